"""Checks every precondition of tracing on this machine, by trying it where nothing else shows it.

Nothing stays attached, and nothing on the machine changes, except that the programs compiled for
the trial are kept, as at every start.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from tcpstuck_bpf.ending import Ending
from tcpstuck_bpf.errors import CannotTraceError, as_root_remedy
from tcpstuck_bpf.host import bpf_syscall, kallsyms, netns_counters, netns_owners
from tcpstuck_bpf.kernel import features
from tcpstuck_bpf.kernel.kept_files import KeptFiles, cache_directory
from tcpstuck_bpf.kernel.kernel_report import KernelReport, describe
from tcpstuck_bpf.kernel.layout import PER_CPU_OFFSET_SYMBOL
from tcpstuck_bpf.kernel.probes import EVERY_PROBE
from tcpstuck_bpf.kernel.softirqs import BH_LOCK_OPTION, softirq_gaps
from tcpstuck_bpf.model import SOFTIRQ_LOCK, Coverage, CoverageGap, TraceSettings
from tcpstuck_bpf.typeinfo.btf import RUNNING_KERNEL, read_running_kernel
from tcpstuck_bpf.typeinfo.graph import KernelTypes

OK, NOTE, NO = "ok", "note", "NO"
MODES = ("fentry", "kprobe")
TRIAL_HANDSHAKES = 1024
SOCK_DIAG_OPTION = "CONFIG_INET_TCP_DIAG"
SOCK_DESTROY_OPTION = "CONFIG_INET_DIAG_DESTROY"


class Attached(Protocol):
    """Attached programs; `kernel.source.KernelSource` is one implementation."""

    @property
    def coverage(self) -> Coverage:
        """The attached probes, and the gaps."""

    def close(self) -> None:
        """Detach the programs."""


OpenSource = Callable[[TraceSettings], Attached]

SYNCOOKIES = {
    0: "no cookies: a full queue drops SYNs",
    1: "cookies while a listener's SYN queue is full",
    2: "a cookie for every SYN",
}
"""Meaning of net.ipv4.tcp_syncookies (ip-sysctl.rst)."""


class Check(NamedTuple):
    """One precondition."""

    what: str
    level: str
    """OK, NOTE, or NO."""
    state: str
    why: str
    """Why it matters."""
    remedy: str = ""


class Trial(NamedTuple):
    """Result of loading and attaching our programs in one mode for a moment."""

    attached: frozenset[str]
    gaps: tuple[CoverageGap, ...]
    problem: str
    """Why the trial failed; empty if it succeeded."""


@dataclass(frozen=True)
class MachineReport:
    """The doctor's report on this machine."""

    kernel: KernelReport
    checks: tuple[Check, ...]
    trials: Mapping[str, Trial]
    """Trials by mode."""
    client_side: bool
    """Whether --client works as far as the kernel's configuration shows."""
    namespaces: Mapping[int, Mapping[str, int]]
    """Queue settings by inode number; empty for a namespace that cannot be entered."""
    names: Mapping[int, str]

    @property
    def able(self) -> bool:
        """Whether our programs attach in at least one mode."""
        return any(not trial.problem for trial in self.trials.values())

    @property
    def gaps(self) -> tuple[CoverageGap, ...]:
        """Coverage gaps of the mode with the fewest gaps."""
        worked = [trial.gaps for trial in self.trials.values() if not trial.problem]
        return min(worked, key=len, default=())


def examine(open_source: OpenSource, bcc_version: Callable[[], str]) -> MachineReport:
    """Examine this machine. Missing preconditions are reported, not raised."""
    types, types_check = _types()
    trials = {mode: _try(open_source, mode) for mode in MODES}
    names = kallsyms.function_symbols([probe.symbol for probe in EVERY_PROBE]) or None
    source = f"{RUNNING_KERNEL} (BTF)" if types is not None else "no type information"
    return MachineReport(
        kernel=describe(os.uname().release, source, types, names),
        checks=(
            _capabilities(),
            _lockdown(),
            _tracing_programs(),
            _kprobes(any(not trial.problem for trial in trials.values())),
            types_check,
            *(_mode(mode, trials) for mode in MODES),
            _ring_buffer(),
            _batch_lookup(),
            _locked_memory(),
            _counters(),
            _softirq_lock(types),
            _cookies_elsewhere(),
            _bcc(bcc_version),
            _kept_programs(),
            _client_side(),
            _ending_connections(),
        ),
        trials=trials,
        client_side=features.kernel_option(SOCK_DIAG_OPTION) != "n",
        namespaces=netns_counters.read_queue_settings(),
        names=netns_owners.names(),
    )


