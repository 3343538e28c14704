"""The attach plan, and that the program text has what it names."""

from __future__ import annotations

import re

import pytest

from tcpstuck_bpf.errors import CannotTraceError
from tcpstuck_bpf.judge.rules import RULES
from tcpstuck_bpf.kernel.attach_plan import attach_order, misread_argument, plan
from tcpstuck_bpf.kernel.compilation import program_directory, program_text
from tcpstuck_bpf.kernel.probes import EVERY_PROBE, OPTIONAL, PROBES, RESCUE_PROBES, of_mode
from tcpstuck_bpf.typeinfo.graph import Prototype

TEXT = program_text(program_directory()).decode("ascii")
ALL = {probe.function for probe in PROBES}
REQUIRED = {probe.function for probe in PROBES if probe.required}


def test_a_complete_kernel_leaves_no_gap() -> None:
    assert plan(ALL) == (PROBES, ())


@pytest.mark.parametrize("function", sorted(REQUIRED))
def test_a_missing_required_function_is_named(function: str) -> None:
    with pytest.raises(CannotTraceError, match=function):
        plan(ALL - {function})


@pytest.mark.parametrize("function", sorted(ALL - REQUIRED))
def test_a_missing_optional_function_is_a_gap(function: str) -> None:
    probes, gaps = plan(ALL - {function})
    assert function in {gap.probe for gap in gaps}
    assert {probe.function for probe in probes} | {gap.probe for gap in gaps} == ALL


def test_ipv6_is_all_or_nothing() -> None:
    for function in ("cookie_v6_check", "cookie_v6_init_sequence"):
        probes, _ = plan(ALL - {function})
        assert not [probe for probe in probes if "_v6_" in probe.function]


def test_the_text_has_every_program_and_no_other() -> None:
    every = (*PROBES, *RESCUE_PROBES)
    kprobes = {name for p in every for name in (p.kprobe_entry, p.kprobe_return) if name}
    assert set(re.findall(r"^int (\w+)\(struct pt_regs \*ctx\)", TEXT, re.M)) == kprobes
    for macro, wanted in (
        ("KFUNC_PROBE", {p.function for p in every if p.fentry}),
        ("KRETFUNC_PROBE", {p.function for p in every if p.fexit}),
    ):
        assert set(re.findall(rf"\b{macro}\((\w+),", TEXT)) == wanted


@pytest.mark.parametrize("mode", ["fentry", "kprobe"])
def test_entries_are_made_only_where_all_that_ends_them_is_seen(mode: str) -> None:
    order = [probe.function for probe in attach_order(EVERY_PROBE, mode)]
    assert sorted(order) == sorted(probe.function for probe in of_mode(EVERY_PROBE, mode))
    assert order[-2:] == ["cookie_v4_init_sequence", "cookie_v6_init_sequence"]


def test_verdicts_need_probes_that_exist() -> None:
    assert set().union(*(rule.needs for rule in RULES)) <= ALL


@pytest.mark.parametrize(
    ("parameters", "wrong"),
    [
        (("struct sock *sk", "struct sk_buff *skb"), None),
        (("const struct sock *", "struct sk_buff *skb", "u32 isn"), None),
        (("struct sk_buff *skb", "struct sock *sk"), "parameter 1 is `struct sk_buff *skb`"),
        (("struct sock *sk", "struct sk_buff **skb"), "parameter 2"),
        (("struct sock_reuseport *sk", "struct sk_buff *skb"), "parameter 1"),
        (("struct sock *sk",), "1 parameters, no parameter 2"),
        ((), "0 parameters"),
    ],
)
def test_arguments_are_read_where_they_are_or_not_at_all(
    parameters: tuple[str, ...], wrong: str | None
) -> None:
    (probe,) = (one for one in PROBES if one.function == "cookie_v4_check")
    found = misread_argument(probe, Prototype("struct sock *", parameters))
    assert found is None if wrong is None else wrong in str(found)


def test_the_mss_is_any_number_s_place() -> None:
    (probe,) = (one for one in PROBES if one.function == "cookie_v4_init_sequence")
    for mss, right in (("__u16 *mssp", True), ("unsigned short *", True), ("u16 mss", False)):
        prototype = Prototype("u32", ("const struct sk_buff *skb", mss))
        assert (misread_argument(probe, prototype) is None) == right


def test_an_optional_probe_can_be_left_out_of_the_text() -> None:
    """Without its own condition a program stays for a function that this kernel may not have."""
    conditions: list[str] = []
    seen = set()
    for line in TEXT.splitlines():
        if begun := re.match(r"#\s*if\w*\s+(.*)", line):
            conditions.append(begun[1])
        elif re.match(r"#\s*endif", line):
            conditions.pop()
        elif entry := re.search(r"(?:KFUNC_PROBE\(|KRETFUNC_PROBE\(|k(?:ret)?probe__)(\w+)", line):
            seen.add(entry[1])
            optional = entry[1] in OPTIONAL or entry[1] in {one.function for one in RESCUE_PROBES}
            assert any("PROBE_" in one for one in conditions) == optional, entry[1]
    assert {*REQUIRED} <= seen
