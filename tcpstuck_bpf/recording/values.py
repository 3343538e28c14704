"""Encodes and decodes the parts of a recording's steps.

Numbers stay integers; keys and addresses are hexadecimal. The decoders (`*_of`) raise KeyError,
TypeError, ValueError or AttributeError for damaged values.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

from tcpstuck_bpf import wire
from tcpstuck_bpf.model import (
    Attempt,
    Event,
    HandshakeId,
    KernelWarning,
    ListenerFacts,
    ListenerSeen,
    NetnsCount,
    Rescue,
    Tally,
)
from tcpstuck_bpf.recording.table import (
    address_of,
    four_tuple_of,
    handshake_of,
    integer,
    integers,
)
from tcpstuck_bpf.rulesets import Conditions, DropRule, Jump, KernelNames, Ruleset

_EVENT_NUMBERS = len(Event._fields) - 2


def event_values(event: Event) -> list[Any]:
    """Encode an event."""
    return [wire.encode_key(event.four_tuple).hex(), list(event.handshake), *event[2:]]


def tally_values(tally: Tally) -> dict[str, Any]:
    """Encode a tally."""
    return {
        "time_ns": tally.time_ns,
        "kernel_before": tally.kernel_before,
        "traced": {
            netns: {which.name: number for which, number in counts.items()}
            for netns, counts in tally.traced.items()
        },
        "kernel_after": tally.kernel_after,
    }


def _identity_values(handshake: HandshakeId) -> list[Any]:
    return [wire.encode_key(handshake.four_tuple).hex(), handshake.first_syn_ns]


def rescue_values(rescue: Rescue) -> dict[str, Any]:
    """Encode a rescue."""
    return {
        "attempts": [
            [*_identity_values(attempt.handshake), attempt.time_ns, attempt.number, attempt.outcome]
            for attempt in rescue.attempts
        ],
        "unanswered": [_identity_values(handshake) for handshake in rescue.unanswered],
        "left_alone": dict(rescue.left_alone),
    }


def warning_values(warning: KernelWarning) -> list[Any]:
    """Encode a kernel warning."""
    address = None if warning.address is None else warning.address.hex()
    return [warning.time_ns, warning.port, address, warning.text]


def event_of(values: list[Any]) -> Event:
    """Decode an event."""
    key, handshake, *segment = values
    numbers = integers(segment, _EVENT_NUMBERS)
    return Event(four_tuple_of(key), handshake_of(handshake), *numbers)


def _identity(values: list[Any]) -> HandshakeId:
    key, first_syn_ns = values
    return HandshakeId(four_tuple_of(key), integer(first_syn_ns))


def _attempt(values: list[Any]) -> Attempt:
    *identity, time_ns, number, outcome = values
    return Attempt(_identity(identity), integer(time_ns), integer(number), str(outcome))


def ruleset_of(values: list[Any]) -> Ruleset:
    """Decode a ruleset. Earlier recordings lack the counters, the jumps and what follows them."""
    rules, problems, read_ns, *more = values
    jumps, packets, elsewhere, devices, counted_ns, namespace = (
        [*more, 0][:6] if more else ((), (), (), None, 0, 0)
    )
    return Ruleset(
        tuple(map(_drop_rule, rules)),
        tuple(map(str, problems)),
        integer(read_ns),
        tuple(map(_jump, jumps)),
        tuple(None if number is None else integer(number) for number in packets),
        tuple(map(str, elsewhere)),
        None if devices is None else tuple((integer(i), str(name)) for i, name in devices),
        integer(counted_ns),
        integer(namespace),
    )


def _few(words: list[Any]) -> Iterator[str]:
    """Words, with one copy of each, because many rules share them."""
    return (sys.intern(str(word)) for word in words)


def _conditions(values: list[Any]) -> Conditions:
    return tuple((sys.intern(str(name)), str(value)) for name, value in values)


def _drop_rule(values: list[Any]) -> DropRule:
    *words, number, conditions, may_reset, queues = values if len(values) > 8 else [*values, False]
    family, table, chain, hook, kind = _few(words)
    pairs = _conditions(conditions)
    answers, hands_over = bool(may_reset), bool(queues)
    return DropRule(family, table, chain, hook, kind, integer(number), pairs, answers, hands_over)


def _jump(values: list[Any]) -> Jump:
    *words, conditions = values
    family, table, chain, hook, target = _few(words)
    return Jump(family, table, chain, hook, target, _conditions(conditions))


def names_of(values: Mapping[str, Any]) -> KernelNames:
    """Decode names."""
    return KernelNames(
        {int(place): str(name) for place, name in values["places"].items()},
        {
            int(number): None if name is None else str(name)
            for number, name in values["reasons"].items()
        },
        {int(number): tuple(map(str, frames)) for number, frames in values["stacks"].items()},
        {
            int(netns): tuple(map(ruleset_of, readings))
            for netns, readings in values["rulesets"].items()
        },
    )


def rescue_of(values: Mapping[str, Any]) -> Rescue:
    """Decode a rescue."""
    return Rescue(
        tuple(map(_attempt, values["attempts"])),
        tuple(map(_identity, values["unanswered"])),
        {str(why): integer(number) for why, number in values["left_alone"].items()},
    )


def warning_of(values: list[Any]) -> KernelWarning:
    """Decode a kernel warning."""
    time_ns, port, address, text = values
    known = None if address is None else address_of(address)
    return KernelWarning(integer(time_ns), integer(port), known, str(text))


def _counters(values: Mapping[str, Mapping[str, int]]) -> dict[int, dict[str, int]]:
    return {
        int(netns): {str(name): integer(number) for name, number in counts.items()}
        for netns, counts in values.items()
    }


def tally_of(values: dict[str, Any]) -> Tally:
    """Decode a tally."""
    return Tally(
        integer(values["time_ns"]),
        _counters(values["kernel_before"]),
        {
            netns: {NetnsCount[name]: number for name, number in counts.items()}
            for netns, counts in _counters(values["traced"]).items()
        },
        _counters(values["kernel_after"]),
    )


def listener_values(seen: ListenerSeen) -> list[Any]:
    """Encode a listener."""
    netns, address, *numbers = seen.facts
    bound = None if seen.bound is None else seen.bound.hex()
    known = [seen.owners, seen.sockets, dict(seen.settings), bound]
    return [[netns, address.hex(), *numbers], *known]


def listener_of(values: list[Any]) -> ListenerSeen:
    """Decode a listener. Raises TypeError or ValueError for damaged values.

    A recording of an earlier version lacks the socket, and the address at which it listens.
    """
    (netns, address, *rest), owners, sockets, settings, *bound = values
    numbers = integers(rest, len(ListenerFacts._fields) - 2 - (not bound))
    return ListenerSeen(
        ListenerFacts(integer(netns), address_of(address), *numbers),
        tuple(map(str, owners)),
        tuple(map(integer, sockets)),
        {str(name): integer(number) for name, number in settings.items()},
        address_of(bound[0]) if bound and bound[0] is not None else None,
    )
