"""Which rule of a ruleset can have dropped a client's ACK. Pure.

A ruleset is read after the fact, and no packet is run through it: a rule is ruled out only by a
match that the packet surely fails (another protocol, port or address). What is left are suspects;
only where there is one of them the rule is named.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from typing import Any, NamedTuple

from tcpstuck_bpf.model import KEPT_READINGS, DropRule, FourTuple, Ruleset
from tcpstuck_bpf.terminal import printable

_FAMILIES = {4: frozenset({"ip", "inet", "netdev"}), 6: frozenset({"ip6", "inet", "netdev"})}
BRIDGE = "bridge"
"""For a hook: any of those that a bridge runs."""
_NFPROTO = {4: "ipv4", 6: "ipv6"}


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

    def _same(self, field: str) -> str | None:
        if self.notes:
            return None
        found = {getattr(suspect, field) for suspect in self.suspects}
        return found.pop() if len(found) == 1 else None

    @property
    def rule(self) -> DropRule | None:
        """The one rule that can have done it; None where others may be there, or may be unread."""
        return self.suspects[0] if len(self.suspects) == 1 and not self.notes else None

    @property
    def may_reset(self) -> bool:
        """Whether it can have been a rule that answers by RST."""
        return any(suspect.may_reset for suspect in self.suspects)

    def values(self) -> dict[str, Any]:
        """As JSON has it."""
        one = self.rule
        several = self.suspects if one is None else ()
        after_ns = self.read_after_ns
        return {
            "rules_read_ms": after_ns if after_ns is None else round(after_ns / 1_000_000, 3),
            "family": self._same("family"),
            "table": self._same("table"),
            "chain": self._same("chain"),
            "rule": None if one is None else rule_value(one),
            "rule_candidates": [
                {
                    "family": suspect.family,
                    "table": suspect.table,
                    "chain": suspect.chain,
                    "rule": rule_value(suspect),
                }
                for suspect in several
            ],
        }


def rule_value(rule: DropRule) -> dict[str, Any]:
    """What names a rule within its chain, as JSON has it."""
    return {rule.kind: True if rule.kind == "policy" else rule.number}


def rule_text(rule: DropRule) -> str:
    """A rule in words: `ip filter INPUT, rule handle 4`.

    Whoever may make rules in a namespace chooses the names: they are no terminal's control
    characters here.
    """
    where = printable(f"{rule.family} {rule.table} {rule.chain}")
    if rule.kind == "policy":
        return f"{where}, the chain's policy"
    return f"{where}, rule {rule.kind} {rule.number}"


class Read(NamedTuple):
    """The reading of a namespace's rules that tells most of a drop."""

    ruleset: Ruleset
    after_ns: int | None
    """How long after the drop it began; None: before the drop."""


def rules_after(readings: Sequence[Ruleset], dropped_ns: int) -> Read | None:
    """The rules as they were read first after a drop; None where they never were.

    Others are no proof of who did it, and say so: rules come and go.
    """
    if not readings:
        return None
    after = [reading for reading in readings if reading.read_ns >= dropped_ns]
    if after and (len(after) < len(readings) or len(readings) < KEPT_READINGS):
        return Read(after[0], after[0].read_ns - dropped_ns)
    nearest = after[0] if after else readings[-1]
    when = "long after" if after else "before"
    problem = f"the rules were read {when} that drop, and may have been others then"
    told = nearest._replace(problems=(*nearest.problems, problem))
    return Read(told, nearest.read_ns - dropped_ns if after else None)


def suspicion(read: Read | None, who: FourTuple, hook: str | None, by_nftables: bool) -> Suspicion:
    """The rules that can have dropped a packet from this client at a hook (None: any hook).

    `by_nftables`: the packet was dropped within nf_tables, so no rule of xtables did it.
    """
    if hook == BRIDGE:
        return Suspicion(
            (), ("a bridge's rules are not looked at: which one dropped it cannot be told",)
        )
    if read is None:
        return Suspicion(
            (),
            ("the rules were not read: which one dropped it cannot be told",),
            needs_reading=True,
        )
    ruleset, after_ns = read
    # A rule that can be come to in several ways is there once for each.
    suspects = dict.fromkeys(
        rule._replace(conditions=())
        for rule in ruleset.rules
        if rule.family in _FAMILIES[who.family]
        and hook in (None, rule.hook)
        and not (by_nftables and rule.kind == "number")
        and not any(_surely_fails(name, value, who) for name, value in rule.conditions)
    )
    notes = ruleset.problems
    if not suspects and not notes:
        notes = ("no rule loaded after the drop matches: which one dropped it cannot be told",)
    return Suspicion(tuple(suspects), notes, after_ns, needs_reading=after_ns is None)


def _surely_fails(name: str, value: str, who: FourTuple) -> bool:
    """Whether a match cannot hold for a TCP segment from this client to this server."""
    if name == "protocol":
        return value.lower() not in ("tcp", "6", "all")
    if name == "nfproto":
        return value != _NFPROTO[who.family]
    if name in ("sport", "dport"):
        port = who.client_port if name == "sport" else who.server_port
        low, _, high = value.partition(":")
        if not low.isdecimal() or (high and not high.isdecimal()):
            return False
        return not int(low) <= port <= int(high or low)
    address = who.client_ip if name == "saddr" else who.server_ip
    try:
        return ipaddress.ip_address(address) not in ipaddress.ip_network(value, strict=False)
    except ValueError:
        return False
