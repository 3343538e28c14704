"""Turns readings of the listeners and of the awaiting-ACK table into a report of each listener.

Pure. The programs count every cookie handshake as owed an entry, whether it is answered later or
never. Only later does the awaiting-ACK table show who stayed silent. So every new peak of the need
is kept with its time, and at the end the clients that had begun by then and are still silent are
subtracted.
"""

from __future__ import annotations

import bisect
from array import array
from collections import Counter, deque
from collections.abc import Iterable, Sequence

from tcpstuck_bpf.judge.backlog import ListenerReport, SynNeed, report
from tcpstuck_bpf.model import (
    CoverageGap,
    Ending,
    FourTuple,
    HandshakeId,
    ListenerFacts,
    ListenerId,
    ListenerSeen,
    Row,
    Sweep,
    SweepPart,
    listener_id,
    listener_of,
)

Destination = tuple[int, bytes, int]
"""Network namespace, server address and server port in a client's packets."""

_Silent = dict[ListenerId, dict[Destination, "array[int]"]]
"""First SYN times of clients that never answered, unordered. Arrays, since a flood has many."""

KEPT_HEIGHTS = 256
MAX_LISTENERS = 8192
"""Largest number of listeners whose figures are remembered."""
MAX_ENDED = 1024
"""Largest number of earlier figures kept, of listeners whose figures began again from zero."""


class ListenerHistory:
    """Takes in a run's observations in order; `reports` may be called at any time."""

    def __init__(self) -> None:
        self.forgotten = 0
        """Number of listeners whose figures were dropped for lack of room."""
        self._seen: dict[ListenerId, ListenerSeen] = {}
        """The last reading of each listener, the least recently changed first."""
        self._ended: deque[tuple[ListenerSeen, SynNeed]] = deque()
        """Figures of listeners before they began again from zero, the oldest first."""
        self._heights: dict[ListenerId, list[ListenerFacts]] = {}
        self._silent: _Silent = {}
        self._silent_in_sweep: _Silent = {}
        self._gone: dict[ListenerId, Counter[int]] = {}

    @property
    def seen(self) -> tuple[ListenerSeen, ...]:
        """The latest reading of each listener, the one that changed longest ago first."""
        return tuple(self._seen.values())

    def take_listeners(self, seen: Iterable[ListenerSeen]) -> None:
        """Take in new readings of the listeners that changed."""
        for one in seen:
            facts = one.facts
            listener = facts.listener
            before = self._seen.pop(listener, None)
            if before is not None and _begins_anew(before.facts, facts):
                self._end(listener, before)
            self._seen[listener] = one
            heights = self._heights.setdefault(listener, [])
            if not heights or heights[-1].syn_need_ns != facts.syn_need_ns:
                heights.append(facts)
                self._keep_few(listener, heights)
        self._forget()

    def _end(self, listener: ListenerId, before: ListenerSeen) -> None:
        """Keep a listener's old figures when new ones begin from zero.

        Figures never decrease, so the new ones belong to another listener, or the entry was freed.
        """
        if before.facts.suffered:
            self._ended.append((before, self._highest([listener])))
        if len(self._ended) > MAX_ENDED:
            self._ended.popleft()
            self.forgotten += 1
        self._heights.pop(listener, None)
        self._gone.pop(listener, None)

    def _forget(self) -> None:
        """Drop listeners beyond the limit: first those that suffered nothing, then idle ones."""
        excess = len(self._seen) - MAX_LISTENERS
        if excess <= 0:
            return
        by_worth = sorted(self._seen, key=lambda listener: self._seen[listener].facts.suffered)
        for listener in by_worth[:excess]:
            del self._seen[listener]
            self._heights.pop(listener, None)
            self._gone.pop(listener, None)
        self.forgotten += excess

    def _keep_few(self, listener: ListenerId, heights: list[ListenerFacts]) -> None:
        """Drop every other peak of the older half; a flood makes a new peak at every reading."""
        if len(heights) > KEPT_HEIGHTS:
            silent = self._silent_times(listener)
            best = max(heights, key=lambda facts: self._need(listener, silent, facts).together)
            half = len(heights) // 2
            older = [facts for n, facts in enumerate(heights[:half]) if n % 2 or facts is best]
            heights[:half] = older
            self._move_gone(listener, heights)

    def _move_gone(self, listener: ListenerId, heights: Sequence[ListenerFacts]) -> None:
        """Move counts of departed clients from dropped peaks to the next kept peak."""
        moved: Counter[int] = Counter()
        for since, number in self._gone.get(listener, Counter()).items():
            moved[_first_height_from(heights, since)] += number
        if moved:
            self._gone[listener] = moved

    def take_sweep(self, sweep: Sweep) -> None:
        """Take in a batch of the table's rows. A client with a silent row has not answered yet."""
        if sweep.part is SweepPart.CHOSEN:
            return
        for row in sweep.rows:
            if _is_silent(row):
                listener = listener_of(row.four_tuple, row.handshake)
                destinations = self._silent_in_sweep.setdefault(listener, {})
                destination = _destination(row.four_tuple)
                times = destinations.get(destination)
                if times is None:
                    times = destinations[destination] = array("Q")
                times.append(row.handshake.first_syn_ns)
        if sweep.part is SweepPart.LAST:
            self._silent, self._silent_in_sweep = self._silent_in_sweep, {}

    def take_leaving(self, leaving: Iterable[HandshakeId]) -> None:
        """Take in entries that leave the table. Silent ones among them stay silent for good."""
        times: dict[Destination, list[int]] = {}
        for four_tuple, first_syn_ns in leaving:
            times.setdefault(_destination(four_tuple), []).append(first_syn_ns)
        # A leaving entry does not name its socket, so all listeners of the destination are tried.
        for listener, destinations in self._silent.items():
            for destination in destinations.keys() & times.keys():
                silent = set(destinations[destination])
                gone = silent.intersection(times[destination])
                self._note_gone(listener, gone)
                destinations[destination] = array("Q", silent - gone)

    def _note_gone(self, listener: ListenerId, times: Iterable[int]) -> None:
        """Count departed silent clients. The programs still count them as owed at later peaks.

        They are counted by peak, not kept by time, because a flood has too many of them.
        """
        if listener not in self._seen:
            return
        heights = self._heights.get(listener, [])
        for first_syn_ns in times:
            counted_ns = _first_height_from(heights, first_syn_ns)
            self._gone.setdefault(listener, Counter())[counted_ns] += 1

    def _silent_times(self, listener: ListenerId) -> list[int]:
        """SYN times of clients in the table that never answered, in order."""
        destinations = self._silent.get(listener, {})
        return sorted({syn_ns for times in destinations.values() for syn_ns in times})

    def _need(
        self, listener: ListenerId, silent_times: Sequence[int], facts: ListenerFacts
    ) -> SynNeed:
        gone = self._gone.get(listener, Counter())
        silent = bisect.bisect_right(silent_times, facts.syn_need_ns)
        silent += sum(number for since, number in gone.items() if since <= facts.syn_need_ns)
        silent = min(silent, facts.syn_need_owed)
        return SynNeed(facts.syn_need_syn_queue, facts.syn_need_owed - silent, silent)

    def _highest(self, listeners: Iterable[ListenerId]) -> SynNeed:
        """The highest need of a listener. Its addresses share a SYN queue; their clients add up."""
        needs = []
        for listener in listeners:
            silent = self._silent_times(listener)
            heights = (self._need(listener, silent, facts) for facts in self._heights[listener])
            needs.append(max(heights, key=_by_height))
        return SynNeed(
            max(need.in_queue for need in needs),
            sum(need.owed for need in needs),
            sum(need.silent for need in needs),
        )

    def endpoint(self, who: FourTuple, socket: int) -> tuple[bytes, int]:
        """Address and port of a client's listener.

        They may differ from the destination of the client's packets (TPROXY). Where they are
        unknown, that destination is returned.
        """
        seen = self._seen.get(listener_id(who.netns, socket, *who.server))
        if seen is None:
            return who.server
        return seen.bound or who.server_address, seen.facts.server_port

    def reports(self, gaps: Sequence[CoverageGap] = ()) -> tuple[ListenerReport, ...]:
        """Reports of all listeners with a SYN or an ACK, by namespace, port, address and socket.

        `gaps` has the run's coverage gaps. A report names those that make a figure too low.
        """
        together: dict[tuple[object, ...], list[ListenerId]] = {}
        for one in sorted(self._seen.values(), key=_in_order):
            facts, listener = one.facts, one.facts.listener
            # If the socket is unknown and a server listens at several addresses, each address has
            # queues of its own.
            known: object = one.sockets if len(one.sockets) == 1 else listener
            whose = (facts.netns, facts.server_port, facts.limit, known)
            together.setdefault(listener if listener.socket else whose, []).append(listener)
        return (
            *(report([one], need, gaps) for one, need in self._ended),
            *(
                report([self._seen[one] for one in listeners], self._highest(listeners), gaps)
                for listeners in together.values()
            ),
        )


