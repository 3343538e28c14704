"""BTF in its odd corners; test_vmlinux holds it against a compiler's."""

from __future__ import annotations

import contextlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcpstuck_bpf.errors import CannotTraceError
from tcpstuck_bpf.typeinfo.btf import Btf
from tcpstuck_bpf.typeinfo.graph import MemberPlace
from tests.btf_writer import ENUM, FUNC, FUNC_PROTO, INT, STRUCT, TYPEDEF, Types, kernel

POINTER, ARRAY, CONST, ENUM64, TYPE_TAG = 2, 3, 10, 19, 18
KIND_FLAG = 1 << 31


def number(types: Types, name: str = "int", bits: int = 32) -> int:
    return types.add(INT, name, 4, struct.pack("=I", bits))


def with_info(types: Types, index: int, flag: int) -> Types:
    """The flag set in the info word of a type that was added last."""
    raw = bytearray(types._types)
    (info,) = struct.unpack_from("=I", raw, index + 4)
    struct.pack_into("=I", raw, index + 4, info | flag)
    types._types = bytes(raw)
    return types


def test_a_bit_field_shows_its_width_not_an_offset_alone() -> None:
    types = Types()
    word = number(types)
    start = len(types._types)
    types.add(
        STRUCT,
        "flags",
        4,
        struct.pack("=III", types.name("plain"), word, 0)
        + struct.pack("=III", types.name("narrow"), word, 3 << 24 | 37),
        2,
    )
    btf = with_info(types, start, KIND_FLAG).btf()
    assert btf.place("flags", "plain") == MemberPlace(0, 4, 0)
    assert btf.place("flags", "narrow") == MemberPlace(37 // 8, 4, 3)


def test_the_older_form_of_a_bit_field_shows_its_width_too() -> None:
    types = Types()
    types.struct("flags", ("narrow", number(types, bits=5), 4))
    assert types.btf().place("flags", "narrow") == MemberPlace(4, 4, 5)


def test_sizes_of_arrays_and_pointers() -> None:
    types = Types()
    word = number(types)
    row = types.add(ARRAY, "", 0, struct.pack("=III", word, word, 5))
    table = types.add(ARRAY, "", 0, struct.pack("=III", row, word, 3))
    pointer = types.add(POINTER, "", types.add(TYPE_TAG, "percpu", word))
    types.struct("holder", ("table", table, 0), ("pointer", pointer, 60))
    assert types.btf().place("holder", "table") == MemberPlace(0, 60, 0)
    assert types.btf().place("holder", "pointer") == MemberPlace(60, 8, 0)


def test_enumerators_are_found_wherever_they_stand_in_their_enum() -> None:
    types = Types()
    small = [("SKB_NOT_DROPPED_YET", 0), ("SKB_DROP_REASON_NO_SOCKET", 3)]
    tail = b"".join(struct.pack("=II", types.name(name), value) for name, value in small)
    types.add(ENUM, "skb_drop_reason", 4, tail, len(small))
    tail = struct.pack("=III", types.name("SKB_DROP_REASON_WIDE"), 9, 1)
    types.add(ENUM64, "wide", 8, tail, 1)
    found = types.btf().enumerators("SKB_DROP_REASON_")
    assert found == {"SKB_DROP_REASON_NO_SOCKET": 3, "SKB_DROP_REASON_WIDE": 9}


def test_a_prototype_is_written_as_c_writes_it() -> None:
    types = Types()
    word = number(types)
    constant = types.add(CONST, "", types.struct("sk_buff", ("len", word, 0)))
    skb = types.add(POINTER, "", constant)
    callback = types.add(FUNC_PROTO, "", 0, struct.pack("=II", 0, word), 1)
    done = types.add(POINTER, "", callback)
    parameters = (("skb", skb), ("done", done))
    tail = b"".join(struct.pack("=II", types.name(name), kind) for name, kind in parameters)
    types.add(FUNC, "f", types.add(FUNC_PROTO, "", 0, tail, len(parameters)))
    prototype = types.btf().prototype("f")
    assert prototype is not None
    assert prototype.text("f") == "void f(const struct sk_buff *skb, void (*done)(int))"


def test_types_that_refer_to_themselves_are_damage() -> None:
    types = Types()
    types.add(TYPEDEF, "circle", 1)
    types.struct("holder", ("value", 1, 0))
    with pytest.raises(CannotTraceError, match="type information"):
        types.btf().place("holder", "value.inner")


def test_a_type_that_is_not_there_is_damage() -> None:
    types = Types()
    types.struct("holder", ("value", 77, 0))
    with pytest.raises(CannotTraceError, match="type information"):
        types.btf().place("holder", "value")


@given(st.lists(st.tuples(st.integers(0, len(kernel().data()) - 1), st.integers(0, 255))))
def test_damaged_data_ends_in_a_typed_error(changes: list[tuple[int, int]]) -> None:
    data = bytearray(kernel().data())
    for place, value in changes:
        data[place] = value
    with contextlib.suppress(CannotTraceError):
        btf = Btf(bytes(data), "the test")
        btf.place("sock", "__sk_common.skc_net.net")
        btf.enumerators("LINUX_MIB_")
        btf.prototype("cookie_v4_check")