def _try(open_source: OpenSource, mode: str) -> Trial:
    if mode == "kprobe" and not features.has_kprobes():
        return Trial(frozenset(), (), features.kprobes_text())
    try:
        source = open_source(TraceSettings(probe_mode=mode, max_handshakes=TRIAL_HANDSHAKES))
    except CannotTraceError as error:
        return Trial(frozenset(), (), f"{error.what}: {error.why}")
    coverage = source.coverage
    failures: list[str] = []
    with Ending(failures.append) as ending:
        ending.add("the programs were not detached cleanly", source.close)
    lost = "the programs stay attached until this process ends"
    gaps = (CoverageGap("clean end", failure, lost) for failure in failures)
    return Trial(coverage.probes, (*coverage.gaps, *gaps), "")


def _capabilities() -> Check:
    held = features.held_capabilities()
    enough = features.has_tracing_capabilities()
    who = "root" if os.geteuid() == 0 else f"user {os.geteuid()}"
    return Check(
        "capabilities",
        OK if enough else NO,
        f"{who} with {', '.join(held) or 'none of the needed ones'}",
        "CAP_SYS_ADMIN, or CAP_BPF and CAP_PERFMON, load and attach the programs; CAP_SYSLOG shows "
        "the kernel's addresses; CAP_NET_ADMIN is not needed",
        "" if enough else as_root_remedy(),
    )


def _lockdown() -> Check:
    why = "mode [confidentiality] forbids reading the kernel's memory (kernel_lockdown(7))"
    mode, text = features.lockdown_mode(), features.lockdown_text()
    if mode == "confidentiality":
        return Check("lockdown", NO, text, why, "boot with lockdown=integrity or less")
    if mode is not None or "no lockdown" in text:
        return Check("lockdown", OK, text, why)
    remedy = "to see it: mount -t securityfs none /sys/kernel/security"
    return Check("lockdown", NOTE, text, why, remedy)


def _tracing_programs() -> Check:
    refusal = bpf_syscall.tracing_refusal()
    return Check(
        "reading kernel memory",
        NO if refusal else OK,
        refusal or "a program that calls bpf_probe_read_kernel loads",
        "tried with bpf(2), since capabilities, lockdown and security modules can all forbid it",
        "EPERM: lockdown, a security module or a container's seccomp filter" if refusal else "",
    )


def _kprobes(any_mode_works: bool) -> Check:
    why, state = "one of the two ways to attach", features.kprobes_text()
    if features.has_kprobes():
        return Check("kprobes", OK, state, why)
    if any_mode_works:
        return Check("kprobes", NOTE, state, why)
    return Check("kprobes", NO, state, why, "use a kernel with CONFIG_KPROBES=y")


def _types() -> tuple[KernelTypes | None, Check]:
    why = "shows the offsets of struct members and the parameters of functions"
    try:
        types = read_running_kernel()
    except CannotTraceError as error:
        return None, Check("type information", NO, f"{error.what}: {error.why}", why, error.remedy)
    return types, Check("type information", OK, f"BTF in {RUNNING_KERNEL}", why)


def _mode(mode: str, trials: Mapping[str, Trial]) -> Check:
    what, trial = f"attaching by {mode}", trials[mode]
    why = {
        "fentry": "the cheaper way to attach; auto prefers it",
        "kprobe": "the way to attach if fentry does not work",
    }[mode]
    if not trial.problem:
        gaps = f", {len(trial.gaps)} gaps" if trial.gaps else ""
        return Check(what, OK, f"tried: {len(trial.attached)} probes attach{gaps}", why)
    works = [other for other in MODES if not trials[other].problem]
    if works:
        return Check(what, NOTE, trial.problem, why, f"none needed: {works[0]} works")
    return Check(what, NO, trial.problem, why, "see the rows above, and the kernel log")


def _cookies_elsewhere() -> Check:
    what, why = "cookies made elsewhere", "the tool sees only cookies that TCP itself makes"
    if note := features.synproxy_note():
        return Check(what, NOTE, note, why, "look for rules with synproxy (nft, iptables-save)")
    return Check(what, OK, "SYNPROXY is not loaded", why)


