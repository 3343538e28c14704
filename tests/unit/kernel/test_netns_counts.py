"""What the programs count of each network namespace, and how those that are gone make room."""

from __future__ import annotations

import struct

import pytest

from tcpstuck_bpf import wire
from tcpstuck_bpf.kernel.netns_counts import KEPT_APART, CountsTable
from tcpstuck_bpf.model import CROWDED_NETNS, GONE_NETNS, NetnsCount
from tests.fake_maps import FakeMap

ENTRIES = 8
SENT = NetnsCount.COOKIES_SENT
FIRST = 0xF0000000


def packed(number: int) -> bytes:
    return wire.COUNTS.pack(*(number if which is SENT else 0 for which in NetnsCount))


class Host:
    """A machine whose programs count cookies."""

    def __init__(self) -> None:
        self.counts, self.crowded_out = FakeMap(ENTRIES), FakeMap(1)
        self.crowded_out.update(struct.pack("=I", 0), packed(0))
        self.table = CountsTable(self.counts, self.crowded_out)

    def count(self, netns: int, *of_each_cpu: int, cookie: int = 0) -> None:
        key = wire.NETNS_KEY.pack(cookie, netns)
        self.counts.held[key] = [packed(number) for number in of_each_cpu]

    def sent(self, living: dict[int, int] | None = None) -> dict[int, int]:
        return {netns: counts[SENT] for netns, counts in self.table.read(living or {}).items()}


def test_each_cpus_count_is_part_of_it() -> None:
    host = Host()
    host.count(FIRST, 3, 4)
    host.count(FIRST + 1, 0, 1)
    assert host.sent() == {FIRST: 7, FIRST + 1: 1}


def test_what_there_was_no_place_for_is_a_figure_of_its_own() -> None:
    host = Host()
    host.count(FIRST, 3)
    host.crowded_out.held[struct.pack("=I", 0)] = [packed(2), packed(5)]
    assert host.sent() == {FIRST: 3, CROWDED_NETNS: 7}


def test_room_is_wanted_once_more_than_half_is_taken() -> None:
    host = Host()
    for number in range(ENTRIES // 2):
        host.count(FIRST + number, 1)
    assert host.table.crowd() == frozenset()
    host.count(FIRST + 99, 1)
    assert host.table.crowd() == {*range(FIRST, FIRST + ENTRIES // 2), FIRST + 99}


def test_who_is_gone_makes_room_and_what_it_counted_stays() -> None:
    host = Host()
    for number in range(ENTRIES):
        host.count(FIRST + number, 1 << number)
    host.table.free({FIRST, FIRST + 2, 4711})
    assert len(host.counts.held) == ENTRIES - 2
    assert host.sent()[GONE_NETNS] == 0b101
    assert sum(host.sent().values()) == 0b11111111
    host.table.free({FIRST + 1})
    assert host.sent()[GONE_NETNS] == 0b111


def test_a_number_that_is_used_again_begins_anew() -> None:
    host = Host()
    host.count(FIRST, 5)
    host.table.free({FIRST})
    host.count(FIRST, 2)
    assert host.sent() == {GONE_NETNS: 5, FIRST: 2}


def test_two_namespaces_of_one_number_are_told_apart_by_the_cookie_of_the_one_that_is_there() -> (
    None
):
    host = Host()
    host.count(FIRST, 5, cookie=71)
    host.count(FIRST, 2, cookie=72)
    assert host.sent({FIRST: 72}) == {GONE_NETNS: 5, FIRST: 2}
    assert host.sent({FIRST: 73}) == {GONE_NETNS: 7}
    # Which one is there is not known: together they are at least all that was counted.
    assert host.sent({FIRST: 0}) == host.sent({}) == {FIRST: 7}


def test_where_the_programs_have_no_cookies_those_of_others_say_nothing() -> None:
    host = Host()
    host.count(FIRST, 5)
    assert host.sent({FIRST: 72}) == {FIRST: 5}


def test_one_that_was_only_thought_gone_gets_its_figures_back() -> None:
    """A socket alone may have held it, until a process enters it again."""
    host = Host()
    host.count(FIRST, 5, cookie=71)
    host.table.free({FIRST})
    host.count(FIRST, 2, cookie=71)
    assert host.sent({}) == {GONE_NETNS: 5, FIRST: 2}
    assert host.sent({FIRST: 71}) == {FIRST: 7}
    host.table.free({FIRST})
    assert host.sent({FIRST: 71}) == {FIRST: 7}
    assert host.sent({FIRST: 72}) == {GONE_NETNS: 7}


def test_those_whose_number_is_another_ones_by_now_make_room_too() -> None:
    """On a host of containers the lowest number is taken again and again."""
    host = Host()
    for one in range(ENTRIES):
        host.count(FIRST, 1 << one, cookie=71 + one)
    host.table.free((), {FIRST: 71 + ENTRIES - 1})
    assert len(host.counts.held) == 1
    assert host.sent() == {GONE_NETNS: 0b01111111, FIRST: 0b10000000}


@pytest.mark.parametrize("cookies", [True, False])
def test_what_is_kept_of_those_that_are_gone_is_bounded(cookies: bool) -> None:
    host = Host()
    number = KEPT_APART + 50
    for one in range(number):
        host.count(FIRST, 1, cookie=cookies and 100 + one)
        host.table.free({FIRST})
    assert host.sent() == {GONE_NETNS: number}
    assert len(host.table._apart) == (KEPT_APART if cookies else 0)


def test_what_is_taken_begins_anew_from_nothing() -> None:
    host = Host()
    host.count(FIRST, 5)
    host.crowded_out.held[struct.pack("=I", 0)] = [packed(2), packed(5)]
    taken = host.table.take_all()
    assert (taken[FIRST][SENT], taken[CROWDED_NETNS][SENT]) == (5, 7)
    assert host.sent() == {}
