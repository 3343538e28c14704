"""From readings of the listeners and of the awaiting-ACK table to a report of each listener.

Pure. A handshake under a cookie that is never answered looks, in the programs' count of what is
owed, like one that is answered soon. Which of them stayed silent the table tells, later: so every
new height of the need is kept with its time, and at the end those are taken off who were there at
that time and have not answered since.
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
"""Network namespace, server address, server port, as a client's packets have them."""

_Silent = dict[ListenerId, dict[Destination, "array[int]"]]
"""When each client that never answered first sent a SYN, in no order. Arrays: a flood has many."""

KEPT_HEIGHTS = 256
MAX_LISTENERS = 8192
"""Whose figures are remembered."""
MAX_ENDED = 1024
"""Listeners whose figures began anew and that are told with those they had before."""


class ListenerHistory:
    """Takes in what a run saw, in order; `reports` may be asked for at any time."""

    def __init__(self) -> None:
        self.forgotten = 0
        """Listeners whose figures were given up for want of room."""
        self._seen: dict[ListenerId, ListenerSeen] = {}
        """The one that changed longest ago first."""
        self._ended: deque[tuple[ListenerSeen, SynNeed]] = deque()
        """What listeners suffered before their figures began anew; the oldest first."""
        self._heights: dict[ListenerId, list[ListenerFacts]] = {}
        self._silent: _Silent = {}
        self._silent_in_sweep: _Silent = {}
        self._gone: dict[ListenerId, Counter[int]] = {}

    @property
    def seen(self) -> tuple[ListenerSeen, ...]:
        """The latest reading of each listener, the one that changed longest ago first."""
        return tuple(self._seen.values())

    def take_listeners(self, seen: Iterable[ListenerSeen]) -> None:
        """Later readings of listeners, of those alone that changed."""
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
        """Figures never go back: these are another listener's, or the entry was made room of."""
        if before.facts.suffered:
            self._ended.append((before, self._highest([listener])))
        if len(self._ended) > MAX_ENDED:
            self._ended.popleft()
            self.forgotten += 1
        self._heights.pop(listener, None)
        self._gone.pop(listener, None)

    def _forget(self) -> None:
        """Where there are too many, those go first that suffered nothing, the idle ones before."""
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
        """A flood raises the need at every reading: of the older half every other one goes."""
        if len(heights) > KEPT_HEIGHTS:
            silent = self._silent_times(listener)
            best = max(heights, key=lambda facts: self._need(listener, silent, facts).together)
            half = len(heights) // 2
            older = [facts for n, facts in enumerate(heights[:half]) if n % 2 or facts is best]
            heights[:half] = older
            self._move_gone(listener, heights)

    def _move_gone(self, listener: ListenerId, heights: Sequence[ListenerFacts]) -> None:
        """Count those who left at heights that are not kept at the next one that is."""
        moved: Counter[int] = Counter()
        for since, number in self._gone.get(listener, Counter()).items():
            moved[_first_height_from(heights, since)] += number
        if moved:
            self._gone[listener] = moved

    def take_sweep(self, sweep: Sweep) -> None:
        """A batch of the table's rows; who is in a whole sweep has not answered yet."""
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
        """Entries that are removed from the table: silent ones are so for good."""
        times: dict[Destination, list[int]] = {}
        for four_tuple, first_syn_ns in leaving:
            times.setdefault(_destination(four_tuple), []).append(first_syn_ns)
        # Which of the sockets of a port it was is not told again.
        for listener, destinations in self._silent.items():
            for destination in destinations.keys() & times.keys():
                silent = set(destinations[destination])
                gone = silent.intersection(times[destination])
                self._note_gone(listener, gone)
                destinations[destination] = array("Q", silent - gone)

    def _note_gone(self, listener: ListenerId, times: Iterable[int]) -> None:
        """What the programs count as owed they stay part of, at every later height.

        By height and not by time, for a flood's would be too many to be kept for ever.
        """
        if listener not in self._seen:
            return
        heights = self._heights.get(listener, [])
        for first_syn_ns in times:
            counted_ns = _first_height_from(heights, first_syn_ns)
            self._gone.setdefault(listener, Counter())[counted_ns] += 1

    def _silent_times(self, listener: ListenerId) -> list[int]:
        """When those of the table who never answered sent their SYN, in order."""
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
        """The need of one listener: its addresses have one SYN queue, and their clients add up."""
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
        """Address and port that a client's listener listens at.

        As far as they are not known, those that the client's packets are for: a proxy may have them
        come to a socket of other ones (TPROXY).
        """
        seen = self._seen.get(listener_id(who.netns, socket, *who.server))
        if seen is None:
            return who.server
        return seen.bound or who.server_address, seen.facts.server_port

    def reports(self, gaps: Sequence[CoverageGap] = ()) -> tuple[ListenerReport, ...]:
        """Every listener that a SYN or an ACK came to, by namespace, port, address and socket.

        `gaps` are the run's: what they hide is said where it makes a figure too low.
        """
        together: dict[tuple[object, ...], list[ListenerId]] = {}
        for one in sorted(self._seen.values(), key=_in_order):
            facts, listener = one.facts, one.facts.listener
            # Where the programs do not tell the socket: of a server that listens at several
            # addresses each has queues of its own.
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
    """The time of the first height at or after a time; of those yet to come, a time before any."""
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
