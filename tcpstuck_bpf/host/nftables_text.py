"""Finds the rules that can drop a packet in the output of `nft -j list ruleset`. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from tcpstuck_bpf.host.ruleset_text import ChainName, Parts, no_parts
from tcpstuck_bpf.host.xtables_text import (
    INNOCENT_TARGETS,
    MATCHES_THAT_DROP,
    NO_QUEUE,
    SILENT_TARGETS,
)
from tcpstuck_bpf.rulesets import Conditions, DropRule, Jump

_NEVER_DROPS = frozenset(
    {
        "accept", "continue", "return", "jump", "goto", "match", "counter", "quota", "limit",
        "mangle", "dup", "log", "ct helper", "ct timeout", "ct expectation", "notrack", "flow",
        "set", "map", "meter", "last", "secmark", "comment", "snat", "dnat", "tproxy",
    }
)  # fmt: skip
"""Innocent statements of libnftables-json(5). These are suspects: drop, reject, queue, synproxy,
fwd (NF_STOLEN), `ct count` (nft_connlimit.c), reset of a TCP option (nft_exthdr.c), masquerade and
redirect (no address), and any statement of a later version."""
_SILENT_STATEMENTS = frozenset(
    {"drop", "synproxy", "fwd", "ct count", "reset", "redirect", "masquerade"}
)
_VERDICTS = frozenset({"accept", "drop", "jump", "goto", "return", "continue", "queue"})
_TABLE_FLAGS = frozenset({"dormant", "owner", "persist"})


class _Verdict(NamedTuple):
    """What a rule may do to a packet."""

    drops: bool
    may_reset: bool
    leads_to: tuple[str, ...] = ()
    queues: bool = False


_NOTHING = _Verdict(False, False)


class _Listing:
    """The items of `nft -j list ruleset` that rules refer to by name."""

    def __init__(self, items: Sequence[Mapping[str, Any]]) -> None:
        self.asleep: set[tuple[str, str]] = set()
        self.has_unclear_flags = False
        self.chains: dict[ChainName, Mapping[str, Any]] = {}
        self.counters: dict[ChainName, int] = {}
        self.maps: dict[ChainName, Any] = {}
        for item in items:
            if "table" in item:
                self._note_table(item["table"])
            elif "chain" in item:
                self.chains[_name_of(item["chain"])] = item["chain"]
            elif "counter" in item:
                self.counters[_name_of(item["counter"])] = int(item["counter"]["packets"])
            elif "map" in item:
                self.maps[_name_of(item["map"])] = item["map"].get("elem", ())
        self._verdicts: dict[ChainName, _Verdict] = {}

    def _note_table(self, table: Mapping[str, Any]) -> None:
        flags = table.get("flags", [])
        names = {flags} if isinstance(flags, str) else set(flags)
        if "dormant" in names:
            self.asleep.add((table["family"], table["name"]))
        elif names - _TABLE_FLAGS:
            # nft 1.0.6 prints the table's own name as a flag.
            self.has_unclear_flags = True

    def verdict_of(self, map_: ChainName) -> _Verdict:
        """What the verdicts of a named map may do. A map that is not listed may do anything."""
        if map_ not in self._verdicts:
            elements = self.maps.get(map_)
            if elements is None:
                everywhere = tuple(c[2] for c in self.chains if c[:2] == map_[:2])
                self._verdicts[map_] = _Verdict(True, False, everywhere)
            else:
                self._verdicts[map_] = _of_verdicts(elements)
        return self._verdicts[map_]

    def map_jumps(self) -> Iterator[Jump]:
        """The jumps in each map used so far, as if the map was a chain named `@map`.

        Many rules may use one large map, so no rule has a copy of its elements.
        """
        for (family, table, name), verdict in self._verdicts.items():
            for target in dict.fromkeys(verdict.leads_to):
                yield Jump(family, table, f"@{name}", "", target, ())

    def hook_of(self, chain_name: ChainName) -> str:
        """The hook that calls a chain; empty if none does."""
        return str(self.chains.get(chain_name, {}).get("hook", ""))

    def at_device(self, chain_name: ChainName) -> Conditions:
        """The condition on the device of a chain at a device's ingress hook."""
        device = self.chains.get(chain_name, {}).get("dev")
        return (("iifname", device),) if isinstance(device, str) else ()


