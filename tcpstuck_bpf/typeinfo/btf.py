"""Reads BTF, the kernel's description of its own types (Documentation/bpf/btf.rst).

No maintained pure-Python reader exists, and libbpf's needs bindings that BCC's packages do not
ship. This one reads only what `graph.KernelTypes` asks for.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator
from pathlib import Path

from tcpstuck_bpf.errors import CannotTraceError
from tcpstuck_bpf.typeinfo import graph
from tcpstuck_bpf.typeinfo.graph import Field, Shape, TypeGraph

RUNNING_KERNEL = "/sys/kernel/btf/vmlinux"

_MAGIC = 0xEB9F
_HEADER = struct.Struct("=HBBIIIII")
_TYPE = struct.Struct("=III")
_WORD = struct.Struct("=I")
_TRIPLE = struct.Struct("=III")
_PAIR = struct.Struct("=II")

_INT, _ARRAY, _STRUCT, _UNION, _ENUM, _TYPEDEF = 1, 3, 4, 5, 6, 8
_FUNC, _FUNC_PROTO, _ENUM64 = 12, 13, 19

_NAMED = {
    graph.STRUCT: _STRUCT,
    graph.TYPEDEF: _TYPEDEF,
    graph.FUNCTION: _FUNC,
}
_KINDS = {
    1: graph.NUMBER,
    2: graph.POINTER,
    3: graph.ARRAY,
    4: graph.STRUCT,
    5: graph.UNION,
    6: graph.ENUM,
    7: graph.STRUCT,  # a forward declaration
    8: graph.TYPEDEF,
    9: "volatile",
    10: "const",
    11: "restrict",
    13: graph.FUNCTION,
    16: graph.NUMBER,  # a floating-point one
    18: graph.TAG,
    19: graph.ENUM,
}

# By kind: bytes of a type with its struct btf_type, and bytes of each member.
_LENGTHS = {
    1: (16, 0),
    2: (12, 0),
    3: (24, 0),
    4: (12, 12),
    5: (12, 12),
    6: (12, 8),
    7: (12, 0),
    8: (12, 0),
    9: (12, 0),
    10: (12, 0),
    11: (12, 0),
    12: (12, 0),
    13: (12, 8),
    14: (16, 0),
    15: (12, 12),
    16: (12, 0),
    17: (16, 0),
    18: (12, 0),
    19: (12, 12),
}
_FOUND_BY_NAME = frozenset({_STRUCT, _FUNC, _TYPEDEF})
_ENUMS = frozenset({_ENUM, _ENUM64})
_KIND_BITS = 5


class Btf(TypeGraph[int]):
    """The types of one kernel; a node is a type's number.

    Raises CannotTraceError where the bytes are not BTF or hold a type of an unknown kind.
    """

    form = "BTF"
    _damage = (struct.error, IndexError, KeyError, ValueError)

    def __init__(self, data: bytes, source: str) -> None:
        super().__init__(source)
        self._data = data
        if len(data) < _HEADER.size or _HEADER.unpack_from(data)[0] != _MAGIC:
            raise self._unreadable("it does not begin with BTF's magic number in our byte order")
        _, _, _, header_length, type_start, type_length, string_start, _ = _HEADER.unpack_from(data)
        self._strings = header_length + string_start
        self._places = array("I", [0])
        self._by_name: dict[int, int] = {}
        self._enums: list[int] = []
        types = header_length + type_start
        if types + type_length > len(data) or self._strings >= len(data):
            raise self._unreadable("it is shorter than its own header says")
        with self._reading():
            self._index(types, types + type_length)

    @staticmethod
    def length(header: bytes) -> int:
        """Bytes of a whole BTF, by its header; 0 if the header is too short."""
        if len(header) < _HEADER.size:
            return 0
        _, _, _, own, _, _, string_start, string_length = _HEADER.unpack_from(header)
        return int(own + string_start + string_length)

    def tracepoint_type(self, tracepoint: str) -> int | None:
        """Number of the type that attaches programs to a tracepoint; None if there is none."""
        with self._reading():
            return self._named(graph.TYPEDEF, f"btf_trace_{tracepoint}")

    def function(self, name: str) -> int | None:
        """Number of the type that attaches programs to a function; None if there is none."""
        with self._reading():
            return self._number(_FUNC, name)

    def _index(self, place: int, end: int) -> None:
        """Find where each type begins. A kernel has 130 000 types, and a start waits for this."""
        unpack, data, places, by_name = _PAIR.unpack_from, self._data, self._places, self._by_name
        while place < end:
            name, info = unpack(data, place)
            kind = info >> 24 & 0x1F
            if kind not in _LENGTHS:
                raise self._unreadable(f"type {len(places)} is of the unknown kind {kind}")
            if kind in _FOUND_BY_NAME:
                by_name.setdefault(name << _KIND_BITS | kind, len(places))
            elif kind in _ENUMS:
                self._enums.append(len(places))
            places.append(place)
            fixed, each = _LENGTHS[kind]
            place += fixed + each * (info & 0xFFFF) if each else fixed

    def _string(self, offset: int) -> str:
        start = self._strings + offset
        return self._data[start : self._data.index(b"\0", start)].decode(
            "ascii", "backslashreplace"
        )

    def _string_offsets(self, wanted: bytes) -> Iterator[int]:
        """Offsets of the strings that begin with `wanted`."""
        found = self._data.find(b"\0" + wanted, self._strings)
        while found != -1:
            yield found + 1 - self._strings
            found = self._data.find(b"\0" + wanted, found + 1)

    def _type(self, number: int) -> tuple[int, int, int, int]:
        """Name, info, size or referred type, and the offset of what follows the btf_type."""
        if not 0 < number < len(self._places):
            raise IndexError(f"there is no type {number}")
        place = self._places[number]
        name, info, size_or_type = _TYPE.unpack_from(self._data, place)
        return name, info, size_or_type, place + _TYPE.size

    def _number(self, kind: int, name: str) -> int | None:
        for offset in self._string_offsets(name.encode() + b"\0"):
            number = self._by_name.get(offset << _KIND_BITS | kind)
            if number is not None:
                return number
        return None

    def _named(self, kind: str, name: str) -> int | None:
        number = self._number(_NAMED[kind], name)
        # The parameters belong to the function's prototype, which is another type.
        is_function = number is not None and kind == graph.FUNCTION
        return self._type(number)[2] if number is not None and is_function else number

    def _shape(self, node: int) -> Shape[int]:
        name, info, size_or_type, tail = self._type(node)
        number = info >> 24 & 0x1F
        kind = _KINDS[number]
        if number == _ARRAY:
            element, _, count = _TRIPLE.unpack_from(self._data, tail)
            return Shape(kind, inner=element or None, count=count)
        if kind in (graph.STRUCT, graph.UNION, graph.ENUM):
            if number == 7 and info >> 31:
                kind = graph.UNION
            return Shape(kind, self._string(name), size=0 if number == 7 else size_or_type)
        if kind == graph.NUMBER:
            return Shape(kind, self._string(name), size=size_or_type)
        return Shape(kind, self._string(name), inner=size_or_type or None)

    def _fields(self, node: int) -> Iterator[Field[int]]:
        _, info, _, tail = self._type(node)
        count, kind = info & 0xFFFF, info >> 24 & 0x1F
        if kind == _FUNC_PROTO:
            for index in range(count):
                name, number = _PAIR.unpack_from(self._data, tail + index * _PAIR.size)
                yield Field(self._string(name), number or None)
            return
        for index in range(count):
            name, number, offset = _TRIPLE.unpack_from(self._data, tail + index * _TRIPLE.size)
            # With the flag, bit-fields carry their width beside their offset.
            bits = offset >> 24 if info >> 31 else self._narrowed(number)
            offset = offset & 0xFFFFFF if info >> 31 else offset
            yield Field(self._string(name), number or None, offset, bits)

    def _narrowed(self, number: int) -> int:
        """Width of a bit-field in the older form: an int type with fewer bits than its bytes hold.

        0 for any other type.
        """
        _, info, size, tail = self._type(number)
        if info >> 24 & 0x1F != _INT:
            return 0
        bits: int = _WORD.unpack_from(self._data, tail)[0] & 0xFF
        return bits if bits != 8 * size else 0

    def _enumerators(self, prefix: str) -> dict[str, int]:
        wanted = dict.fromkeys(self._string_offsets(prefix.encode()), "")
        found: dict[str, int] = {}
        for number in self._enums:
            _, info, _, tail = self._type(number)
            size = _TRIPLE.size if info >> 24 & 0x1F == _ENUM64 else _PAIR.size
            for place in range(tail, tail + (info & 0xFFFF) * size, size):
                name, value = _PAIR.unpack_from(self._data, place)
                if name in wanted:
                    found[self._string(name)] = value
        return found


def read_running_kernel() -> Btf:
    """The BTF of the running kernel. Raises CannotTraceError where it has none."""
    try:
        with Path(RUNNING_KERNEL).open("rb") as file:
            data = file.read()
    except OSError as error:
        raise CannotTraceError(
            "this kernel provides no BTF",
            f"{RUNNING_KERNEL}: {error.strerror}",
            "name a file that has type information: --vmlinux FILE (the kernel's vmlinux or "
            "/boot/vmlinuz), or use a kernel built with CONFIG_DEBUG_INFO_BTF=y (every current "
            "distribution kernel)",
        ) from error
    return Btf(data, RUNNING_KERNEL)
