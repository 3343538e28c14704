"""The kernel side at its limits: big tables, full ones, a full ring buffer, 4-tuples used again.

The programs run inside the test, so that each of the source's answers can be held against what
was sent, what passed on the wire, and the kernel's own counters.
"""

from __future__ import annotations

import itertools
import os
import resource
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType

import pytest

from lab.patience import COMMAND_S, patient
from lab.records import FourTuple
from lab.scene import PORT
from lab.syns import BURST, Syn, make_syn, make_syns, send_in_bursts
from lab.topology import LOCAL_SOURCES, SERVER_ADDRESS, SILENT_SOURCES, Topology, source_addresses
from lab.watch import Watch
from tcpstuck_bpf import model, tables, wire
from tcpstuck_bpf.model import Ending, Event, EventKind, NetnsCount, Row
from tcpstuck_bpf.probes import PROBES
from tcpstuck_bpf.source import EVENT_PAGES, BccSource, open_source
from tcpstuck_bpf.tables import READ_AT_ONCE
from tests.kernel.conftest import be_greeted, listening

pytestmark = pytest.mark.kernel

SERVER_IP = SERVER_ADDRESS[4]
ISN = 0xFFFF_FF00
"""Near its end, so that arithmetic on sequence numbers wraps."""
ANOTHER_ISN = 0x0BAD_CAFE
REPEATING_CLIENTS = 8


@pytest.fixture(scope="module")
def source() -> Iterator[BccSource]:
    wanted = model.TraceFilter(ports=(PORT,))
    opened = open_source(model.TraceSettings(trace_filter=wanted))
    yield opened
    opened.close()


def identity(row: Row) -> model.HandshakeId:
    return model.HandshakeId(row.four_tuple, row.handshake.first_syn_ns)


def lab_name(four_tuple: model.FourTuple) -> FourTuple:
    return FourTuple(
        four_tuple.client_ip, four_tuple.client_port, four_tuple.server_ip, four_tuple.server_port
    )


class Beside:
    """A listener that answers every SYN by a cookie, and the source beside it.

    A namespace may get the inode number of one that is gone, so the source is emptied first and
    its counts are those since then.
    """

    topology: Topology
    watch: Watch

    def __init__(self, source: BccSource) -> None:
        self.source = source
        self._cleanup = ExitStack()

    def __enter__(self) -> Beside:
        with ExitStack() as building:
            self.topology = building.enter_context(Topology())
            self.netns = self.topology.server.inode
            self.cookies_for_all()
            building.enter_context(listening(self.topology.server))
            self.watch = building.enter_context(Watch(self.topology.client, PORT))
            self._cleanup = building.pop_all()
        self.source.poll(0)
        self.source.forget(map(identity, self.all_rows()))
        self._before = self._counts()
        self._kernel_before = self.topology.server.counters()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._cleanup.close()

    def cookies_for_all(self) -> None:
        self.topology.server.pin({"net/ipv4/tcp_syncookies": "2"})

    def cookies_when_full(self) -> None:
        """The SYN queue is empty: from now on a SYN gets an ordinary handshake."""
        self.topology.server.pin({"net/ipv4/tcp_syncookies": "1"})

    def send(self, *syns: Syn) -> None:
        send_in_bursts(self.topology.client, self.watch, syns)

    def all_rows(self) -> list[Row]:
        return [row for batch in self.source.sweep() for row in batch.rows]

    def rows(self) -> list[Row]:
        return [row for row in self.all_rows() if row.four_tuple.netns == self.netns]

    def row(self, four_tuple: FourTuple) -> model.Handshake:
        (found,) = (row for row in self.rows() if lab_name(row.four_tuple) == four_tuple)
        return found.handshake

    def events(self) -> list[Event]:
        return [event for event in self.source.poll(0) if event.four_tuple.netns == self.netns]

    def counted(self, which: NetnsCount) -> int:
        return self._counts().get(which, 0) - self._before.get(which, 0)

    def moved(self, counter: str) -> int:
        return self.topology.server.counters()[counter] - self._kernel_before[counter]

    def _counts(self) -> dict[NetnsCount, int]:
        return dict(self.source.counts().get(self.netns, {}))


@pytest.fixture
def beside(source: BccSource) -> Iterator[Beside]:
    with Beside(source) as made:
        yield made


def silent_client(number: int) -> FourTuple:
    """A 4-tuple whose client's address nobody owns."""
    sources = source_addresses(SILENT_SOURCES[4], number + 1)
    return FourTuple(sources[number], 2000 + number, SERVER_IP, PORT)


def test_the_programs_load_without_kernel_headers(source: BccSource) -> None:
    headers = Path("/lib/modules", os.uname().release, "build")
    if headers.exists():
        pytest.skip(f"{headers} exists: this machine cannot show that it is not needed")
    assert {probe.function for probe in PROBES if probe.required} <= source.coverage.probes


