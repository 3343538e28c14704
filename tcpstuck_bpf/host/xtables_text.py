"""Finds the rules that can drop a packet in the output of `iptables-save -c`. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tcpstuck_bpf.host.ruleset_text import ChainName, Parts, no_parts
from tcpstuck_bpf.rulesets import DropRule, Jump

_BUILT_IN = ("PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING")
INNOCENT_TARGETS = frozenset(
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
SILENT_TARGETS = frozenset(
    {
        "DROP", "CLUSTERIP", "DHCPMAC", "DNPT", "ECHO", "MASQUERADE", "RAWDNAT", "RAWSNAT",
        "REDIRECT", "SNPT", "STEAL", "SYNPROXY", "SYSRQ", "TCPOPTSTRIP", "TPROXY",
    }
)  # fmt: skip
"""Suspects that never answer with an RST."""
NO_QUEUE = SILENT_TARGETS | {"REJECT", "TARPIT", "DELUDE", "CHAOS"}
"""Suspects that never hand a packet to a queue."""
MATCHES_THAT_DROP = frozenset({"connlimit", "hashlimit"})
"""iptables matches that drop by themselves: `hotdrop`, if there is no room for an entry."""
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
            drops_in_match |= after in MATCHES_THAT_DROP
    family, table, chain = at.chain
    hook = chain.lower() if chain in _BUILT_IN else ""
    if target in chains:
        parts.jumps.append(Jump(family, table, chain, hook, target, tuple(conditions)))
    if target == "SYNPROXY":
        parts.mentioned.add("synproxy")
    is_innocent = not target or target in chains or target in INNOCENT_TARGETS
    if is_innocent and not drops_in_match:
        return
    if target == "REJECT":
        may_reset = "tcp-reset" in words
    else:
        may_reset = not is_innocent and target not in SILENT_TARGETS
    rule = DropRule(family, table, chain, hook, "number", at.number, tuple(conditions), may_reset)
    rule = rule._replace(queues=not is_innocent and target not in NO_QUEUE)
    # The counter counts only packets that pass all matches, not those that a match drops.
    parts.add(rule, None if drops_in_match else at.packets)
