"""From BTF to a header that a C compiler agrees with; BTF made here, byte by byte."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from tcpstuck_bpf.errors import CannotTraceError
from tcpstuck_bpf.kernel.layout import (
    COOKIE_MEMBER,
    COUNTER_MEMBER,
    DROP_MEMBERS,
    REQUIRED_MEMBERS,
    SOCKET_MEMBERS,
    Layout,
    Member,
    cookie_obstacle,
    find_drop_members,
    find_layout,
    header_text,
    obstacle,
)
from tcpstuck_bpf.typeinfo.btf import Btf
from tcpstuck_bpf.typeinfo.graph import MemberPlace
from tests.btf_writer import (
    FUNC,
    FUNC_PROTO,
    INT,
    TYPEDEF,
    Types,
    expected_offset,
    kernel,
)


def test_a_compiler_finds_every_member_where_btf_says(tmp_path: Path) -> None:
    types = kernel()
    layout = find_layout(types.btf(), 0xFFFFFFFF82000000)
    assert dict(layout.offsets) == {m: expected_offset(m) for m in layout.offsets}
    assert set(layout.offsets) == {
        *(*REQUIRED_MEMBERS, *DROP_MEMBERS, *SOCKET_MEMBERS),
        COOKIE_MEMBER,
        COUNTER_MEMBER,
    }
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    program = (
        "typedef unsigned char u8; typedef unsigned short u16; typedef unsigned u32;\n"
        "typedef unsigned long long u64;\n"
    )
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


@pytest.mark.parametrize("member", REQUIRED_MEMBERS, ids=lambda m: m.path)
def test_a_member_that_grew_is_refused_not_misread(member: Member) -> None:
    grown = 8 if member.size < 8 else 4
    with pytest.raises(CannotTraceError, match=f"{member.path} has {grown} bytes"):
        find_layout(kernel(sizes={member: grown}).btf(), 1)


def test_a_member_that_became_a_bit_field_is_refused() -> None:
    member = REQUIRED_MEMBERS[0]
    assert obstacle(member, MemberPlace(8, member.size, 0)) is None
    assert "bit-field" in str(obstacle(member, MemberPlace(8, member.size, 3)))


@pytest.mark.parametrize(
    ("types", "table"),
    [
        (kernel(counters=()), 1),
        (kernel(counters=(2, 3, 21, 23)), 1),
        (kernel(counters=(3, 2, 21, 22)), 1),
        (kernel(without=COUNTER_MEMBER), 1),
        (kernel(sizes={COUNTER_MEMBER: 4}), 1),
    ],
)
def test_without_counters_the_programs_do_without(types: Types, table: int | None) -> None:
    layout = find_layout(types.btf(), table)
    assert not layout.has_counters
    assert "HAVE_MIB_COUNTERS" not in header_text(layout)


@pytest.mark.parametrize("member", SOCKET_MEMBERS, ids=lambda m: m.path)
def test_without_the_sockets_members_the_programs_do_without(member: Member) -> None:
    for types in (kernel(without=member), kernel(sizes={member: 1})):
        layout = find_layout(types.btf(), 1)
        assert not layout.has_sockets
        assert "HAVE_SOCKET_INODE" not in header_text(layout)
    assert "HAVE_SOCKET_INODE" in header_text(find_layout(kernel().btf(), 1))


def lazily_made() -> Types:
    """A kernel before 5.12, with the cookie as an atomic64_t that is 0 until somebody asks."""
    types = Types()
    number = types.add(INT, "s64", 8, struct.pack("=I", 64))
    atomic = types.add(TYPEDEF, "atomic64_t", types.struct("", ("counter", number, 0)))
    types.struct("net", ("net_cookie", atomic, 8))
    return types


@pytest.mark.parametrize(
    ("types", "has_cookie"),
    [
        (kernel(), True),
        (kernel(without=COOKIE_MEMBER), False),
        (kernel(sizes={COOKIE_MEMBER: 4}), False),
    ],
)
def test_a_namespaces_cookie_is_read_where_it_is_a_plain_number(
    types: Types, has_cookie: bool
) -> None:
    layout = find_layout(types.btf(), 1)
    assert (COOKIE_MEMBER in layout.offsets) is has_cookie
    assert ("#define HAVE_NET_COOKIE" in header_text(layout)) is has_cookie


def test_a_cookie_that_is_made_when_somebody_asks_is_none() -> None:
    assert cookie_obstacle(lazily_made().btf()) is not None
    assert cookie_obstacle(kernel().btf()) is None


def test_what_changes_from_boot_to_boot_is_not_in_the_header() -> None:
    """Else programs that were compiled before the last boot, or elsewhere, would never fit."""
    btf = kernel().btf()
    layouts = [find_layout(btf, table) for table in (None, 0xFFFF_FFFF_8200_0000, 0xFFFF_1000)]
    assert len({header_text(layout) for layout in layouts}) == 1
    assert [layout.has_counters for layout in layouts] == [False, True, True]


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
    assert types.btf().place("outer", "first.value") == MemberPlace(20, 4, 0)


@pytest.mark.parametrize(
    "data", [b"", b"\x7fELF", b"\0" * 64, kernel().data()[:7], kernel().data()[:300]]
)
def test_what_is_no_btf_is_said(data: bytes) -> None:
    with pytest.raises(CannotTraceError, match="type information"):
        Btf(data, "the test")


def packet_types(**changed: int) -> Types:
    """Types as far as a dropped packet is read; members at other places, -1 for none."""
    types = Types()
    numbers = {
        size: types.add(INT, f"u{8 * size}", size, struct.pack("=I", 8 * size))
        for size in (2, 4, 8)
    }
    places = {"dev": 16, "protocol": 180, "network_header": 184, "tail": 188, "head": 200}
    places = {**places, "data": 208, "_skb_refdst": 88, **changed}
    sizes = {"protocol": 2, "network_header": 2, "tail": 4}
    members = [(n, numbers[sizes.get(n, 8)], at) for n, at in places.items() if at >= 0]
    types.struct("sk_buff", *members)
    nd_net = types.struct("possible_net_t", ("net", numbers[8], 0))
    types.struct("net_device", ("nd_net", nd_net, 280), ("ifindex", numbers[4], 200))
    types.struct("dst_entry", ("dev", numbers[8], 0))
    return types


def test_a_dropped_packet_is_read_at_once() -> None:
    offsets: dict[Member, int] = {}
    assert find_drop_members(packet_types().btf(), offsets) is None
    assert set(offsets) == set(DROP_MEMBERS)
    layout = Layout(offsets, {}, None)
    assert layout.span == (176, 40)
    text = header_text(layout)
    assert "#define PACKET_SPAN_AT 176" in text
    assert "u8 before_protocol[4]; u16 protocol;" in text
    assert "u8 before_data[32]; u8 *data;" in text


@pytest.mark.parametrize(
    ("changed", "words"),
    [({"tail": -1}, "no member tail"), ({"data": 8}, "bytes apart"), ({"dev": -1}, "member dev")],
)
def test_packets_that_cannot_be_read_at_once_are_a_reason_to_do_without(
    changed: dict[str, int], words: str
) -> None:
    offsets: dict[Member, int] = {}
    assert words in str(find_drop_members(packet_types(**changed).btf(), offsets))
    assert offsets == {}
    assert "PACKET_SPAN" not in header_text(Layout({}, {}, None))