def _in_order(one: ListenerSeen) -> tuple[object, ...]:
    facts = one.facts
    return (facts.netns, facts.server_port, one.bound or facts.server_address, facts.socket)


def _first_height_from(heights: Sequence[ListenerFacts], time_ns: int) -> int:
    """Time of the first peak at or after `time_ns`; if there is none, one after the last peak."""
    low, high = 0, len(heights)
    while low < high:
        middle = (low + high) // 2
        if heights[middle].syn_need_ns < time_ns:
            low = middle + 1
        else:
            high = middle
    if low < len(heights):
        return heights[low].syn_need_ns
    return heights[-1].syn_need_ns + 1 if heights else 0


def _begins_anew(before: ListenerFacts, now: ListenerFacts) -> bool:
    return (
        now.syns < before.syns
        or now.cookies_sent < before.cookies_sent
        or now.syns_refused < before.syns_refused
        or now.acks_refused < before.acks_refused
    )


def _by_height(need: SynNeed) -> tuple[int, int, int]:
    return (need.together, need.owed, need.silent)


def _is_silent(row: Row) -> bool:
    entry = row.handshake
    return entry.ending == Ending.NONE and not entry.acks_dropped and not entry.acks_filtered


def _destination(four_tuple: FourTuple) -> Destination:
    return (four_tuple.netns, four_tuple.server_address, four_tuple.server_port)
