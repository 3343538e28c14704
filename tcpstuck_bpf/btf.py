"""Reads BTF, the kernel's description of its own types (Documentation/bpf/btf.rst).

Own code because no maintained pure-Python reader exists; libbpf's needs bindings that BCC's
packages do not ship. Only what `layout` asks for is looked at: member offsets, the parameters of
functions, and enumerators.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

from tcpstuck_bpf.errors import CannotTraceError

RUNNING_KERNEL = "/sys/kernel/btf/vmlinux"

_MAGIC = 0xEB9F
_HEADER = struct.Struct("=HBBIIIII")
_TYPE = struct.Struct("=III")
_TRIPLE = struct.Struct("=III")
_PAIR = struct.Struct("=II")

_KIND_STRUCT = 4
_KIND_UNION = 5
_KIND_ENUM = 6
_KIND_FUNC = 12
_KIND_FUNC_PROTO = 13
_TRANSPARENT_KINDS = frozenset({8, 9, 10, 11, 18})  # typedef, volatile, const, restrict, tag

# Bytes after struct btf_type, (fixed, per member), by kind.
_TAIL = {
    1: (4, 0),
    2: (0, 0),
    3: (12, 0),
    4: (0, 12),
    5: (0, 12),
    6: (0, 8),
    7: (0, 0),
    8: (0, 0),
    9: (0, 0),
    10: (0, 0),
    11: (0, 0),
    12: (0, 0),
    13: (0, 8),
    14: (4, 0),
    15: (0, 12),
    16: (0, 0),
    17: (4, 0),
    18: (0, 0),
    19: (0, 12),
}


class Btf:
    """The types of one kernel.

    Raises CannotTraceError where the bytes are not BTF or hold a kind of type that is not known.
    """

    def __init__(self, data: bytes, source: str) -> None:
        self._data = data
        self._source = source
        if len(data) < _HEADER.size or _HEADER.unpack_from(data)[0] != _MAGIC:
            raise self._unreadable("it does not begin with BTF's magic number in our byte order")
        _, _, _, header_length, type_start, type_length, string_start, _ = _HEADER.unpack_from(data)
        self._strings = header_length + string_start
        self._places = [0]
        self._named: dict[tuple[int, int], int] = {}
        self._enums: list[int] = []
        types = header_length + type_start
        if types + type_length > len(data) or self._strings >= len(data):
            raise self._unreadable("it is shorter than its own header says")
        self._index(types, types + type_length)

    def _unreadable(self, why: str) -> CannotTraceError:
        return CannotTraceError(
            f"cannot read the kernel's type information in {self._source}",
            why,
            "use a kernel built with CONFIG_DEBUG_INFO_BTF=y",
        )

    def _index(self, place: int, end: int) -> None:
        while place < end:
            name, info, _ = _TYPE.unpack_from(self._data, place)
            kind = info >> 24 & 0x1F
            tail = _TAIL.get(kind)
            if tail is None:
                raise self._unreadable(f"type {len(self._places)} is of the unknown kind {kind}")
            if kind in (_KIND_STRUCT, _KIND_FUNC):
                self._named.setdefault((kind, name), len(self._places))
            elif kind == _KIND_ENUM:
                self._enums.append(len(self._places))
            self._places.append(place)
            place += _TYPE.size + tail[0] + tail[1] * (info & 0xFFFF)

    def _string(self, offset: int) -> str:
        start = self._strings + offset
        return self._data[start : self._data.index(b"\0", start)].decode("ascii", "replace")

    def _string_offsets(self, text: str) -> Iterator[int]:
        wanted = b"\0" + text.encode() + b"\0"
        found = self._data.find(wanted, self._strings)
        while found != -1:
            yield found + 1 - self._strings
            found = self._data.find(wanted, found + 1)

    def _type(self, number: int) -> tuple[int, int, int, int]:
        """Kind, member count, size or referred type, place of what follows; qualifiers skipped."""
        while True:
            place = self._places[number]
            _, info, size_or_type = _TYPE.unpack_from(self._data, place)
            kind = info >> 24 & 0x1F
            if kind not in _TRANSPARENT_KINDS:
                return kind, info & 0xFFFF, size_or_type, place
            number = size_or_type

    def _find(self, kind: int, name: str) -> int | None:
        for offset in self._string_offsets(name):
            number = self._named.get((kind, offset))
            if number is not None:
                return number
        return None

    def _member(self, number: int, name: str) -> tuple[int, int] | None:
        """Bit offset and type of a member, looked for in anonymous structs and unions too."""
        kind, count, _, place = self._type(number)
        if kind not in (_KIND_STRUCT, _KIND_UNION):
            return None
        has_bit_fields = _TYPE.unpack_from(self._data, place)[1] >> 31
        for index in range(count):
            at = place + _TYPE.size + index * _TRIPLE.size
            name_offset, member_type, offset = _TRIPLE.unpack_from(self._data, at)
            if has_bit_fields:
                offset &= 0xFFFFFF
            member_name = self._string(name_offset)
            if member_name == name:
                return offset, member_type
            if not member_name:
                inner = self._member(member_type, name)
                if inner is not None:
                    return offset + inner[0], inner[1]
        return None

    def offset(self, struct_name: str, path: str) -> int | None:
        """Byte offset of a member such as `__sk_common.skc_net.net`; None where there is none."""
        number = self._find(_KIND_STRUCT, struct_name)
        bits = 0
        for name in path.split("."):
            found = None if number is None else self._member(number, name)
            if found is None:
                return None
            bits += found[0]
            number = found[1]
        return bits // 8

    def parameter_count(self, function: str) -> int | None:
        """How many parameters a function has; None where the kernel has no such function."""
        number = self._find(_KIND_FUNC, function)
        if number is None:
            return None
        _, _, prototype, _ = self._type(number)
        return self._type(prototype)[1]

    def enumerators(self, prefix: str) -> dict[str, int]:
        """Values of every 32-bit enumerator whose name begins with `prefix`."""
        found: dict[str, int] = {}
        for number in self._enums:
            _, count, _, place = self._type(number)
            first = _PAIR.unpack_from(self._data, place + _TYPE.size)[0] if count else 0
            if not count or not self._string(first).startswith(prefix):
                continue
            for index in range(count):
                name, value = _PAIR.unpack_from(self._data, place + _TYPE.size + index * _PAIR.size)
                found[self._string(name)] = value
        return found


def read_running_kernel() -> Btf:
    """The BTF of the running kernel. Raises CannotTraceError where it has none."""
    try:
        with Path(RUNNING_KERNEL).open("rb") as file:
            data = file.read()
    except OSError as error:
        raise CannotTraceError(
            "this kernel does not describe its types",
            f"{RUNNING_KERNEL}: {error.strerror}",
            "use a kernel built with CONFIG_DEBUG_INFO_BTF=y (every current distribution kernel)",
        ) from error
    return Btf(data, RUNNING_KERNEL)
