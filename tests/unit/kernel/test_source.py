"""The source tells the programs how many events for repeated SYNs it has read."""

from __future__ import annotations

import struct
from typing import Any, cast

import pytest

from tcpstuck_bpf import wire
from tcpstuck_bpf.kernel import source
from tcpstuck_bpf.kernel.source import KernelSource
from tcpstuck_bpf.model import EventKind
from tests.builders import at, event, handshake


class Programs:
    """Only the table `repeats`: what was written to it, in order."""

    def __init__(self) -> None:
        self.maps = {"repeats": self}
        self.written: list[tuple[int, int]] = []

    def update(self, key: bytes, value: bytes) -> None:
        (index,), (number,) = struct.unpack("=I", key), struct.unpack("=I", value)
        self.written.append((index, number))


class Ring:
    """Holds kinds of events instead of records."""

    def __init__(self) -> None:
        self.waiting: list[EventKind] = []

    def poll(self, _timeout_ms: int, most: int) -> list[Any]:
        read, self.waiting = self.waiting[:most], self.waiting[most:]
        return read


@pytest.fixture
def ring() -> Ring:
    return Ring()


@pytest.fixture
def programs() -> Programs:
    return Programs()


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch, ring: Ring, programs: Programs) -> KernelSource:
    monkeypatch.setattr(source.wire, "decode_event", lambda kind: event(kind, handshake(), at(0)))
    nothing = cast(Any, None)
    return KernelSource(
        cast(Any, programs),
        cast(Any, ring),
        nothing,
        nothing,
        table_capacity=1,
        drop_reasons={},
        timings={},
        notes=[],
    )


def test_only_repeated_syns_are_counted_as_read(
    opened: KernelSource, ring: Ring, programs: Programs
) -> None:
    ring.waiting = [EventKind.ACK_DROPPED]
    opened.poll(0)
    assert programs.written == []
    ring.waiting = [EventKind.SYN_REPEATED, EventKind.RESET, EventKind.SYN_REPEATED]
    opened.poll(0)
    ring.waiting = [EventKind.SYN_REPEATED]
    opened.poll(0)
    assert programs.written == [(wire.REPEATS_READ, 2), (wire.REPEATS_READ, 3)]


def test_the_count_wraps_as_the_programs_count_does(
    opened: KernelSource, ring: Ring, programs: Programs
) -> None:
    opened._repeats_read = 0xFFFF_FFFF
    ring.waiting = [EventKind.SYN_REPEATED, EventKind.SYN_REPEATED]
    opened.poll(0)
    assert programs.written == [(wire.REPEATS_READ, 1)]


def test_repeated_syns_take_at_most_half_of_the_smallest_ring_buffer() -> None:
    header = 8
    record = (wire.EVENT.size + header + 7) & ~7
    assert 2 * source.MOST_REPEATS_UNREAD * record <= source.EVENT_PAGES * 4096
