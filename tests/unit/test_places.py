"""Numbers of a kernel become words: reasons, symbols, stacks; and when rules are read."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from tcpstuck_bpf import places
from tcpstuck_bpf.model import Row, Ruleset
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


@pytest.fixture
def kallsyms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "kallsyms"
    path.write_text(SYMBOLS)
    monkeypatch.setattr(places, "_SYMBOLS", path)
    return path


def test_reasons_are_those_of_the_enum_and_no_other() -> None:
    names = places.reason_names(types_with_reasons().btf())
    assert names == {v: n for n, v in REASONS.items() if n != "MAX"}
    assert places.reason_text(NF_REASON, names) == "NETFILTER_DROP"
    assert places.reason_text(77, names) == "reason 77"
    assert places.reason_text(3 << 16 | 7, names) == "subsystem 3 reason 7"
    assert places.reason_text(NF_REASON, {}) is None


def test_the_programs_are_told_the_reasons_they_pass_over() -> None:
    assert places.reason_defines({}) == ""
    lines = places.reason_defines({3: "NO_SOCKET", 8: "NETFILTER_DROP"}).splitlines()
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


@pytest.mark.usefixtures("kallsyms")
def test_places_are_symbols_with_their_offset() -> None:
    module = 0xFFFFFFFFC0001000 + 0x47F
    assert places.place_names([NF_PLACE, NF_PLACE + 0x1010, module, 16]) == {
        NF_PLACE: "nf_hook_slow+0xa2",
        NF_PLACE + 0x1010: "ip_rcv_finish_core.isra.0+0x10",
        module: "nft_do_chain+0x47f",
        16: "0x10",
    }


def test_hidden_symbols_leave_the_address(kallsyms: Path) -> None:
    kallsyms.unlink()
    assert places.place_names([NF_PLACE]) == {NF_PLACE: f"{NF_PLACE:#x}"}


class Kernel:
    """Stacks and rules, and how often they were asked for."""

    def __init__(self) -> None:
        self.now_ns = at(0)
        self.rulesets_read: list[int] = []
        self.reading_ns = 0
        self.namer = places.Namer(
            {NF_REASON: "NETFILTER_DROP"}, self.stack, self.ruleset, lambda: self.now_ns
        )

    def stack(self, number: int) -> tuple[int, ...]:
        assert number == NF_STACK
        return (16, NF_PLACE, NF_PLACE + 0x1010)

    def ruleset(self, netns: int) -> Ruleset:
        self.rulesets_read.append(netns)
        self.now_ns += self.reading_ns
        return Ruleset((), ())


@pytest.mark.usefixtures("kallsyms")
def test_everything_is_named_once() -> None:
    kernel = Kernel()
    assert kernel.namer([Row(four_tuple(), handshake())]) is None
    row = Row(four_tuple(), ack_filtered(handshake(), at(0.1)))
    names = kernel.namer([row, row])
    assert names is not None
    assert names.places == {NF_PLACE: "nf_hook_slow+0xa2"}
    assert names.reasons[NF_REASON] == "NETFILTER_DROP"
    assert names.stacks == {NF_STACK: ("nf_hook_slow+0xa2", "ip_rcv_finish_core.isra.0+0x10")}
    assert names.rulesets == {NETNS: (Ruleset((), (), at(0)),)}
    assert kernel.namer([row]) is None
    assert kernel.rulesets_read == [NETNS]


@pytest.mark.usefixtures("kallsyms")
def test_rules_are_read_again_only_for_a_later_drop_of_netfilter_s() -> None:
    kernel = Kernel()
    dropped = Row(four_tuple(), ack_filtered(handshake(), at(0.1)))
    again = Row(four_tuple(), ack_filtered(handshake(), at(0.5)))
    soon_ns = at(0.2) + places.RULES_INTERVAL_NS
    for now_ns, row, reads in (
        (at(0.2), dropped, 1),
        (soon_ns - 1, again, 1),
        (soon_ns, dropped, 1),
        (soon_ns, again, 2),
        (at(60), again, 2),
    ):
        kernel.now_ns = now_ns
        kernel.namer([row])
        assert len(kernel.rulesets_read) == reads
    elsewhere = ack_filtered(handshake(), at(90), filter_place=NF_PLACE + 0x1010, filter_reason=2)
    kernel.now_ns = at(91)
    kernel.namer([Row(four_tuple(), elsewhere)])
    assert len(kernel.rulesets_read) == 2


@pytest.mark.usefixtures("kallsyms")
def test_many_rules_are_read_more_rarely() -> None:
    kernel = Kernel()
    kernel.reading_ns = 5 * places.RULES_INTERVAL_NS
    began_ns = kernel.now_ns
    while kernel.now_ns < began_ns + 100 * kernel.reading_ns:
        kernel.namer([Row(four_tuple(), ack_filtered(handshake(), kernel.now_ns))])
        kernel.now_ns += places.RULES_INTERVAL_NS
    assert len(kernel.rulesets_read) >= 100 // (places.RULES_SHARE + 2)
    assert len(kernel.rulesets_read) <= 100 // (places.RULES_SHARE + 1) + 1
