"""What is said of a listener's queues, beside `ss` and the kernel's counters; its advice is tried.

The clients come in one batch to a server that accepts nobody, so that the queues keep what `ss`
then shows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest

from lab.network.readings import SocketRow
from lab.processes.servers import MariaDb
from lab.scenarios.catalogue import SMALL_BACKLOG, connect_in_one_batch
from lab.scenarios.scene import PORT, Scene, Settings
from tests.kernel.conftest import tracing

pytestmark = pytest.mark.kernel

MODES = pytest.mark.parametrize("mode", ["fentry", "kprobe"])
CLIENTS = 120


class Played(NamedTuple):
    """What the tool said of the listener, and what `ss` and the kernel's counters did."""

    reported: dict[str, Any]
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


def play(mode: str, *backlogs: int, server: Server = paused_greeter) -> list[Played]:
    """One server for each backlog, all beside one run of the tool."""
    with (
        contextlib.ExitStack() as opened,
        tracing(["-p", str(PORT), "--probe-mode", mode]) as (tracer,),
    ):
        scenes = []
        for backlog in backlogs:
            scene = opened.enter_context(Scene("overflow", Settings(CLIENTS), syncookies=1))
            opened.enter_context(server(scene, backlog))
            scene.ready()
            connect_in_one_batch(scene)
            scenes.append(scene)
        shown = [
            row
            for scene in scenes
            for row in scene.topology.server.sockets("listening", f"sport = :{PORT}")
        ]
        before = [scene.moved("ListenOverflows") for scene in scenes]
        tracer.stop()
        overflows = zip(before, [scene.moved("ListenOverflows") for scene in scenes])
        cookies = [scene.moved("SyncookiesSent") for scene in scenes]
        places = [scene.topology.server.inode for scene in scenes]
    listeners = [dict(line) for line in tracer.lines if line["type"] == "listener"]
    told = {line["netns"]: line for line in listeners}
    assert len(told) == len(listeners)
    return list(map(Played, (told[netns] for netns in places), shown, cookies, overflows))


@MODES
def test_the_advised_backlog_is_enough_and_half_of_it_is_not(mode: str) -> None:
    (short,) = play(mode, SMALL_BACKLOG)
    assert short.cookies
    assert short.reported["peak_accept_queue"] == short.shown.receive_queue
    assert short.reported["limit"] == short.shown.send_queue == SMALL_BACKLOG
    assert short.reported["cookies_sent"] == short.cookies
    low, high = short.overflows
    assert low <= short.reported["acks_refused"] + short.reported["syns_refused"] <= high
    assert short.reported["accept_queue_needed"] == CLIENTS
    # One whose ACK came before the last SYN needed its place no more.
    assert SMALL_BACKLOG + 1 < short.reported["syn_queue_needed"] <= CLIENTS
    advised = short.reported["advised_backlog"]
    enough, half = play(mode, advised, advised // 2)
    assert enough.cookies == enough.reported["cookies_sent"] == 0
    assert enough.overflows == (0, 0)
    assert enough.reported["peak_accept_queue"] == enough.shown.receive_queue == CLIENTS
    assert enough.reported["limit"] == advised
    assert enough.reported["advised_backlog"] is None
    assert half.cookies == half.reported["cookies_sent"] > 0
    assert half.reported["advised_backlog"] > half.reported["limit"]


@pytest.mark.slow
def test_mariadb_with_the_back_log_that_it_is_advised_to_have() -> None:
    (short,) = play("fentry", SMALL_BACKLOG, server=paused_mariadb)
    (owner,) = short.reported["owners"]
    assert owner.startswith("mariadbd (pid ")
    assert "back_log" in short.reported["advice"][0]
    (enough,) = play("fentry", short.reported["advised_backlog"], server=paused_mariadb)
    assert enough.cookies == enough.reported["cookies_sent"] == 0
