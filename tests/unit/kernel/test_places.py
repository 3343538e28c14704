"""Numbers of a kernel become words: reasons, symbols, stacks; and whose rules are wanted."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from tcpstuck_bpf.host import kallsyms
from tcpstuck_bpf.kernel import drop_names
from tcpstuck_bpf.model import Row
from tcpstuck_bpf.rulesets import KernelNames, Ruleset
from tests.btf_writer import ENUM, INT, TYPEDEF, Types, add_tracepoint
from tests.builders import (
    NF_PLACE,
    NF_REASON,
    NF_STACK,
    ack_filtered,
    at,
    four_tuple,
    handshake,
)

REASONS = {"NOT_SPECIFIED": 2, "NO_SOCKET": 3, "NETFILTER_DROP": NF_REASON, "MAX": 99}
SYMBOLS = f"""\
ffffffff81000000 T _text
{NF_PLACE - 0xA2:016x} T nf_hook_slow
{NF_PLACE - 1:016x} D some_data
{NF_PLACE + 0x1000:016x} t ip_rcv_finish_core.isra.0
ffffffffc0001000 t nft_do_chain\t[nf_tables]
0000000000000000 t hidden
"""
NETNS = four_tuple().netns


def types_with_reasons() -> Types:
    types = Types()
    for prefix, values in (
        ("SKB_DROP_REASON_", REASONS),
        ("SKB_DROP_REASON_SUBSYS_", {"CORE": 0, "MAC80211_UNUSABLE": 1}),
    ):
        tail = [struct.pack("=II", types.name(prefix + n), v) for n, v in values.items()]
        types.add(ENUM, "", 4, b"".join(tail), len(tail))
    return types


@pytest.fixture(name="symbols")
def _symbols(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "kallsyms"
    path.write_text(SYMBOLS)
    monkeypatch.setattr(kallsyms, "_SYMBOLS", path)
    return path


def test_reasons_are_those_of_the_enum_and_no_other() -> None:
    names = drop_names.reason_names(types_with_reasons().btf())
    assert names == {v: n for n, v in REASONS.items() if n != "MAX"}
    assert drop_names.reason_text(NF_REASON, names) == "NETFILTER_DROP"
    assert drop_names.reason_text(77, names) == "reason 77"
    assert drop_names.reason_text(3 << 16 | 7, names) == "subsystem 3 reason 7"
    assert drop_names.reason_text(NF_REASON, {}) is None


def test_the_programs_are_told_the_reasons_they_pass_over() -> None:
    assert drop_names.reason_defines({}) == ""
    lines = drop_names.reason_defines({3: "NO_SOCKET", 8: "NETFILTER_DROP"}).splitlines()
    assert lines == ["#define KFREE_SKB_HAS_REASON", "#define REASON_NO_SOCKET 3"]


@pytest.mark.parametrize("count", [2, 3, 4])
def test_a_tracepoint_s_arguments_are_counted_without_its_own(count: int) -> None:
    types = Types()
    add_tracepoint(types, "kfree_skb", count)
    types.add(TYPEDEF, "btf_trace_other", types.add(INT, "int", 4, struct.pack("=I", 32)))
    btf = types.btf()
    number = btf.tracepoint_type("kfree_skb")
    assert number is not None
    assert btf.tracepoint_type("missing") is None
    assert btf.tracepoint_arguments("kfree_skb") == count
    assert btf.tracepoint_arguments("other") is None
    assert btf.tracepoint_arguments("missing") is None


@pytest.mark.usefixtures("symbols")
def test_places_are_symbols_with_their_offset() -> None:
    module = 0xFFFFFFFFC0001000 + 0x47F
    assert kallsyms.place_names([NF_PLACE, NF_PLACE + 0x1010, module, 16]) == {
        NF_PLACE: "nf_hook_slow+0xa2",
        NF_PLACE + 0x1010: "ip_rcv_finish_core.isra.0+0x10",
        module: "nft_do_chain+0x47f",
        16: "0x10",
    }


def test_hidden_symbols_leave_the_address(symbols: Path) -> None:
    symbols.unlink()
    assert kallsyms.place_names([NF_PLACE]) == {NF_PLACE: f"{NF_PLACE:#x}"}


class Kernel:
    """Stacks and rules, and what was asked for."""

    def __init__(self) -> None:
        self.wanted: list[tuple[int, int]] = []
        self.read: dict[int, Ruleset] = {}
        self.hurries = 0
        self.namer = drop_names.Namer({NF_REASON: "NETFILTER_DROP"}, self.stack, self)

    def stack(self, number: int) -> tuple[int, ...]:
        assert number == NF_STACK
        return (16, NF_PLACE, NF_PLACE + 0x1010)

    def want(self, netns: int, dropped_ns: int) -> None:
        self.wanted.append((netns, dropped_ns))

    def taken(self) -> dict[int, Ruleset]:
        read, self.read = self.read, {}
        return read

    def hurry(self) -> None:
        self.hurries += 1


@pytest.mark.usefixtures("symbols")
def test_everything_is_named_once() -> None:
    kernel = Kernel()
    assert kernel.namer([Row(four_tuple(), handshake())]) is None
    row = Row(four_tuple(), ack_filtered(handshake(), at(0.1)))
    names = kernel.namer([row, row])
    assert names is not None
    assert names.places == {NF_PLACE: "nf_hook_slow+0xa2"}
    assert names.reasons[NF_REASON] == "NETFILTER_DROP"
    assert names.stacks == {NF_STACK: ("nf_hook_slow+0xa2", "ip_rcv_finish_core.isra.0+0x10")}
    assert names.rulesets == {}
    assert kernel.namer([row]) is None


@pytest.mark.usefixtures("symbols")
def test_rules_are_wanted_after_a_drop_of_netfilter_s_and_told_when_they_are_read() -> None:
    kernel = Kernel()
    elsewhere = ack_filtered(handshake(), at(90), filter_place=NF_PLACE + 0x1010, filter_reason=2)
    kernel.namer([Row(four_tuple(), elsewhere)])
    assert kernel.wanted == []
    kernel.namer([Row(four_tuple(), ack_filtered(handshake(), at(0.1)))])
    assert kernel.wanted == [(NETNS, at(0.1))]
    assert kernel.namer(()) is None
    kernel.read[NETNS] = Ruleset((), (), at(0.2))
    names = kernel.namer(())
    assert names == KernelNames({}, {}, {}, {NETNS: (Ruleset((), (), at(0.2)),)})
    assert kernel.namer(()) is None
    kernel.namer.hurry()
    assert kernel.hurries == 1
