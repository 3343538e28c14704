"""The attach plan: which probes a kernel gets, in what order, and the gaps of the others."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from tcpstuck_bpf.errors import CannotTraceError, UsageError
from tcpstuck_bpf.kernel.probes import (
    KERNEL_COUNTERS,
    OPTIONAL,
    PROBES,
    RESCUE_PROBES,
    WHY_PROBES,
    Probe,
    of_mode,
)
from tcpstuck_bpf.model import CoverageGap
from tcpstuck_bpf.typeinfo.graph import KernelTypes, Prototype

_IPV6_PROBES = frozenset({"cookie_v6_init_sequence", "cookie_v6_check"})
_MAKING_ENTRIES = frozenset({"cookie_v4_init_sequence", "cookie_v6_init_sequence"})

WITHOUT_VARIABLE = "TCPSTUCK_WITHOUT_PROBE"
"""A test switch: optional probes to leave out, to test that only a declared gap results."""

_NO_REFUSALS: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True)
class AttachRequest:
    """How to attach. No setting here changes the meaning of a recording."""

    types: KernelTypes | None = None
    """Source of struct members and prototypes; None means the running kernel's own BTF."""
    strict: bool = False
    """Whether a coverage gap is fatal."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Optional probes to leave out, and why."""
    rescue: bool = False
    """Whether SYN-ACKs are to be repeated, which needs more probes."""

    why: bool = True
    """Whether to look for packets dropped before TCP."""

    keep: bool = True
    """Whether to keep compiled programs for the next start, and use the kept ones."""
    programs: str | None = None
    """Directory of programs built elsewhere, to use instead of the compiler."""

    @property
    def probes(self) -> tuple[Probe, ...]:
        """The probes to attach."""
        rescue = RESCUE_PROBES if self.rescue else ()
        return (*PROBES, *rescue, *(WHY_PROBES if self.why else ()))


ATTACH_ALL = AttachRequest()


class ProbeRefusedError(CannotTraceError):
    """The kernel has the function, but refused to attach a program to it."""

    def __init__(self, function: str, refusal: CannotTraceError) -> None:
        super().__init__(f"{refusal.what}: {function}", refusal.why, refusal.remedy)
        self.function = function


def left_out(text: str) -> dict[str, str]:
    """Parse WITHOUT_VARIABLE, names separated by commas, into AttachRequest.left_out.

    Raises UsageError for a name that is not an optional probe's.
    """
    names = [name for name in text.split(",") if name]
    for name in names:
        if name not in OPTIONAL:
            raise UsageError(
                f"{WITHOUT_VARIABLE} names {name!r}",
                "only an optional probe can be left out",
                f"choose from {', '.join(OPTIONAL)}",
            )
    return dict.fromkeys(names, f"left out by {WITHOUT_VARIABLE}")


def plan(
    symbols: Collection[str],
    refused: Mapping[str, str] = _NO_REFUSALS,
    wanted: Sequence[Probe] = PROBES,
) -> tuple[tuple[Probe, ...], tuple[CoverageGap, ...]]:
    """The probes whose functions this kernel has, and the gaps that the others leave.

    `refused` has functions that cannot or must not be probed, and why. Raises CannotTraceError
    where a required function is missing or refused. IPv6 is all or nothing: if cookies are seen
    but ACKs are not, healthy clients would look stuck.
    """
    why = {
        probe.function: refused.get(probe.function, "the kernel has no such function")
        for probe in wanted
        if probe.symbol not in symbols or probe.function in refused
    }
    for probe in wanted:
        if probe.required and probe.function in symbols and probe.function in refused:
            raise CannotTraceError(
                f"the programs cannot use this kernel's {probe.function}",
                f"{refused[probe.function]}; without it {probe.lost}",
                "report it, with the kernel's version; a newer tcpstuck-trace may know it",
            )
        if probe in RESCUE_PROBES and probe.required and probe.function in why:
            raise CannotTraceError(
                f"this kernel has no function {probe.function} to probe",
                f"without it {probe.lost}",
                "leave out --rescue",
            )
        if probe.required and probe.function in why:
            raise CannotTraceError(
                f"this kernel has no function {probe.function} to probe",
                f"without it {probe.lost}; it may lack CONFIG_SYN_COOKIES or have it inlined",
                "use a kernel built with CONFIG_SYN_COOKIES=y",
            )
    for function in sorted(_IPV6_PROBES & why.keys()):
        for other in _IPV6_PROBES - why.keys():
            why[other] = f"useless without {function}"
    gaps = tuple(
        CoverageGap(probe.function, why[probe.function], probe.lost)
        for probe in wanted
        if probe.function in why
    )
    return tuple(probe for probe in wanted if probe.function not in why), gaps


