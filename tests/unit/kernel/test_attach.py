"""What cannot be attached is a declared gap, or fatal where the user wants no gaps."""

from __future__ import annotations

import pytest

from tcpstuck_bpf.errors import CannotTraceError, UsageError
from tcpstuck_bpf.kernel.attach_plan import (
    WITHOUT_VARIABLE,
    AttachRequest,
    ProbeRefusedError,
    attach,
    left_out,
    plan,
)
from tcpstuck_bpf.kernel.probes import KERNEL_COUNTERS, OPTIONAL, PROBES, WHY_PROBES, Probe
from tcpstuck_bpf.kernel.softirqs import BH_LOCK_OPTION, mode_to_try, softirq_gaps
from tcpstuck_bpf.model import SOFTIRQ_LOCK
from tcpstuck_bpf.typeinfo.btf import Btf
from tests.btf_writer import RT, RT_INTERLEAVED, Types, with_functions, with_members

EVERY = (*PROBES, *WHY_PROBES)
ALL = {probe.symbol for probe in EVERY}
REQUIRED = sorted(probe.function for probe in EVERY if probe.required)
OPTIONAL_FUNCTIONS = sorted(set(OPTIONAL) - {KERNEL_COUNTERS})
REFUSAL = CannotTraceError("the kernel refused the BPF programs", "no such place", "none")


MODES = pytest.mark.parametrize("mode", ["fentry", "kprobe"])


def served(mode: str) -> set[str]:
    """The functions that have a program in a mode."""
    return {probe.function for probe in EVERY if probe.serves(mode)}


class Kernel:
    """A kernel that attaches everything except the probes in `refuses`."""

    def __init__(self, *refuses: str, mode: str = "kprobe") -> None:
        self.refuses = refuses
        self.mode = mode
        self.attempts = 0

    def start(self, wanted: tuple[Probe, ...]) -> str:
        self.attempts += 1
        for probe in wanted:
            if probe.function in self.refuses:
                raise ProbeRefusedError(probe.function, REFUSAL)
        return self.mode


def functions(probes: tuple[Probe, ...]) -> set[str]:
    return {probe.function for probe in probes}


@MODES
def test_nothing_in_the_way_leaves_no_gap(mode: str) -> None:
    kernel = Kernel(mode=mode)
    chosen, attached, gaps = attach(ALL, AttachRequest(strict=True), True, kernel.start)
    assert (chosen, functions(attached), gaps) == (mode, served(mode), ())
    assert kernel.attempts == 1


@MODES
@pytest.mark.parametrize("function", OPTIONAL_FUNCTIONS)
def test_an_optional_probe_that_is_refused_becomes_a_gap(function: str, mode: str) -> None:
    kernel = Kernel(function, mode=mode)
    _, attached, gaps = attach(ALL, AttachRequest(), True, kernel.start)
    assert function not in functions(attached)
    assert {gap.probe for gap in gaps} | functions(attached) == served(mode)
    assert all(gap.why == REFUSAL.why for gap in gaps if gap.probe == function)


@pytest.mark.parametrize("function", REQUIRED)
def test_a_required_probe_that_is_refused_is_fatal(function: str) -> None:
    with pytest.raises(CannotTraceError, match=function):
        attach(ALL, AttachRequest(), True, Kernel(function).start)


@pytest.mark.parametrize("name", OPTIONAL)
def test_strict_names_every_gap_before_it_attaches_anything(name: str) -> None:
    kernel = Kernel()
    request = AttachRequest(strict=True, left_out=left_out(name))
    with pytest.raises(CannotTraceError) as raised:
        attach(ALL, request, name != KERNEL_COUNTERS, kernel.start)
    assert f"no {name} " in raised.value.why
    assert WITHOUT_VARIABLE in raised.value.why
    assert kernel.attempts == 0


@pytest.mark.parametrize("function", OPTIONAL_FUNCTIONS)
def test_strict_holds_for_what_only_the_attempt_shows(function: str) -> None:
    with pytest.raises(CannotTraceError) as raised:
        attach(ALL, AttachRequest(strict=True), True, Kernel(function).start)
    assert function in raised.value.why


