"""Which rule of a ruleset can have dropped a client's ACK. Pure.

A ruleset is read after the fact, and no packet is run through it: a rule is ruled out only by a
match that the packet surely fails (another protocol, port, address or device; `rule_index`), or by
its own counter, where that has not counted the packet. What is left are suspects; only where there
is one of them the rule is named.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from tcpstuck_bpf.judge.rule_index import Packet, index_of
from tcpstuck_bpf.model import KEPT_READINGS, DropRule, FourTuple, Ruleset
from tcpstuck_bpf.terminal import printable

BRIDGE = "bridge"
"""For a hook: any of those that a bridge runs."""
_NFTABLES_KINDS = frozenset({"handle", "policy"})
_CONNTRACK = "nf_conntrack"
OTHER_CODE = ("function", "program")
_RACE_NS = 10_000_000
"""A packet is counted before it is dropped, microseconds as a rule. A reading that ended less than
that before a drop may have the packet in its counters already."""
NOT_THE_RULE = "the program that reads the queue or a later rule dropped it; which one is unknown"
NOTHING_QUEUES = "no rule loaded after the drop queues it; rule unknown"
MORE_SUSPECTS = "there are more rules that match: not all of them are looked at"


class Suspicion(NamedTuple):
    """What a ruleset says of one drop."""

    suspects: tuple[DropRule, ...]
    """Every rule, or chain's policy, that can have dropped it."""
    notes: tuple[str, ...]
    """Complete sentences: what is not known, and why."""
    read_after_ns: int | None = None
    """How long after the drop the rules were read; None where they were not."""
    needs_reading: bool = False
    """Whether the rules have not been read since the drop, and would tell more."""

    @property
    def rule(self) -> DropRule | None:
        """The one rule that can have done it; None where others may be there, or may be unread."""
        return self.suspects[0] if len(self.suspects) == 1 and not self.notes else None

    @property
    def may_reset(self) -> bool:
        """Whether it can have been a rule here that answers by RST."""
        return any(suspect.may_reset for suspect in self.suspects)

    def of_full_queue(self) -> Suspicion:
        """The suspects of a packet that no program could be handed: the rules that queue.

        Nobody has seen it, so nobody has answered it.
        """
        queueing = (rule._replace(may_reset=False) for rule in self.suspects if rule.queues)
        return self._among(queueing)

    def of_queue_verdict(self) -> Suspicion:
        """The suspects of a packet that came back from a queue: what can have put it there."""
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
        """Whether it can have been a rule that is not here, of which nothing is known."""
        return bool(self.notes)


def rule_text(rule: DropRule) -> str:
    """A rule in words: `ip filter INPUT, rule handle 4`.

    Whoever may make rules in a namespace chooses the names: they are no terminal's control
    characters here.
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
    """The reading of a namespace's rules that tells most of a drop."""

    ruleset: Ruleset
    after_ns: int | None
    """How long after the drop it began; None: before the drop."""
    before: Ruleset | None = None
    """The same rules as they were read before the drop, for their counters."""

    def counted(self, rule: int) -> bool:
        """Whether the rule with that index can have counted the packet; True where nothing tells.

        A counter that has gone down was reset since, and tells nothing.
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
    """The rules as they were read first after a drop; None where they never were.

    Others are no proof of who did it, and say so: rules come and go.
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
    problem = f"the rules were read {when} that drop, and may have been others then"
    told = nearest._replace(problems=(*nearest.problems, problem))
    return Read(told, nearest.read_ns - dropped_ns if after else None)


def suspicion(
    read: Read | None,
    who: FourTuple,
    hook: str | None,
    by_nftables: bool,
    device: int | None = None,
) -> Suspicion:
    """The rules that can have dropped a packet from this client at a hook (None: any hook).

    `by_nftables`: the packet was dropped within nf_tables, so nothing else did it. `device`: the
    index of the device it came by, None where that is not known.
    """
    if hook == BRIDGE:
        return Suspicion((), ("the rules of a bridge are not read; rule unknown",))
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
