"""From BTF to a header that a C compiler agrees with; BTF made here, byte by byte."""

from __future__ import annotations

import shutil
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from tcpstuck_bpf.btf import Btf
from tcpstuck_bpf.errors import CannotTraceError
from tcpstuck_bpf.layout import (
    COUNTER_MEMBER,
    COUNTERS,
    REQUIRED_MEMBERS,
    Member,
    find_layout,
    header_text,
)

INT, STRUCT, UNION, ENUM, TYPEDEF, FUNC, FUNC_PROTO = 1, 4, 5, 6, 8, 12, 13


class Types:
    """Writes BTF (Documentation/bpf/btf.rst)."""

    def __init__(self) -> None:
        self._strings = b"\0"
        self._types = b""
        self.count = 0

    def name(self, text: str) -> int:
        if not text:
            return 0
        self._strings += text.encode() + b"\0"
        return len(self._strings) - len(text) - 1

    def add(self, kind: int, name: str, size: int, tail: bytes = b"", members: int = 0) -> int:
        info = kind << 24 | members
        self._types += struct.pack("=III", self.name(name), info, size) + tail
        self.count += 1
        return self.count

    def struct(self, name: str, *members: tuple[str, int, int], kind: int = STRUCT) -> int:
        tail = b"".join(struct.pack("=III", self.name(n), t, 8 * o) for n, t, o in members)
        return self.add(kind, name, 4096, tail, len(members))

    def data(self) -> bytes:
        types = len(self._types)
        header = struct.pack("=HBBIIIII", 0xEB9F, 1, 0, 24, 0, types, types, len(self._strings))
        return header + self._types + self._strings

    def btf(self) -> Btf:
        return Btf(self.data(), "the test")


def kernel(without: Member | None = None, counters: Sequence[int] = (2, 3, 21, 22)) -> Types:
    """A kernel with every member we ask for, each at an offset of its own."""
    types = Types()
    word = types.add(INT, "u32", 4, struct.pack("=I", 32))
    structs: dict[str, dict[str, object]] = {}
    for number, member in enumerate((*REQUIRED_MEMBERS, COUNTER_MEMBER)):
        if member != without:
            place = structs.setdefault(member.kernel_struct, {})
            *outer, last = member.path.split(".")
            for step in outer:
                place = place.setdefault(step, {})  # type: ignore[assignment]
            place[last] = 64 + 8 * number

    def write(name: str, members: dict[str, object]) -> int:
        fields = []
        for member_name, inner in members.items():
            if isinstance(inner, dict):
                fields.append((member_name, write("", inner), 0))
            else:
                # In an anonymous union each, as many of the kernel's members are.
                union = types.struct("", (member_name, word, 0), kind=UNION)
                fields.append(("", union, int(str(inner))))
        return types.struct(name, *fields)

    for name, members in structs.items():
        write(name, members)
    if counters:
        values = [
            struct.pack("=II", types.name(f"LINUX_MIB_{c}"), n) for c, n in zip(COUNTERS, counters)
        ]
        types.add(ENUM, "", 4, b"".join(values), len(values))
    return types


def expected_offset(member: Member) -> int:
    return 64 + 8 * (*REQUIRED_MEMBERS, COUNTER_MEMBER).index(member)


def test_a_compiler_finds_every_member_where_btf_says(tmp_path: Path) -> None:
    types = kernel()
    layout = find_layout(types.btf(), 0xFFFFFFFF82000000)
    assert dict(layout.offsets) == {m: expected_offset(m) for m in layout.offsets}
    assert len(layout.offsets) == len(REQUIRED_MEMBERS) + 1
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    program = "typedef unsigned char u8; typedef unsigned short u16; typedef unsigned u32;\n"
    (tmp_path / "layout.c").write_text(program + header_text(layout))
    ended = subprocess.run(
        [compiler, "-std=gnu11", "-Werror", "-fsyntax-only", str(tmp_path / "layout.c")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("member", REQUIRED_MEMBERS, ids=lambda m: m.path)
def test_a_missing_member_is_named(member: Member) -> None:
    with pytest.raises(CannotTraceError, match=member.path.split(".")[-1]):
        find_layout(kernel(without=member).btf(), 1)


@pytest.mark.parametrize(
    ("types", "table"),
    [
        (kernel(counters=()), 1),
        (kernel(counters=(2, 3, 21, 23)), 1),
        (kernel(counters=(3, 2, 21, 22)), 1),
        (kernel(without=COUNTER_MEMBER), 1),
        (kernel(), None),
    ],
)
def test_without_counters_the_programs_do_without(types: Types, table: int | None) -> None:
    layout = find_layout(types.btf(), table)
    assert not layout.has_counters
    assert "HAVE_MIB_COUNTERS" not in header_text(layout)


def test_parameters_are_counted_through_the_prototype() -> None:
    types = Types()
    word = types.add(INT, "int", 4, struct.pack("=I", 32))
    prototype = types.add(FUNC_PROTO, "", word, struct.pack("=IIII", 0, word, 0, word), 2)
    types.add(FUNC, "cookie_v4_check", prototype)
    btf = types.btf()
    assert btf.parameter_count("cookie_v4_check") == 2
    assert btf.parameter_count("cookie_v6_check") is None


def test_typedefs_are_looked_through() -> None:
    types = Types()
    word = types.add(INT, "int", 4, struct.pack("=I", 32))
    inner = types.struct("inner_t", ("value", word, 12))
    alias = types.add(TYPEDEF, "alias_t", inner)
    types.struct("outer", ("first", alias, 8))
    assert types.btf().offset("outer", "first.value") == 20


@pytest.mark.parametrize(
    "data", [b"", b"\x7fELF", b"\0" * 64, kernel().data()[:7], kernel().data()[:300]]
)
def test_what_is_no_btf_is_said(data: bytes) -> None:
    with pytest.raises(CannotTraceError, match="type information"):
        Btf(data, "the test")
