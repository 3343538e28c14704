"""The doctor says what is in the way, on this machine and in files, and its status tells."""

from __future__ import annotations

import contextlib
import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tcpstuck_bpf.cli import main
from tcpstuck_bpf.doctor import machine_report
from tcpstuck_bpf.doctor.machine_report import NO, NOTE, OK, MachineReport, examine
from tcpstuck_bpf.doctor.render import (
    change_lines,
    in_sight,
    kernel_lines,
    machine_json,
    machine_lines,
)
from tcpstuck_bpf.errors import EXIT_CANNOT_TRACE, EXIT_USAGE, CannotTraceError
from tcpstuck_bpf.host import bpf_syscall, kallsyms
from tcpstuck_bpf.kernel import features
from tcpstuck_bpf.kernel.kernel_report import Change, KernelReport, changes, describe
from tcpstuck_bpf.kernel.layout import COUNTER_MEMBER, REQUIRED_MEMBERS
from tcpstuck_bpf.kernel.probes import (
    EVERY_PROBE,
    KERNEL_COUNTERS,
    PROBES,
    REASON_ARGUMENT,
    RESCUE_PROBES,
    WHY_PROBES,
    Probe,
)
from tcpstuck_bpf.model import SOFTIRQ_LOCK, Coverage, TraceSettings
from tests import fake_kernel
from tests.btf_writer import (
    ENUM,
    RT,
    RT_INTERLEAVED,
    Types,
    add_tracepoint,
    expected_offset,
    kernel,
    with_functions,
    with_members,
)

FUNCTIONS = frozenset(probe.symbol for probe in EVERY_PROBE)
EPERM = "EPERM: Operation not permitted"


def report(types: Types, names: frozenset[str] | None = FUNCTIONS) -> KernelReport:
    return describe("9.9", "a test", types.btf(), names)


def trouble(kernel_report: KernelReport) -> dict[str, str]:
    found = {f.probe.function: f.trouble for f in kernel_report.functions if f.trouble}
    return {**found, **{m.name: m.trouble for m in kernel_report.members if m.trouble}}


def test_a_complete_kernel_has_nothing_in_the_way() -> None:
    found = report(with_functions(kernel()))
    assert (trouble(found), found.gaps, found.trouble) == ({}, (), "")
    for fact in found.members:
        assert fact.place is not None
        assert fact.place.offset == expected_offset(fact.member)
    assert sorted(found.counters.values()) == [2, 3, 21, 22]


@pytest.mark.parametrize("probe", PROBES, ids=lambda probe: probe.function)
@pytest.mark.parametrize("left", ["", ".isra.0"])
def test_a_function_that_is_gone_or_changed_is_told(probe: Any, left: str) -> None:
    names = FUNCTIONS - {probe.function} | ({probe.function + left} if left else set())
    found = report(with_functions(kernel()), frozenset(names))
    assert probe.lost in trouble(found)[probe.function]
    assert (".isra.0" in trouble(found)[probe.function]) == bool(left)
    assert bool(found.trouble) == probe.required
    assert probe.required or probe.function in {gap.probe for gap in found.gaps}


@pytest.mark.parametrize("probe", RESCUE_PROBES, ids=lambda probe: probe.function)
def test_what_only_the_rescue_needs_is_told_and_is_not_in_the_way(probe: Probe) -> None:
    found = report(with_functions(kernel()), FUNCTIONS - {probe.function})
    assert probe.lost in trouble(found)[probe.function]
    assert (found.gaps, found.trouble) == ((), "")
    need = "required" if probe.required else "optional"
    lines = list(kernel_lines(found, 1000, False))
    (line,) = (line for line in lines if probe.lost in line)
    assert f"{need} for --rescue" in line


@pytest.mark.parametrize("probe", WHY_PROBES, ids=lambda probe: probe.function)
def test_what_tells_where_an_ack_died_is_a_gap_where_it_is_missing(probe: Probe) -> None:
    found = report(with_functions(kernel()), FUNCTIONS - {probe.symbol})
    assert [gap.probe for gap in found.gaps] == [probe.function]
    assert found.trouble == ""


def test_a_tracepoint_without_reasons_is_told() -> None:
    types = kernel()
    add_tracepoint(types, "kfree_skb", REASON_ARGUMENT)
    found = report(types, frozenset({"__traceiter_kfree_skb"}))
    assert trouble(found)["kfree_skb"] == "it has no drop reason, only the drop site"


