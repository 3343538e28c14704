"""Checks whether this machine can trace; if not, names the obstacle and the remedy.

Most preconditions are checked before anything is loaded. `refusal` explains those that only an
attempt shows.
"""

from __future__ import annotations

import gzip
import os
import re
import resource
from pathlib import Path

from tcpstuck_bpf.errors import CannotTraceError, as_root_remedy
from tcpstuck_bpf.typeinfo.btf import RUNNING_KERNEL

CAP_SYS_ADMIN = 21
CAP_PERFMON = 38
CAP_BPF = 39

RELEVANT_CAPABILITIES = {
    "CAP_SYS_ADMIN": CAP_SYS_ADMIN,
    "CAP_SYS_RESOURCE": 24,
    "CAP_SYSLOG": 34,
    "CAP_PERFMON": CAP_PERFMON,
    "CAP_BPF": CAP_BPF,
}
"""The capabilities(7) that the tool can use."""

_KPROBE_PMU = Path("/sys/bus/event_source/devices/kprobe/type")
_LOCKDOWN = Path("/sys/kernel/security/lockdown")
_MODULES = Path("/proc/modules")
_SYNPROXY = "nf_synproxy_core"
"""The module that iptables' SYNPROXY and nftables' synproxy need."""


def _effective_capabilities() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    found = re.search(r"^CapEff:\s*([0-9a-f]+)$", status, re.MULTILINE)
    return int(found.group(1), 16) if found else 0


def has_tracing_capabilities() -> bool:
    """Whether we have CAP_SYS_ADMIN, or CAP_BPF with CAP_PERFMON (capabilities(7))."""
    held = _effective_capabilities()
    if held >> CAP_SYS_ADMIN & 1:
        return True
    return bool(held >> CAP_BPF & 1 and held >> CAP_PERFMON & 1)


def held_capabilities() -> list[str]:
    """Names of the relevant capabilities in our effective set."""
    held = _effective_capabilities()
    return [name for name, bit in RELEVANT_CAPABILITIES.items() if held >> bit & 1]


def lockdown_mode() -> str | None:
    """The active lockdown mode; None if securityfs does not show it (kernel_lockdown(7))."""
    try:
        found = re.search(r"\[(\w+)\]", _LOCKDOWN.read_text(encoding="ascii"))
    except OSError:
        return None
    return found.group(1) if found else None


def lockdown_text() -> str:
    """The lockdown state as text, or why it is unknown."""
    mode = lockdown_mode()
    if mode is not None:
        return f"lockdown is [{mode}]"
    if not _LOCKDOWN.parent.is_dir() or not any(_LOCKDOWN.parent.iterdir()):
        return f"lockdown unknown: securityfs is not mounted at {_LOCKDOWN.parent}"
    return f"this kernel has no lockdown ({_LOCKDOWN} is missing)"


def synproxy_note() -> str:
    """A note if netfilter may send its own cookies on this host; empty if it is not known to.

    Source: /proc/modules, which does not show a SYNPROXY that is built into the kernel.
    """
    try:
        modules = _MODULES.read_text("ascii", "replace")
    except OSError:
        return ""
    if not any(line.startswith(f"{_SYNPROXY} ") for line in modules.splitlines()):
        return ""
    return (
        f"SYNPROXY may be in use (module {_SYNPROXY} is loaded): the tool does not see "
        "handshakes that SYNPROXY answers, nor clients stuck under its cookies"
    )


def has_kprobes() -> bool:
    """Whether the kernel has the perf event type that attaches kprobes."""
    return _KPROBE_PMU.exists()


def kprobes_text() -> str:
    """Whether there are kprobes, as text, with the kernel's configuration."""
    if has_kprobes():
        return "the kernel has the kprobe event type"
    option = kernel_option("CONFIG_KPROBES")
    built = {"y": "CONFIG_KPROBES=y, but", None: ""}.get(option, "CONFIG_KPROBES is not set:")
    return f"{built} no kprobe event type ({_KPROBE_PMU} is missing)".lstrip()


