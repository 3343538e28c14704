"""The functions, members and counters that the tool needs of a kernel, and how two kernels differ.

Pure: the kernel may run here, or only be an image.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from tcpstuck_bpf.errors import CannotTraceError
from tcpstuck_bpf.kernel import attach_plan, probes
from tcpstuck_bpf.kernel.attach_plan import ATTACH_ALL
from tcpstuck_bpf.kernel.layout import (
    COUNTER_MEMBER,
    COUNTERS,
    REQUIRED_MEMBERS,
    SOCKET_MEMBERS,
    Member,
    find_layout,
    obstacle,
)
from tcpstuck_bpf.kernel.probes import EVERY_PROBE, Probe
from tcpstuck_bpf.kernel.softirqs import softirq_gaps
from tcpstuck_bpf.model import SOFTIRQ_LOCK, CoverageGap
from tcpstuck_bpf.typeinfo.graph import KernelTypes, MemberPlace, Prototype

ANY_ADDRESS = 1
"""Stands for the per-CPU offset table, whose address only a running kernel shows."""
COUNTER_PREFIX = "LINUX_MIB_"
DROP_REASON_PREFIX = "SKB_DROP_REASON_"
SUBSYSTEM_PREFIX = "SKB_DROP_REASON_SUBSYS_"
"""Prefix of other enums and a mask, for the subsystem in a reason beyond 65535."""


class FunctionFact(NamedTuple):
    """A function or tracepoint to probe."""

    probe: Probe
    prototype: Prototype | None
    """None where the type information has no such function."""
    symbol: str
    """`there`, `missing`, `unknown`, or the names found with a compiler's suffix."""
    arguments: int | None = None
    """Number of a tracepoint's arguments; None for a function, or if unknown."""

    @property
    def there(self) -> bool:
        """Whether it can be probed by its name, as far as known."""
        if self.symbol == "unknown":
            return self.prototype is not None or self.arguments is not None
        return self.symbol == "there"

    @property
    def declaration(self) -> str:
        """The prototype in C; `-` if unknown."""
        if self.probe.raw_tracepoint is not None:
            count = "-" if self.arguments is None else str(self.arguments)
            return f"tracepoint {self.probe.function}, arguments: {count}"
        return "-" if self.prototype is None else self.prototype.text(self.probe.function)

    @property
    def trouble(self) -> str:
        """Why it cannot be probed, or not fully; empty if it can."""
        if self.symbol not in ("there", "missing", "unknown"):
            return f"the compiler changed it, there is only {self.symbol}: {self.probe.lost}"
        if not self.there:
            return f"inlined, or not built in: {self.probe.lost}"
        if self.probe.raw_tracepoint is not None:
            has_reason = (self.arguments or 0) > probes.REASON_ARGUMENT
            return "" if has_reason else "it has no drop reason, only the drop site"
        if self.prototype is None:
            return "no type information: kprobes only"
        misread = attach_plan.misread_argument(self.probe, self.prototype)
        if misread is not None:
            return f"{misread}: {self.probe.lost}"
        count, expected = len(self.prototype.parameters), self.probe.parameters
        if expected is not None and count != expected:
            return f"{count} parameters instead of {expected}: kprobes only"
        return ""


class MemberFact(NamedTuple):
    """A struct member that the programs read."""

    member: Member
    place: MemberPlace | None

    @property
    def name(self) -> str:
        """Name of the struct, and path of the member."""
        return f"{self.member.kernel_struct}.{self.member.path}"

    @property
    def trouble(self) -> str:
        """Why the programs cannot read the member; empty if they can."""
        return obstacle(self.member, self.place) or ""


@dataclass(frozen=True)
class KernelReport:
    """The facts that decide whether and how a kernel can be traced."""

    release: str
    source: str
    """Where the types were read, and in which form."""
    functions: tuple[FunctionFact, ...]
    members: tuple[MemberFact, ...]
    counters: Mapping[str, int]
    """Index of each LINUX_MIB_* that the programs read."""
    drop_reasons: Mapping[str, int]
    """enum skb_drop_reason; empty before 5.17."""
    gaps: tuple[CoverageGap, ...]
    trouble: str
    """Why the kernel cannot be traced at all; empty if no obstacle is known."""


