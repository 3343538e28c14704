"""Finds the rules that a packet may match without checking every rule. Pure.

Rules are sorted once by their conditions on the server's side, and then by the network of the
client's address. For each packet a chain is checked once, however many jumps lead to it.
"""

from __future__ import annotations

import ipaddress
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from tcpstuck_bpf.model import FourTuple
from tcpstuck_bpf.rulesets import DropRule, Jump, Ruleset

_FAMILIES = {4: frozenset({"ip", "inet", "netdev"}), 6: frozenset({"ip6", "inet", "netdev"})}
_NFPROTO = {4: "ipv4", 6: "ipv6"}
_ADDRESS_BITS = {4: 32, 6: 128}

MOST_SUSPECTS = 32
"""Largest number of suspects of one packet. Each verdict lists them all; more would not help."""
MOST_STEPS = 2_000_000
"""Checks of a rule or a chain, for all packets compared with one reading; about a second.
A ruleset of 20 000 rules with 50 listeners takes half of it once, and then a few for each packet.
"""
_KEPT_INDEXES = 32
"""Number of indexes kept. One for each namespace with recent drops is enough."""
_INDEXED_RULES = 50_000
"""Largest number of rules in all indexes together, at about 500 bytes each."""
_VIEWED_RULES = 20_000
"""Largest number of rules in all views of an index. Views share entries and only add lists."""

_Chain = tuple[str, str, str]
"""Family, table and name."""


class Packet(NamedTuple):
    """The known facts of a dropped packet."""

    who: FourTuple
    hook: str | None
    """Netfilter hook; None means any."""
    device: int | None
    """Index of the device by which it came; None means any."""


class Matching(NamedTuple):
    """The rules that a packet may have matched."""

    rules: tuple[int, ...]
    """Indices in the ruleset, in order."""
    incomplete: bool
    """Whether more rules may match."""


class _Source(NamedTuple):
    """A network of client addresses."""

    family: int
    shift: int
    """Number of address bits after the network's prefix."""
    prefix: int

    def has(self, address: int) -> bool:
        return address >> self.shift == self.prefix


class _Entry(NamedTuple):
    """A rule or a jump, with its conditions on the client's side."""

    rule: int
    """Index of the rule; -1 for a jump."""
    target: _Chain | None
    sources: tuple[_Source, ...]
    ports: tuple[tuple[int, int], ...]

    def may_match(self, address: int, port: int) -> bool:
        return all(source.has(address) for source in self.sources) and all(
            low <= port <= high for low, high in self.ports
        )


@dataclass
class _ChainView:
    """The part of a chain that can match packets to one server address and port."""

    by_source: dict[int, dict[int, list[_Entry]]] = field(default_factory=dict)
    """Entries by `_Source.shift`, then by `_Source.prefix`."""
    of_any_source: list[_Entry] = field(default_factory=list)

    def add(self, entry: _Entry) -> None:
        """Add a rule or a jump."""
        if entry.sources:
            source = entry.sources[0]
            self.by_source.setdefault(source.shift, {}).setdefault(source.prefix, []).append(entry)
        else:
            self.of_any_source.append(entry)


class _View(NamedTuple):
    """The part of a ruleset that can match packets to one server address and port."""

    chains: dict[_Chain, _ChainView]
    bases: tuple[_Chain, ...]
    """Chains that a hook calls."""


class _Parsed(NamedTuple):
    """The parsed conditions of a rule or jump; unknown ones are left out."""

    place: DropRule | Jump
    entry: _Entry
    server_side: tuple[tuple[str, str], ...]
    destinations: tuple[_Source, ...]
    server_ports: tuple[tuple[int, int], ...]


def _network(value: str) -> _Source | None:
    try:
        network = ipaddress.ip_network(value, strict=False)
    except ValueError:
        return None
    shift = network.max_prefixlen - network.prefixlen
    return _Source(network.version, shift, int(network.network_address) >> shift)


def _ports(value: str) -> tuple[int, int] | None:
    low, _, high = value.partition(":")
    try:
        return int(low), int(high or low)
    except ValueError:
        return None


def _parsed(place: DropRule | Jump, rule: int) -> _Parsed:
    def networks(name: str) -> tuple[_Source, ...]:
        found = (_network(value) for key, value in place.conditions if key == name)
        return tuple(network for network in found if network is not None)

    def ports(name: str) -> tuple[tuple[int, int], ...]:
        found = (_ports(value) for key, value in place.conditions if key == name)
        return tuple(port for port in found if port is not None)

    target = (place.family, place.table, place.target) if isinstance(place, Jump) else None
    others = tuple(c for c in place.conditions if c[0] in ("protocol", "nfproto", "iifname"))
    return _Parsed(
        place,
        _Entry(rule, target, networks("saddr"), ports("sport")),
        others,
        networks("daddr"),
        ports("dport"),
    )


def _names_device(pattern: str, names: Sequence[str]) -> bool:
    """Whether an interface match can hold for one of these devices."""
    if pattern.endswith("*"):
        return any(name.startswith(pattern[:-1]) for name in names)
    return pattern in names