def test_a_shifted_return_value_is_told() -> None:
    more = ("struct sock", "struct sk_buff", "int")
    found = report(with_functions(kernel(), {"cookie_v4_check": more}))
    assert trouble(found) == {"cookie_v4_check": "3 parameters instead of 2: kprobes only"}
    assert found.trouble == ""


@pytest.mark.parametrize("probe", PROBES, ids=lambda probe: probe.function)
def test_an_argument_that_moved_is_no_matter_of_the_mode(probe: Probe) -> None:
    places = range(max(probe.arguments) + 1)
    moved = ["struct request_sock_ops", *(probe.arguments.get(place, "") for place in places)]
    found = report(with_functions(kernel(), {probe.function: moved}))
    assert "not a pointer to" in trouble(found)[probe.function]
    assert "kprobes only" not in trouble(found)[probe.function]
    assert bool(found.trouble) == probe.required
    assert probe.required or probe.function in {gap.probe for gap in found.gaps}


@pytest.mark.parametrize("types", [kernel(counters=()), kernel(without=COUNTER_MEMBER)])
def test_counters_that_a_file_does_not_show_are_a_gap(types: Types) -> None:
    found = report(with_functions(types))
    assert found.trouble == ""
    assert [gap.probe for gap in found.gaps] == [KERNEL_COUNTERS]
    assert any(
        line.startswith(f"gap: no {KERNEL_COUNTERS}") for line in kernel_lines(found, 90, False)
    )


def test_packets_that_a_kernel_may_mix_up_are_a_gap_and_a_change() -> None:
    first, second = (
        report(with_members(with_functions(kernel()), *members)) for members in (RT, RT_INTERLEAVED)
    )
    assert (first.gaps, second.trouble) == ((), "")
    assert [gap.probe for gap in second.gaps] == [SOFTIRQ_LOCK]
    assert [change.what for change in changes(first, second)] == [f"no {SOFTIRQ_LOCK}"]


def test_without_a_symbol_table_the_types_say_what_is_there() -> None:
    found = report(kernel(), None)
    assert {fact.symbol for fact in found.functions} == {"unknown"}
    assert found.trouble
    assert report(with_functions(kernel()), None).trouble == ""


def test_a_member_that_cannot_be_read_is_told() -> None:
    member = REQUIRED_MEMBERS[-1]
    found = report(with_functions(kernel(without=member)))
    assert f"no member {member.path}" in found.trouble
    assert list(trouble(found)) == [f"{member.kernel_struct}.{member.path}"]


def test_changes_are_those_between_two_kernels_and_no_others() -> None:
    def with_reasons(types: Types, **reasons: int) -> Types:
        tail = b"".join(
            struct.pack("=II", types.name(f"SKB_DROP_REASON_{name}"), value)
            for name, value in reasons.items()
        )
        types.add(ENUM, "skb_drop_reason", 4, tail, len(reasons))
        return with_functions(types)

    first = report(with_reasons(kernel(), NO_SOCKET=3, OLD=4))
    second = report(
        with_reasons(kernel(counters=(2, 3, 23, 24)), NO_SOCKET=4, NEW=9),
        FUNCTIONS - {"tcp_check_req"},
    )
    assert changes(first, first) == []
    assert {change.what: change[1:] for change in changes(first, second)} == {
        "symbol tcp_check_req": ("there", "missing"),
        "LINUX_MIB_LISTENOVERFLOWS": ("21", "23"),
        "LINUX_MIB_LISTENDROPS": ("22", "24"),
        "SKB_DROP_REASON_NO_SOCKET": ("3", "4"),
        "SKB_DROP_REASON_OLD": ("4", "-"),
        "SKB_DROP_REASON_NEW": ("-", "9"),
    }


