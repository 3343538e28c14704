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

from tcpstuck_bpf.listener import ListenerReport, SynNeed, report
from tcpstuck_bpf.model import (
    CoverageGap,
    Ending,
    FourTuple,
    HandshakeId,
    ListenerFacts,
    ListenerSeen,
    Row,
    Sweep,
    SweepPart,
)

Place = tuple[int, bytes, int]
"""Network namespace, server address, server port."""

KEPT_HEIGHTS = 256
MAX_PLACES = 8192
"""Places whose figures are remembered."""
MAX_ENDED = 1024
"""Listeners whose figures began anew and that are told with those they had before."""


class ListenerHistory:
    """Takes in what a run saw, in order; `reports` may be asked for at any time."""

    def __init__(self) -> None:
        self.forgotten = 0
        """Listeners whose figures were given up for want of room."""
        self._seen: dict[Place, ListenerSeen] = {}
        """The one that changed longest ago first."""
        self._ended: deque[tuple[ListenerSeen, SynNeed]] = deque()
        """What was suffered at a place before its figures began anew; the oldest first."""
        self._heights: dict[Place, list[ListenerFacts]] = {}
        self._silent: dict[Place, array[int]] = {}
        """When each first sent a SYN, in no order. An array, for a flood has many."""
        self._silent_in_sweep: dict[Place, array[int]] = {}
        self._gone: dict[Place, Counter[int]] = {}

    def take_listeners(self, seen: Iterable[ListenerSeen]) -> None:
        """Later readings of listeners, of those alone that changed."""
        for one in seen:
            facts = one.facts
            place = (facts.netns, facts.server_address, facts.server_port)
            before = self._seen.pop(place, None)
            if before is not None and _begins_anew(before.facts, facts):
                self._end(place, before)
            self._seen[place] = one
            heights = self._heights.setdefault(place, [])
            if not heights or heights[-1].syn_need_ns != facts.syn_need_ns:
                heights.append(facts)
                self._keep_few(place, heights)
        self._forget()

    def _end(self, place: Place, before: ListenerSeen) -> None:
        """Figures never go back: these are another listener's, or the entry was made room of."""
        if suffered(before.facts):
            self._ended.append((before, self._highest([place])))
        if len(self._ended) > MAX_ENDED:
            self._ended.popleft()
            self.forgotten += 1
        self._heights.pop(place, None)
        self._gone.pop(place, None)

    def _forget(self) -> None:
        """Where there are too many, those go first that suffered nothing, the idle ones before."""
        excess = len(self._seen) - MAX_PLACES
        if excess <= 0:
            return
        by_worth = sorted(self._seen, key=lambda place: suffered(self._seen[place].facts))
        for place in by_worth[:excess]:
            del self._seen[place]
            self._heights.pop(place, None)
            self._gone.pop(place, None)
        self.forgotten += excess

    def _keep_few(self, place: Place, heights: list[ListenerFacts]) -> None:
        """A flood raises the need at every reading: of the older half every other one goes."""
        if len(heights) > KEPT_HEIGHTS:
            silent = self._silent_times(place)
            best = max(heights, key=lambda facts: self._need(place, silent, facts).together)
            half = len(heights) // 2
            older = [facts for n, facts in enumerate(heights[:half]) if n % 2 or facts is best]
            heights[:half] = older
            self._move_gone(place, heights)

    def _move_gone(self, place: Place, heights: Sequence[ListenerFacts]) -> None:
        """Count those who left at heights that are not kept at the next one that is."""
        moved: Counter[int] = Counter()
        for since, number in self._gone.get(place, Counter()).items():
            moved[_first_height_from(heights, since)] += number
        if moved:
            self._gone[place] = moved

    def take_sweep(self, sweep: Sweep) -> None:
        """A batch of the table's rows; who is in a whole sweep has not answered yet."""
        if sweep.part is SweepPart.CHOSEN:
            return
        for row in sweep.rows:
            if _is_silent(row):
                place = _place(row.four_tuple)
                times = self._silent_in_sweep.get(place)
                if times is None:
                    times = self._silent_in_sweep[place] = array("Q")
                times.append(row.handshake.first_syn_ns)
        if sweep.part is SweepPart.LAST:
            self._silent, self._silent_in_sweep = self._silent_in_sweep, {}

    def take_leaving(self, leaving: Iterable[HandshakeId]) -> None:
        """Entries that are removed from the table: silent ones are so for good."""
        times: dict[Place, list[int]] = {}
        for four_tuple, first_syn_ns in leaving:
            times.setdefault(_place(four_tuple), []).append(first_syn_ns)
        for place, left in times.items():
            if place not in self._seen:
                continue
            silent = set(self._silent.get(place, ()))
            # What the programs count as owed they stay part of, at every later height. By height
            # and not by time, for a flood's would be too many to be kept for ever.
            heights = self._heights.get(place, [])
            gone = silent.intersection(left)
            for first_syn_ns in gone:
                counted_ns = _first_height_from(heights, first_syn_ns)
                self._gone.setdefault(place, Counter())[counted_ns] += 1
            self._silent[place] = array("Q", silent - gone)

    def _silent_times(self, place: Place) -> list[int]:
        """When those of the table who never answered sent their SYN, in order."""
        return sorted(set(self._silent.get(place, ())))

    def _need(self, place: Place, silent_times: Sequence[int], facts: ListenerFacts) -> SynNeed:
        gone = self._gone.get(place, Counter())
        silent = bisect.bisect_right(silent_times, facts.syn_need_ns)
        silent += sum(number for since, number in gone.items() if since <= facts.syn_need_ns)
        silent = min(silent, facts.syn_need_owed)
        return SynNeed(facts.syn_need_syn_queue, facts.syn_need_owed - silent, silent)

    def _highest(self, places: Iterable[Place]) -> SynNeed:
        """Of one listener's addresses: one SYN queue, and the clients of all of them."""
        needs = []
        for place in places:
            silent = self._silent_times(place)
            heights = (self._need(place, silent, facts) for facts in self._heights[place])
            needs.append(max(heights, key=_by_height))
        return SynNeed(
            max(need.in_queue for need in needs),
            sum(need.owed for need in needs),
            sum(need.silent for need in needs),
        )

    def reports(self, gaps: Sequence[CoverageGap] = ()) -> tuple[ListenerReport, ...]:
        """Every listener that a SYN or an ACK came to, by namespace, port and address.

        `gaps` are the run's: what they hide is said where it makes a figure too low.
        """
        together: dict[tuple[object, ...], list[Place]] = {}
        for place in sorted(self._seen, key=lambda place: (place[0], place[2], place[1])):
            one = self._seen[place]
            # Of a server that listens at several addresses each has queues of its own.
            known = one.sockets if len(one.sockets) == 1 else place
            together.setdefault((place[0], place[2], one.facts.limit, known), []).append(place)
        return (
            *(report([one], need, gaps) for one, need in self._ended),
            *(
                report([self._seen[place] for place in places], self._highest(places), gaps)
                for places in together.values()
            ),
        )


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


def suffered(facts: ListenerFacts) -> bool:
    """Whether a listener sent cookies or turned anybody away: there is something to tell."""
    return bool(facts.cookies_sent or facts.syns_refused or facts.acks_refused)


def _by_height(need: SynNeed) -> tuple[int, int, int]:
    return (need.together, need.owed, need.silent)


def _is_silent(row: Row) -> bool:
    entry = row.handshake
    return entry.ending == Ending.NONE and not entry.acks_dropped and not entry.acks_filtered


def _place(four_tuple: FourTuple) -> Place:
    return (four_tuple.netns, four_tuple.server_address, four_tuple.server_port)