def _configurations() -> list[str]:
    release = os.uname().release
    return ["/proc/config.gz", f"/boot/config-{release}", f"/lib/modules/{release}/config"]


def kernel_option(name: str) -> str | None:
    """An option of the running kernel, `y`, `m` or `n`; None if its config cannot be read."""
    for path in _configurations():
        try:
            data = Path(path).read_bytes()
            text = (gzip.decompress(data) if path.endswith(".gz") else data).decode("ascii")
        except (OSError, EOFError, ValueError):
            continue
        found = re.search(rf"^{name}=(\w+)$", text, re.MULTILINE)
        return found.group(1) if found else "n"
    return None


def locked_memory_limits() -> tuple[int | None, int | None]:
    """Soft and hard RLIMIT_MEMLOCK in bytes; None means unlimited."""
    limits = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    soft, hard = (None if limit == resource.RLIM_INFINITY else limit for limit in limits)
    return soft, hard


def require_privileges() -> None:
    """Raises CannotTraceError without the capabilities, or under lockdown (confidentiality)."""
    if not has_tracing_capabilities():
        raise CannotTraceError(
            "no permission to load BPF programs",
            f"user {os.geteuid()} has neither CAP_SYS_ADMIN nor CAP_BPF with CAP_PERFMON",
            as_root_remedy(),
        )
    if lockdown_mode() == "confidentiality":
        raise CannotTraceError(
            "this kernel is locked down and refuses BPF tracing",
            "lockdown mode is [confidentiality] (/sys/kernel/security/lockdown)",
            "boot with lockdown=integrity or less, or trace on another machine",
        )


def refusal(problem: str, wished: str) -> CannotTraceError:
    """The error for a kernel that refused to load or attach.

    `problem` is the kernel's error, `wished` the requested probe mode.
    """
    said = problem
    not_permitted = "not permitted" in problem or "EPERM" in problem
    if not_permitted:
        problem = (
            "EPERM despite sufficient capabilities: lockdown or another security module refused "
            f"({lockdown_text()})"
        )
    if not has_kprobes() and wished == "kprobe":
        return CannotTraceError(
            "this kernel cannot attach kprobes",
            kprobes_text(),
            "use --probe-mode fentry, or a kernel with CONFIG_KPROBES",
        )
    if not has_kprobes() and wished == "auto":
        return CannotTraceError(
            "this kernel can attach neither kprobes nor fentry programs",
            f"kprobes: {kprobes_text()}; fentry: {problem}",
            "use a kernel with CONFIG_KPROBES and CONFIG_DEBUG_INFO_BTF and without lockdown; "
            "tcpstuck-trace --doctor says more",
        )
    limit, _ = locked_memory_limits()
    if not_permitted and "map" in said and limit is not None:
        return CannotTraceError(
            "the kernel refused to create the programs' tables",
            f"{problem}; or, before Linux 5.11, RLIMIT_MEMLOCK: it is {limit} bytes, and raising "
            "it needs CAP_SYS_RESOURCE",
            "run tcpstuck-trace as root, or after `ulimit -l unlimited`",
        )
    if not_permitted:
        return CannotTraceError(
            "the kernel refused to load BPF tracing programs",
            problem,
            "see `cat /sys/kernel/security/lockdown`, the kernel log, and tcpstuck-trace --doctor",
        )
    return CannotTraceError(
        "the kernel refused the BPF programs",
        problem,
        "try --probe-mode kprobe or fentry; if both fail, report it with the kernel's version",
    )


def fentry_obstacle() -> str | None:
    """Why fentry programs cannot be attached here, even if a file provides the types."""
    if Path(RUNNING_KERNEL).is_file():
        return None
    return f"fentry needs {RUNNING_KERNEL}, which this kernel does not have"
