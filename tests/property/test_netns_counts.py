"""Namespaces come, count and go in any order: what they counted is theirs, and never lost."""

from __future__ import annotations

import struct
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from tcpstuck_bpf import wire
from tcpstuck_bpf.kernel.netns_counts import CountsTable
from tcpstuck_bpf.model import NetnsCount
from tests.fake_maps import FakeMap

PLACES = 3
FIRST = 0xF0000000
SENT = NetnsCount.COOKIES_SENT
ONLY = struct.pack("=I", 0)


def packed(number: int) -> bytes:
    return wire.COUNTS.pack(*(number if which is SENT else 0 for which in NetnsCount))


class Host:
    """Programs that count, on a machine whose namespaces get the lowest number that is free."""

    def __init__(self, *, cookies: bool) -> None:
        self.counts, self.crowded_out = FakeMap(PLACES), FakeMap(1)
        self.crowded_out.update(ONLY, packed(0))
        self.table = CountsTable(self.counts, self.crowded_out)
        self.cookies = cookies
        self.next_cookie = 70
        self.there: dict[int, int] = {}
        """The cookies of those that are there, by number."""
        self.total = 0
        self.counted: Counter[int] = Counter()
        """Expected counts by the namespace's cookie."""
        self.crowded: set[int] = set()

    def begin(self) -> None:
        number = next(n for n in range(FIRST, FIRST + 99) if n not in self.there)
        self.next_cookie += 1
        self.there[number] = self.next_cookie

    def end(self, which: int) -> None:
        if self.there:
            del self.there[sorted(self.there)[which % len(self.there)]]

    def count(self, which: int) -> None:
        if not self.there:
            return
        number = sorted(self.there)[which % len(self.there)]
        cookie = self.there[number]
        self.total += 1
        self.counted[cookie] += 1
        table, key = self.counts, wire.NETNS_KEY.pack(cookie if self.cookies else 0, number)
        if key not in table.held and len(table.held) == PLACES:
            table, key = self.crowded_out, ONLY
            self.crowded.add(cookie)
        before = 0
        for one in table.held.get(key, []):
            before += wire.decode_counts(one)[SENT]
        table.held[key] = [packed(before + 1)]

    def look(self) -> None:
        gone = self.table.crowd() - self.there.keys()
        self.table.free(gone, self.living())

    def living(self) -> dict[int, int]:
        return dict(self.there) if self.cookies else {}


Step = tuple[str, int]
STEPS = st.lists(
    st.tuples(st.sampled_from(("begin", "end", "count", "count", "look")), st.integers(0, 9)),
    max_size=60,
)


def play(host: Host, steps: list[Step]) -> None:
    for what, which in steps:
        if what in ("begin", "look"):
            getattr(host, what)()
        else:
            getattr(host, what)(which)


@given(STEPS, st.booleans())
def test_all_that_was_counted_is_somewhere(steps: list[Step], cookies: bool) -> None:
    host = Host(cookies=cookies)
    play(host, steps)
    for living in ({}, host.living()):
        assert sum(counts[SENT] for counts in host.table.read(living).values()) == host.total


@given(STEPS)
def test_who_is_there_has_what_was_counted_in_it_and_nothing_else(steps: list[Step]) -> None:
    host = Host(cookies=True)
    play(host, steps)
    found = host.table.read(host.living())
    for number, cookie in host.there.items():
        mine = found[number][SENT] if number in found else 0
        assert mine == host.counted[cookie] or (
            cookie in host.crowded and mine < host.counted[cookie]
        )


@given(STEPS)
def test_while_few_are_there_at_a_time_all_find_a_place(steps: list[Step]) -> None:
    host = Host(cookies=True)
    for step in steps:
        if step[0] == "begin" and len(host.there) == PLACES - 1:
            continue
        play(host, [step, ("look", 0)])
    assert not host.crowded
