"""A listener is the socket that really listens, beside `ss`.

Several sockets may share a port (SO_REUSEPORT), and what a proxy's socket gets may be for another
port than its own (TPROXY, REDIRECT).
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import pytest

from lab.processes.servers import Greeter
from lab.scenarios.catalogue import connect_in_one_batch
from lab.scenarios.scene import PORT, Scene, Settings
from lab.scenarios.tracer import Tracer
from tests.kernel.conftest import tracing

pytestmark = pytest.mark.kernel

CLIENTS = 120
SHORT, LONG = 16, 500
"""Backlogs."""


class Listening(NamedTuple):
    """A listening socket as `ss` shows it."""

    inode: int
    pid: int
    limit: int
    accept_queue: int


def shown(scene: Scene) -> dict[int, Listening]:
    """The listening sockets of the port by their limit."""
    words = ("ss", "-tlnpeH", "sport", "=", f":{PORT}")
    found = {}
    for line in scene.topology.server.command(*words).splitlines():
        queue, limit = (int(word) for word in line.split()[1:3])
        inode, pid = (re.findall(rf"\b{what}(\d+)", line)[0] for what in ("ino:", "pid="))
        found[limit] = Listening(int(inode), int(pid), limit, queue)
    return found


def told_of(tracer: Tracer, scene: Scene, kind: str) -> list[dict[str, Any]]:
    """Lines of one type about the scene's server."""
    netns = scene.topology.server.inode
    lines = (dict(line) for line in tracer.lines if line["type"] == kind)
    return [line for line in lines if line["netns"] == netns]


def is_of(told: Mapping[str, Any], socket: Listening) -> bool:
    """Whether a listener's line is that socket's."""
    (owner,) = told["owners"]
    return (told["socket"], told["limit"]) == (
        socket.inode,
        socket.limit,
    ) and owner.endswith(f"(pid {socket.pid})")


@contextlib.contextmanager
def sharing(scene: Scene) -> Iterator[Greeter]:
    """Two servers share the port: one that accepts nobody, and the healthy one that is yielded."""
    server = scene.topology.server
    with (
        Greeter(server, scene.listen_ip, PORT, backlog=SHORT, shares_port=True),
        Greeter(server, scene.listen_ip, PORT, backlog=LONG, shares_port=True) as healthy,
    ):
        healthy.resume()
        yield healthy


@pytest.mark.parametrize(("mode", "syncookies"), [("fentry", 1), ("kprobe", 2)])
def test_of_two_sockets_that_share_a_port_the_paused_one_is_named(
    mode: str, syncookies: int
) -> None:
    with (
        tracing(["-p", str(PORT), "--probe-mode", mode]) as (tracer,),
        Scene("overflow", Settings(CLIENTS), syncookies=syncookies) as scene,
        sharing(scene) as healthy,
    ):
        scene.ready()
        connect_in_one_batch(scene)
        healthy.await_accepted(len(scene.known_to_server()) - (SHORT + 1))
        sockets = shown(scene)
        accepted = len(healthy.accepted())
        assert tracer.await_lines(1), "nobody was told as stuck"
        tracer.stop()
    assert 0 < accepted < CLIENTS - SHORT - 1
    by_limit = {told["limit"]: told for told in told_of(tracer, scene, "listener")}
    assert len(told_of(tracer, scene, "listener")) == len(by_limit) == len(sockets) == 2
    assert all(is_of(by_limit[limit], sockets[limit]) for limit in (SHORT, LONG))
    paused, other = by_limit[SHORT], by_limit[LONG]
    assert paused["sockets"] == other["sockets"] == 2
    assert paused["peak_accept_queue"] == sockets[SHORT].accept_queue == SHORT + 1
    assert paused["accept_queue_needed"] == CLIENTS - accepted
    assert paused["advised_backlog"] >= CLIENTS - accepted - 1
    assert other["advised_backlog"] is None
    assert other["acks_refused"] == other["syns_refused"] == 0
    stuck = [told for told in told_of(tracer, scene, "verdict") if told["stuck"]]
    assert stuck
    assert {told["listener_socket"] for told in stuck} == {sockets[SHORT].inode}


MEANT_PORT = 8080
"""What the clients connect to."""
PREROUTING = (
    "add table ip proxy; add chain ip proxy before {{ type {} hook prerouting priority {}; }}; "
)
TPROXY = (
    PREROUTING.format("filter", "mangle")
    + f"add rule ip proxy before tcp dport {MEANT_PORT} tproxy to :{PORT} meta mark set 1 accept"
)
LOCAL_BY_MARK = ("rule add fwmark 1 lookup 100", "route add local 0.0.0.0/0 dev lo table 100")
REDIRECT = (
    PREROUTING.format("nat", "dstnat")
    + f"add rule ip proxy before tcp dport {MEANT_PORT} redirect to :{PORT}"
)


class ProxyScene(Scene):
    """Clients connect to a port that nobody listens at; their packets come to another's socket."""

    def syns_answered(self) -> int:
        """As known at either port: which of the two, the way of the packets says."""
        return super().syns_answered() + self.topology.server.count_known(PORT)


@pytest.mark.parametrize(
    ("mode", "way", "traced_port"),
    [
        ("fentry", TPROXY, MEANT_PORT),
        ("kprobe", TPROXY, MEANT_PORT),
        ("fentry", REDIRECT, PORT),
    ],
    ids=["fentry-tproxy", "kprobe-tproxy", "fentry-redirect"],
)
def test_what_is_for_another_port_is_the_listeners_that_has_it(
    mode: str, way: str, traced_port: int
) -> None:
    with (
        tracing(["-p", str(traced_port), "--probe-mode", mode]) as (tracer,),
        ProxyScene("overflow", Settings(CLIENTS, port=MEANT_PORT), syncookies=1) as scene,
        Greeter(scene.topology.server, scene.listen_ip, PORT, backlog=SHORT, transparent=True),
    ):
        server = scene.topology.server
        server.command("nft", way)
        for words in LOCAL_BY_MARK:
            server.command("ip", *words.split())
        scene.ready()
        connect_in_one_batch(scene)
        (socket,) = shown(scene).values()
        assert tracer.await_lines(1), "nobody was told as stuck"
        tracer.stop()
    (told,) = told_of(tracer, scene, "listener")
    assert is_of(told, socket)
    assert (told["addresses"], told["port"]) == (["10.9.0.1"], PORT)
    assert told["peak_accept_queue"] == socket.accept_queue == SHORT + 1
    assert told["accept_queue_needed"] == CLIENTS
    assert told["advised_backlog"] >= CLIENTS - 1
    stuck = [one for one in told_of(tracer, scene, "verdict") if one["stuck"]]
    assert stuck
    assert {one["server_port"] for one in stuck} == {traced_port}
    assert {one["listener_socket"] for one in stuck} == {socket.inode}
