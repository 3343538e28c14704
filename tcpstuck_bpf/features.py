"""Can this machine trace, and if not, what stands in the way and what would remove it.

Preconditions that can be read are read before anything is loaded; a refusal that only the
attempt shows is explained afterwards by `explain_refusal`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from pathlib import Path

from tcpstuck_bpf.errors import CannotTraceError

CAP_SYS_ADMIN = 21
CAP_PERFMON = 38
CAP_BPF = 39

_KPROBE_PMU = Path("/sys/bus/event_source/devices/kprobe/type")
_LOCKDOWN = Path("/sys/kernel/security/lockdown")


def _effective_capabilities() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    found = re.search(r"^CapEff:\s*([0-9a-f]+)$", status, re.MULTILINE)
    return int(found.group(1), 16) if found else 0


def has_tracing_capabilities() -> bool:
    """CAP_SYS_ADMIN, or CAP_BPF with CAP_PERFMON (capabilities(7))."""
    held = _effective_capabilities()
    if held >> CAP_SYS_ADMIN & 1:
        return True
    return bool(held >> CAP_BPF & 1 and held >> CAP_PERFMON & 1)


def lockdown_mode() -> str | None:
    """The active lockdown mode, None where securityfs does not tell (kernel_lockdown(7))."""
    try:
        found = re.search(r"\[(\w+)\]", _LOCKDOWN.read_text(encoding="ascii"))
    except OSError:
        return None
    return found.group(1) if found else None


def has_kprobes() -> bool:
    """Whether the kernel has the perf event type that attaches kprobes."""
    return _KPROBE_PMU.exists()


def require_privileges() -> None:
    """Raises CannotTraceError without the capabilities, or under lockdown (confidentiality)."""
    if not has_tracing_capabilities():
        raise CannotTraceError(
            "no permission to load BPF programs",
            f"user {os.geteuid()} has neither CAP_SYS_ADMIN nor CAP_BPF with CAP_PERFMON",
            "run it as root: sudo tcpstuck-trace",
        )
    if lockdown_mode() == "confidentiality":
        raise CannotTraceError(
            "this kernel is locked down and refuses BPF tracing",
            "lockdown mode is [confidentiality] (/sys/kernel/security/lockdown)",
            "boot with lockdown=integrity or less, or trace on another machine",
        )


def refusal(problem: str) -> CannotTraceError:
    """The error for a kernel that refused to load or attach; `problem` is what it said."""
    if not has_kprobes():
        return CannotTraceError(
            "this kernel can attach neither kprobes nor fentry programs",
            f"it has no kprobe event type ({_KPROBE_PMU} is missing), and fentry: {problem}",
            "use a kernel with CONFIG_KPROBES and CONFIG_DEBUG_INFO_BTF, unlocked (not lockdown)",
        )
    if "not permitted" in problem or "EPERM" in problem:
        return CannotTraceError(
            "the kernel refused to load BPF tracing programs",
            "EPERM in spite of the capabilities held: lockdown or another security module",
            "see `cat /sys/kernel/security/lockdown` and the kernel log",
        )
    return CannotTraceError(
        "the kernel refused the BPF programs",
        problem,
        "try --probe-mode kprobe or fentry; if both fail report it, with the kernel's version",
    )


def read_symbols(functions: Collection[str], data_symbol: str) -> tuple[frozenset[str], int | None]:
    """Which of `functions` the kernel has, and the address of `data_symbol` (None if hidden).

    Source: /proc/kallsyms, whose addresses read as zero without CAP_SYSLOG or with
    kptr_restrict=2. Raises CannotTraceError where it cannot be read.
    """
    try:
        symbols = Path("/proc/kallsyms").read_bytes()
    except OSError as error:
        raise CannotTraceError(
            "the kernel's symbol table cannot be read",
            f"/proc/kallsyms: {error.strerror}",
            "use a kernel built with CONFIG_KALLSYMS=y and mount /proc",
        ) from error
    found = frozenset(name for name in functions if b" " + name.encode() + b"\n" in symbols)
    line_end = symbols.find(b" " + data_symbol.encode() + b"\n")
    if line_end < 0:
        return found, None
    line_start = symbols.rfind(b"\n", 0, line_end) + 1
    return found, int(symbols[line_start:line_end].split()[0], 16) or None
