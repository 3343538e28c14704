"""Reads a kernel's types from the DWARF of its vmlinux, through pyelftools.

This serves kernels without BTF. A vmlinux repeats the same types in each of its thousands of
compilation units; reading them all takes hours and tens of gigabytes. So this module reads only
the units of the TCP functions. It finds them by address (.symtab, .debug_aranges) or, where clang
left those tables out, by the names of their source files.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from elftools.common.exceptions import ELFCompressionError
from elftools.dwarf.compileunit import CompileUnit
from elftools.dwarf.die import DIE
from elftools.dwarf.dwarfinfo import DWARFInfo
from elftools.elf.elffile import ELFFile
from elftools.elf.sections import SymbolTableSection

from tcpstuck_bpf.errors import CannotTraceError
from tcpstuck_bpf.typeinfo import graph
from tcpstuck_bpf.typeinfo.graph import Field, Shape, TypeGraph

UNIT_FUNCTIONS = (
    "tcp_conn_request",
    "cookie_v4_check",
    "cookie_v6_check",
    "tcp_check_req",
)
"""Functions whose compilation units are read; together they use every type that is needed."""
UNIT_FILES = (
    b"net/ipv4/tcp_input.c",
    b"net/ipv4/syncookies.c",
    b"net/ipv6/syncookies.c",
    b"net/ipv4/tcp_minisocks.c",
)

_KINDS = {
    "DW_TAG_base_type": graph.NUMBER,
    "DW_TAG_pointer_type": graph.POINTER,
    "DW_TAG_array_type": graph.ARRAY,
    "DW_TAG_structure_type": graph.STRUCT,
    "DW_TAG_union_type": graph.UNION,
    "DW_TAG_enumeration_type": graph.ENUM,
    "DW_TAG_typedef": graph.TYPEDEF,
    "DW_TAG_const_type": "const",
    "DW_TAG_volatile_type": "volatile",
    "DW_TAG_restrict_type": "restrict",
    "DW_TAG_subroutine_type": graph.FUNCTION,
    "DW_TAG_subprogram": graph.FUNCTION,
}
_DW_OP_PLUS_UCONST = 0x23


def has_dwarf(elf: ELFFile) -> bool:
    """Whether a file has debug information. pyelftools' own check accepts unwind tables too."""
    return elf.get_section_by_name(".debug_info") is not None


