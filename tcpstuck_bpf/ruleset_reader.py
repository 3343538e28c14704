"""Reads the firewall rules of a network namespace that drop packets, and changes none of them.

By the programs that people themselves use, `nft -j` and `iptables-save`, run inside the namespace.
Neither is run where it would make the kernel load a module: only what is in use is read.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tcpstuck_bpf import features, netns
from tcpstuck_bpf.model import DropRule, Ruleset
from tcpstuck_bpf.programs import ENVIRONMENT, find_program

LIMIT_S = 60.0
"""For one program. It ends a wait for one that hangs; nobody else waits for it."""
_MODULE = Path("/sys/module/nf_tables")
_BUILT_INTO_KERNEL = "nft_do_chain"
"""A function of nf_tables that the kernel itself has where it is no module."""
_OWN_NET = Path("/proc/thread-self/net")
_LEGACY = (("ip", "iptables", "ip_tables_names"), ("ip6", "ip6tables", "ip6_tables_names"))
_BUILT_IN = ("PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING")
_DROPPING = frozenset({"drop", "reject", "synproxy"})
_TARGETS = frozenset({"DROP", "REJECT", "SYNPROXY", "TPROXY"})
"""Those that end in NF_DROP, SYNPROXY and TPROXY for an ACK that does not suit them."""
_VERDICTS = frozenset({"accept", "drop", "jump", "goto", "return", "continue", "queue"})
_DEEPEST = 32
_MOST_WAYS = 10_000
_STRANGE = (ValueError, KeyError, TypeError, AttributeError)
"""What comes of a ruleset in a shape that nobody has seen yet."""
_WORD = re.compile(r'"(?:[^"\\]|\\.)*"|\S+')
"""As xtables_save_string() writes them. shlex takes ten times as long:
seconds for a large ruleset."""
_OPTIONS = {
    "-p": "protocol",
    "-s": "saddr",
    "-d": "daddr",
    "--dport": "dport",
    "--sport": "sport",
}

Conditions = tuple[tuple[str, str], ...]
Found = tuple[str, int, Conditions, tuple[str, ...], bool, bool]
"""A rule: what its number is, the number, its conditions, chains it leads to, whether it drops, and
whether it may answer by RST as well."""


def read_ruleset(inode: int) -> Ruleset:
    """The rules that can drop, of the namespace with that inode number, as they are now."""
    try:
        return netns.run_in(inode, _read_own)
    except OSError as error:
        problem = f"the rules cannot be read: network namespace {inode}: {error.strerror}"
        return Ruleset((), (problem,))


def _read_own() -> Ruleset:
    rules: list[DropRule] = []
    problems: list[str] = []

    def read(command: Sequence[str], parse: Callable[[str], Iterator[DropRule]]) -> None:
        try:
            rules.extend(tuple(parse(_output(command))))
        except (OSError, subprocess.SubprocessError, *_STRANGE) as error:
            why = getattr(error, "strerror", None) or type(error).__name__
            problems.append(f"the rules of {command[0]} cannot be read: {why}")

    if _MODULE.exists() or features.function_symbols([_BUILT_INTO_KERNEL]):
        read(("nft", "-j", "list", "ruleset"), nftables_rules)
    for family, program, names in _LEGACY:
        if _has_tables(_OWN_NET / names):
            legacy = f"{program}-legacy-save"
            command = legacy if find_program(legacy) else f"{program}-save"
            read((command,), lambda text, of=family: xtables_rules(text, of))  # type: ignore[misc]
    if _conntrack_drops(_OWN_NET / "stat" / "nf_conntrack"):
        problems.append(
            "connection tracking has dropped packets by itself (a full table: "
            "net.netfilter.nf_conntrack_max), and may have dropped this one"
        )
    return Ruleset(tuple(rules), tuple(problems))


def _conntrack_drops(statistics: Path) -> int:
    """Packets that nf_conntrack_in() dropped in this namespace; 0 where nothing tells.

    A line of names, then one of hexadecimal numbers for each CPU.
    """
    try:
        names, *cpus = (line.split() for line in statistics.read_text("ascii").splitlines())
        return sum(int(cpu[names.index("drop")], 16) for cpu in cpus)
    except (OSError, ValueError, IndexError):
        return 0


def _has_tables(names: Path) -> bool:
    try:
        return bool(names.read_text("ascii").strip())
    except OSError:
        return False


def _output(command: Sequence[str]) -> str:
    program = find_program(command[0])
    if program is None:
        raise FileNotFoundError(2, "it is not installed", command[0])
    ended = subprocess.run(
        [program, *command[1:]],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        # A comment may hold any bytes, and is no reason not to read the rules.
        errors="surrogateescape",
        timeout=LIMIT_S,
        env=ENVIRONMENT,
        # Ctrl-C at our terminal is meant for us: what is being read still tells something.
        start_new_session=True,
        check=True,
    )
    return ended.stdout


def nftables_rules(text: str) -> Iterator[DropRule]:
    """From `nft -j list ruleset` (libnftables-json(5)).

    Raises ValueError, KeyError, TypeError or AttributeError where it is none.
    """
    items = json.loads(text)["nftables"]
    chains = [item["chain"] for item in items if "chain" in item]
    rules: dict[tuple[str, str, str], list[Found]] = {}
    for item in items:
        if "rule" in item:
            rule = item["rule"]
            place = (rule["family"], rule["table"], rule["chain"])
            expressions = rule.get("expr", [])
            is_nameless = _may_end_in_target(expressions)
            rules.setdefault(place, []).append(
                (
                    "handle",
                    int(rule["handle"]),
                    tuple(_conditions(expressions)),
                    tuple(_leads_to(expressions)),
                    is_nameless or _drops(expressions),
                    is_nameless or any(map(_may_reset, expressions)),
                )
            )
    for chain in chains:
        if "hook" in chain:
            family, table, name = chain["family"], chain["table"], chain["name"]
            own = {
                place[2]: found for place, found in rules.items() if place[:2] == (family, table)
            }
            yield from _reachable(family, table, name, chain["hook"], own)
            if chain.get("policy") == "drop":
                yield DropRule(family, table, name, chain["hook"], "policy", 0, ())


def _reachable(
    family: str, table: str, base: str, hook: str, rules: Mapping[str, Sequence[Found]]
) -> Iterator[DropRule]:
    """Dropping rules of a base chain and of every chain it leads to.

    Where there are too many ways to follow, every one of the table may be come to.
    """
    seen: set[tuple[str, Conditions]] = set()
    waiting: deque[tuple[str, Conditions]] = deque([(base, ())])
    while waiting and len(seen) < _MOST_WAYS:
        way = waiting.popleft()
        if way in seen:
            continue
        seen.add(way)
        chain, passed = way
        for kind, number, conditions, leads_to, drops, may_reset in rules.get(chain, ()):
            # What it took to get into a chain holds for every rule of it.
            together = tuple(dict.fromkeys((*passed, *conditions)))
            waiting += [(target, together) for target in leads_to]
            if drops:
                yield DropRule(family, table, chain, hook, kind, number, together, may_reset)
    if waiting:
        for chain, own in rules.items():
            for kind, number, conditions, _, drops, may_reset in own:
                if drops:
                    yield DropRule(family, table, chain, hook, kind, number, conditions, may_reset)


def _drops(expression: Any, depth: int = _DEEPEST) -> bool:
    """Whether a verdict anywhere in it drops; a map's verdicts are not all seen, so it may."""
    if depth and isinstance(expression, dict):
        if expression.keys() & _DROPPING:
            return True
        if "xt" in expression:
            target = expression["xt"] or {}
            return target.get("type") == "target" and target.get("name") in _TARGETS
        if "vmap" in expression and isinstance(expression["vmap"].get("data"), str):
            return True
        return any(_drops(inner, depth - 1) for inner in expression.values())
    if depth and isinstance(expression, list):
        return any(_drops(inner, depth - 1) for inner in expression)
    return False