def _name_of(item: Mapping[str, Any]) -> ChainName:
    return item["family"], item["table"], item["name"]


def nftables_rules(text: str) -> Parts:
    """Parse `nft -j list ruleset` (libnftables-json(5)). A dormant table's chains are left out.

    Raises ValueError, KeyError, TypeError or AttributeError where the text is not a ruleset.
    """
    items = json.loads(text)["nftables"]
    listing = _Listing(items)
    parts = no_parts()
    if listing.has_unclear_flags:
        parts.problems.append("this nft does not show whether tables with flags are dormant")
    for item in items:
        if "flowtable" in item:
            parts.mentioned.add("flowtable")
        if "rule" in item:
            _add_nftables_rule(parts, item["rule"], listing)
    parts.jumps.extend(listing.map_jumps())
    for chain_name, item in listing.chains.items():
        if "hook" in item and chain_name[:2] not in listing.asleep:
            parts.chains.add(chain_name)
            if item.get("policy") == "drop":
                conditions = listing.at_device(chain_name)
                parts.add(DropRule(*chain_name, item["hook"], "policy", 0, conditions), None)
    return parts


def _add_nftables_rule(parts: Parts, rule: Mapping[str, Any], listing: _Listing) -> None:
    chain_name = family, table, chain = rule["family"], rule["table"], rule["chain"]
    if (family, table) in listing.asleep:
        return
    statements = rule.get("expr", [])
    if any(_is_synproxy(s) for s in statements):
        parts.mentioned.add("synproxy")
    verdict, packets = _rule_verdict(statements, listing, (family, table))
    hook = listing.hook_of(chain_name)
    conditions = (*listing.at_device(chain_name), *_conditions(statements))
    for target in dict.fromkeys(verdict.leads_to):
        parts.jumps.append(Jump(family, table, chain, hook, target, conditions))
    if verdict.drops:
        handle = int(rule["handle"])
        rule_found = DropRule(family, table, chain, hook, "handle", handle, conditions)
        parts.add(rule_found._replace(may_reset=verdict.may_reset, queues=verdict.queues), packets)


def _is_synproxy(statement: Any) -> bool:
    if not isinstance(statement, dict):
        return False
    target = statement.get("xt")
    return "synproxy" in statement or (
        isinstance(target, dict) and target.get("name") == "SYNPROXY"
    )


def _rule_verdict(
    statements: Sequence[Any], listing: _Listing, table: tuple[str, str]
) -> tuple[_Verdict, int | None]:
    """What a rule may do, and how many packets reached the first statement that may drop."""
    drops = may_reset = queues = False
    leads_to: list[str] = []
    packets: int | None = None
    has_verdict = any(isinstance(s, dict) and s.keys() & _VERDICTS for s in statements)
    for statement in statements:
        if not drops:
            packets = _counted(statement, listing, table, packets)
        verdict = _of_statement(statement, has_verdict, listing, table)
        drops |= verdict.drops
        may_reset |= verdict.may_reset
        queues |= verdict.queues
        leads_to += verdict.leads_to
    return _Verdict(drops, may_reset, tuple(leads_to), queues), packets


def _counted(
    statement: Any, listing: _Listing, table: tuple[str, str], before: int | None
) -> int | None:
    counter = statement.get("counter") if isinstance(statement, dict) else None
    if isinstance(counter, dict):
        return int(counter["packets"])
    if isinstance(counter, str):
        return listing.counters.get((*table, counter), before)
    return before