class Dwarf(TypeGraph[DIE]):
    """The types of one kernel. Raises CannotTraceError where its debug information is damaged."""

    form = "DWARF"
    # pyelftools raises whatever its parser happens to meet in damaged input.
    _damage = (Exception,)

    def __init__(self, elf: ELFFile, source: str) -> None:
        super().__init__(source)
        self._by_name: dict[tuple[str, str], DIE] = {}
        self._enums: list[DIE] = []
        with self._reading():
            self._info: DWARFInfo = _debug_information(elf, source)
            self._units = _units_by_address(elf, self._info) or _units_by_name(self._info)
        if not self._units:
            raise self._unreadable("it has no debug information of the kernel's TCP")

    def _next_unit(self) -> bool:
        """Index one more unit; False if none is left."""
        if not self._units:
            return False
        unit = self._units.pop(0)
        for die in unit.iter_DIE_children(unit.get_top_DIE()):
            kind = _KINDS.get(die.tag)
            if kind is None or "DW_AT_declaration" in die.attributes:
                continue
            if kind == graph.ENUM:
                self._enums.append(die)
            elif kind in (graph.STRUCT, graph.FUNCTION, graph.TYPEDEF):
                self._by_name.setdefault((kind, _text(die, "DW_AT_name")), die)
        return True

    def _named(self, kind: str, name: str) -> DIE | None:
        while (kind, name) not in self._by_name and self._next_unit():
            pass
        return self._by_name.get((kind, name))

    def _shape(self, node: DIE) -> Shape[DIE]:
        inner = node.get_DIE_from_attribute("DW_AT_type") if _has(node, "DW_AT_type") else None
        return Shape(
            _KINDS[node.tag],
            _text(node, "DW_AT_name"),
            inner,
            _number(node, "DW_AT_byte_size"),
            _elements(node) if node.tag == "DW_TAG_array_type" else 0,
        )

    def _fields(self, node: DIE) -> Iterator[Field[DIE]]:
        for child in node.iter_children():
            if child.tag in ("DW_TAG_member", "DW_TAG_formal_parameter"):
                yield Field(
                    _text(child, "DW_AT_name"),
                    child.get_DIE_from_attribute("DW_AT_type"),
                    self._bit_offset(child) if child.tag == "DW_TAG_member" else 0,
                    _number(child, "DW_AT_bit_size"),
                )

    def _bit_offset(self, member: DIE) -> int:
        """Bits from the start of the struct; a union's members have no location."""
        if _has(member, "DW_AT_data_bit_offset"):
            return _number(member, "DW_AT_data_bit_offset")
        location: Any = 0
        if _has(member, "DW_AT_data_member_location"):
            location = member.attributes["DW_AT_data_member_location"].value
        if isinstance(location, list):  # an expression, in DWARF 2
            if location[0] != _DW_OP_PLUS_UCONST:
                raise ValueError("a member's offset is computed")
            location = sum((byte & 0x7F) << 7 * n for n, byte in enumerate(location[1:]))
        bits = 8 * int(location)
        if _has(member, "DW_AT_bit_offset"):
            # Up to DWARF 4 this offset counts from the storage unit's most significant bit.
            size = _number(member, "DW_AT_byte_size") or self._size(
                member.get_DIE_from_attribute("DW_AT_type")
            )
            used = _number(member, "DW_AT_bit_offset") + _number(member, "DW_AT_bit_size")
            bits += 8 * size - used
        return bits

    def _enumerators(self, prefix: str) -> dict[str, int]:
        found: dict[str, int] = {}
        while not found:
            for enum in self._enums:
                for child in enum.iter_children():
                    name = _text(child, "DW_AT_name")
                    if name.startswith(prefix):
                        found[name] = _number(child, "DW_AT_const_value")
            if not self._next_unit():
                break
        return found


def _debug_information(elf: ELFFile, source: str) -> DWARFInfo:
    try:
        # The linker has relocated it already, although --emit-relocs leaves the tables in.
        return elf.get_dwarf_info(relocate_dwarf_sections=False)
    except ELFCompressionError as error:
        raise CannotTraceError(
            f"the debug information in {source} is compressed in a way that cannot be read here",
            f"pyelftools says: {error}",
            f"unpack it: objcopy --decompress-debug-sections {source} NEW-FILE",
        ) from error


def _has(die: DIE, attribute: str) -> bool:
    return attribute in die.attributes


def _text(die: DIE, attribute: str) -> str:
    return die.attributes[attribute].value.decode("ascii") if _has(die, attribute) else ""


def _number(die: DIE, attribute: str) -> int:
    return int(die.attributes[attribute].value) if _has(die, attribute) else 0


def _elements(array: DIE) -> int:
    """Number of elements of an array of any dimension; 0 for an open array."""
    total = 1
    for child in array.iter_children():
        if child.tag == "DW_TAG_subrange_type":
            if _has(child, "DW_AT_count"):
                total *= _number(child, "DW_AT_count")
            else:
                total *= _number(child, "DW_AT_upper_bound") + _has(child, "DW_AT_upper_bound")
    return total


def _units_by_address(elf: ELFFile, info: DWARFInfo) -> list[CompileUnit]:
    table = elf.get_section_by_name(".symtab")
    ranges = info.get_aranges()
    if not isinstance(table, SymbolTableSection) or ranges is None:
        return []
    offsets: dict[int, None] = {}
    for name in UNIT_FUNCTIONS:
        for symbol in table.get_symbol_by_name(name) or ():
            offset = ranges.cu_offset_at_addr(symbol["st_value"])
            if offset is not None:
                offsets[offset] = None
    return [info.get_CU_at(offset) for offset in offsets]


def _units_by_name(info: DWARFInfo) -> list[CompileUnit]:
    found: list[CompileUnit] = []
    for unit in info.iter_CUs():
        name = unit.get_top_DIE().attributes.get("DW_AT_name")
        if name is not None and name.value.endswith(UNIT_FILES):
            found.append(unit)
            if len(found) == len(UNIT_FILES):
                break
    return found
