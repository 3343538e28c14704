"""Gathers the lengths of listeners' queues from a recording, while it is replayed. Pure.

A recording has a length only where a packet came. Times are CLOCK_MONOTONIC nanoseconds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from tcpstuck_bpf.model import (
    Event,
    EventKind,
    FourTuple,
    Handshake,
    ListenerId,
    ListenerSeen,
    Sweep,
    SweepPart,
    listener_of,
)
from tcpstuck_bpf.steps import Listened, Observed, Step, Swept

MOST_READINGS = 1000
"""Largest number of readings of one queue."""
MOST_LISTENERS = 256
"""Largest number of listeners in memory."""

_SEEN_BY_LISTENER = frozenset(EventKind) - {EventKind.ACK_FILTERED, EventKind.NO_LISTENER}
"""Events whose lengths are those of the listener's queues when the segment came."""


class Series:
    """Readings over time. If they become many, only the highest of each interval is kept.

    Neither the order of readings nor a repeated one matters.
    """

    def __init__(self) -> None:
        self._interval_ns = 1
        self._highest: dict[int, tuple[int, int]] = {}
        """Reading and negative time, by interval. Of equal readings the earliest is kept."""

    def note(self, time_ns: int, number: int) -> None:
        """Add a reading."""
        self._note((number, -time_ns))
        while len(self._highest) > MOST_READINGS:
            self._interval_ns *= 2
            before, self._highest = self._highest, {}
            for reading in before.values():
                self._note(reading)

    def _note(self, reading: tuple[int, int]) -> None:
        place = -reading[1] // self._interval_ns
        self._highest[place] = max(reading, self._highest.get(place, reading))

    def readings(self) -> list[tuple[int, int]]:
        """Time and reading, in order of time."""
        return sorted((-negative_ns, number) for number, negative_ns in self._highest.values())


class QueueLengths:
    """What is known about the queues of one listener."""

    def __init__(self) -> None:
        self.accept_queue = Series()
        self.syn_queue = Series()
        self.limit = Series()

    def note_entry(self, entry: Handshake) -> None:
        """Note the lengths at an entry's last SYN."""
        if entry.syns_dropped:
            return  # the lengths are older than the last SYN
        if entry.syn_count:
            self.syn_queue.note(entry.last_syn_ns, entry.syn_queue)
        self.note_accept_queue(entry.last_syn_ns, entry.accept_queue, entry.accept_queue_limit)

    def note_accept_queue(self, time_ns: int, length: int, limit: int) -> None:
        """Note the accept queue's length, and the limit, at a moment."""
        self.accept_queue.note(time_ns, length)
        self.limit.note(time_ns, limit)


class Queues:
    """Takes the steps of a recording."""

    def __init__(self) -> None:
        self._kept: dict[ListenerId, QueueLengths] = {}
        self._segments: Counter[ListenerId] = Counter()
        """Number of events of each kept listener. Without a dropped ACK there are none."""
        self._swept_ns = 0
        """When the last whole sweep began."""

    def take(self, step: Step) -> None:
        """Take a step."""
        if isinstance(step, Observed):
            for event in step.events:
                self._take_event(event)
        elif isinstance(step, Swept):
            self._take_sweep(step.sweep)
        elif isinstance(step, Listened):
            self._take_listeners(step.listeners)

    def _take_event(self, event: Event) -> None:
        lengths = self._of(listener_of(event.four_tuple, event.handshake))
        self._segments[listener_of(event.four_tuple, event.handshake)] += 1
        lengths.note_entry(event.handshake)
        if event.kind in _SEEN_BY_LISTENER:
            lengths.note_accept_queue(event.time_ns, event.accept_queue, event.accept_queue_limit)

    def _take_sweep(self, sweep: Sweep) -> None:
        for who, entry in sweep.rows:
            # The last whole sweep had every SYN that came before it.
            if entry.last_syn_ns >= self._swept_ns:
                self._take_entry(who, entry)
        if sweep.part is SweepPart.LAST:
            self._swept_ns = sweep.time_ns

    def _take_entry(self, who: FourTuple, entry: Handshake) -> None:
        self._of(listener_of(who, entry)).note_entry(entry)

    def _take_listeners(self, listeners: Iterable[ListenerSeen]) -> None:
        for one in listeners:
            facts = one.facts
            if facts.cookies_sent and facts.syn_need_ns:
                lengths = self._of(facts.listener)
                lengths.syn_queue.note(facts.syn_need_ns, facts.syn_need_syn_queue)
                lengths.limit.note(facts.syn_need_ns, facts.limit)

    def _of(self, listener: ListenerId) -> QueueLengths:
        if listener not in self._kept:
            if len(self._kept) >= MOST_LISTENERS:
                least = min(self._kept, key=self._segments.__getitem__)
                del self._kept[least], self._segments[least]
            self._kept[listener] = QueueLengths()
        return self._kept[listener]

    def of(self, listener: ListenerId) -> QueueLengths:
        """The lengths of a listener's queues; empty if nothing is known about it."""
        return self._kept.get(listener) or QueueLengths()
