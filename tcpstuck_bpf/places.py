"""The kernel's own words for where and why it dropped a packet: symbols, and enum skb_drop_reason.

They are looked up on the machine that traces, once for each number, and travel as text with what
was observed: a recording has to name them on another machine too.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from tcpstuck_bpf.kernel_types import KernelTypes
from tcpstuck_bpf.model import Handshake, KernelNames, Row, Ruleset

RULES_INTERVAL_NS = 1_000_000_000
RULES_SHARE = 4
"""A namespace's rules are not read more often than that, nor for more than one part in so many of
the time: a flood must not be paid for. A drop in between waits for the next time, which mostly
comes before its verdict: another rule may have dropped it than those that were read."""

_SYMBOLS = Path("/proc/kallsyms")
_REASON_PREFIX = "SKB_DROP_REASON_"
_NO_REASONS = ("SUBSYS_", "MAX")
"""Of other enums with that prefix (include/net/dropreason.h), or no reason."""
_SUBSYSTEM_SHIFT = 16
_REASONS_OF_THE_PROGRAMS = ("NO_SOCKET", "PACKET_SOCK_ERROR")
_FUNCTION_KINDS = frozenset(b"tTwW")


def reason_names(types: KernelTypes) -> Mapping[int, str]:
    """This kernel's drop reasons by number, without their prefix; empty before 5.17."""
    return {
        value: name[len(_REASON_PREFIX) :]
        for name, value in types.enumerators(_REASON_PREFIX).items()
        if not name[len(_REASON_PREFIX) :].startswith(_NO_REASONS)
    }


def reason_text(number: int, names: Mapping[int, str]) -> str | None:
    """A drop reason in words; None where this kernel has no reasons.

    Beyond 65535 it is another subsystem's (SKB_DROP_REASON_SUBSYS_SHIFT), whose names vmlinux
    does not always describe.
    """
    if not names:
        return None
    if number in names:
        return names[number]
    subsystem, own = number >> _SUBSYSTEM_SHIFT, number & ((1 << _SUBSYSTEM_SHIFT) - 1)
    return f"subsystem {subsystem} reason {own}" if subsystem else f"reason {number}"


def reason_defines(names: Mapping[int, str]) -> str:
    """#define lines for the programs; empty for a kernel whose skb:kfree_skb has no reason."""
    if not names:
        return ""
    known = {name: number for number, name in names.items() if name in _REASONS_OF_THE_PROGRAMS}
    lines = ["KFREE_SKB_HAS_REASON", *(f"REASON_{name} {value}" for name, value in known.items())]
    return "".join(f"#define {line}\n" for line in lines)


def place_names(addresses: Iterable[int]) -> dict[int, str]:
    """Kernel addresses as `symbol+0x1f`, those of modules too; one that is hidden in hexadecimal.

    Source: /proc/kallsyms, read anew because modules come and go.
    """
    try:
        lines = _SYMBOLS.read_bytes().splitlines()
    except OSError:
        lines = []
    symbols = sorted(_functions(lines))
    starts = [start for start, _ in symbols]
    found = {}
    for address in addresses:
        index = bisect.bisect_right(starts, address) - 1
        found[address] = f"{address:#x}"
        if index >= 0:
            start, name = symbols[index]
            found[address] = f"{name}+{address - start:#x}"
    return found


def _functions(lines: Iterable[bytes]) -> Iterator[tuple[int, str]]:
    """Address and name of each; addresses read as 0 where they are hidden."""
    for line in lines:
        address, kind, name = line.split(maxsplit=2)
        if kind[0] in _FUNCTION_KINDS and address.strip(b"0"):
            yield int(address, 16), name.split()[0].decode("ascii", "replace")


class Namer:
    """Says what the numbers in entries mean, each once, and reads rules when netfilter dropped.

    `read_stack` gives the addresses of a stack by its number, the innermost first; `read_ruleset`
    the rules of a network namespace.
    """

    def __init__(
        self,
        reasons: Mapping[int, str],
        read_stack: Callable[[int], tuple[int, ...]],
        read_ruleset: Callable[[int], Ruleset],
        clock_ns: Callable[[], int],
    ) -> None:
        self._reasons = reasons
        self._read_stack = read_stack
        self._read_ruleset = read_ruleset
        self._clock_ns = clock_ns
        self._places: dict[int, str] = {0: ""}
        self._known_reasons: set[int] = set()
        self._known_stacks: set[int] = {0}
        self._rules_read: dict[int, tuple[int, int]] = {}
        """By namespace, when they were read last, and when they may be read again."""

    def __call__(self, rows: Iterable[Row]) -> KernelNames | None:
        """Names of what is new in these entries; None where nothing is."""
        dropped = [row for row in rows if row.handshake.filter_place or row.handshake.drop_place]
        if not dropped:
            return None
        entries = [row.handshake for row in dropped]
        places = {e.filter_place for e in entries} | {e.drop_place for e in entries}
        places -= self._places.keys()
        reasons = {e.filter_reason for e in entries} | {e.drop_reason for e in entries}
        reasons -= self._known_reasons
        frames = {
            e.filter_stack: _callers(self._read_stack(e.filter_stack), e.filter_place)
            for e in entries
            if e.filter_stack not in self._known_stacks
        }
        self._known_reasons |= reasons
        self._known_stacks |= frames.keys()
        addresses = {*places, *(address for stack in frames.values() for address in stack)}
        if addresses:
            self._places.update(place_names(addresses))
        rulesets = dict(self._rulesets(dropped))
        if not (places or reasons or frames or rulesets):
            return None
        return KernelNames(
            {place: self._places[place] for place in sorted(places)},
            {number: reason_text(number, self._reasons) for number in sorted(reasons)},
            {number: tuple(map(self._places.__getitem__, s)) for number, s in frames.items()},
            rulesets,
        )

    def _rulesets(self, dropped: Iterable[Row]) -> Iterator[tuple[int, tuple[Ruleset, ...]]]:
        """Rules of the namespaces where netfilter dropped something since they were last read."""
        for (_, _, _, _, netns), entry in dropped:
            begun_ns = self._clock_ns()
            read_ns, again_ns = self._rules_read.get(netns, (0, 0))
            is_new = entry.last_ack_filtered_ns > read_ns and begun_ns >= again_ns
            if entry.filter_place and is_new and self._by_netfilter(entry):
                ruleset = self._read_ruleset(netns)
                done_ns = self._clock_ns()
                pause_ns = max(RULES_INTERVAL_NS, RULES_SHARE * (done_ns - begun_ns))
                self._rules_read[netns] = begun_ns, done_ns + pause_ns
                yield netns, (ruleset._replace(read_ns=begun_ns),)

    def _by_netfilter(self, entry: Handshake) -> bool:
        place = self._places[entry.filter_place]
        return self._reasons.get(entry.filter_reason) == "NETFILTER_DROP" or place.startswith("nf")


def _callers(stack: tuple[int, ...], place: int) -> tuple[int, ...]:
    """The stack from that place on: what comes before it is the tracing's own."""
    return stack[stack.index(place) :] if place in stack else stack
