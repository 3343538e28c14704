"""What is asked for is told, and nothing else; what the filters leave out is still counted.

Two topologies with equal addresses, and in both the same 4-tuples: only the namespace tells them
apart. Several runs of the tool, each with its filters, see the same traffic.
"""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import NamedTuple

import pytest

from lab.network.syns import make_syns, send_in_bursts
from lab.network.topology import INTERFACE, SERVER_ADDRESS, SILENT_SOURCES, Topology
from lab.network.watch import Watch
from lab.records import FourTuple
from lab.scenarios.scene import PORT
from lab.scenarios.tracer import Tracer
from tests.kernel.conftest import be_greeted, listening, summary_of, told_by, tracing

pytestmark = pytest.mark.kernel

PORTS = (PORT, PORT + 1, PORT + 2)
SECOND_ADDRESS = "10.9.0.77"
SPOOFED = 3
FIRST_CLIENT_PORT = 30_000
VERDICTS = ("ack-missing", "completed")


class Target(NamedTuple):
    """Where clients connect to."""

    side: int
    """0 or 1: which of the two topologies."""
    server_ip: str
    port: int

    @property
    def family(self) -> int:
        return 6 if ":" in self.server_ip else 4


TARGETS = [
    Target(side, server_ip, port)
    for side in (0, 1)
    for server_ip in (SERVER_ADDRESS[4], SECOND_ADDRESS, SERVER_ADDRESS[6])
    for port in PORTS
]

# {first} and {second} stand for the names of the two servers' namespaces.
FILTERS: Mapping[str, Callable[[Target], bool]] = {
    "": lambda _: True,
    "-4": lambda target: target.family == 4,
    "-6": lambda target: target.family == 6,
    f"-p {PORTS[0]},{PORTS[2]}": lambda target: target.port != PORTS[1],
    f"--listener {SECOND_ADDRESS}": lambda target: target.server_ip == SECOND_ADDRESS,
    "--netns {first}": lambda target: target.side == 0,
    f"-6 -p {PORTS[1]} --listener {SERVER_ADDRESS[6]} --netns {{second}}": (
        lambda target: target == Target(1, SERVER_ADDRESS[6], PORTS[1])
    ),
}


@dataclass(frozen=True)
class Side:
    """One topology with its listeners, each for every address."""

    topology: Topology
    listeners: Mapping[int, socket.socket]
    watches: Mapping[int, Watch]

    @property
    def netns(self) -> int:
        return self.topology.server.inode


@dataclass
class Played:
    """What was sent, and what each run of the tool said of it."""

    netns: tuple[int, int]
    tracers: Mapping[str, Tracer]
    silent: dict[Target, set[FourTuple]] = field(default_factory=dict)
    greeted: dict[Target, FourTuple] = field(default_factory=dict)
    moved: dict[int, dict[str, int]] = field(default_factory=dict)
    """Increase of the kernel's counters by namespace, as the lab read them."""

    def reported(self, target: Target) -> dict[FourTuple, str]:
        """What is true of the clients of one target."""
        silent, completed = VERDICTS
        return {**dict.fromkeys(self.silent[target], silent), self.greeted[target]: completed}


def open_side(opened: ExitStack) -> Side:
    topology = opened.enter_context(Topology())
    topology.server.pin({"net/ipv4/tcp_syncookies": "2"})
    topology.server.command("ip", "address", "add", f"{SECOND_ADDRESS}/32", "dev", "lo")
    gateway = ("via", SERVER_ADDRESS[4], "dev", INTERFACE)
    topology.client.command("ip", "route", "add", f"{SECOND_ADDRESS}/32", *gateway)
    listeners = opened.enter_context(listening(topology.server, *PORTS))
    watches = {port: opened.enter_context(Watch(topology.client, port)) for port in PORTS}
    return Side(topology, dict(zip(PORTS, listeners)), watches)


