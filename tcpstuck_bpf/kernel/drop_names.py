"""The kernel's names for drop sites and drop reasons: symbols, and enum skb_drop_reason.

The names are looked up on the tracing machine, once for each number, and recorded as text, because
a recording is also replayed on other machines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

from tcpstuck_bpf.host.kallsyms import place_names
from tcpstuck_bpf.judge.drop_cause import NO_NAMES, is_by_netfilter
from tcpstuck_bpf.model import Handshake, Row
from tcpstuck_bpf.rulesets import KernelNames, Ruleset
from tcpstuck_bpf.typeinfo.graph import KernelTypes

_REASON_PREFIX = "SKB_DROP_REASON_"
_NO_REASONS = ("SUBSYS_", "MAX")
"""Prefixes of names that are not reasons: other enums' (include/net/dropreason.h), and MAX."""
_SUBSYSTEM_SHIFT = 16
_REASONS_OF_THE_PROGRAMS = ("NO_SOCKET", "PACKET_SOCK_ERROR")


def reason_names(types: KernelTypes) -> Mapping[int, str]:
    """This kernel's drop reasons by number, without their prefix; empty before 5.17."""
    return {
        value: name[len(_REASON_PREFIX) :]
        for name, value in types.enumerators(_REASON_PREFIX).items()
        if not name[len(_REASON_PREFIX) :].startswith(_NO_REASONS)
    }


def reason_text(number: int, names: Mapping[int, str]) -> str | None:
    """The text of a drop reason; None where this kernel has no reasons.

    A number beyond 65535 belongs to a subsystem (SKB_DROP_REASON_SUBSYS_SHIFT), and vmlinux does
    not always have its name.
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


class Rules(Protocol):
    """Reads firewall rules. `ruleset_watch.RulesetWatch` does so in parallel to the main loop."""

    def want(self, netns: int, dropped_ns: int) -> None:
        """Request the rules of a namespace, after a drop at `dropped_ns`."""

    def taken(self) -> Mapping[int, Ruleset]:
        """The rules read since the last call, by namespace."""

    def hurry(self) -> None:
        """Stop pausing between two readings, because the run ends."""


class Namer:
    """Names the numbers in entries, each once, and requests rules when netfilter dropped a packet.

    `read_stack` returns the addresses of a stack by its number, the innermost first.
    """

    def __init__(
        self,
        reasons: Mapping[int, str],
        read_stack: Callable[[int], tuple[int, ...]],
        rules: Rules,
    ) -> None:
        self._reasons = reasons
        self._read_stack = read_stack
        self._rules = rules
        self._places: dict[int, str] = {0: ""}
        self._known_reasons: set[int] = set()
        self._known_stacks: set[int] = {0}

    def __call__(self, rows: Iterable[Row]) -> KernelNames | None:
        """Names for new numbers in these entries, and newly read rules; None if there are none."""
        dropped = [row for row in rows if row.handshake.filter_place or row.handshake.drop_place]
        names = self._names([row.handshake for row in dropped]) if dropped else NO_NAMES
        for four_tuple, entry in dropped:
            if entry.filter_place and self._by_netfilter(entry):
                self._rules.want(four_tuple.netns, entry.last_ack_filtered_ns)
        rulesets = {netns: (ruleset,) for netns, ruleset in self._rules.taken().items()}
        names = names._replace(rulesets=rulesets)
        return names if any(names) else None

    def hurry(self) -> None:
        """Read the outstanding rules without a pause, because the run ends."""
        self._rules.hurry()

    def _names(self, entries: Sequence[Handshake]) -> KernelNames:
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
        return KernelNames(
            {place: self._places[place] for place in sorted(places)},
            {number: reason_text(number, self._reasons) for number in sorted(reasons)},
            {number: tuple(map(self._places.__getitem__, s)) for number, s in frames.items()},
            {},
        )

    def _by_netfilter(self, entry: Handshake) -> bool:
        reason = reason_text(entry.filter_reason, self._reasons)
        return is_by_netfilter(reason, self._places[entry.filter_place])


def _callers(stack: tuple[int, ...], place: int) -> tuple[int, ...]:
    """The stack from the drop site on; the frames inside it belong to the tracing."""
    return stack[stack.index(place) :] if place in stack else stack