class RuleIndex:
    """The rules and jumps of one reading, sorted so that few of them have to be checked."""

    def __init__(self, ruleset: Ruleset) -> None:
        self.ruleset = ruleset
        self.steps_left = MOST_STEPS
        self._parsed: list[_Parsed] | None = None
        self._views: OrderedDict[tuple[object, ...], _View] = OrderedDict()

    def matching(self, packet: Packet) -> Matching:
        """The rules that a packet may have matched."""
        view = self._view(packet)
        if view is None:
            return Matching((), incomplete=True)
        family = packet.who.family
        address = int.from_bytes(packet.who.client_address, "big") & (
            (1 << _ADDRESS_BITS[family]) - 1
        )
        port = packet.who.client_port
        found: list[int] = []
        seen: set[_Chain] = set(view.bases)
        waiting = deque(view.bases)
        while waiting:
            chain = view.chains[waiting.popleft()]
            lists = [chain.of_any_source]
            lists += [
                prefixes[address >> shift]
                for shift, prefixes in chain.by_source.items()
                if address >> shift in prefixes
            ]
            self.steps_left -= 1 + len(chain.by_source)
            for entries in lists:
                for entry in entries:
                    self.steps_left -= 1
                    if self.steps_left < 0 or len(found) > MOST_SUSPECTS:
                        return Matching(tuple(sorted(found[:MOST_SUSPECTS])), incomplete=True)
                    if not entry.may_match(address, port):
                        continue
                    if entry.target is None:
                        found.append(entry.rule)
                    elif entry.target in view.chains and entry.target not in seen:
                        seen.add(entry.target)
                        waiting.append(entry.target)
        return Matching(tuple(sorted(found[:MOST_SUSPECTS])), len(found) > MOST_SUSPECTS)

    def _view(self, packet: Packet) -> _View | None:
        """The view for a packet; None if making it would exceed this ruleset's steps."""
        who = packet.who
        key = (who.family, who.server_address, who.server_port, packet.hook, packet.device)
        view = self._views.get(key)
        if view is None:
            self.steps_left -= self.ruleset.size
            if self.steps_left < 0:
                return None
            view = self._views[key] = self._made_view(packet)
            if len(self._views) > 1 + _VIEWED_RULES // (1 + self.ruleset.size):
                self._views.popitem(last=False)
        return view

    def _made_view(self, packet: Packet) -> _View:
        if self._parsed is None:
            rules, jumps = self.ruleset.rules, self.ruleset.jumps
            self._parsed = [_parsed(rule, number) for number, rule in enumerate(rules)]
            self._parsed += [_parsed(jump, -1) for jump in jumps]
        families = _FAMILIES[packet.who.family]
        devices = self._possible_devices(packet.device)
        chains: dict[_Chain, _ChainView] = {}
        bases: dict[_Chain, None] = {}
        for parsed in self._parsed:
            place = parsed.place
            if place.family not in families or _fails(parsed, packet.who, devices):
                continue
            chain = (place.family, place.table, place.chain)
            if place.hook:
                if packet.hook not in (None, place.hook):
                    continue
                bases[chain] = None
            chains.setdefault(chain, _ChainView()).add(parsed.entry)
        return _View(chains, tuple(bases))

    def _possible_devices(self, device: int | None) -> tuple[str, ...] | None:
        known = self.ruleset.devices
        if known is None or device is None:
            return None if known is None else tuple(name for _, name in known)
        return tuple(name for index, name in known if index == device) or None


def _fails(parsed: _Parsed, who: FourTuple, devices: Sequence[str] | None) -> bool:
    """Whether a condition cannot hold for a TCP segment to this server from any client."""
    family = who.family
    if any(source.family != family for source in (*parsed.entry.sources, *parsed.destinations)):
        return True
    server = int.from_bytes(who.server_address, "big") & ((1 << _ADDRESS_BITS[family]) - 1)
    if not all(network.has(server) for network in parsed.destinations):
        return True
    if not all(low <= who.server_port <= high for low, high in parsed.server_ports):
        return True
    for name, value in parsed.server_side:
        if name == "protocol" and value.lower() not in ("tcp", "6", "all"):
            return True
        if name == "nfproto" and value != _NFPROTO[family]:
            return True
        if name == "iifname" and devices is not None and not _names_device(value, devices):
            return True
    return False


_Identity = tuple[int, int, int]
_indexes: OrderedDict[_Identity, RuleIndex] = OrderedDict()


def _is_too_much() -> bool:
    rules = sum(index.ruleset.size for index in _indexes.values())
    return len(_indexes) > _KEPT_INDEXES or rules > _INDEXED_RULES


def index_of(ruleset: Ruleset) -> RuleIndex:
    """The index of these rules; readings that share their rules share the index."""
    identity = (id(ruleset.rules), id(ruleset.jumps), id(ruleset.devices))
    index = _indexes.get(identity)
    if index is None:
        # The index keeps the rules alive, so no other object can get their id() meanwhile.
        index = _indexes[identity] = RuleIndex(ruleset)
        while len(_indexes) > 1 and _is_too_much():
            _indexes.popitem(last=False)
    return index
