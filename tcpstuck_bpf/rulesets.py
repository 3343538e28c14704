"""What explains a drop on this host: the firewall's rules, and names of the kernel's numbers.

Times are CLOCK_MONOTONIC nanoseconds.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import NamedTuple

Conditions = tuple[tuple[str, str], ...]
"""Some of a rule's conditions, which must all hold: protocol, sport, saddr, iifname ..., and the
value."""


class DropRule(NamedTuple):
    """A firewall rule, a chain's policy, or other code at a hook, that can drop packets."""

    family: str
    """nftables' name: ip, ip6, inet, netdev ...; ip or ip6 for iptables."""
    table: str
    """Table; for a function its module, empty if it is built into the kernel."""
    chain: str
    """Chain; for a function its name."""
    hook: str
    """The hook that calls the chain; empty if only jumps lead to it."""
    kind: str
    """Meaning of `number`: `handle` (nftables), `number` (iptables, from 1), `policy`, `function`
    (another function at the hook), or `program` (a BPF program)."""
    number: int
    conditions: Conditions
    may_reset: bool = False
    """Whether the rule may also answer with an RST (reject with tcp reset)."""
    queues: bool = False
    """Whether the rule may hand the packet to a queue that a program reads (NFQUEUE)."""


class Jump(NamedTuple):
    """A rule that jumps from a chain to another chain with rules that can drop."""

    family: str
    table: str
    chain: str
    hook: str
    """The hook that calls `chain`; empty if only jumps lead to it."""
    target: str
    conditions: Conditions


class Ruleset(NamedTuple):
    """One reading of what can drop packets in a network namespace."""

    rules: tuple[DropRule, ...]
    problems: tuple[str, ...]
    """What could not be read, in complete sentences."""
    read_ns: int = 0
    """Time at which the reading began."""
    jumps: tuple[Jump, ...] = ()
    packets: tuple[int | None, ...] = ()
    """Packet counter of each rule, in the order of `rules`; None for a rule without a counter. A
    counter includes every packet that the rule drops, and maybe others."""
    elsewhere: tuple[str, ...] = ()
    """Like `problems`, for everything except nftables."""
    devices: tuple[tuple[int, str], ...] | None = None
    """Index and name of the namespace's network devices; None if unknown."""
    counted_ns: int = 0
    """Time at which the reading ended, with `packets`; 0 if unknown."""
    namespace: int = 0
    """The namespace's cookie (SO_NETNS_COOKIE, from 5.14 on); 0 if unknown. Another namespace may
    reuse the inode number, with the same rules and its own counters."""

    @property
    def contents(self) -> tuple[object, ...]:
        """The parts that are equal in two readings if nothing changed in between."""
        return (
            self.rules,
            self.jumps,
            self.problems,
            self.elsewhere,
            self.devices,
            self.namespace,
        )

    def shares_rules_with(self, other: Ruleset) -> bool:
        """Whether both have the same rule objects, as equal readings have when they are kept."""
        return self.rules is other.rules and self.jumps is other.jumps

    @property
    def size(self) -> int:
        """Number of its rules and jumps."""
        return len(self.rules) + len(self.jumps)


KEPT_READINGS = 16
"""Number of readings kept for a namespace. Of equal readings in a row only the first and the last
are kept, so these hold at least half as many changes."""
KEPT_RULES = 50_000
"""Largest number of rules over all namespaces and readings, about 25 MB. A stranger who fills a
namespace with rules must not fill this process's memory."""
LET_GO = "the rules were read, but dropped again to make room for others"


def _with_reading(known: tuple[Ruleset, ...], reading: Ruleset) -> tuple[Ruleset, ...]:
    """Add a reading to those of its namespace."""
    alike = [kept for kept in known[-2:] if kept.contents == reading.contents]
    if alike:
        # Share the rules with the equal reading.
        reading = alike[-1]._replace(
            read_ns=reading.read_ns, packets=reading.packets, counted_ns=reading.counted_ns
        )
    kept = known[:-1] if len(alike) == 2 else known
    return (*kept, reading)[-KEPT_READINGS:]


def _size(readings: tuple[Ruleset, ...]) -> int:
    return sum({id(reading.rules): reading.size for reading in readings}.values())


def _within_bounds(rulesets: dict[int, tuple[Ruleset, ...]]) -> dict[int, tuple[Ruleset, ...]]:
    """Drop the oldest rules of the largest namespaces while there are too many in total.

    An empty reading stays, so that no later reading is taken for the first after a drop.
    """
    sizes = {netns: _size(readings) for netns, readings in rulesets.items()}
    while sum(sizes.values()) > KEPT_RULES:
        largest = max(sizes, key=sizes.__getitem__)
        readings = list(rulesets[largest])
        oldest = next(place for place, reading in enumerate(readings) if reading.size)
        readings[oldest] = Ruleset((), (LET_GO,), readings[oldest].read_ns)
        rulesets[largest] = tuple(readings)
        sizes[largest] = _size(rulesets[largest])
    return rulesets


class KernelNames(NamedTuple):
    """Names for the traced kernel's numbers, as far as they were needed."""

    places: Mapping[int, str]
    """`symbol+0x1f` by kernel address."""
    reasons: Mapping[int, str | None]
    """enum skb_drop_reason by number, without prefix; None where the kernel has no reasons."""
    stacks: Mapping[int, tuple[str, ...]]
    """Functions by a stack's number: the one that dropped the packet, then its callers."""
    rulesets: Mapping[int, tuple[Ruleset, ...]]
    """The latest KEPT_READINGS by network namespace (inode number), the oldest first."""

    def with_more(self, others: KernelNames) -> KernelNames:
        """Merge with other names."""
        return KernelNames(
            {**self.places, **others.places},
            {**self.reasons, **others.reasons},
            {**self.stacks, **others.stacks},
            _within_bounds(
                {
                    **self.rulesets,
                    **{
                        netns: functools.reduce(
                            _with_reading, readings, self.rulesets.get(netns, ())
                        )
                        for netns, readings in others.rulesets.items()
                    },
                }
            ),
        )
