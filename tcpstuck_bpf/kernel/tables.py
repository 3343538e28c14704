"""Reads the programs' tables (not their events) from user space.

The programs change the tables during every read, so a missing entry is no error.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Collection, Iterable, Iterator, Mapping

from tcpstuck_bpf import wire
from tcpstuck_bpf.errors import CannotTraceError
from tcpstuck_bpf.host.bpf_syscall import RefusedError
from tcpstuck_bpf.kernel.listener_table import ListenerTable
from tcpstuck_bpf.kernel.maps import NOEXIST, BpfMap
from tcpstuck_bpf.kernel.netns_counts import CountsTable
from tcpstuck_bpf.model import (
    Ending,
    FourTuple,
    Handshake,
    HandshakeId,
    ListenerFacts,
    NetnsCounts,
    Row,
    Sweep,
    SweepPart,
)
from tcpstuck_bpf.synack import is_synack_of

READ_AT_ONCE = 1024
"""Entries per bpf_map_lookup_batch; at least the size of the fullest bucket.

Four times as many would cost 1 MiB more, which the C library keeps.
"""
JUDGED_AT_ONCE = 512
"""Rows of one batch of a sweep. Everything else waits until a batch is judged."""
CHOSEN_FOR_NS = 180_000_000_000
"""Time after its last SYN that a handshake stays chosen; a cookie lives at most 120 s."""


class Tables:
    """The maps of one run, by their names in bpf/tcpstuck.bpf.c.

    `in_batches` says whether the awaiting-ACK table may be read in batches, `capacity` is its
    number of entries, and `rescue` says whether the maps of --rescue exist.
    """

    def __init__(
        self, maps: Mapping[str, BpfMap], capacity: int, *, in_batches: bool, rescue: bool
    ) -> None:
        self._maps = maps
        self._handshakes = maps["awaiting_ack"]
        self._counts = CountsTable(maps["counts"], maps["crowded_out"])
        self._listeners = ListenerTable(maps["listeners"])
        self._in_batches = in_batches
        self._capacity = capacity
        self._rescue = rescue

    def sweep(self) -> Iterator[Sweep]:
        """The whole awaiting-ACK table in batches; the last one is marked.

        All batches have the time before the first entry was read. Raises CannotTraceError where
        the kernel refuses the read.
        """
        begun = time.monotonic_ns()
        self._note_room()
        batch: list[Row] = []
        for row in self._rows():
            if len(batch) == JUDGED_AT_ONCE:
                yield Sweep(begun, tuple(batch), SweepPart.MORE)
                batch = []
            batch.append(row)
        yield Sweep(begun, tuple(batch), SweepPart.LAST)

    def _note_room(self) -> None:
        """Clear the programs' table-is-full flags (`is_full` in C), so that they insert again."""
        flags = self._maps["table_is_full"]
        for table in range(flags.shape.entries):
            flags.update(struct.pack("=I", table), struct.pack("=I", 0))

    def _rows(self) -> Iterator[Row]:
        if not self._in_batches:
            for packed in self._keys(self._handshakes):
                yield from self._row(packed)
            return
        try:
            for keys, values in self._handshakes.batches(READ_AT_ONCE):
                yield from wire.decode_rows(keys, values)
        except RefusedError as error:
            raise CannotTraceError(
                "the table of handshakes cannot be read",
                f"bpf_map_lookup_batch: {error}",
                "report it, with the kernel's version",
            ) from error

    def _keys(self, table: BpfMap) -> list[bytes]:
        """Packed keys of a table of handshakes, each once."""
        return list(dict.fromkeys(table.keys(2 * self._capacity)))

    def _row(self, packed_key: bytes) -> Iterator[Row]:
        """The row of a packed key, if the entry still exists."""
        entry = self._handshakes.lookup(packed_key)
        if entry is not None:
            yield from wire.decode_rows(packed_key, entry)

    def chosen(self) -> Sweep:
        """The handshakes that a rescue may be for. They are few, even in a flood of spoofed SYNs.

        The programs choose them (`choose` in the BPF text). This method drops those whose handshake
        has ended or whose cookie has expired.
        """
        begun = time.monotonic_ns()
        choice = self._maps["chosen"]
        rows = []
        for packed in self._keys(choice):
            found = list(self._row(packed))
            ended = all(
                row.handshake.ending != Ending.NONE
                or begun - row.handshake.last_syn_ns > CHOSEN_FOR_NS
                for row in found
            )
            if ended:
                choice.delete(packed)
            rows += found
        return Sweep(begun, tuple(rows), SweepPart.CHOSEN)

    def forget(self, handshakes: Iterable[HandshakeId]) -> None:
        """Remove the entries of these handshakes; a missing entry is no error.

        A client may begin a new handshake between the read of its entry and the removal. So the
        removed value is checked, and put back if it belongs to the newer handshake. If the kernel
        cannot remove and return in one step, an entry made in those microseconds is lost.
        """
        table = self._handshakes
        for four_tuple, first_syn_ns in handshakes:
            key = wire.encode_key(four_tuple)
            entry = table.lookup(key)
            if entry is None or wire.decode_handshake(entry).first_syn_ns != first_syn_ns:
                continue
            gone, taken = _take(table, key)
            if taken is not None and wire.decode_handshake(taken).first_syn_ns != first_syn_ns:
                # NOEXIST keeps an entry that a program has made meanwhile.
                table.update(key, taken, NOEXIST)
            elif gone and self._rescue:
                self._forget_synack(key, taken)
        self._note_room()

    def _forget_synack(self, key: bytes, entry: bytes | None) -> None:
        """Remove the SYN-ACK of a removed entry (None if unknown), but not a newer handshake's."""
        table = self._maps["synacks"]
        _, synack = _take(table, key)
        if entry is None or synack is None:
            return
        (row,) = wire.decode_rows(key, entry)
        if not is_synack_of(synack, row.handshake, row.four_tuple):
            table.update(key, synack, NOEXIST)

    def handshake(self, four_tuple: FourTuple) -> Handshake | None:
        """The current entry of a 4-tuple in the awaiting-ACK table; None if there is none."""
        return next((row.handshake for row in self._row(wire.encode_key(four_tuple))), None)

    def synack(self, four_tuple: FourTuple) -> bytes | None:
        """The TCP segment of the last SYN-ACK with a cookie; see struct synack in tcpstuck.h."""
        return self._maps["synacks"].lookup(wire.encode_key(four_tuple))

    def last_completion_ns(self, four_tuple: FourTuple) -> int | None:
        """Time when the client's address last completed a handshake with the listener, if ever."""
        found = self._maps["known_clients"].lookup(wire.encode_known_client(four_tuple))
        return None if found is None else int(struct.unpack("=Q", found)[0])

    def stack(self, number: int) -> tuple[int, ...]:
        """Addresses of an entry's `filter_stack`, the innermost first; empty if unknown."""
        data = self._maps["stacks"].lookup(struct.pack("=I", number - 1)) or b""
        return tuple(address for (address,) in struct.iter_unpack("=Q", data) if address)

    def counts(self, living: Mapping[int, int]) -> NetnsCounts:
        """Counts since the programs were attached; see `CountsTable.read`."""
        return self._counts.read(living)

    def take_counts(self) -> NetnsCounts:
        """Return all counts and set them to zero."""
        return self._counts.take_all()

    def netns_in_full_tables(self) -> frozenset[int]:
        """Network namespaces with entries in tables that are more than half full."""
        return self._counts.crowd() | self._listeners.crowd()

    def free(self, gone: Collection[int], living: Mapping[int, int]) -> None:
        """Free the entries of removed network namespaces; see `CountsTable`, `ListenerTable`."""
        self._counts.free(gone, living)
        self._listeners.free(gone)
        self._note_room()

    @property
    def listeners_let_go(self) -> int:
        """Number of listeners whose entries were freed for others."""
        return self._listeners.let_go

    def listeners(self) -> tuple[ListenerFacts, ...]:
        """Queue figures of every listener that SYNs came for, in order."""
        return self._listeners.read()


def _take(table: BpfMap, key: bytes) -> tuple[bool, bytes | None]:
    """Remove an entry. Returns whether there was one, and its value.

    The value is None where the kernel cannot remove and return in one step. For a hash it can
    from 5.14 on (bpf_map_lookup_and_delete_elem; commit 3e87f192b405).
    """
    try:
        taken = table.take(key)
    except RefusedError:
        return table.delete(key), None
    return taken is not None, taken
