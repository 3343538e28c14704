"""Can this machine trace, and if not, what stands in the way and what would remove it.

Preconditions that can be read are read before anything is loaded; a refusal that only the
attempt shows is explained afterwards by `refusal`.
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
"""Those of capabilities(7) that the tool uses where it has them."""

_KPROBE_PMU = Path("/sys/bus/event_source/devices/kprobe/type")
_LOCKDOWN = Path("/sys/kernel/security/lockdown")
_MODULES = Path("/proc/modules")
_SYNPROXY = "nf_synproxy_core"
"""What every rule with the target SYNPROXY, and nftables' synproxy, needs."""


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


def held_capabilities() -> list[str]:
    """Names of the relevant capabilities in this process's effective set."""
    held = _effective_capabilities()
    return [name for name, bit in RELEVANT_CAPABILITIES.items() if held >> bit & 1]


def lockdown_mode() -> str | None:
    """The active lockdown mode, None where securityfs does not tell (kernel_lockdown(7))."""
    try:
        found = re.search(r"\[(\w+)\]", _LOCKDOWN.read_text(encoding="ascii"))
    except OSError:
        return None
    return found.group(1) if found else None


def lockdown_text() -> str:
    """The lockdown state in words, or why it cannot be told."""
    mode = lockdown_mode()
    if mode is not None:
        return f"lockdown is [{mode}]"
    if not _LOCKDOWN.parent.is_dir() or not any(_LOCKDOWN.parent.iterdir()):
        return f"lockdown unknown: securityfs is not mounted at {_LOCKDOWN.parent}"
    return f"this kernel has no lockdown ({_LOCKDOWN} is missing)"


def synproxy_note() -> str:
    """A sentence if netfilter makes cookies of its own on this host; empty if that is not known.

    Source: /proc/modules. In a kernel that has SYNPROXY built in there is no telling.
    """
    try:
        modules = _MODULES.read_text("ascii", "replace")
    except OSError:
        return ""
    if not any(line.startswith(f"{_SYNPROXY} ") for line in modules.splitlines()):
        return ""
    return (
        f"SYNPROXY may be in use (the module {_SYNPROXY} is loaded): the tool does not see "
        "handshakes that SYNPROXY answers, nor clients that get stuck under its cookies"
    )


def has_kprobes() -> bool:
    """Whether the kernel has the perf event type that attaches kprobes."""
    return _KPROBE_PMU.exists()


def kprobes_text() -> str:
    """Whether there are kprobes, in words, with what the kernel's configuration says of it."""
    if has_kprobes():
        return "the kernel has the kprobe event type"
    option = kernel_option("CONFIG_KPROBES")
    built = {"y": "CONFIG_KPROBES=y, but", None: ""}.get(option, "CONFIG_KPROBES is not set:")
    return f"{built} no kprobe event type ({_KPROBE_PMU} is missing)".lstrip()


def _configurations() -> list[str]:
    release = os.uname().release
    return ["/proc/config.gz", f"/boot/config-{release}", f"/lib/modules/{release}/config"]


def kernel_option(name: str) -> str | None:
    """`y`, `m` or `n` by the running kernel's configuration; None where it cannot be read."""
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

    `problem` is what it said, `wished` the probe mode that was asked for.
    """
    said = problem
    not_permitted = "not permitted" in problem or "EPERM" in problem
    if not_permitted:
        problem = (
            "EPERM in spite of the capabilities held, by lockdown or another security module "
            f"({lockdown_text()})"
        )
    if not has_kprobes() and wished == "kprobe":
        return CannotTraceError(
            "this kernel can attach no kprobes",
            kprobes_text(),
            "use --probe-mode fentry, or a kernel with CONFIG_KPROBES",
        )
    if not has_kprobes() and wished == "auto":
        return CannotTraceError(
            "this kernel can attach neither kprobes nor fentry programs",
            f"kprobes: {kprobes_text()}; fentry: {problem}",
            "use a kernel with CONFIG_KPROBES and CONFIG_DEBUG_INFO_BTF, unlocked (not lockdown); "
            "tcpstuck-trace --doctor says more",
        )
    limit, _ = locked_memory_limits()
    if not_permitted and "map" in said and limit is not None:
        return CannotTraceError(
            "the kernel refused to make the programs' tables",
            f"{problem}; or, before Linux 5.11, by RLIMIT_MEMLOCK: it is {limit} bytes and could "
            "not be raised without CAP_SYS_RESOURCE",
            "run it as root, or after `ulimit -l unlimited`",
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
        "try --probe-mode kprobe or fentry; if both fail report it, with the kernel's version",
    )


def fentry_obstacle() -> str | None:
    """Why BCC cannot attach fentry programs here, whatever the types were read from."""
    if Path(RUNNING_KERNEL).is_file():
        return None
    return f"BCC finds the functions in {RUNNING_KERNEL}, which this kernel does not have"