def test_a_sweep_of_several_batches_is_exactly_what_was_sent(
    beside: Beside, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = READ_AT_ONCE * 5 // 4
    syns = list(make_syns(SILENT_SOURCES[4], SERVER_IP, PORT, number))
    beside.send(*syns)
    wire_records = beside.watch.records
    expected = {s.four_tuple: (s.isn, wire_records[s.four_tuple].cookie_isn, 1) for s in syns}
    assert len(expected) == number == beside.moved("SyncookiesSent")
    for batch in (READ_AT_ONCE, READ_AT_ONCE // 8):
        monkeypatch.setattr(tables, "READ_AT_ONCE", batch)
        rows = beside.rows()
        assert len(rows) == number
        found = {
            lab_name(name): (entry.client_isn, entry.cookie_isn, entry.syn_count)
            for name, entry in rows
        }
        assert found == expected
    assert beside.counted(NetnsCount.COOKIES_SENT) == number
    assert beside.counted(NetnsCount.TABLE_FULL) == 0

    gone = set(map(identity, rows[::3]))
    former = [name._replace(first_syn_ns=name.first_syn_ns - 1) for name in map(identity, rows)]
    for _ in range(2):
        beside.source.forget([*gone, *former])
    staying = beside.rows()
    assert len(staying) == number - len(gone)
    assert set(map(identity, staying)) == set(map(identity, rows)) - gone


@pytest.mark.parametrize("mode", ["fentry", "kprobe"])
def test_reading_the_table_hides_no_packets(mode: str) -> None:
    """All on one CPU, where a reader is interrupted by what it must not miss.

    By kprobe a single entry's lookup, too, hides what interrupts it, for some hundred instructions.
    Where that is the timer, and a burst waits for this CPU's softirq, it hides much of the burst:
    rarely, so that it is the best burst that tells.
    """
    bursts = 5
    may_miss = {"fentry": 0, "kprobe": BURST // 50}[mode]
    wanted = model.TraceFilter(ports=(PORT,))
    opened = open_source(model.TraceSettings(trace_filter=wanted, probe_mode=mode))
    allowed = os.sched_getaffinity(0)
    done = threading.Event()

    def read_all_the_time() -> None:
        while not done.is_set():
            list(opened.sweep())

    try:
        with Beside(opened) as beside, ThreadPoolExecutor(1) as threads:
            os.sched_setaffinity(0, {min(allowed)})
            syns = list(make_syns(SILENT_SOURCES[4], SERVER_IP, PORT, bursts * BURST))
            counted = [0]
            reading = threads.submit(read_all_the_time)
            try:
                for first in range(0, len(syns), BURST):
                    beside.send(*syns[first : first + BURST])
                    counted.append(beside.counted(NetnsCount.COOKIES_SENT))
            finally:
                done.set()
            reading.result(timeout=patient(COMMAND_S))
            assert beside.moved("SyncookiesSent") == len(syns)
            unseen = [BURST - (after - before) for before, after in zip(counted, counted[1:])]
            assert min(unseen) >= 0
            assert (max if mode == "fentry" else min)(unseen) <= may_miss, unseen
            assert len(beside.rows()) == counted[-1]
    finally:
        os.sched_setaffinity(0, allowed)
        opened.close()


@pytest.mark.parametrize("mode", ["fentry", "kprobe"])
def test_who_connects_while_the_programs_are_attached_is_not_accused(mode: str) -> None:
    """An entry must not be made before all that ends it is seen."""
    wanted = model.TraceFilter(ports=(PORT,))
    done = threading.Event()
    with Topology() as topology, listening(topology.server) as (listener,):
        topology.server.pin({"net/ipv4/tcp_syncookies": "2"})

        def connect_all_the_time() -> int:
            for number in itertools.count(1):
                be_greeted(topology, listener, SERVER_IP)
                if done.is_set():
                    return number
            raise AssertionError

        with ThreadPoolExecutor(1) as threads:
            connecting = threads.submit(connect_all_the_time)
            try:
                opened = open_source(model.TraceSettings(trace_filter=wanted, probe_mode=mode))
            finally:
                done.set()
            connected = connecting.result(timeout=patient(COMMAND_S))
        rows = [row for batch in opened.sweep() for row in batch.rows]
        opened.close()
    assert connected > 1
    assert not [row for row in rows if row.four_tuple.netns == topology.server.inode]


def test_what_the_ring_buffer_has_no_room_for_is_counted(beside: Beside) -> None:
    ring_bytes = EVENT_PAGES * resource.getpagesize()
    more_than_fit = ring_bytes // wire.EVENT.size + 1
    repeats = more_than_fit // REPEATING_CLIENTS + 1
    clients = [silent_client(number) for number in range(REPEATING_CLIENTS)]
    syns = [make_syn(client, ISN) for client in clients]
    beside.send(*syns, *syns * repeats)
    sent = repeats * len(syns)
    assert beside.moved("SyncookiesSent") == sent + len(syns)
    assert beside.counted(NetnsCount.SYNS_REPEATED) == sent

    lost = beside.counted(NetnsCount.EVENTS_LOST)
    events = beside.events()
    assert 0 < lost < sent
    assert len(events) + lost == sent
    assert {event.kind for event in events} == {EventKind.SYN_REPEATED}
    assert beside.source.losses()["undecodable_events"] == 0
    for client in clients:
        told = [e.handshake.syn_count for e in events if lab_name(e.four_tuple) == client]
        assert told == list(range(2, len(told) + 2))
        assert beside.row(client).syn_count == 1 + repeats

    beside.send(syns[0])
    (event,) = beside.events()
    assert event.handshake.syn_count == 2 + repeats
    assert event.handshake == beside.row(clients[0])
    assert beside.counted(NetnsCount.EVENTS_LOST) == lost


def test_a_repeated_syn_is_counted_in_its_entry(beside: Beside) -> None:
    client = silent_client(0)
    beside.send(make_syn(client, ISN))
    first = beside.row(client)
    assert (first.syn_count, first.client_isn) == (1, ISN)
    assert first.first_syn_ns == first.last_syn_ns
    between_ns = time.monotonic_ns()
    beside.send(make_syn(client, ISN))
    second = beside.row(client)
    assert (second.syn_count, second.client_isn) == (2, ISN)
    assert second.first_syn_ns == first.first_syn_ns < between_ns < second.last_syn_ns
    assert second.cookie_isn == beside.watch.records[client].cookie_isn
    (event,) = beside.events()
    assert (event.kind, event.handshake) == (EventKind.SYN_REPEATED, second)
    assert beside.counted(NetnsCount.REPLACED) == 0


def test_another_isn_under_cookies_is_a_new_handshake(beside: Beside) -> None:
    client = silent_client(1)
    beside.send(make_syn(client, ISN), make_syn(client, ISN))
    between_ns = time.monotonic_ns()
    beside.send(make_syn(client, ANOTHER_ISN))
    entry = beside.row(client)
    assert (entry.syn_count, entry.client_isn, entry.ending) == (1, ANOTHER_ISN, Ending.NONE)
    assert entry.first_syn_ns == entry.last_syn_ns > between_ns
    assert entry.cookie_isn == beside.watch.records[client].cookie_isn
    assert beside.counted(NetnsCount.REPLACED) == 1
    assert beside.counted(NetnsCount.SYNS_REPEATED) == 1
    assert beside.counted(NetnsCount.COOKIES_SENT) == beside.moved("SyncookiesSent") == 3


@pytest.mark.parametrize(
    ("isn", "kind", "ending", "count"),
    [
        (ANOTHER_ISN, EventKind.REPLACED, Ending.REPLACED, NetnsCount.REPLACED),
        (ISN, EventKind.TAKEN_OVER, Ending.TAKEN_OVER, NetnsCount.TAKEN_OVER),
    ],
)
def test_an_ordinary_handshake_ends_the_entry(
    beside: Beside, isn: int, kind: EventKind, ending: Ending, count: NetnsCount
) -> None:
    client = silent_client(2)
    beside.send(make_syn(client, ISN))
    owed = beside.row(client)
    beside.cookies_when_full()
    between_ns = time.monotonic_ns()
    beside.send(make_syn(client, isn))
    assert beside.moved("SyncookiesSent") == 1
    assert len(beside.topology.server.sockets("syn-recv", f"sport = :{PORT}")) == 1
    entry = beside.row(client)
    assert entry == owed._replace(ending=ending, ended_ns=entry.ended_ns)
    assert between_ns < entry.ended_ns < time.monotonic_ns()
    (event,) = beside.events()
    assert (event.kind, event.handshake, event.sequence) == (kind, entry, isn)
    ends = (NetnsCount.REPLACED, NetnsCount.TAKEN_OVER)
    assert {which: beside.counted(which) for which in ends} == {
        which: int(which == count) for which in ends
    }


def test_an_ended_entry_makes_room_for_the_next_handshake(beside: Beside) -> None:
    client = FourTuple(source_addresses(LOCAL_SOURCES[4], 1)[0], 2000, SERVER_IP, PORT)

    def has_reset(times: int) -> bool:
        return beside.watch.records[client].client_resets == times

    for number, isn in enumerate((ISN, ISN, ANOTHER_ISN), 1):
        between_ns = time.monotonic_ns()
        beside.send(make_syn(client, isn))
        beside.watch.until(partial(has_reset, number), "an RST for the SYN-ACK")
        entry = beside.row(client)
        assert (entry.ending, entry.syn_count, entry.client_isn) == (Ending.RESET, 1, isn)
        assert between_ns < entry.first_syn_ns < entry.ended_ns < time.monotonic_ns()
        (event,) = beside.events()
        assert (event.kind, event.handshake) == (EventKind.RESET, entry)
    assert beside.counted(NetnsCount.RESETS) == 3
    assert beside.counted(NetnsCount.REPLACED) == beside.counted(NetnsCount.SYNS_REPEATED) == 0
