"""The running kernel as a source of observations, once the programs are attached."""

from __future__ import annotations

import resource
import struct
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping

from tcpstuck_bpf import wire
from tcpstuck_bpf.ending import close_all
from tcpstuck_bpf.host.grace_period import await_grace_period
from tcpstuck_bpf.kernel.loader import LoadedPrograms
from tcpstuck_bpf.kernel.ring_buffer import RingBuffer
from tcpstuck_bpf.kernel.tables import Tables
from tcpstuck_bpf.model import (
    NOT_KNOWN,
    Coverage,
    Event,
    EventKind,
    HandshakeId,
    ListenerFacts,
    NetnsCounts,
    Sweep,
)

EVENT_PAGES = 256
EVENTS_AT_ONCE = 512
"""Largest number of events per poll, so that a flood of events does not block everything else."""
_RECORD_BYTES = wire.EVENT.size + 8
"""An event in the ring buffer, with its header (BPF_RINGBUF_HDR_SZ)."""
MOST_REPEATS_UNREAD = EVENT_PAGES * 4096 // 2 // _RECORD_BYTES
"""Largest number of unread events for repeated SYNs: half of what the smallest ring buffer holds.
The other half is for events that say more than the table."""
LOSSES = (
    "namespaces_uncounted",
    "cookies_unmatched",
    "listeners_unknown",
    "stacks_unknown",
    "tasks_unknown",
)


class KernelSource:
    """Our programs in the running kernel; `app.interfaces.Source` describes each method.

    `open_source.open_source` attaches them.
    """

    def __init__(
        self,
        programs: LoadedPrograms,
        ring: RingBuffer,
        tables: Tables,
        coverage: Coverage,
        *,
        table_capacity: int,
        drop_reasons: Mapping[int, str],
        timings: dict[str, float],
        notes: list[str],
    ) -> None:
        self.tables = tables
        self.coverage = coverage
        self.table_capacity = table_capacity
        self.drop_reasons = drop_reasons
        self.timings = timings
        self.notes = notes
        self._programs: LoadedPrograms | None = programs
        self._ring = ring
        self._undecodable = 0
        self._repeats_read = 0

    @property
    def most_waiting(self) -> int:
        """Number of events that the ring buffer has room for."""
        return EVENT_PAGES * resource.getpagesize() // wire.EVENT.size

    def poll(self, timeout_ns: int) -> list[Event]:
        """Up to EVENTS_AT_ONCE events, waiting at most `timeout_ns` for the first.

        Those for repeated SYNs are counted for the programs, which send only so many in advance.
        """
        events = []
        for record in self._ring.poll(max(0, timeout_ns) // 1_000_000, EVENTS_AT_ONCE):
            try:
                events.append(wire.decode_event(record))
            except struct.error:
                self._undecodable += 1
        repeats = sum(event.kind == EventKind.SYN_REPEATED for event in events)
        if repeats:
            self._note_read(repeats)
        return events

    def _note_read(self, repeats: int) -> None:
        assert self._programs is not None
        self._repeats_read = (self._repeats_read + repeats) & 0xFFFF_FFFF
        index = struct.pack("=I", wire.REPEATS_READ)
        self._programs.maps["repeats"].update(index, struct.pack("=I", self._repeats_read))

    def sweep(self) -> Iterator[Sweep]:
        """The whole awaiting-ACK table in batches; all have the time at which the sweep began."""
        return self.tables.sweep()

    def chosen(self) -> Sweep:
        """The handshakes that a rescue may be for; see `Tables.chosen`."""
        return self.tables.chosen()

    def forget(self, handshakes: Iterable[HandshakeId]) -> None:
        """Remove the entries of these handshakes; a missing entry is no error."""
        self.tables.forget(handshakes)

    def stack(self, number: int) -> tuple[int, ...]:
        """Addresses of an entry's `filter_stack`, the innermost first; empty if unknown."""
        return self.tables.stack(number)

    def settle(self) -> None:
        """Wait until each packet that is being processed now is in the programs' counts.

        The kernel counts a packet before a program that runs at the function's return. If the
        kernel refuses the wait, our counts may lack one packet per CPU.
        """
        await_grace_period()

    def counts(self, living: Mapping[int, int] = NOT_KNOWN) -> NetnsCounts:
        """The programs' counts since they were attached; see `app.interfaces.Source`."""
        return self.tables.counts(living)

    def netns_in_full_tables(self) -> frozenset[int]:
        """Network namespaces with entries in tables that are more than half full."""
        return self.tables.netns_in_full_tables()

    def free(self, gone: Collection[int], living: Mapping[int, int]) -> None:
        """Free the entries of removed network namespaces; see `app.interfaces.Source`."""
        self.tables.free(gone, living)

    def listeners(self) -> tuple[ListenerFacts, ...]:
        """Queue figures of each listener since the programs were attached."""
        return self.tables.listeners()

    def losses(self) -> Mapping[str, int]:
        """Losses that belong to no namespace, by name."""
        assert self._programs is not None
        table = self._programs.maps["losses"]
        named = {
            name: sum(
                int.from_bytes(one, sys.byteorder)
                for one in table.per_cpu(struct.pack("=I", index))
            )
            for index, name in enumerate(LOSSES)
        }
        return {
            **named,
            "listeners_let_go": self.tables.listeners_let_go,
            "undecodable_events": self._undecodable,
            "programs_not_run": self._programs.missed_runs(),
        }

    def loaded_programs(self) -> frozenset[str]:
        """Names of the loaded programs; an fentry or fexit program has its function's name."""
        return frozenset() if self._programs is None else self._programs.names

    def close(self) -> None:
        """Detach and unload. The kernel does the same when the process dies.

        Every step is tried; then the first error is raised.
        """
        ring = self.__dict__.pop("_ring", None)
        programs, self._programs = self._programs, None
        close_all(one.close for one in (ring, programs) if one is not None)
