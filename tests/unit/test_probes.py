"""The attach plan, and that the program text has what it names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tcpstuck_bpf.errors import CannotTraceError
from tcpstuck_bpf.probes import PROBES, plan
from tcpstuck_bpf.verdict import RULES

TEXT = (Path(__file__).parents[2] / "bpf" / "tcpstuck.bpf.c").read_text("ascii")
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
    kprobes = {name for p in PROBES for name in (p.kprobe_entry, p.kprobe_return) if name}
    assert set(re.findall(r"^int (\w+)\(struct pt_regs \*ctx\)", TEXT, re.M)) == kprobes
    for macro, wanted in (
        ("KFUNC_PROBE", {p.function for p in PROBES if p.fentry}),
        ("KRETFUNC_PROBE", {p.function for p in PROBES if p.fexit}),
    ):
        found = re.findall(rf"\b{macro}\((\w+(?:##\w+)*),", TEXT)
        spelled = {name.replace("##version##", v) for name in found for v in ("v4", "v6")}
        assert spelled == wanted


def test_verdicts_need_probes_that_exist() -> None:
    assert set().union(*(rule.needs for rule in RULES)) <= ALL