def _symbol(function: str, names: frozenset[str] | None) -> str:
    if names is None:
        return "unknown"
    if function in names:
        return "there"
    return ", ".join(sorted(n for n in names if n.startswith(f"{function}."))) or "missing"


def _prototype(probe: Probe, types: KernelTypes | None) -> Prototype | None:
    if types is None or probe.raw_tracepoint is not None:
        return None
    return types.prototype(probe.function)


def _arguments(probe: Probe, types: KernelTypes | None) -> int | None:
    if types is None or probe.raw_tracepoint is None:
        return None
    return types.tracepoint_arguments(probe.function)


def describe(
    release: str, source: str, types: KernelTypes | None, names: frozenset[str] | None
) -> KernelReport:
    """Look everything up.

    `names` has the kernel's function symbols; None if unknown. `types` is None if the kernel has
    no type information. Raises CannotTraceError where the types are damaged.
    """
    functions = tuple(
        FunctionFact(
            probe,
            _prototype(probe, types),
            _symbol(probe.symbol, names),
            _arguments(probe, types),
        )
        for probe in EVERY_PROBE
    )
    gaps: tuple[CoverageGap, ...] = ()
    trouble = "" if types is not None else "it has no type information"
    try:
        there = {fact.probe.symbol for fact in functions if fact.there}
        layout = None if types is None else find_layout(types, ANY_ADDRESS)
        refused = attach_plan.misread(types)
        if layout is not None and layout.drop_obstacle is not None:
            refused[probes.KFREE_SKB] = layout.drop_obstacle
        _, gaps = attach_plan.plan(there, refused, ATTACH_ALL.probes)
        if layout is not None and not layout.has_counters:
            gaps = (*gaps, attach_plan.counter_gap("the kernel's types do not contain them"))
        if types is not None:
            gaps = (*gaps, *softirq_gaps(types, None))
    except CannotTraceError as error:
        trouble = trouble or error.what
    if types is None:
        return KernelReport(release, source, functions, (), {}, {}, gaps, trouble)
    counters = types.enumerators(COUNTER_PREFIX)
    names_of_counters = [f"{COUNTER_PREFIX}{name}" for name in COUNTERS]
    return KernelReport(
        release,
        source,
        functions,
        tuple(
            MemberFact(member, types.place(member.kernel_struct, member.path))
            for member in (*REQUIRED_MEMBERS, *SOCKET_MEMBERS, COUNTER_MEMBER)
        ),
        {name: counters[name] for name in names_of_counters if name in counters},
        {
            name: value
            for name, value in types.enumerators(DROP_REASON_PREFIX).items()
            if not name.startswith(SUBSYSTEM_PREFIX)
        },
        gaps,
        trouble,
    )


class Change(NamedTuple):
    """A difference between two kernels; `-` if one of them lacks the item."""

    what: str
    before: str
    after: str


def place_text(place: MemberPlace | None) -> str:
    """A member's offset and size, as text."""
    if place is None:
        return "-"
    bits = f", {place.bits} bits" if place.bits else ""
    return f"offset {place.offset}, {place.size} bytes{bits}"


def _facts(report: KernelReport) -> Iterator[tuple[str, str]]:
    for function in report.functions:
        yield function.probe.function, function.declaration
        if function.symbol != "unknown":
            yield f"symbol {function.probe.function}", function.symbol
    for member in report.members:
        yield member.name, place_text(member.place)
    for values in (report.counters, report.drop_reasons):
        yield from ((name, str(value)) for name, value in values.items())
    yield from ((f"no {gap.probe}", gap.lost) for gap in report.gaps if gap.probe == SOFTIRQ_LOCK)


def changes(before: KernelReport, after: KernelReport) -> list[Change]:
    """The differences, in the order of the report; only symbols that both know are compared."""
    first, second = dict(_facts(before)), dict(_facts(after))
    found = []
    for what in {**first, **second}:
        if what.startswith("symbol ") and not (what in first and what in second):
            continue
        old, new = first.get(what, "-"), second.get(what, "-")
        if old != new:
            found.append(Change(what, old, new))
    return found
