"""What the live view shows at one moment, and the book that it is taken from. Pure.

The tracing thread takes findings into the `Book` and makes a `Snapshot` about once a second. A
snapshot never changes, so the thread that draws it needs no lock.

Times are CLOCK_MONOTONIC nanoseconds.
"""

from __future__ import annotations

import heapq
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import NamedTuple

from tcpstuck_bpf.judge.stuck_now import StuckGroup, group_of
from tcpstuck_bpf.judge.verdict import Finding
from tcpstuck_bpf.model import (
    SECOND_NS,
    HandshakeId,
    ListenerFacts,
    ListenerId,
    ListenerSeen,
    address_bytes,
    listener_id,
)
from tcpstuck_bpf.summary import Summary

MOST_CLIENTS = 100
"""Largest number of clients kept for one cause, and of the newest clients in a snapshot."""
MOST_CAUSES = 64
"""Largest number of causes with clients. Beyond it, the cause that grew longest ago loses its
clients; its number is still shown."""
MOST_LISTENERS = 100
RATE_NS = 10 * SECOND_NS
"""A rate is the average of this time."""


class ListenerView(NamedTuple):
    """A listener, as it is shown."""

    seen: ListenerSeen
    accept_queue: int | None
    """Present length of the accept queue, in entries; None if unknown."""
    cookies_per_second: float
    stuck: int

    @property
    def listener(self) -> ListenerId:
        """The listener's identity."""
        return self.seen.facts.listener


class Cause(NamedTuple):
    """The clients that are stuck at one listener for one cause."""

    group: StuckGroup
    number: int
    clients: tuple[Finding, ...]
    """The newest ones, the newest first; at most MOST_CLIENTS."""


class Snapshot(NamedTuple):
    """Everything that the view shows."""

    now_ns: int
    summary: Summary
    cookies_per_second: float
    causes: tuple[Cause, ...]
    clients: tuple[Finding, ...]
    """The newest stuck clients of all causes, the newest first; at most MOST_CLIENTS."""
    listeners: tuple[ListenerView, ...]
    """The listeners that suffered, most stuck clients first; at most MOST_LISTENERS."""
    remarks: tuple[str, ...]
    """What the run said on standard error."""
    ended: bool
    """Whether this is the end of a recording."""


def identity_of(finding: Finding) -> HandshakeId:
    """The handshake that a finding is about."""
    return HandshakeId(finding.four_tuple, finding.first_syn_ns)


class _Rates:
    """Counters' averages over the last RATE_NS, by key."""

    def __init__(self) -> None:
        self._readings: deque[tuple[int, Mapping[Hashable, int]]] = deque()

    def note(self, now_ns: int, counters: Mapping[Hashable, int], begun_ns: int) -> None:
        """Take a reading of all counters. At `begun_ns`, the start of the run, they were zero."""
        if not self._readings:
            self._readings.append((begun_ns, {}))
        self._readings.append((now_ns, counters))
        while len(self._readings) > 2 and now_ns - self._readings[1][0] >= RATE_NS:
            self._readings.popleft()

    def of(self, key: Hashable) -> float:
        """The counter's increase per second. A counter that fell began again from zero."""
        (from_ns, before), (until_ns, after) = self._readings[0], self._readings[-1]
        rise = after.get(key, 0) - before.get(key, 0)
        if rise < 0:
            rise = after.get(key, 0)
        return rise * SECOND_NS / max(1, until_ns - from_ns)


class Book:
    """Takes the run's findings; `snapshot` may be called at any time.

    `is_stuck`: whether a client whose last finding said so is still stuck. `accept_queues` reads
    the present lengths of accept queues; a recording has none.
    """

    def __init__(
        self,
        is_stuck: Callable[[HandshakeId], bool],
        accept_queues: Callable[[Iterable[ListenerFacts]], Mapping[ListenerId, int]],
    ) -> None:
        self._is_stuck = is_stuck
        self._accept_queues = accept_queues
        self._clients: OrderedDict[StuckGroup, OrderedDict[HandshakeId, Finding]] = OrderedDict()
        """The newest clients of each cause; the latest finding comes last."""
        self._groups: dict[HandshakeId, StuckGroup] = {}
        self._rates = _Rates()

    def take(self, findings: Iterable[Finding]) -> None:
        """Take findings. Each replaces an earlier one about the same handshake."""
        for finding in findings:
            identity = identity_of(finding)
            self._remove(identity)
            if finding.stuck and not finding.flood_suspected:
                self._add(identity, finding)

    def _add(self, identity: HandshakeId, finding: Finding) -> None:
        group = group_of(finding)
        clients = self._clients.setdefault(group, OrderedDict())
        self._clients.move_to_end(group)
        clients[identity] = finding
        self._groups[identity] = group
        if len(clients) > MOST_CLIENTS:
            self._remove(next(iter(clients)))
        if len(self._clients) > MOST_CAUSES:
            for one in list(next(iter(self._clients.values()))):
                self._remove(one)

    def _remove(self, identity: HandshakeId) -> None:
        group = self._groups.pop(identity, None)
        if group is None:
            return
        clients = self._clients[group]
        del clients[identity]
        if not clients:
            del self._clients[group]

    def examples(self) -> list[Finding]:
        """The newest finding of each cause that has clients."""
        return [next(reversed(clients.values())) for clients in self._clients.values()]

    def snapshot(
        self, summary: Summary, now_ns: int, remarks: tuple[str, ...], *, ended: bool = False
    ) -> Snapshot:
        """The state of the run at `now_ns`. `summary` is the summary so far."""
        # No finding says that a client gave up and reused its port.
        for identity in [one for one in self._groups if not self._is_stuck(one)]:
            self._remove(identity)
        causes = tuple(
            Cause(group, number, tuple(reversed(self._clients.get(group, {}).values())))
            for group, number in summary.stuck
        )
        newest = heapq.nlargest(
            MOST_CLIENTS,
            (one for cause in causes for one in cause.clients),
            key=lambda finding: (finding.verdict_ns, finding.first_syn_ns),
        )
        counters: dict[Hashable, int] = {
            one.facts.listener: one.facts.cookies_sent for one in summary.seen
        }
        counters[None] = summary.cookies_sent
        if ended:
            self._rates = _Rates()
        self._rates.note(now_ns, counters, now_ns - summary.duration_ns)
        return Snapshot(
            now_ns,
            summary,
            self._rates.of(None),
            causes,
            tuple(newest),
            self._listeners(summary),
            remarks,
            ended,
        )

    def _listeners(self, summary: Summary) -> tuple[ListenerView, ...]:
        stuck: Counter[ListenerId] = Counter()
        for group, number in summary.stuck:
            address = address_bytes(group.server_ip)
            stuck[listener_id(group.netns, group.socket, address, group.server_port)] += number
        suffering = heapq.nlargest(
            MOST_LISTENERS,
            (one for one in summary.seen if one.facts.suffered or stuck[one.facts.listener]),
            key=lambda one: (stuck[one.facts.listener], one.facts.cookies_sent),
        )
        lengths = self._accept_queues(one.facts for one in suffering)
        return tuple(
            ListenerView(
                one,
                lengths.get(one.facts.listener),
                self._rates.of(one.facts.listener),
                stuck[one.facts.listener],
            )
            for one in suffering
        )
