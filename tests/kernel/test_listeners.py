"""What is said of a listener's queues, beside `ss` and the kernel's counters; its advice is tried.

The clients come in one batch to a server that accepts nobody, so that the queues keep what `ss`
then shows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest

from lab.readings import SocketRow
from lab.scenarios import SMALL_BACKLOG, connect_in_one_batch
from lab.scene import PORT, Scene, Settings
from lab.servers import MariaDb
from tests.kernel.conftest import tracing

pytestmark = pytest.mark.kernel

MODES = pytest.mark.parametrize("mode", ["fentry", "kprobe"])
CLIENTS = 120


class Played(NamedTuple):
    """What the tool said of the listener, and what `ss` and the kernel's counters did."""

    told: dict[str, Any]
    shown: SocketRow
    cookies: int
    overflows: tuple[int, int]
    """Right before the tool ended and right after: SYN-ACKs go on being repeated."""


@contextlib.contextmanager
def paused_mariadb(scene: Scene, backlog: int) -> Iterator[None]:
    with MariaDb(scene.topology.server, scene.listen_ip, PORT, backlog=backlog) as server:
        server.pause()
        yield


@contextlib.contextmanager
def paused_greeter(scene: Scene, backlog: int) -> Iterator[None]:
    scene.greeter(backlog)
    yield


Server = Callable[[Scene, int], contextlib.AbstractContextManager[None]]


def play(mode: str, backlog: int, server: Server = paused_greeter) -> Played:
    with (
        tracing(["-p", str(PORT), "--probe-mode", mode]) as (tracer,),
        Scene("overflow", Settings(CLIENTS), syncookies=1) as scene,
        server(scene, backlog),
    ):
        scene.ready()
        connect_in_one_batch(scene)
        (shown,) = scene.topology.server.sockets("listening", f"sport = :{PORT}")
        before = scene.moved("ListenOverflows")
        tracer.stop()
        overflows = (before, scene.moved("ListenOverflows"))
        cookies = scene.moved("SyncookiesSent")
        netns = scene.topology.server.inode
    (told,) = (
        dict(line) for line in tracer.lines if line["type"] == "listener" and line["netns"] == netns
    )
    return Played(told, shown, cookies, overflows)


@MODES
def test_the_advised_backlog_is_enough_and_half_of_it_is_not(mode: str) -> None:
    short = play(mode, SMALL_BACKLOG)
    assert short.cookies
    assert short.told["peak_accept_queue"] == short.shown.receive_queue
    assert short.told["limit"] == short.shown.send_queue == SMALL_BACKLOG
    assert short.told["cookies_sent"] == short.cookies
    low, high = short.overflows
    assert low <= short.told["acks_refused"] + short.told["syns_refused"] <= high
    assert short.told["accept_queue_needed"] == CLIENTS
    # One whose ACK came before the last SYN needed its place no more.
    assert SMALL_BACKLOG + 1 < short.told["syn_queue_needed"] <= CLIENTS
    advised = short.told["advised_backlog"]
    enough = play(mode, advised)
    assert enough.cookies == enough.told["cookies_sent"] == 0
    assert enough.overflows == (0, 0)
    assert enough.told["peak_accept_queue"] == enough.shown.receive_queue == CLIENTS
    assert enough.told["limit"] == advised
    assert enough.told["advised_backlog"] is None
    half = play(mode, advised // 2)
    assert half.cookies == half.told["cookies_sent"] > 0
    assert half.told["advised_backlog"] > half.told["limit"]


@pytest.mark.slow
def test_mariadb_with_the_back_log_that_it_is_advised_to_have() -> None:
    short = play("fentry", SMALL_BACKLOG, paused_mariadb)
    (owner,) = short.told["owners"]
    assert owner.startswith("mariadbd (pid ")
    assert "back_log" in short.told["advice"][0]
    enough = play("fentry", short.told["advised_backlog"], paused_mariadb)
    assert enough.cookies == enough.told["cookies_sent"] == 0