class Machine:
    """What the doctor looks at, as a test wants it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.problems: dict[str, str] = {}
        self.opened: list[str] = []
        self.closed = 0
        self._set = monkeypatch.setattr
        self._set(features, "_effective_capabilities", lambda: (1 << 41) - 1)
        self.locked("none")
        self._set(features, "has_kprobes", lambda: True)
        self._set(kallsyms, "function_symbols", lambda _functions: FUNCTIONS)
        self._set(kallsyms, "read_symbols", lambda *_: (frozenset(), 4096))
        self._set(machine_report, "read_running_kernel", with_functions(kernel()).btf)
        self._set(features, "synproxy_note", lambda: "")
        self.with_option("y")
        for name in ("tracing", "ring_buffer", "batch_lookup"):
            self.refuse(name, None)

    def refuse(self, trial: str, why: str | None) -> None:
        self._set(bpf_syscall, f"{trial}_refusal", lambda: why)

    def without_types(self) -> None:
        def read() -> None:
            raise CannotTraceError("this kernel provides no BTF", "none", "vmlinux")

        self._set(machine_report, "read_running_kernel", read)

    def interleaves(self, option: str | None = "n") -> None:
        types = with_members(with_functions(kernel()), *RT_INTERLEAVED)
        self._set(machine_report, "read_running_kernel", types.btf)
        self.with_option(option)

    def with_option(self, value: str | None) -> None:
        """Every option of the kernel has this value; None: they cannot be read."""
        self._set(features, "kernel_option", lambda _name: value)

    def with_synproxy(self) -> None:
        self._set(features, "synproxy_note", lambda: "SYNPROXY may be in use")

    def without_kprobes(self) -> None:
        self._set(features, "has_kprobes", lambda: False)

    def locked(self, mode: str) -> None:
        self._set(features, "lockdown_mode", lambda: mode)
        self._set(features, "lockdown_text", lambda: f"lockdown is [{mode}]")

    def open_source(self, settings: TraceSettings) -> Any:
        self.opened.append(settings.probe_mode)
        problem = self.problems.get(settings.probe_mode)
        if problem is not None:
            raise CannotTraceError("the kernel refused", problem, "none")

        def close() -> None:
            self.closed += 1

        return SimpleNamespace(coverage=Coverage(settings.probe_mode, FUNCTIONS), close=close)

    def examined(self) -> MachineReport:
        return examine(self.open_source, lambda: "0.26.0")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def levels(found: MachineReport) -> dict[str, str]:
    return {check.what: check.level for check in found.checks}


def test_a_good_machine_is_able_and_left_as_it_was(machine: Machine) -> None:
    found = machine.examined()
    assert found.able
    assert NO not in levels(found).values()
    assert machine.opened == ["fentry", "kprobe"]
    assert machine.closed == len(machine.opened)
    answer, empty, *_ = machine_lines(found, 100, verbose=False)
    assert (answer, empty) == ("this machine can trace, by fentry and by kprobe", "")


def test_the_directory_of_kept_programs_is_looked_at(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    directory = tmp_path / "cache"
    monkeypatch.setattr(machine_report, "cache_directory", lambda: directory)
    assert levels(machine.examined())["kept programs"] == OK
    directory.mkdir()
    directory.chmod(0o777)
    found = machine.examined()
    (check,) = (one for one in found.checks if one.what == "kept programs")
    assert (check.level, "0777" in check.state) == (NOTE, True)
    assert found.able


def test_one_mode_is_enough(machine: Machine) -> None:
    machine.problems["fentry"] = "no trampoline"
    found = machine.examined()
    assert found.able
    assert levels(found)["attaching by fentry"] == NOTE
    assert levels(found)["attaching by kprobe"] == OK


def test_what_is_in_the_way_is_named(machine: Machine) -> None:
    machine.without_kprobes()
    machine.problems["fentry"] = EPERM
    machine.locked("confidentiality")
    machine.refuse("tracing", EPERM)
    found = machine.examined()
    assert not found.able
    assert machine.opened == ["fentry"]
    for what in ("lockdown", "kprobes", "reading kernel memory", "attaching by fentry"):
        assert levels(found)[what] == NO
        assert next(check for check in found.checks if check.what == what).remedy
    text = " ".join(machine_lines(found, 200, verbose=False))
    assert "lockdown is [confidentiality]" in text
    assert "no kprobe event type" in text


@pytest.mark.parametrize(
    ("spoil", "what", "level"),
    [
        (lambda m: m.refuse("ring_buffer", EPERM), "ring buffer", NO),
        (lambda m: m.refuse("batch_lookup", "EINVAL"), "batch lookup", NOTE),
        (lambda m: m.with_synproxy(), "cookies made elsewhere", NOTE),
        (lambda m: m.without_types(), "type information", NO),
        (lambda m: m.without_types(), SOFTIRQ_LOCK, NOTE),
        (lambda m: m.interleaves(), SOFTIRQ_LOCK, NOTE),
        (lambda m: m.interleaves(None), SOFTIRQ_LOCK, NOTE),
        (lambda m: m.interleaves("y"), SOFTIRQ_LOCK, OK),
        *(
            (lambda m, value=value: m.with_option(value), what, level)
            for what in ("--client", "--client --rescue=reset")
            for value, level in (("y", OK), ("m", OK), ("n", NOTE), (None, NOTE))
        ),
    ],
)
def test_each_precondition_speaks_for_itself(
    spoil: Callable[[Machine], None], what: str, level: str, machine: Machine
) -> None:
    spoil(machine)
    assert levels(machine.examined())[what] == level


def test_what_is_in_the_way_and_the_remedy_come_first(machine: Machine) -> None:
    machine.without_kprobes()
    machine.problems["fentry"] = EPERM
    machine.refuse("tracing", EPERM)
    answer, why, remedy, client, *rest = machine_lines(machine.examined(), 1000, verbose=False)
    assert answer == "this machine cannot trace"
    assert why.startswith(f"  why: by fentry: the kernel refused: {EPERM}; by kprobe: ")
    assert remedy.startswith("  remedy: ")
    assert "use a kernel with CONFIG_KPROBES=y" in remedy
    assert "lockdown, a security module" in remedy
    assert "see the rows above" not in remedy
    assert client == "  on a client's host no tracing is needed: tcpstuck-trace --client -p PORT"
    assert rest[0] == ""
    assert rest[1].split()[:2] == ["what", "state"]


@pytest.mark.parametrize(("value", "said"), [("m", True), (None, True), ("n", False)])
def test_where_sock_diag_is_missing_too_the_client_s_side_is_not_offered(
    value: str | None, said: bool, machine: Machine
) -> None:
    machine.problems = dict.fromkeys(("fentry", "kprobe"), "not root")
    machine.with_option(value)
    lines = [*machine_lines(machine.examined(), 1000, verbose=False)]
    assert any("--client -p PORT" in line for line in lines[: lines.index("")]) == said


def test_one_reason_for_both_modes_is_said_once(machine: Machine) -> None:
    machine.problems = dict.fromkeys(("fentry", "kprobe"), "not root")
    _, why, *_ = machine_lines(machine.examined(), 1000, verbose=False)
    assert why == "  why: by fentry and by kprobe: the kernel refused: not root"


def test_an_answer_that_has_scrolled_off_comes_again(machine: Machine) -> None:
    lines = [*machine_lines(machine.examined(), 80, verbose=False)]
    answer = lines[: lines.index("")]
    assert [*in_sight(lines, None)] == [*in_sight(lines, len(lines) + 1)] == lines
    assert [*in_sight(lines, 24)] == [*lines, *answer]


@pytest.mark.parametrize("able", [True, False])
def test_of_a_kernel_in_a_file_the_answer_comes_first(able: bool) -> None:
    types = (
        with_functions(kernel()) if able else with_functions(kernel(without=REQUIRED_MEMBERS[-1]))
    )
    found = report(types)
    answer, *rest = kernel_lines(found, 1000, verbose=False)
    word = "can" if able else "cannot"
    assert answer == f"this kernel {word} be traced: Linux 9.9, types from a test"
    assert (rest[0] == f"  why: {found.trouble}") == (not able)
    other = report(with_functions(kernel(counters=(5, 6, 7, 8))))
    lines = (
        change_lines(found, found, [], 1000),
        change_lines(found, other, changes(found, other)[:2], 1000),
    )
    assert [next(one) for one in lines] == [
        "Linux 9.9 -> 9.9: nothing that tcpstuck-trace uses has changed",
        "Linux 9.9 -> 9.9: 2 changes",
    ]


@pytest.mark.parametrize("width", [60, 80, 100])
@pytest.mark.parametrize("verbose", [False, True])
def test_no_path_setting_or_option_is_split_over_lines(
    width: int, verbose: bool, machine: Machine
) -> None:
    """They are copied, and looked for."""
    machine.without_kprobes()
    machine.locked("")
    machine.problems["fentry"] = "EPERM, lockdown unknown: /sys/kernel/security is not mounted"
    report = machine.examined()
    words = [one.strip("(:") for one in " ".join(machine_lines(report, width, verbose)).split()]
    for name in (
        "/sys/bus/event_source/devices/kprobe/type",
        "/sys/kernel/security",
        "CONFIG_KPROBES=y",
        "tcp_max_syn_backlog",
        str(machine_report.cache_directory()),
    ):
        assert name in words


@pytest.mark.parametrize("width", [60, 100, 200])
def test_tables_keep_to_the_width(width: int, machine: Machine) -> None:
    for line in machine_lines(machine.examined(), width, verbose=True):
        assert len(line) <= width
    found = report(with_functions(kernel()))
    other = report(with_functions(kernel(counters=(5, 6, 7, 8))))
    for line in (
        *kernel_lines(found, width, verbose=True),
        *change_lines(found, other, changes(found, other), width),
    ):
        assert len(line) <= width


def test_a_narrow_terminal_breaks_no_name_that_has_room(machine: Machine) -> None:
    """A remedy is copied, a reason's name looked up: neither may be cut to spare another column."""
    machine.locked("none")
    machine.without_kprobes()
    machine.problems["fentry"] = "EPERM, lockdown unknown: /sys/kernel/security is not mounted"
    shown = " ".join(machine_lines(machine.examined(), 80, verbose=False))
    words = [one.rstrip(":") for one in shown.split()]
    assert "CONFIG_KPROBES=y" in words
    assert "tcp_max_syn_backlog" in words
    name = "SKB_DROP_REASON_TCP_AOUNEXPECTED_AND_MORE"
    first = report(with_functions(kernel()))
    found = [Change(name, "-", "9"), Change("f", "a struct " * 20, "another struct " * 20)]
    lines = list(change_lines(first, first, found, 80))
    assert any(line.startswith(f"{name} ") for line in lines)
    assert max(map(len, lines)) <= 80