def test_counters_out_of_sight_are_a_gap() -> None:
    _, attached, (gap,) = attach(ALL, AttachRequest(), False, Kernel().start)
    assert gap.probe == KERNEL_COUNTERS
    assert functions(attached) == served("kprobe")


@pytest.mark.parametrize(
    ("members", "option", "gap"),
    [
        ((), None, False),
        (RT, "n", False),
        (RT_INTERLEAVED, "n", True),
        (RT_INTERLEAVED, None, True),
        (RT_INTERLEAVED, "y", False),
        (RT[:1], "n", True),
        (RT_INTERLEAVED[2:], "n", False),
    ],
)
def test_packets_of_one_cpu_may_interleave_on_some_rt_kernels(
    members: tuple[str, ...], option: str | None, gap: bool
) -> None:
    """Where the lock itself is gone from an RT kernel, no option brings it back: it is a gap."""
    found = softirq_gaps(with_members(Types(), *members).btf(), option)
    assert [(one.probe, BH_LOCK_OPTION in one.why) for one in found] == [(SOFTIRQ_LOCK, True)] * gap


@pytest.mark.parametrize(
    ("wished", "interleave", "has_kprobes", "mode"),
    [
        ("auto", True, True, "kprobe"),
        ("auto", True, False, "auto"),
        ("auto", False, True, "auto"),
        ("fentry", True, True, "fentry"),
        ("kprobe", True, True, "kprobe"),
    ],
)
def test_where_packets_may_preempt_fentry_programs_kprobes_come_first(
    wished: str, interleave: bool, has_kprobes: bool, mode: str
) -> None:
    members = RT_INTERLEAVED if interleave else RT
    gaps = softirq_gaps(with_members(Types(), *members).btf(), "n")
    assert mode_to_try(wished, gaps, has_kprobes) == mode


def test_a_gap_that_is_no_probes_is_kept_and_fatal_where_none_is_wanted() -> None:
    besides = softirq_gaps(with_members(Types(), *RT_INTERLEAVED).btf(), None)
    kernel = Kernel("tcp_check_req")
    _, attached, gaps = attach(ALL, AttachRequest(), True, kernel.start, besides)
    assert functions(attached) == served("kprobe") - {"tcp_check_req"}
    assert [gap.probe for gap in gaps] == ["tcp_check_req", SOFTIRQ_LOCK]
    with pytest.raises(CannotTraceError) as raised:
        attach(ALL, AttachRequest(strict=True), True, Kernel().start, besides)
    assert f"no {SOFTIRQ_LOCK} " in raised.value.why


def test_arguments_elsewhere_than_the_programs_read_them_are_not_attached_to() -> None:
    def types(function: str) -> Btf:
        return with_functions(Types(), {function: ("struct sk_buff", "struct sock")}).btf()

    kernel = Kernel()
    optional = AttachRequest(types=types("tcp_check_req"))
    _, attached, (gap,) = attach(ALL, optional, True, kernel.start)
    assert functions(attached) == served("kprobe") - {"tcp_check_req"}
    assert (gap.probe, "struct sk_buff" in gap.why) == ("tcp_check_req", True)
    with pytest.raises(CannotTraceError, match="cookie_v4_check") as raised:
        attach(ALL, AttachRequest(types=types("cookie_v4_check")), True, kernel.start)
    assert "CONFIG_SYN_COOKIES" not in raised.value.why + raised.value.remedy
    assert kernel.attempts == 1


def test_half_of_ipv6_says_what_it_lacks() -> None:
    _, gaps = plan(ALL - {"cookie_v6_check"})
    assert {gap.probe: gap.why for gap in gaps} == {
        "cookie_v6_check": "the kernel has no such function",
        "cookie_v6_init_sequence": "useless without cookie_v6_check",
    }


def test_the_switch_takes_optional_probes_only() -> None:
    assert left_out("") == {}
    assert set(left_out(",".join(OPTIONAL))) == set(OPTIONAL)
    for wrong in ("tcp_conn_request", "no_such_function"):
        with pytest.raises(UsageError, match=wrong):
            left_out(wrong)