def _of_statement(
    statement: Any, has_verdict: bool, listing: _Listing, table: tuple[str, str]
) -> _Verdict:
    if not isinstance(statement, dict) or statement == {"xt": None}:
        # Older nft prints null or plain text for any iptables match or target. A target comes
        # last, and a rule with a target has no nftables verdict.
        return _NOTHING if has_verdict else _Verdict(True, True, queues=True)
    if "xt" in statement:
        return _of_xtables(statement["xt"])
    if "vmap" in statement:
        return _of_map(statement["vmap"]["data"], listing, table)
    for verb in ("jump", "goto"):
        if verb in statement:
            return _Verdict(False, False, (str(statement[verb]["target"]),))
    unknown = statement.keys() - _NEVER_DROPS
    if not unknown:
        return _NOTHING
    rejects = statement.get("reject")
    if "reject" in statement:
        answers = isinstance(rejects, dict) and rejects.get("type") == "tcp reset"
        return _Verdict(True, answers)
    is_unknown = bool(unknown - _SILENT_STATEMENTS)
    return _Verdict(True, is_unknown, queues=is_unknown)


def _of_xtables(details: Mapping[str, Any]) -> _Verdict:
    name = details.get("name")
    if details.get("type") == "match":
        return _Verdict(name in MATCHES_THAT_DROP, False)
    if details.get("type") == "target" and name in INNOCENT_TARGETS:
        return _NOTHING
    return _Verdict(True, name not in SILENT_TARGETS, queues=name not in NO_QUEUE)


def _of_map(data: Any, listing: _Listing, table: tuple[str, str]) -> _Verdict:
    if isinstance(data, str):
        name = data[1:] if data.startswith("@") else data
        verdict = listing.verdict_of((*table, name))
        return verdict._replace(leads_to=(f"@{name}",))
    if not isinstance(data, dict):
        raise TypeError("not a map")
    return _of_verdicts(data)


def _of_verdicts(elements: Any) -> _Verdict:
    """What the verdicts in a map's elements may do."""
    drops = queues = False
    leads_to: dict[str, None] = {}
    waiting = [elements]
    while waiting:
        inner = waiting.pop()
        if isinstance(inner, dict):
            for verb in ("jump", "goto"):
                if isinstance(inner.get(verb), dict):
                    leads_to[str(inner[verb]["target"])] = None
            queues |= "queue" in inner
            drops |= "drop" in inner
            waiting += inner.values()
        elif isinstance(inner, list):
            waiting += inner
    return _Verdict(drops or queues, queues, tuple(leads_to), queues)


def _conditions(expressions: Sequence[Any]) -> Iterator[tuple[str, str]]:
    """The rule's conditions that compare a field with one value for equality."""
    for expression in expressions:
        match = expression.get("match") if isinstance(expression, dict) else None
        if not isinstance(match, dict) or match.get("op") != "==":
            continue
        left, value = match["left"], _value(match["right"])
        if not isinstance(left, dict) or value is None:
            continue
        payload, meta = left.get("payload", {}), left.get("meta", {})
        field, protocol = payload.get("field"), payload.get("protocol")
        if protocol in ("tcp", "udp", "sctp", "dccp", "udplite"):
            yield "protocol", str(protocol)
        if (field in ("saddr", "daddr") and protocol in ("ip", "ip6")) or field in (
            "sport",
            "dport",
        ):
            yield str(field), value
        elif field in ("protocol", "nexthdr") or meta.get("key") == "l4proto":
            yield "protocol", value
        elif meta.get("key") == "nfproto":
            yield "nfproto", value
        elif meta.get("key") in ("iif", "iifname") and not value.isdecimal():
            # nft prints a number for a device that is gone.
            yield "iifname", value


def _value(right: Any) -> str | None:
    if isinstance(right, (str, int)):
        return str(right)
    if isinstance(right, dict) and "prefix" in right:
        return f"{right['prefix']['addr']}/{right['prefix']['len']}"
    return None
