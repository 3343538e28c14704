"""Room in the programs' table of listeners: who gives its place up, and who keeps it."""

from __future__ import annotations

from tcpstuck_bpf import wire
from tcpstuck_bpf.kernel.listener_table import ListenerTable
from tcpstuck_bpf.model import ListenerFacts
from tests.fake_maps import FakeMap

ENTRIES = 16
FIGURES = len(ListenerFacts._fields) - 4
"""All but the namespace, the address, the port and the socket."""
FIRST = 0xF0000000


class Host:
    """A machine with listeners that SYNs come for."""

    def __init__(self) -> None:
        self.map = FakeMap(ENTRIES)
        self.table = ListenerTable(self.map)

    def syns(self, netns: int, number: int, cookies: int = 0) -> None:
        address, port = bytes(16), (3311).to_bytes(2, "big")
        figures = (number, cookies, *[0] * (FIGURES - 2))
        key = wire.LISTENER_KEY.pack(address, netns, port, 0)
        self.map.held[key] = [wire.LISTENER_FACTS.pack(*figures, address, port)]

    def left(self) -> set[int]:
        return {one.netns - FIRST for one in self.table.read()}


def test_room_is_wanted_once_more_than_half_is_taken() -> None:
    host = Host()
    for number in range(ENTRIES // 2):
        host.syns(FIRST + number, 1)
    host.table.read()
    assert host.table.crowd() == frozenset()
    host.syns(FIRST + 99, 1)
    host.table.read()
    assert host.table.crowd() == {*range(FIRST, FIRST + ENTRIES // 2), FIRST + 99}


def test_those_of_namespaces_that_are_gone_make_room() -> None:
    host = Host()
    for number in range(ENTRIES):
        host.syns(FIRST + number, 1, cookies=1)
    host.table.read()
    host.table.free(range(FIRST, FIRST + 6))
    assert host.left() == set(range(6, ENTRIES))
    assert host.table.let_go == 0


def test_where_none_is_gone_those_make_room_that_have_nothing_to_tell_and_are_idle() -> None:
    host = Host()
    for number in range(ENTRIES):
        host.syns(FIRST + number, 1, cookies=number % 4 == 1)
    host.table.read()
    for number in (0, 2):
        host.syns(FIRST + number, 2)
    host.table.read()
    host.table.free(())
    assert host.left() == {0, 2, 1, 5, 9, 13, 14, 15}
    assert host.table.let_go == 8


def test_few_enough_stay_where_they_are() -> None:
    host = Host()
    for number in range(3 * ENTRIES // 4):
        host.syns(FIRST + number, 1)
    host.table.read()
    host.table.free(())
    assert len(host.left()) == 3 * ENTRIES // 4


def test_who_has_something_to_tell_stays_however_full_it_is() -> None:
    host = Host()
    for number in range(ENTRIES):
        host.syns(FIRST + number, 1, cookies=1)
    host.table.read()
    host.table.free(())
    assert len(host.left()) == ENTRIES
    assert host.table.let_go == 0