def _is_nameless(statement: Any) -> bool:
    """Whether it may be any match or target of iptables': older nft has null or mere text there."""
    return isinstance(statement, str) or statement == {"xt": None}


def _may_end_in_target(statements: Sequence[Any]) -> bool:
    """Whether a rule of iptables' may end in a target that nft does not name."""
    has_verdict = any(isinstance(s, dict) and s.keys() & _VERDICTS for s in statements)
    return not has_verdict and any(map(_is_nameless, statements))


def _may_reset(statement: Any) -> bool:
    """Whether it rejects by RST; of a target of iptables' nft does not tell how it rejects."""
    if not isinstance(statement, dict):
        return False
    for verb, key, value in (("reject", "type", "tcp reset"), ("xt", "name", "REJECT")):
        details = statement.get(verb)
        if isinstance(details, dict) and details.get(key) == value:
            return True
    return False


def _leads_to(expression: Any, depth: int = _DEEPEST) -> Iterator[str]:
    if not depth:
        return
    if isinstance(expression, dict):
        for verb in ("jump", "goto"):
            if isinstance(expression.get(verb), dict):
                yield str(expression[verb]["target"])
        for inner in expression.values():
            yield from _leads_to(inner, depth - 1)
    elif isinstance(expression, list):
        for inner in expression:
            yield from _leads_to(inner, depth - 1)


def _conditions(expressions: Sequence[Any]) -> Iterator[tuple[str, str]]:
    """Matches for equality with one value that every packet of a rule has to pass."""
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


def _value(right: Any) -> str | None:
    if isinstance(right, (str, int)):
        return str(right)
    if isinstance(right, dict) and "prefix" in right:
        return f"{right['prefix']['addr']}/{right['prefix']['len']}"
    return None


def xtables_rules(text: str, family: str) -> Iterator[DropRule]:
    """From `iptables-save` of the legacy back end. Raises ValueError, KeyError."""
    table = ""
    policies: dict[str, str] = {}
    rules: dict[str, list[Found]] = {}
    for line in text.splitlines():
        if line.startswith("*"):
            table, policies, rules = line[1:].strip(), {}, {}
        elif line.startswith(":"):
            chain, policy, *_ = line[1:].split()
            policies[chain] = policy
        elif line.startswith("-A "):
            _, chain, *words = _WORD.findall(line)
            own = rules.setdefault(chain, [])
            own.append(_xtables_rule(len(own) + 1, words))
        elif line.strip() == "COMMIT":
            for chain in _BUILT_IN:
                if chain in policies:
                    hook = chain.lower()
                    yield from _reachable(family, table, chain, hook, rules)
                    if policies[chain] == "DROP":
                        yield DropRule(family, table, chain, hook, "policy", 0, ())


def _xtables_rule(number: int, words: Sequence[str]) -> Found:
    conditions = []
    target = ""
    for before, word, after in zip(["", *words], words, [*words[1:], ""]):
        if word in _OPTIONS and before != "!":
            conditions.append((_OPTIONS[word], after))
        elif word in ("-j", "-g"):
            target = after
    drops = target in _TARGETS
    leads_to = () if drops or not target else (target,)
    return "number", number, tuple(conditions), leads_to, drops, "tcp-reset" in words