def play(sides: tuple[Side, Side], tracers: Mapping[str, Tracer]) -> Played:
    played = Played((sides[0].netns, sides[1].netns), tracers)
    before = [side.topology.server.counters() for side in sides]
    for number, target in enumerate(TARGETS):
        side = sides[target.side]
        prefix = SILENT_SOURCES[target.family]
        syns = list(make_syns(prefix, target.server_ip, target.port, SPOOFED))
        send_in_bursts(side.topology.client, side.watches[target.port], syns)
        played.silent[target] = {syn.four_tuple for syn in syns}
        played.greeted[target] = be_greeted(
            side.topology,
            side.listeners[target.port],
            target.server_ip,
            FIRST_CLIENT_PORT + number % (len(TARGETS) // 2),
        )
    for side, counters in zip(sides, before):
        after = side.topology.server.counters()
        played.moved[side.netns] = {name: after[name] - counters[name] for name in after}
    return played


@pytest.fixture(scope="module")
def played() -> Iterator[Played]:
    with ExitStack() as opened:
        sides = (open_side(opened), open_side(opened))
        names = {
            "first": sides[0].topology.server.name,
            "second": sides[1].topology.server.name,
        }
        runs = [("-t", "1", "--all", *text.format(**names).split()) for text in FILTERS]
        tracers = dict(zip(FILTERS, opened.enter_context(tracing(*runs))))
        # A handshake that takes this machine longer than -t is not to be told as stuck first.
        for tracer in tracers.values():
            tracer.pause()
        result = play(sides, tracers)
        for tracer in tracers.values():
            tracer.resume()
        for wanted, tracer in tracers.items():
            for target in filter(FILTERS[wanted], TARGETS):
                tracer.await_reported(result.reported(target), result.netns[target.side])
        for tracer in tracers.values():
            tracer.stop()
        yield result


def test_both_topologies_had_the_same_clients(played: Played) -> None:
    for target in TARGETS:
        other = target._replace(side=1 - target.side)
        assert played.reported(target) == played.reported(other)
    assert played.netns[0] != played.netns[1]
    for moved in played.moved.values():
        assert moved["SyncookiesSent"] == (SPOOFED + 1) * len(TARGETS) // 2
        assert moved["SyncookiesRecv"] == len(TARGETS) // 2


@pytest.mark.parametrize("wanted", FILTERS)
def test_only_what_was_asked_for_is_told(played: Played, wanted: str) -> None:
    inside = [target for target in TARGETS if FILTERS[wanted](target)]
    assert inside
    expected = Counter(
        (played.netns[target.side], name, verdict)
        for target in inside
        for name, verdict in played.reported(target).items()
    )
    assert Counter(told_by(played.tracers[wanted])) == expected
    summary = summary_of(played.tracers[wanted])
    verdicts = Counter(verdict for _, _, verdict in expected)
    assert summary["verdicts"] == dict(verdicts)
    assert summary["cookies_sent"] == len(expected)
    assert summary["untracked"] == summary["lost_events"] == summary["unseen_syn"] == 0


@pytest.mark.parametrize("wanted", FILTERS)
def test_the_kernels_counters_are_inside_and_outside_together(played: Played, wanted: str) -> None:
    inside = Counter(played.netns[target.side] for target in TARGETS if FILTERS[wanted](target))
    each = {"SyncookiesSent": SPOOFED + 1, "SyncookiesRecv": 1}
    expected = {
        (netns, counter): (
            inside[netns] * per_target,
            played.moved[netns][counter] - inside[netns] * per_target,
            played.moved[netns][counter],
            True,
        )
        for netns in played.netns
        for counter, per_target in each.items()
    }
    found = {
        (row["netns"], row["counter"]): (
            row["traced"],
            row["outside_filter"],
            row["kernel"],
            row["agrees"],
        )
        for row in summary_of(played.tracers[wanted])["reconciliation"]
        if row["netns"] in played.netns
    }
    assert found == expected
