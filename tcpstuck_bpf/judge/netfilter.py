"""Finds the rules that can have dropped a client's ACK. Pure.

A ruleset is read after the drop, and no packet is run through it. A rule is ruled out only by a
condition that the packet cannot meet (another protocol, port, address or device; `rule_index`), or
by its own counter, if that has not counted the packet. The remaining rules are suspects. Only a
single suspect is named as the rule.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from tcpstuck_bpf.judge.rule_index import Packet, index_of
from tcpstuck_bpf.model import FourTuple
from tcpstuck_bpf.rulesets import KEPT_READINGS, DropRule, Ruleset
from tcpstuck_bpf.terminal import printable

BRIDGE = "bridge"
"""Stands for any hook that a bridge runs."""
_NFTABLES_KINDS = frozenset({"handle", "policy"})
_CONNTRACK = "nf_conntrack"
OTHER_CODE = ("function", "program")
_RACE_NS = 10_000_000
"""A packet is counted before it is dropped, usually by microseconds. So the counters of a reading
that ended less than this before a drop may already include the packet."""
NOT_THE_RULE = "the program that reads the queue or a later rule dropped it; which one is unknown"
NOTHING_QUEUES = "no rule loaded after the drop queues it; rule unknown"
MORE_SUSPECTS = "more rules match: not all of them were checked"


class Suspicion(NamedTuple):
    """What a ruleset shows about one drop."""

    suspects: tuple[DropRule, ...]
    """All rules and chain policies that can have dropped the packet."""
    notes: tuple[str, ...]
    """What is unknown, and why, in complete sentences."""
    read_after_ns: int | None = None
    """Time from the drop to the reading of the rules; None if they were not read after it."""
    needs_reading: bool = False
    """Whether the rules have not been read since the drop, so that a reading may show more."""

    @property
    def rule(self) -> DropRule | None:
        """The only rule that can have dropped the packet; None if there may be another."""
        return self.suspects[0] if len(self.suspects) == 1 and not self.notes else None

    @property
    def may_reset(self) -> bool:
        """Whether a suspect may have answered with an RST."""
        return any(suspect.may_reset for suspect in self.suspects)

    def of_full_queue(self) -> Suspicion:
        """The suspects of a packet dropped at a full or unread queue: the rules that queue.

        No program got the packet, so none can have answered it with an RST.
        """
        queueing = (rule._replace(may_reset=False) for rule in self.suspects if rule.queues)
        return self._among(queueing)

    def of_queue_verdict(self) -> Suspicion:
        """The suspects of a packet that came back from a queue: the rules that queue."""
        found = self._among(rule for rule in self.suspects if rule.queues)
        return found._replace(notes=(*found.notes, NOT_THE_RULE))

    def _among(self, rules: Iterable[DropRule]) -> Suspicion:
        suspects = tuple(rules)
        notes = self.notes
        if not suspects and not notes:
            notes = (NOTHING_QUEUES,)
        return self._replace(suspects=suspects, notes=notes)

    @property
    def may_be_unseen(self) -> bool:
        """Whether a rule that was not read can have dropped the packet."""
        return bool(self.notes)


def rule_text(rule: DropRule) -> str:
    """A rule as text: `ip filter INPUT, rule handle 4`.

    A stranger may have chosen the names, so control characters are escaped.
    """
    if rule.kind == "program":
        return f"{rule.family}, the BPF program {rule.number}"
    if rule.table == _CONNTRACK and rule.kind == "function":
        return (
            f"{rule.family}, connection tracking ({rule.chain}; a full table? "
            "net.netfilter.nf_conntrack_max)"
        )
    if rule.kind == "function":
        module = f" of the module {rule.table}" if rule.table else ""
        return printable(f"{rule.family}, the hook function {rule.chain}{module}")
    where = printable(f"{rule.family} {rule.table} {rule.chain}")
    if rule.kind == "policy":
        return f"{where}, the chain's policy"
    return f"{where}, rule {rule.kind} {rule.number}"


class Read(NamedTuple):
    """The reading of a namespace's rules that shows most about a drop."""

    ruleset: Ruleset
    after_ns: int | None
    """Time from the drop to the begin of the reading; None if it began before the drop."""
    before: Ruleset | None = None
    """The same rules read before the drop, for their counters; None if there is no such reading."""

    def counted(self, rule: int) -> bool:
        """Whether the rule with this index may have counted the packet; True if unknown.

        A counter that has decreased was reset, and shows nothing.
        """
        if self.after_ns is None or rule >= len(self.ruleset.packets):
            return True
        after = self.ruleset.packets[rule]
        before = None
        if self.before is not None and rule < len(self.before.packets):
            before = self.before.packets[rule]
        if after is None:
            return True
        return after != before if before is not None else after > 0


def rules_after(readings: Sequence[Ruleset], dropped_ns: int) -> Read | None:
    """The first reading of the rules after a drop; None if there is no reading at all.

    If there is only another reading, it gets a problem that says so, because rules come and go.
    """
    if not readings:
        return None
    after = [reading for reading in readings if reading.read_ns >= dropped_ns]
    if after and (len(after) < len(readings) or len(readings) < KEPT_READINGS):
        first = after[0]
        alike = [
            reading
            for reading in readings[: len(readings) - len(after)]
            if 0 != reading.namespace == first.namespace
            and reading.shares_rules_with(first)
            and 0 < reading.counted_ns <= dropped_ns - _RACE_NS
        ]
        return Read(first, first.read_ns - dropped_ns, alike[-1] if alike else None)
    nearest = after[0] if after else readings[-1]
    when = "long after" if after else "before"
    problem = f"the rules were read {when} that drop, and may have changed in between"
    doubted = nearest._replace(problems=(*nearest.problems, problem))
    return Read(doubted, nearest.read_ns - dropped_ns if after else None)


def suspicion(
    read: Read | None,
    who: FourTuple,
    hook: str | None,
    by_nftables: bool,
    device: int | None = None,
) -> Suspicion:
    """The rules that can have dropped a packet from this client at a hook (None: any hook).

    `by_nftables` means that nf_tables dropped the packet, so only its rules are suspects. `device`
    is the index of the device by which it came; None if unknown.
    """
    if hook == BRIDGE:
        return Suspicion((), ("the tool does not read the rules of a bridge; rule unknown",))
    if read is None:
        return Suspicion(
            (),
            ("the rules were not read; rule unknown",),
            needs_reading=True,
        )
    ruleset = read.ruleset
    packet = Packet(who, hook, device)
    found = index_of(ruleset).matching(packet)
    suspects: dict[DropRule, None] = {}
    for number in found.rules:
        rule = ruleset.rules[number]
        if by_nftables and rule.kind not in _NFTABLES_KINDS:
            continue
        if read.counted(number):
            suspects[rule._replace(conditions=())] = None
    notes = ruleset.problems if by_nftables else (*ruleset.problems, *ruleset.elsewhere)
    if found.incomplete:
        notes = (*notes, MORE_SUSPECTS)
    if not suspects and not notes:
        notes = ("no rule loaded after the drop matches; rule unknown",)
    return Suspicion(tuple(suspects), notes, read.after_ns, needs_reading=read.after_ns is None)
