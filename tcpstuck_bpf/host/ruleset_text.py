"""The parts of a ruleset that can drop packets, as its two parsers find them. Pure.

A rule is a suspect unless everything it does is known never to drop a packet. Known to be innocent
are the nftables statements and iptables targets whose code returns only NFT_CONTINUE, NFT_BREAK,
XT_CONTINUE or an accepting verdict (net/netfilter of 5.10 to 7.1, and xtables-addons). Those that
drop only for lack of memory count as innocent too (DSCP, TTL, NAT).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tcpstuck_bpf.rulesets import DropRule, Jump

STRANGE = (ValueError, KeyError, TypeError, AttributeError)
"""Exceptions that a ruleset of an unknown format causes."""

ChainName = tuple[str, str, str]
"""A chain's family, table and name."""


class Parts(NamedTuple):
    """The relevant parts of a ruleset, in the order of the listing."""

    rules: list[DropRule]
    packets: list[int | None]
    """Each rule's packet counter; as long as `rules`."""
    jumps: list[Jump]
    chains: set[ChainName]
    """Listed chains that a hook calls."""
    mentioned: set[str]
    """Statements and targets that make a hook of their own (`synproxy`, `flowtable`)."""
    problems: list[str]
    """What the listing leaves unknown, in complete sentences."""

    def add(self, rule: DropRule, packets: int | None) -> None:
        """Add a rule and its packet counter."""
        self.rules.append(rule)
        self.packets.append(packets)


def no_parts() -> Parts:
    """Empty parts."""
    return Parts([], [], [], set(), set(), [])


def reachable(parts: Parts) -> Parts:
    """`parts` without chains that no hook reaches, and jumps that reach no rule that drops."""
    ways: dict[ChainName, list[Jump]] = {}
    back: dict[ChainName, list[ChainName]] = {}
    starts: dict[ChainName, None] = {}
    for jump in parts.jumps:
        chain = (jump.family, jump.table, jump.chain)
        ways.setdefault(chain, []).append(jump)
        back.setdefault((jump.family, jump.table, jump.target), []).append(chain)
        if jump.hook:
            starts[chain] = None
    dropping = {(rule.family, rule.table, rule.chain): None for rule in parts.rules}
    starts.update({(r.family, r.table, r.chain): None for r in parts.rules if r.hook})
    come_to = _closure(
        starts, {chain: [(j.family, j.table, j.target) for j in own] for chain, own in ways.items()}
    )
    leading = _closure(dropping, back)
    rules = Parts([], [], [], parts.chains, parts.mentioned, parts.problems)
    for rule, packets in zip(parts.rules, parts.packets):
        if (rule.family, rule.table, rule.chain) in come_to:
            rules.add(rule, packets)
    for jump in parts.jumps:
        chain, target = (
            (jump.family, jump.table, jump.chain),
            (jump.family, jump.table, jump.target),
        )
        if chain in come_to and target in leading:
            rules.jumps.append(jump)
    return rules


def _closure(
    starts: Mapping[ChainName, None], ways: Mapping[ChainName, Sequence[ChainName]]
) -> set[ChainName]:
    reached = set(starts)
    waiting = deque(starts)
    while waiting:
        for chain_name in ways.get(waiting.popleft(), ()):
            if chain_name not in reached:
                reached.add(chain_name)
                waiting.append(chain_name)
    return reached