def counter_gap(why: str) -> CoverageGap:
    """The gap of programs that cannot read LINUX_MIB_*."""
    return CoverageGap(KERNEL_COUNTERS, why, "it is unknown why an ACK was dropped or rejected")


def attach(
    symbols: Collection[str],
    request: AttachRequest,
    has_counters: bool,
    start: Callable[[tuple[Probe, ...]], str],
    besides: tuple[CoverageGap, ...] = (),
) -> tuple[str, tuple[Probe, ...], tuple[CoverageGap, ...]]:
    """Attach every possible probe. Returns the mode, the attached probes, and the gaps.

    `start` attaches all given probes and returns the mode. An optional probe that it cannot attach
    (ProbeRefusedError) becomes a gap, and `start` is called again with the rest. `besides` has
    gaps that belong to no probe. Raises what `plan` and `start` raise, and CannotTraceError for
    any gap if the request is strict.
    """
    refused = {**misread(request.types, request.probes), **request.left_out}
    required = {probe.function for probe in request.probes if probe.required}
    unseen = refused.get(KERNEL_COUNTERS, "__per_cpu_offset or LINUX_MIB_* was not found")
    while True:
        probes, gaps = plan(symbols, refused, request.probes)
        if not has_counters:
            gaps = (*gaps, counter_gap(unseen))
        gaps = (*gaps, *besides)
        if request.strict and gaps:
            raise CannotTraceError(
                "some probes are missing here, and --strict allows no gap",
                "; ".join(f"no {gap.probe} ({gap.why}): {gap.lost}" for gap in gaps),
                "leave out --strict; the verdicts then say what is unknown",
            )
        try:
            mode = start(probes)
        except ProbeRefusedError as error:
            if error.function in required:
                raise
            refused[error.function] = error.why
            continue
        unused = {probe.function for probe in request.probes if not probe.serves(mode)}
        gaps = tuple(gap for gap in gaps if gap.probe not in unused)
        return mode, of_mode(probes, mode), gaps


def attach_order(wanted: Sequence[Probe], mode: str) -> tuple[Probe, ...]:
    """The probes that have a program in a mode; the ones that make table entries come last.

    Otherwise an entry could be made before the probe that ends it is attached. A client that
    connects meanwhile would look stuck for ever.
    """
    return tuple(sorted(of_mode(wanted, mode), key=lambda probe: probe.function in _MAKING_ENTRIES))


def misread_argument(probe: Probe, prototype: Prototype) -> str | None:
    """Which argument is not at the position where the programs read it; None if all are.

    In both modes the programs find arguments only by position. If an argument moved, they would
    take something else for a socket.
    """
    for position, kind in probe.arguments.items():
        if position >= len(prototype.parameters):
            return f"it has {len(prototype.parameters)} parameters, no parameter {position + 1}"
        found = prototype.parameters[position]
        if not re.match(rf"(?:const |volatile )*{kind or '[^*(]+'} \*(?!\*)", found):
            return f"parameter {position + 1} is `{found}`, not a pointer to {kind or 'a number'}"
    return None


def misread(types: KernelTypes | None, wanted: Sequence[Probe] = PROBES) -> dict[str, str]:
    """Functions whose arguments the programs would misread, and why.

    A function without a described prototype counts as unchanged. Raises CannotTraceError where the
    types are damaged.
    """
    found: dict[str, str] = {}
    for probe in wanted:
        described = types is not None and probe.raw_tracepoint is None
        prototype = types.prototype(probe.function) if described and types is not None else None
        why = None if prototype is None else misread_argument(probe, prototype)
        if why is not None:
            found[probe.function] = why
    return found


def fentry_obstacle(types: KernelTypes, probes: Collection[Probe]) -> str | None:
    """Why fentry/fexit cannot be used for these probes; None if they can.

    The prototype decides, not the version: an extra parameter shifts fexit's return value.
    """
    for probe in of_mode(tuple(probes), "fentry"):
        if probe.raw_tracepoint is not None:
            continue
        count = types.parameter_count(probe.function)
        if count is None:
            return f"{probe.function} is not in the kernel's type information"
        if probe.parameters is not None and count != probe.parameters:
            return f"{probe.function} has {count} parameters, not {probe.parameters}"
    return None
