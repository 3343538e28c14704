"""One table of the programs, read and changed by bpf(2).

Keys and values are packed bytes; `wire` decodes them. Every method raises RefusedError where the
kernel refuses, except for a missing entry.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tcpstuck_bpf.host.bpf_syscall import RefusedError, bpf, bpf_answering
from tcpstuck_bpf.kernel.artifact import MapShape

_LOOKUP, _UPDATE, _DELETE, _NEXT_KEY, _LOOKUP_AND_DELETE, _LOOKUP_BATCH = 1, 2, 3, 4, 21, 24
"""enum bpf_cmd."""
_ELEMENT = struct.Struct("=I4xQQQ")
_BATCH = struct.Struct("=QQQQIIQQ")
_BATCH_COUNT_AT = 32
_PER_CPU_KINDS = frozenset({5, 6, 10})
"""BPF_MAP_TYPE_PERCPU_HASH, PERCPU_ARRAY and LRU_PERCPU_HASH. A lookup returns all CPUs' values."""
ANY, NOEXIST = 0, 1
"""Flags of `update`."""

if TYPE_CHECKING:
    _Buffer = ctypes.Array[ctypes.c_char]


def possible_cpus() -> int:
    """Number of CPUs in a per-CPU value: the kernel's possible CPUs, not the online ones."""
    # The text is `0-7`, or `0` for one CPU. It has no gaps (kernel/cpu.c, cpu_possible_mask).
    text = Path("/sys/devices/system/cpu/possible").read_text("ascii")
    return int(text.strip().split("-")[-1]) + 1


class BpfMap:
    """A table in the kernel. This object owns the table's file descriptor."""

    def __init__(self, file: int, shape: MapShape) -> None:
        self.file = file
        self.shape = shape
        self._copies = possible_cpus() if shape.kind in _PER_CPU_KINDS else 1
        each = shape.value_bytes if self._copies == 1 else -(-shape.value_bytes // 8) * 8
        self._value_bytes = self._copies * each

    def close(self) -> None:
        """Close the descriptor. The kernel frees the table once no program uses it any more."""
        os.close(self.file)

    def _element(
        self, command: int, key: bytes | None, value: _Buffer | None = None, flags: int = 0
    ) -> None:
        packed = None if key is None else ctypes.create_string_buffer(key, self.shape.key_bytes)
        addresses = (0 if one is None else ctypes.addressof(one) for one in (packed, value))
        bpf(command, _ELEMENT.pack(self.file, *addresses, flags))

    def lookup(self, key: bytes) -> bytes | None:
        """The value of a key; None if there is none. A per-CPU value is all CPUs' in a row."""
        return self._found(_LOOKUP, key)

    def take(self, key: bytes) -> bytes | None:
        """Remove an entry and return its value in one step; None if there is none.

        Hash tables support this from 5.14 on (commit 3e87f192b405).
        """
        return self._found(_LOOKUP_AND_DELETE, key)

    def _found(self, command: int, key: bytes) -> bytes | None:
        value = ctypes.create_string_buffer(self._value_bytes)
        try:
            self._element(command, key, value)
        except RefusedError as error:
            if error.number == errno.ENOENT:
                return None
            raise
        return value.raw

    def per_cpu(self, key: bytes) -> list[bytes]:
        """Each CPU's value of a key; empty if the key is missing."""
        values = self.lookup(key) or b""
        each = self._value_bytes // self._copies
        return [values[at : at + self.shape.value_bytes] for at in range(0, len(values), each)]

    def update(self, key: bytes, value: bytes, flags: int = ANY) -> bool:
        """Set the value of a key; False if flags is NOEXIST and the key exists."""
        packed = ctypes.create_string_buffer(value, self._value_bytes)
        try:
            self._element(_UPDATE, key, packed, flags)
        except RefusedError as error:
            if error.number == errno.EEXIST and flags == NOEXIST:
                return False
            raise
        return True

    def delete(self, key: bytes) -> bool:
        """Remove an entry; False if there is none."""
        try:
            self._element(_DELETE, key)
        except RefusedError as error:
            if error.number == errno.ENOENT:
                return False
            raise
        return True

    def keys(self, most: int) -> Iterator[bytes]:
        """The table's keys, at most `most`, found one after the other.

        If the last key was deleted meanwhile, the kernel starts over. A key may then come twice,
        and without `most` the walk might never end.
        """
        found = ctypes.create_string_buffer(self.shape.key_bytes)
        key: bytes | None = None
        for _ in range(most):
            try:
                self._element(_NEXT_KEY, key, found)
            except RefusedError as error:
                if error.number == errno.ENOENT:
                    return
                raise
            key = found.raw
            yield key

    def batches(self, most: int) -> Iterator[tuple[bytes, bytes]]:
        """The whole table: packed keys and packed values of up to `most` entries at a time.

        `most` must be at least the size of the fullest bucket.
        """
        keys = ctypes.create_string_buffer(most * self.shape.key_bytes)
        values = ctypes.create_string_buffer(most * self.shape.value_bytes)
        cursors = [ctypes.create_string_buffer(max(4, self.shape.key_bytes)) for _ in range(2)]
        begun = False
        while True:
            before, after = (ctypes.addressof(cursor) for cursor in cursors)
            packed = _BATCH.pack(
                before if begun else 0,
                after,
                ctypes.addressof(keys),
                ctypes.addressof(values),
                most,
                self.file,
                *(0, 0),  # flags
            )
            count, ended = self._batch(packed)
            # Most sweeps find a few entries, so only the used part of a buffer is copied.
            yield (
                ctypes.string_at(keys, count * self.shape.key_bytes),
                ctypes.string_at(values, count * self.shape.value_bytes),
            )
            if ended:
                return
            begun = True
            cursors.reverse()

    @staticmethod
    def _batch(packed: bytes) -> tuple[int, bool]:
        """Number of entries that one call returned, and whether they are the last."""
        answer, refused = bpf_answering(_LOOKUP_BATCH, packed)
        if refused is not None and refused.number != errno.ENOENT:
            raise refused
        return struct.unpack_from("=I", answer, _BATCH_COUNT_AT)[0], refused is not None
