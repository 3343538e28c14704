"""Finds the rules that can drop a packet in the output of `nft -j` and `iptables-save`. Pure.

A rule is a suspect unless everything it does is known never to drop a packet. Known to be innocent
are the nftables statements and iptables targets whose code returns only NFT_CONTINUE, NFT_BREAK,
XT_CONTINUE or an accepting verdict (net/netfilter of 5.10 to 7.1, and xtables-addons). Those that
drop only for lack of memory count as innocent too (DSCP, TTL, NAT).
"""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from tcpstuck_bpf.rulesets import Conditions, DropRule, Jump

STRANGE = (ValueError, KeyError, TypeError, AttributeError)
"""Exceptions that a ruleset of an unknown format causes."""
_BUILT_IN = ("PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING")
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
_INNOCENT_TARGETS = frozenset(
    {
        "ACCEPT", "RETURN", "ACCOUNT", "AUDIT", "CHECKSUM", "CLASSIFY", "CONNMARK", "CONNSECMARK",
        "CT", "DNAT", "DSCP", "ECN", "FLOWOFFLOAD", "HL", "HMARK", "IDLETIMER", "IPMARK", "LED",
        "LOG", "LOGMARK", "MARK", "NETMAP", "NFLOG", "NOTRACK", "RATEEST", "SECMARK", "SET", "SNAT",
        "TCPMSS", "TEE", "TOS", "TRACE", "TTL", "ULOG",
    }
)  # fmt: skip
"""Innocent targets. These are suspects: DROP, REJECT, QUEUE, NFQUEUE, SYNPROXY, TPROXY, CLUSTERIP,
MASQUERADE, REDIRECT, SNPT, DNPT, TCPOPTSTRIP, and of xtables-addons TARPIT, CHAOS, DELUDE, ECHO,
STEAL, SYSRQ, DHCPMAC, RAWNAT."""
_SILENT_TARGETS = frozenset(
    {
        "DROP", "CLUSTERIP", "DHCPMAC", "DNPT", "ECHO", "MASQUERADE", "RAWDNAT", "RAWSNAT",
        "REDIRECT", "SNPT", "STEAL", "SYNPROXY", "SYSRQ", "TCPOPTSTRIP", "TPROXY",
    }
)  # fmt: skip
"""Suspects that never answer with an RST."""
_NO_QUEUE = _SILENT_TARGETS | {"REJECT", "TARPIT", "DELUDE", "CHAOS"}
"""Suspects that never hand a packet to a queue."""
_SILENT_STATEMENTS = frozenset(
    {"drop", "synproxy", "fwd", "ct count", "reset", "redirect", "masquerade"}
)
_MATCHES_THAT_DROP = frozenset({"connlimit", "hashlimit"})
"""iptables matches that drop by themselves: `hotdrop`, if there is no room for an entry."""
_VERDICTS = frozenset({"accept", "drop", "jump", "goto", "return", "continue", "queue"})
_TABLE_FLAGS = frozenset({"dormant", "owner", "persist"})
_WORD = re.compile(r'"(?:[^"\\]|\\.)*"|\S+')
"""A word as xtables_save_string() writes it. shlex would take ten times as long, which is seconds
for a large ruleset."""
_COUNTED = re.compile(r"\[(\d+):\d+\]")
_OPTIONS = {
    "-p": "protocol",
    "-s": "saddr",
    "-d": "daddr",
    "-i": "iifname",
    "--dport": "dport",
    "--sport": "sport",
}

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
        return _Verdict(name in _MATCHES_THAT_DROP, False)
    if details.get("type") == "target" and name in _INNOCENT_TARGETS:
        return _NOTHING
    return _Verdict(True, name not in _SILENT_TARGETS, queues=name not in _NO_QUEUE)


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


def xtables_rules(text: str, family: str) -> Parts:
    """Parse `iptables-save -c` of the legacy back end. Raises ValueError and KeyError."""
    parts = no_parts()
    table = ""
    policies: dict[str, tuple[str, int | None]] = {}
    numbers: dict[str, int] = {}
    for line in text.splitlines():
        if line.startswith("*"):
            table, policies, numbers = line[1:].strip(), {}, {}
        elif line.startswith(":"):
            chain, policy, *counted = line[1:].split()
            policies[chain] = (policy, _number(counted[0]) if counted else None)
        elif line.startswith(("-A ", "[")):
            words = _WORD.findall(line)
            packets = _number(words.pop(0)) if line.startswith("[") else None
            chain = words[1]
            numbers[chain] = numbers.get(chain, 0) + 1
            at = _Standing((family, table, chain), numbers[chain], packets)
            _add_xtables_rule(parts, at, words[2:], policies)
        elif line.strip() == "COMMIT":
            for chain in _BUILT_IN:
                if chain in policies:
                    policy, packets = policies[chain]
                    parts.chains.add((family, table, chain))
                    if policy == "DROP":
                        hook = chain.lower()
                        rule = DropRule(family, table, chain, hook, "policy", 0, ())
                        parts.add(rule, packets)
    return parts


def _number(counted: str) -> int | None:
    """The number of packets in `[packets:bytes]`."""
    found = _COUNTED.fullmatch(counted)
    return int(found.group(1)) if found else None


class _Standing(NamedTuple):
    """Position and packet counter of an iptables rule."""

    chain: ChainName
    number: int
    packets: int | None


def _add_xtables_rule(
    parts: Parts,
    at: _Standing,
    words: Sequence[str],
    chains: Mapping[str, object],
) -> None:
    conditions: list[tuple[str, str]] = []
    target = ""
    drops_in_match = False
    for before, word, after in zip(["", *words], words, [*words[1:], ""]):
        if not after or after.startswith("-") or before in ("!", "--comment"):
            # The word is negated, or a comment that only looks like an option.
            continue
        if word in _OPTIONS:
            value = after.strip('"')
            # An iptables wildcard ends in +. DropRule uses nftables' form, which ends in *.
            value = value[:-1] + "*" if word == "-i" and value.endswith("+") else value
            conditions.append((_OPTIONS[word], value))
        elif word in ("-j", "-g"):
            target = after
        elif word == "-m":
            drops_in_match |= after in _MATCHES_THAT_DROP
    family, table, chain = at.chain
    hook = chain.lower() if chain in _BUILT_IN else ""
    if target in chains:
        parts.jumps.append(Jump(family, table, chain, hook, target, tuple(conditions)))
    if target == "SYNPROXY":
        parts.mentioned.add("synproxy")
    is_innocent = not target or target in chains or target in _INNOCENT_TARGETS
    if is_innocent and not drops_in_match:
        return
    if target == "REJECT":
        may_reset = "tcp-reset" in words
    else:
        may_reset = not is_innocent and target not in _SILENT_TARGETS
    rule = DropRule(family, table, chain, hook, "number", at.number, tuple(conditions), may_reset)
    rule = rule._replace(queues=not is_innocent and target not in _NO_QUEUE)
    # The counter counts only packets that pass all matches, not those that a match drops.
    parts.add(rule, None if drops_in_match else at.packets)


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