def test_json_is_an_object_a_line_with_the_answer_last(machine: Machine) -> None:
    lines = [json.loads(line) for line in machine_json(machine.examined())]
    assert lines[-1]["type"] == "doctor"
    assert lines[-1]["able"] is True
    assert {line["function"] for line in lines if line["type"] == "function"} == {
        probe.function for probe in EVERY_PROBE
    }
    assert {line["what"] for line in lines if line["type"] == "check"} == levels(
        machine.examined()
    ).keys()


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_kernel.build(tmp_path_factory.mktemp("kernel"), "-g")


def run(*words: str) -> int:
    with contextlib.suppress(SystemExit):
        return main(words)
    return EXIT_USAGE


def json_of(capsys: pytest.CaptureFixture[str]) -> Iterator[dict[str, Any]]:
    for line in capsys.readouterr().out.splitlines():
        yield json.loads(line)


def test_a_kernel_in_a_file_is_reported_on(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--doctor", "--vmlinux", str(image), "--json") == 0
    lines = list(json_of(capsys))
    places = {line["member"]: line["place"] for line in lines if line["type"] == "member"}
    for first, second, third, _ in fake_kernel.what_the_compiler_says(image):
        if f"{first}.{second}" in places:
            assert places[f"{first}.{second}"]["offset"] == int(third)
    assert {"release": fake_kernel.RELEASE}.items() <= lines[0].items()
    assert run("--doctor", "--vmlinux", str(image), "--against", str(image)) == 0
    assert "nothing that tcpstuck-trace uses has changed" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words",
    [
        ["--doctor", "-p", "3311"],
        ["--doctor", "--against", "/etc/passwd"],
        ["--doctor", "--vmlinux", "/etc/passwd"],
        ["--doctor", "--vmlinux", "/no/such/file", "--json"],
        ["--doctor", "--replay", "/etc/passwd"],
        ["--against", "/etc/passwd"],
        ["-p", "3311", "--vmlinux", "/etc/passwd"],
        ["--replay", "/etc/passwd", "--strict"],
    ],
)
def test_wrong_use_ends_with_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*words) == EXIT_USAGE
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    assert err


def test_the_wrong_kernel_s_file_ends_with_3(
    image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--vmlinux", str(image), "--dry-run") == EXIT_CANNOT_TRACE
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 3
    assert fake_kernel.RELEASE in err
