"""What the programs keep in the kernel, read from user space: the tables, not the events.

Given BCC's object and not importing bcc. Each reading is of a table that the programs go on
changing: an entry that is gone meanwhile is no error.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import struct
import time
from collections.abc import Iterable, Iterator
from typing import Any

from tcpstuck_bpf import wire
from tcpstuck_bpf.errors import CannotTraceError
from tcpstuck_bpf.model import (
    Ending,
    FourTuple,
    Handshake,
    HandshakeId,
    ListenerFacts,
    NetnsCount,
    NetnsCounts,
    Row,
    Sweep,
    SweepPart,
)
from tcpstuck_bpf.synack import is_synack_of

READ_AT_ONCE = 4096
"""Entries per bpf_map_lookup_batch; it needs room for the fullest bucket of the table."""
JUDGED_AT_ONCE = 512
"""Rows of one batch of a sweep: what comes between two batches waits for that long."""
CHOSEN_FOR_NS = 180_000_000_000
"""How long after its last SYN a handshake stays chosen; its cookie lives for 120 s at the most."""

_BPF_NOEXIST = 1
"""Flag of bpf_map_update_elem, include/uapi/linux/bpf.h."""


class Tables:
    """The maps of one run, by their names in bpf/tcpstuck.bpf.c.

    `library` is libbcc as ctypes has it; `in_batches` whether its bpf_lookup_batch may be used,
    where it is there; `capacity` the entries of the awaiting-ACK table; `rescue` whether the
    rescue's maps are there.
    """

    def __init__(
        self, bpf: Any, library: Any, capacity: int, *, in_batches: bool, rescue: bool
    ) -> None:
        self._bpf = bpf
        self._library = library
        self._lookup_batch = getattr(library, "bpf_lookup_batch", None) if in_batches else None
        self._capacity = capacity
        self._rescue = rescue

    def sweep(self) -> Iterator[Sweep]:
        """The whole awaiting-ACK table in batches, the last of which says so.

        The time of all of them is from before the first entry was read. Raises CannotTraceError
        where the kernel does not let it be read.
        """
        begun = time.monotonic_ns()
        batch: list[Row] = []
        for row in self._rows():
            if len(batch) == JUDGED_AT_ONCE:
                yield Sweep(begun, tuple(batch), SweepPart.MORE)
                batch = []
            batch.append(row)
        yield Sweep(begun, tuple(batch), SweepPart.LAST)

    def _rows(self) -> Iterator[Row]:
        table = self._bpf[b"awaiting_ack"]
        if self._lookup_batch is None:
            for packed in _keys(table, self._capacity):
                yield from self._row(packed)
            return
        keys = ctypes.create_string_buffer(READ_AT_ONCE * wire.KEY.size)
        values = ctypes.create_string_buffer(READ_AT_ONCE * wire.HANDSHAKE.size)
        # The cursors are separate objects, and the count is set anew for each call: BCC's own
        # wrapper shares them, which cuts reads of more than one batch short (bcc issue 5273).
        last = None
        cursor = ctypes.c_uint32()
        while True:
            count = ctypes.c_uint32(READ_AT_ONCE)
            failed = self._lookup_batch(
                table.map_fd,
                ctypes.byref(last) if last is not None else None,
                ctypes.byref(cursor),
                keys,
                values,
                ctypes.byref(count),
            )
            error = ctypes.get_errno() if failed else 0
            if error not in (0, errno.ENOENT):
                raise CannotTraceError(
                    "the table of handshakes cannot be read",
                    f"bpf_map_lookup_batch: {os.strerror(error)}",
                    "report it, with the kernel's version",
                )
            yield from wire.decode_rows(
                keys.raw[: count.value * wire.KEY.size],
                values.raw[: count.value * wire.HANDSHAKE.size],
            )
            if error == errno.ENOENT:
                return
            last = ctypes.c_uint32(cursor.value)

    def _row(self, packed_key: bytes) -> Iterator[Row]:
        """The row of a packed key, where there still is one."""
        table = self._bpf[b"awaiting_ack"]
        with contextlib.suppress(KeyError):
            entry = table[table.Key.from_buffer_copy(packed_key)]
            yield from wire.decode_rows(packed_key, bytes(entry))

    def chosen(self) -> Sweep:
        """The handshakes of clients that may be written to: few, however many SYNs are spoofed.

        The programs choose them (`choose` in the BPF text); here those are let go whose handshake
        has ended, or is so old that its cookie has.
        """
        begun = time.monotonic_ns()
        choice = self._bpf[b"chosen"]
        rows = []
        for packed in _keys(choice, self._capacity):
            found = list(self._row(packed))
            ended = all(
                row.handshake.ending != Ending.NONE
                or begun - row.handshake.last_syn_ns > CHOSEN_FOR_NS
                for row in found
            )
            if ended:
                with contextlib.suppress(KeyError):
                    del choice[choice.Key.from_buffer_copy(packed)]
            rows += found
        return Sweep(begun, tuple(rows), SweepPart.CHOSEN)

    def forget(self, handshakes: Iterable[HandshakeId]) -> None:
        """Remove entries, where they are still of that handshake; one that is gone is no error.

        The client may begin anew between the look at an entry and its removal: what was removed is
        looked at again, and put back where it is of the newer handshake. Where the kernel cannot
        remove and return in one step, an entry made in those microseconds is lost.
        """
        table = self._bpf[b"awaiting_ack"]
        for four_tuple, first_syn_ns in handshakes:
            key = table.Key.from_buffer_copy(wire.encode_key(four_tuple))
            with contextlib.suppress(KeyError):
                if table[key].first_syn_ns != first_syn_ns:
                    continue
                taken = self._take(table, key)
                if taken is not None and taken.first_syn_ns != first_syn_ns:
                    self._put_back(table, key, taken)
                elif self._rescue:
                    self._forget_synack(key, taken)

    def _forget_synack(self, key: Any, entry: Any) -> None:
        """Remove the SYN-ACK of a removed entry (None: not known), not that of a newer one."""
        table = self._bpf[b"synacks"]
        synack = self._take(table, key)
        if entry is None or synack is None:
            return
        (row,) = wire.decode_rows(bytes(key), bytes(entry))
        if not is_synack_of(bytes(synack), row.handshake, row.four_tuple):
            self._put_back(table, key, synack)

    def _take(self, table: Any, key: Any) -> Any:
        """Remove an entry and return it. Raises KeyError where there is none.

        None where the kernel cannot do both in one step: for a hash it can from 5.14 on
        (bpf_map_lookup_and_delete_elem; commit 3e87f192b405).
        """
        value = table.Leaf()
        arguments = (table.map_fd, ctypes.byref(key), ctypes.byref(value))
        if self._library.bpf_lookup_and_delete(*arguments) == 0:
            return value
        if ctypes.get_errno() == errno.ENOENT:
            raise KeyError
        del table[key]
        return None

    def _put_back(self, table: Any, key: Any, value: Any) -> None:
        """Insert an entry, unless a program has made one meanwhile."""
        arguments = (table.map_fd, ctypes.byref(key), ctypes.byref(value), _BPF_NOEXIST)
        self._library.bpf_update_elem(*arguments)

    def handshake(self, four_tuple: FourTuple) -> Handshake | None:
        """The entry of one 4-tuple in the awaiting-ACK table, as it is now."""
        return next((row.handshake for row in self._row(wire.encode_key(four_tuple))), None)

    def synack(self, four_tuple: FourTuple) -> bytes | None:
        """The TCP segment of the last SYN-ACK with a cookie; see struct synack of the header."""
        table = self._bpf[b"synacks"]
        try:
            return bytes(table[table.Key.from_buffer_copy(wire.encode_key(four_tuple))])
        except KeyError:
            return None

    def last_completion_ns(self, four_tuple: FourTuple) -> int | None:
        """When a client of that address last completed a handshake with that listener, if ever."""
        table = self._bpf[b"known_clients"]
        try:
            return int(
                table[table.Key.from_buffer_copy(wire.encode_known_client(four_tuple))].value
            )
        except KeyError:
            return None

    def stack(self, number: int) -> tuple[int, ...]:
        """The addresses of an entry's `filter_stack`, the innermost first; empty if unknown."""
        table = self._bpf[b"stacks"]
        try:
            data = bytes(table[table.Key(number - 1)])
        except KeyError:
            return ()
        return tuple(address for (address,) in struct.iter_unpack("=Q", data) if address)

    def counts(self) -> NetnsCounts:
        """What the programs counted since they were attached, all CPUs together."""
        totals: dict[int, dict[NetnsCount, int]] = {}
        for netns, per_cpu in self._bpf[b"counts"].items():
            total = dict.fromkeys(NetnsCount, 0)
            for one in per_cpu:
                for which, value in wire.decode_counts(bytes(one)).items():
                    total[which] += value
            totals[netns.value] = total
        return totals

    def listeners(self) -> tuple[ListenerFacts, ...]:
        """What is known of the queues of each address and port that SYNs came for, in order."""
        facts = (
            wire.decode_listener(bytes(key), bytes(value))
            for key, value in self._bpf[b"listeners"].items()
        )
        return tuple(sorted(facts))


def _keys(table: Any, capacity: int) -> list[bytes]:
    """The packed keys of a table, each once, found one after the other."""
    keys: dict[bytes, None] = {}
    key = None
    # Behind a key that has gone the kernel begins anew; the limit ends what could go on so.
    for _ in range(2 * capacity):
        try:
            key = table.next(key)
        except StopIteration:
            break
        keys[bytes(key)] = None
    return list(keys)
