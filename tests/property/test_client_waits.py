"""The client's side, over any history of connections and any polls of it.

The world below is not the tool's: it knows of each connection what really happened to it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from tcpstuck_bpf.client.waits import ABSENT_POLLS, Change, Waits
from tcpstuck_bpf.model import SECOND_NS
from tests.unit.client.world import client_socket, poll

TIMEOUT_S = 3
NUMBERS = st.integers(1, 6)
EVENTS = st.one_of(
    st.tuples(st.sampled_from(["open", "close", "client", "server"]), NUMBERS),
    st.tuples(st.just("wait"), st.integers(1, 5)),
    st.tuples(st.just("poll"), st.frozensets(NUMBERS, max_size=3)),
)


@dataclass
class Connection:
    """What happened to one connection."""

    opened_s: int
    cookie: int
    sent: int = 0
    received: int = 0
    data_s: int = 0
    open: bool = True
    missed: int = 0


@dataclass
class World:
    """Connections by number, and what the tool said of each."""

    waits: Waits = field(default_factory=lambda: Waits(TIMEOUT_S * SECOND_NS))
    now_s: int = 0
    connections: dict[int, Connection] = field(default_factory=dict)
    every: list[Connection] = field(default_factory=list)
    said: dict[int, list[str]] = field(default_factory=dict)

    def play(self, kind: str, what: int | frozenset[int]) -> list[Change]:
        if isinstance(what, frozenset):
            return self.polled(what)
        if kind == "wait":
            self.now_s += what
            return []
        found = self.connections.get(what)
        if kind == "open" and (found is None or not found.open):
            self.connections[what] = Connection(self.now_s, 1 + len(self.every))
            self.every.append(self.connections[what])
        elif found is not None and found.open:
            if kind == "close":
                found.open = False
            elif kind == "client":
                found.sent += 1
            else:
                found.received += 1
                found.data_s = self.now_s
        return []

    def polled(self, missed: frozenset[int]) -> list[Change]:
        """A poll that fails to see some of the connections."""
        self.now_s += 1
        sockets = []
        for number, one in self.connections.items():
            # The kernel may miss a socket once, while its bucket changes, but not time and again.
            if not one.open or (number in missed and one.missed < ABSENT_POLLS - 1):
                one.missed += 1
                continue
            one.missed = 0
            since = max(one.opened_s, one.data_s)
            sockets.append(
                client_socket(
                    one.cookie,
                    self.now_s - since,
                    data_segs_out=one.sent,
                    bytes_acked=1 + one.sent,
                    bytes_received=one.received,
                )
            )
        wanted = tuple(socket for socket in sockets if self.waits.wants(socket))
        changes = self.waits.take(poll(self.now_s, *wanted, established=len(sockets)))
        for change in changes:
            self.judge(change)
        return changes

    def judge(self, change: Change) -> None:
        one = self.every[change.socket.cookie - 1]
        said = self.said.setdefault(one.cookie, [])
        if change.verdict == "greeting-missing":
            assert one.open
            assert (one.sent, one.received) == (0, 0)
            assert self.now_s - one.opened_s >= TIMEOUT_S
            assert change.waited_ns == (self.now_s - one.opened_s) * SECOND_NS
            assert said == []
        else:
            assert said == ["greeting-missing"]
            assert change.verdict == ("recovered" if one.received else "client-spoke")
            assert one.sent or one.received
        said.append(change.verdict)


@given(st.lists(EVENTS, max_size=60))
def test_only_who_waits_is_told_once_and_all_of_them(
    events: list[tuple[str, int | frozenset[int]]],
) -> None:
    world = World()
    for kind, what in events:
        world.play(kind, what)
    for _ in range(TIMEOUT_S + ABSENT_POLLS):
        world.polled(frozenset())
    waits = world.waits
    waiting = {one.cookie for one in world.every if one.open and not (one.sent or one.received)}
    last = Counter(said[-1] for said in world.said.values())
    assert +waits.verdicts == last
    still = {cookie for cookie, said in world.said.items() if said == ["greeting-missing"]}
    assert waiting <= still
    assert waits.stuck == len(waiting)
    assert waits.closed == len(still - waiting)
    assert waits.young == 0
    assert sum(one.number for _, one in waits.groups(world.now_s)) == waits.stuck
    assert waits.untracked == 0