def _ring_buffer() -> Check:
    refusal = bpf_syscall.ring_buffer_refusal()
    return Check(
        "ring buffer",
        NO if refusal else OK,
        refusal or "tried: the kernel creates one",
        "carries the events (Linux 5.8 and later)",
        "use a later kernel" if refusal else "",
    )


def _batch_lookup() -> Check:
    refusal = bpf_syscall.batch_lookup_refusal()
    return Check(
        "batch lookup",
        NOTE if refusal else OK,
        refusal or "tried: a table can be read in batches",
        "reads a full table in a fraction of the time; without it, and with kprobes, the tool "
        "reads entry by entry",
    )


def _locked_memory() -> Check:
    soft, hard = features.locked_memory_limits()
    words = ["unlimited" if limit is None else f"{limit} bytes" for limit in (soft, hard)]
    liftable = hard is None or "CAP_SYS_RESOURCE" in features.held_capabilities()
    return Check(
        "RLIMIT_MEMLOCK",
        OK if liftable else NOTE,
        f"{words[0]}, at most {words[1]}" + ("; raised while tracing" if liftable else ""),
        "kernels before 5.11 charge the tables' memory to it; later ones do not",
        "" if liftable else "before 5.11: ulimit -l unlimited",
    )


def _counters() -> Check:
    why = "show why an ACK was dropped or rejected; without them that is a coverage gap"
    try:
        _, address = kallsyms.read_symbols((), PER_CPU_OFFSET_SYMBOL)
    except CannotTraceError as error:
        return Check("kernel counters", NOTE, f"{error.what}: {error.why}", why, error.remedy)
    if address is None:
        state = f"/proc/kallsyms does not show the address of {PER_CPU_OFFSET_SYMBOL}"
        remedy = "CAP_SYSLOG, kernel.kptr_restrict below 2, CONFIG_KALLSYMS_ALL=y"
        return Check("kernel counters", NOTE, state, why, remedy)
    return Check("kernel counters", OK, f"{PER_CPU_OFFSET_SYMBOL} is visible", why)


def _softirq_lock(types: KernelTypes | None) -> Check:
    why = "keeps packets of one CPU from preempting each other; without it there is a coverage gap"
    if types is None:
        return Check(SOFTIRQ_LOCK, NOTE, "unknown without type information", why)
    gaps = softirq_gaps(types, features.kernel_option(BH_LOCK_OPTION))
    if gaps:
        remedy = (
            f"kprobes (chosen by auto); a kernel with {BH_LOCK_OPTION}=y, or without PREEMPT_RT"
        )
        return Check(SOFTIRQ_LOCK, NOTE, gaps[0].why, why, remedy)
    return Check(SOFTIRQ_LOCK, OK, "no packet preempts another on its CPU", why)


def _bcc(bcc_version: Callable[[], str]) -> Check:
    why = (
        "compiles the programs; neither BCC's embedded headers nor kernel headers matter, because "
        "the package has its own"
    )
    try:
        return Check("BCC", OK, bcc_version(), why)
    except CannotTraceError as error:
        return Check("BCC", NO, f"{error.what}: {error.why}", why, error.remedy)


def _kept_programs() -> Check:
    usable, state = KeptFiles(cache_directory()).state()
    why = "the next start is faster if it finds the compiled programs"
    remedy = "" if usable else "make it ours alone (chown, chmod 0700), or remove it"
    return Check("kept programs", OK if usable else NOTE, state, why, remedy)


def _client_side() -> Check:
    why = "lists the connections of a client's host by sock_diag; needs neither BPF nor BCC"
    return _by_option("--client", SOCK_DIAG_OPTION, why)


def _ending_connections() -> Check:
    why = "ends connections whose server gives no answer, by SOCK_DESTROY of sock_diag"
    return _by_option("--client --rescue=reset", SOCK_DESTROY_OPTION, why)


def _by_option(what: str, option: str, why: str) -> Check:
    """A check of the kernel's configuration: a request to sock_diag would load its module."""
    value = features.kernel_option(option)
    if value is None:
        state = f"{option} is unknown: the kernel's configuration cannot be read"
        return Check(what, NOTE, state, why, "none needed: the option itself finds out")
    if value == "n":
        return Check(what, NOTE, f"{option} is not set", why, f"use a kernel with {option}")
    return Check(what, OK, f"{option}={value}", why)
