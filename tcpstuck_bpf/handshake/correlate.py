"""From observations of the awaiting-ACK table to flows worth telling.

Pure: takes events and sweeps, knows no clock, does no I/O, needs neither root nor BCC. The same
observations and the same calls of `advance` give the same reports, which is what makes a
recording worth its disk space.

Nothing is concluded from what does *not* arrive: an entry counts as silent at its deadline only
when an event or a sweep saw it, still open, at or after the deadline. An event that the ring
buffer lost can therefore never turn a healthy connection into a stuck one; the entry keeps the
fact, or is gone, and either shows in the next sweep.

Times are CLOCK_MONOTONIC nanoseconds.
"""

from __future__ import annotations

import bisect
import heapq
from collections import Counter, deque
from collections.abc import Collection, Mapping
from typing import NamedTuple

from tcpstuck_bpf.handshake.flood import FloodWatch
from tcpstuck_bpf.handshake.flow import (
    ENDED_STATES,
    SILENT_STATES,
    STUCK_STATES,
    Decision,
    Flow,
    FlowFlags,
    FlowReport,
    Segment,
    State,
    TimelineEntry,
    decide,
    ending_of,
    is_remarkable,
    is_torn,
    sharing,
)
from tcpstuck_bpf.handshake.timeline import build_timeline
from tcpstuck_bpf.model import (
    SECOND_NS,
    Ending,
    Event,
    EventKind,
    FourTuple,
    Handshake,
    HandshakeId,
    Rescue,
    Sweep,
    SweepPart,
)

__all__ = [
    "DEFAULT_ROW_LIFE_NS",
    "Correlator",
    "CorrelatorStats",
    "FlowFlags",
    "FlowReport",
    "Segment",
    "State",
    "TimelineEntry",
]

DEFAULT_ROW_LIFE_NS = 15 * 60 * SECOND_NS

_DEADLINE_STEP_NS = SECOND_NS // 10
# Flows that left the kernel's table are remembered for as long as an observation of them may come
# late: a sweep's batch read before the end, or an event behind others in the ring buffer.
_REMEMBERED_NS = 60 * SECOND_NS
# What the SYN queue took over may still prove to be the cookie's, as long as that is valid: it was
# made in this minute or the last (MAX_SYNCOOKIE_AGE).
_COOKIE_VALID_NS = 120 * SECOND_NS
# One in so many flows is evicted together, so that a flood does not search once per packet.
_EVICTED_AT_ONCE = 16

_CONNECTED_STATES = frozenset({State.COMPLETED, State.TAKEN_OVER})
_CONNECTED_AT_LAST = frozenset({State.COMPLETED, State.RECOVERED, State.RESCUED, State.DATA_LOST})
_ALWAYS_TOLD = STUCK_STATES | {
    State.RECOVERED,
    State.RESCUED,
    State.DATA_LOST,
    State.REJECTED,
    State.RESET,
    State.NO_LISTENER,
    State.REPEATING,
    State.NAMESPACE_GONE,
}


_KINDS_OF_REAL = frozenset(
    {EventKind.COMPLETED, EventKind.ACK_DROPPED, EventKind.ACK_FILTERED, EventKind.NO_LISTENER}
)
# What no spoofed source brings about: an ACK of its cookie.
_STATES_OF_REAL = _CONNECTED_AT_LAST | {
    State.ACK_DROPPED,
    State.ACK_FILTERED,
    State.NO_LISTENER,
}


class CorrelatorStats(NamedTuple):
    """What the summary and the status line need; plain counts."""

    told_now: Mapping[State, int]
    """The current state of every flow ever told, evicted and forgotten ones included."""
    ever_stuck: int
    """Flows told as stuck at any time, but for those that look like a SYN flood's."""
    still_stuck: int
    """Those of them that are still in a stuck state."""
    flood_suspected: int
    """Silent flows that look like a SYN flood's."""
    taken_over: int
    """Flows told as connected that an ordinary handshake connected, and no cookie's ACK."""
    untold: Mapping[State, int]
    """Flows that ended without being told: healthy ones that user space came to see."""
    pending: int
    """Handshakes of the latest sweep that are too young for a verdict."""
    flows: int
    """Flows held in memory."""
    superseded: int
    """Flows told as stuck whose client gave up: it uses the 4-tuple for a new handshake."""
    evicted: int
    """Flows forgotten before their end for want of room: later facts of them look like new."""
    let_go: int
    """Open entries given back to the kernel's table for age or want of room there."""
    unresolved: int
    """Flows forgotten undecided: seen open before their deadline, then not again or replaced."""
    late: int
    """Observations of a handshake older than the one known for their 4-tuple."""
    duplicate: int
    """Events that told nothing new."""
    torn: int
    """Rows read while the kernel was writing them; the next sweep reads them again."""


class Correlator:
    """Merges events and sweeps into flows and tells the ones that come into a state worth it.

    `timeout_ns`: silence that becomes a verdict. `tell_healthy`: tell completed flows as well.
    `max_flows`: no more flows than this are held (and no more reports or entries to let go that
    nobody fetched). `row_life_ns`: how long after its last SYN a judged, open entry may stay.
    """

    def __init__(
        self,
        timeout_ns: int,
        tell_healthy: bool = False,
        max_flows: int = 131_072,
        row_life_ns: int = DEFAULT_ROW_LIFE_NS,
    ) -> None:
        self._timeout_ns = timeout_ns
        self._tell_healthy = tell_healthy
        self._max_flows = max(1, max_flows)
        self._row_life_ns = row_life_ns
        self._flows: dict[FourTuple, Flow] = {}
        self._touched: set[FourTuple] = set()
        self._deadlines: list[int] = []
        self._ready: deque[FlowReport] = deque(maxlen=self._max_flows)
        self._evicted_rows: deque[HandshakeId] = deque(maxlen=self._max_flows)
        self._sweep_ns = 0
        self._young_in_sweep = 0
        self._told_now: Counter[State] = Counter()
        self._untold: Counter[State] = Counter()
        self._counts: Counter[str] = Counter()
        self._flood = FloodWatch()

    def observe(self, observation: Event | Sweep) -> None:
        """Take in an event, or a sweep (or one batch of it)."""
        if isinstance(observation, Sweep):
            self._observe_sweep(observation)
        else:
            self._observe_event(observation)

    def _observe_event(self, event: Event) -> None:
        flow = self._flow_of(event.four_tuple, event.handshake)
        if flow is None:
            return
        news = flow.note(event.handshake, event.time_ns)
        if not flow.note_segment(event) and not news:
            self._counts["duplicate"] += 1
        # The program that tells of a completion removes the entry; every other event leaves it.
        flow.in_table = flow.handshake.ending != Ending.COMPLETED
        if event.kind in _KINDS_OF_REAL:
            self._flood.note_real(event.four_tuple)
        self._touched.add(event.four_tuple)

    def _observe_sweep(self, sweep: Sweep) -> None:
        chosen = sweep.part is SweepPart.CHOSEN
        if not chosen and sweep.time_ns > self._sweep_ns:
            self._sweep_ns = sweep.time_ns
            self._young_in_sweep = 0
        newest_due_ns = sweep.time_ns - self._timeout_ns
        young = 0
        for four_tuple, handshake in sweep.rows:
            if (
                handshake.first_syn_ns > newest_due_ns
                and four_tuple not in self._flows
                and not is_remarkable(handshake)
            ):
                young += 1
                if chosen:
                    self._note_deadline(handshake.first_syn_ns + self._timeout_ns)
                continue
            if is_torn(handshake):
                self._counts["torn"] += 1
                continue
            flow = self._flow_of(four_tuple, handshake)
            if flow is None:
                continue
            flow.in_table = True
            if flow.note(handshake, sweep.time_ns) or flow.unsettled:
                self._touched.add(four_tuple)
        if sweep.time_ns == self._sweep_ns and not chosen:
            self._young_in_sweep += young
        if sweep.part is not SweepPart.MORE:
            del self._deadlines[: bisect.bisect_right(self._deadlines, sweep.time_ns)]

    def note_acks(self, netns: int, time_ns: int, total: int) -> None:
        """How many ACKs for cookies came in a network namespace since the run began."""
        self._flood.note_acks(netns, time_ns, total)

    def note_rescue(self, rescue: Rescue) -> None:
        """Take in what the rescuer did; of flows that are forgotten it counts nothing."""
        for attempt in rescue.attempts:
            flow = self._flow_named(attempt.handshake)
            if flow is not None:
                flow.attempts += (attempt,)
        for handshake in rescue.unanswered:
            flow = self._flow_named(handshake)
            if flow is not None:
                flow.unanswered = True
                self._touched.add(handshake.four_tuple)

    @property
    def netns_of_stuck(self) -> set[int]:
        """Network namespaces of the flows that are stuck."""
        return {who.netns for who, flow in self._flows.items() if flow.state in STUCK_STATES}

    def is_stuck(self, handshake: HandshakeId) -> bool:
        """Whether it is known, and in a state that counts as stuck or as a SYN flood's."""
        flow = self._flow_named(handshake)
        return flow is not None and flow.state in STUCK_STATES

    def note_gone(self, netns: Collection[int], now_ns: int, until_ns: int | None = None) -> None:
        """Take in that these network namespaces are gone; `advance` tells who was stuck there.

        `until_ns`: the numbers are those of others by now, and were not yet at that time: only of
        whom nothing has been seen since is known to have been in the ones that are gone.
        """
        for four_tuple, flow in self._flows.items():
            if four_tuple.netns not in netns or flow.state not in STUCK_STATES:
                continue
            if until_ns is None or _last_segment_ns(flow.handshake) <= until_ns:
                self._keep_ready(self._told_in(four_tuple, flow, State.NAMESPACE_GONE, now_ns))

    def _told_in(
        self, four_tuple: FourTuple, flow: Flow, state: State, decided_ns: int
    ) -> FlowReport:
        self._count_change(flow, state, tell=True)
        flow.state = state
        report = _report(four_tuple, flow, state, decided_ns)
        flow.told = state
        flow.told_handshake, flow.told_segments = flow.handshake, flow.segments
        return report

    def _flow_named(self, handshake: HandshakeId) -> Flow | None:
        flow = self._flows.get(handshake.four_tuple)
        known = flow is not None and flow.handshake.first_syn_ns == handshake.first_syn_ns
        return flow if known else None

    def _flow_of(self, four_tuple: FourTuple, handshake: Handshake) -> Flow | None:
        """The flow that an observation belongs to; None where it is about an older handshake."""
        known = self._flows.get(four_tuple)
        if known is not None:
            if known.handshake.first_syn_ns == handshake.first_syn_ns:
                return known
            if known.handshake.first_syn_ns > handshake.first_syn_ns:
                self._counts["late"] += 1
                return None
            self._supersede(four_tuple, known)
        elif len(self._flows) >= self._max_flows:
            self._evict()
        flow = self._flows[sharing(four_tuple)] = Flow(handshake)
        return flow

    def _supersede(self, four_tuple: FourTuple, flow: Flow) -> None:
        """End a flow whose 4-tuple has a new handshake; what it had to tell is told first."""
        report = self._settle(four_tuple, flow, flow.seen_ns)
        if report is not None:
            self._keep_ready(report)
        if flow.state is None:
            self._counts["unresolved"] += 1
        elif flow.state in STUCK_STATES:
            self._told_now[flow.state] -= 1
            self._told_now[State.SUPERSEDED] += 1
            self._is_no_flood(flow, is_real=False)

    def _keep_ready(self, report: FlowReport) -> None:
        if len(self._ready) == self._max_flows:
            self._counts["evicted"] += 1
        self._ready.append(report)

    def _evict(self) -> None:
        """Make room: ended flows first, then told ones, then the others, each oldest first.

        Those whose ACK was dropped go last of their kind.
        """

        def worth(item: tuple[FourTuple, Flow]) -> tuple[int, bool, int, FourTuple]:
            four_tuple, flow = item
            rank = 2 if flow.state is None else 0 if flow.state in ENDED_STATES else 1
            entry = flow.handshake
            return (rank, entry.acks_dropped > 0, entry.first_syn_ns, four_tuple)

        number = max(1, self._max_flows // _EVICTED_AT_ONCE)
        for four_tuple, flow in heapq.nsmallest(number, self._flows.items(), key=worth):
            # Left in the table, a judged entry would come back with the next sweep and be told
            # again; one that is not judged yet must come back.
            if flow.in_table and flow.state is not None and four_tuple not in self._touched:
                self._evicted_rows.append(HandshakeId(four_tuple, flow.handshake.first_syn_ns))
            if flow.state not in ENDED_STATES:
                self._counts["evicted"] += 1
            del self._flows[four_tuple]
            self._touched.discard(four_tuple)

    def advance(self, now_ns: int) -> list[FlowReport]:
        """The flows that came into a state worth telling, by the time of the deciding fact."""
        reports = list(self._ready)
        self._ready.clear()
        not_yet = set()
        for four_tuple in self._touched:
            flow = self._flows[four_tuple]
            report = self._settle(four_tuple, flow, now_ns)
            if report is not None:
                reports.append(report)
            elif flow.unsettled and flow.open_as_of_ns > now_ns:
                not_yet.add(four_tuple)
        self._touched = not_yet
        reports.sort(key=_by_time)
        return self._beside_floods(reports)

    def _beside_floods(self, reports: list[FlowReport]) -> list[FlowReport]:
        """The reports, those of a SYN flood as such, and others to correct what was told before.

        All are noted before the first is judged: what shows a flood comes after its first SYNs.
        """
        fresh = [r.state in SILENT_STATES and r.previous not in SILENT_STATES for r in reports]
        for report, is_fresh in zip(reports, fresh):
            entry = report.handshake
            if report.state in _STATES_OF_REAL or entry.syn_count > 1:
                self._flood.note_real(report.four_tuple)
            elif is_fresh:
                self._flood.note(report.four_tuple, entry)
        revised = self._flood.settle()
        told = [
            self._with_flood(report) if is_fresh else report
            for report, is_fresh in zip(reports, fresh)
        ]
        anew = filter(None, map(self._told_anew, revised))
        return [*sorted(anew, key=_by_time), *told]

    def _with_flood(self, report: FlowReport) -> FlowReport:
        """A report of one that has just fallen silent."""
        handshake = HandshakeId(report.four_tuple, report.handshake.first_syn_ns)
        flow = self._flow_named(handshake)
        if flow is None or report.handshake.syn_count > 1:
            return report
        why = self._flood.why(handshake)
        if why:
            self._is_flood(flow, why)
        return report._replace(flood=why)

    def _told_anew(self, handshake: HandshakeId) -> FlowReport | None:
        """A silent flow that looks otherwise than it was told; None where it does not."""
        flow = self._flow_named(handshake)
        if flow is None or flow.state not in SILENT_STATES:
            return None
        why = self._flood.why(handshake)
        if bool(why) == bool(flow.flood):
            return None
        if why:
            self._is_flood(flow, why)
        else:
            self._is_no_flood(flow, is_real=True)
        decided_ns = decide(flow.handshake, flow.told, self._timeout_ns).decided_ns
        return _report(handshake.four_tuple, flow, flow.state, decided_ns)

    def _is_flood(self, flow: Flow, why: str) -> None:
        """What looks like a flood's was never stuck."""
        flow.flood = why
        self._counts["flood_suspected"] += 1
        self._counts["ever_stuck"] -= 1

    def _is_no_flood(self, flow: Flow, *, is_real: bool) -> None:
        """It is none of a flood's any more; one that is real was stuck all the time."""
        if flow.flood:
            flow.flood = ""
            self._counts["flood_suspected"] -= 1
            self._counts["ever_stuck"] += is_real

    def _settle(self, four_tuple: FourTuple, flow: Flow, now_ns: int) -> FlowReport | None:
        """Bring a flow into the state its facts put it in by `now_ns`; a report if that is told."""
        report = self._settled(four_tuple, flow, now_ns)
        was, flow.told_taken_over = flow.told_taken_over, _is_told_taken_over(flow)
        self._counts["taken_over"] += flow.told_taken_over - was
        return report

    def _settled(self, four_tuple: FourTuple, flow: Flow, now_ns: int) -> FlowReport | None:
        if flow.flood and flow.handshake.syn_count > 1:
            self._flood.note_real(four_tuple)
        decision = decide(flow.handshake, flow.told, self._timeout_ns)
        state = decision.state
        if state in _CONNECTED_STATES and flow.ever_stuck:
            state = State.RESCUED if flow.drawn_by_attempt() else State.RECOVERED
        elif state is State.SILENT and flow.unanswered:
            state = State.UNANSWERED
        elif state is State.TAKEN_OVER and flow.told is not None:
            state = State.COMPLETED
        if flow.state is State.NAMESPACE_GONE and flow.handshake == flow.told_handshake:
            state = flow.state
        flow.unsettled = state is not flow.state
        if not flow.unsettled:
            return None
        if not _is_due(decision, flow, now_ns):
            self._note_deadline(decision.due_ns)
            return None
        flow.unsettled = False
        wants_completed = self._tell_healthy or flow.told is not None
        tell = state in _ALWAYS_TOLD or (wants_completed and state is State.COMPLETED)
        if tell:
            return self._told_in(four_tuple, flow, state, decision.decided_ns)
        self._count_change(flow, state, tell)
        if state not in SILENT_STATES:
            self._is_no_flood(flow, is_real=state in _STATES_OF_REAL)
        flow.state = state
        return None

    def _note_deadline(self, due_ns: int) -> None:
        due_ns = -(-due_ns // _DEADLINE_STEP_NS) * _DEADLINE_STEP_NS
        place = bisect.bisect_left(self._deadlines, due_ns)
        if place == len(self._deadlines) or self._deadlines[place] != due_ns:
            self._deadlines.insert(place, due_ns)

    @property
    def next_deadline_ns(self) -> int | None:
        """When a sweep would decide a flow that events, or a choice of rows, told of.

        Up to 100 ms late.
        """
        return self._deadlines[0] if self._deadlines else None

    def netns_of_silent(self, now_ns: int) -> set[int]:
        """Network namespaces of those whose ACK's not being seen `advance` would judge."""
        found: set[int] = set()
        for who in self._touched:
            if who.netns not in found and self._is_silent(self._flows[who], now_ns):
                found.add(who.netns)
        return found

    def _is_silent(self, flow: Flow, now_ns: int) -> bool:
        decision = decide(flow.handshake, flow.told, self._timeout_ns)
        return flow.handshake.ending == Ending.NONE and _is_due(decision, flow, now_ns)

    def _count_change(self, flow: Flow, state: State, tell: bool) -> None:
        if flow.state is not None:
            (self._untold if flow.told is None else self._told_now)[flow.state] -= 1
        (self._told_now if tell or flow.told is not None else self._untold)[state] += 1
        if state in STUCK_STATES and not flow.ever_stuck:
            flow.ever_stuck = True
            self._counts["ever_stuck"] += 1

    def expired(self, now_ns: int, table_rows: int, table_capacity: int) -> list[HandshakeId]:
        """The entries that may be deleted from the kernel's table, each named once.

        Ended ones, once told (what the SYN queue took over, once no cookie of it is valid any
        more); judged open ones whose last SYN is older than `row_life_ns`; and
        where the `table_rows` fill more than three quarters of `table_capacity`, the oldest
        judged ones until half of it is free, those whose ACK was dropped last (no flood's address
        sends one). Never an entry not judged yet: it stays until it is.
        Flows that the table does not hold any more are forgotten after a minute.
        """
        leaving = list(self._evicted_rows)
        self._evicted_rows.clear()
        crowded = 4 * table_rows > 3 * table_capacity
        staying: list[tuple[bool, int, FourTuple]] = []
        forgotten: list[FourTuple] = []
        for four_tuple, flow in self._flows.items():
            judged = flow.state is not None and four_tuple not in self._touched
            if judged and flow.in_table:
                last_syn_ns = flow.handshake.last_syn_ns
                if self._has_left(flow, now_ns - last_syn_ns):
                    self._let_go(four_tuple, flow, leaving)
                elif crowded:
                    dropped = flow.handshake.acks_dropped > 0
                    staying.append((dropped, last_syn_ns, four_tuple))
            elif now_ns - flow.seen_ns > _REMEMBERED_NS and four_tuple not in self._touched:
                forgotten.append(four_tuple)
        if crowded:
            excess = table_rows - len(leaving) - table_capacity // 2
            for _, _, four_tuple in heapq.nsmallest(excess, staying):
                self._let_go(four_tuple, self._flows[four_tuple], leaving)
        for four_tuple in forgotten:
            if self._flows.pop(four_tuple).state is None:
                self._counts["unresolved"] += 1
        return leaving

    def _has_left(self, flow: Flow, since_syn_ns: int) -> bool:
        """Whether nothing more is to be learned of a judged flow by keeping its entry."""
        if ending_of(flow.handshake) == Ending.TAKEN_OVER:
            return since_syn_ns > min(_COOKIE_VALID_NS, self._row_life_ns)
        ended = flow.state in ENDED_STATES and not flow.unsettled
        return ended or since_syn_ns > self._row_life_ns

    def _let_go(self, four_tuple: FourTuple, flow: Flow, leaving: list[HandshakeId]) -> None:
        flow.in_table = False
        leaving.append(HandshakeId(four_tuple, flow.handshake.first_syn_ns))
        if ending_of(flow.handshake) == Ending.NONE:
            self._counts["let_go"] += 1

    def stats(self) -> CorrelatorStats:
        """The counts as they are now."""
        undecided = sum(
            flow.state is None and flow.seen_ns >= self._sweep_ns for flow in self._flows.values()
        )
        told_now = {state: number for state, number in self._told_now.items() if number}
        flooding = self._counts["flood_suspected"]
        return CorrelatorStats(
            told_now=told_now,
            ever_stuck=self._counts["ever_stuck"],
            still_stuck=sum(told_now.get(state, 0) for state in STUCK_STATES) - flooding,
            flood_suspected=flooding,
            taken_over=self._counts["taken_over"],
            untold={state: number for state, number in self._untold.items() if number},
            pending=self._young_in_sweep + undecided,
            flows=len(self._flows),
            superseded=told_now.get(State.SUPERSEDED, 0),
            evicted=self._counts["evicted"],
            let_go=self._counts["let_go"],
            unresolved=self._counts["unresolved"],
            late=self._counts["late"],
            duplicate=self._counts["duplicate"],
            torn=self._counts["torn"],
        )


def _last_segment_ns(entry: Handshake) -> int:
    return max(entry.last_syn_ns, entry.last_ack_dropped_ns, entry.last_ack_filtered_ns)


def _by_time(report: FlowReport) -> tuple[int, FourTuple, int]:
    return (report.decided_ns, report.four_tuple, report.handshake.first_syn_ns)


def _is_due(decision: Decision, flow: Flow, now_ns: int) -> bool:
    return decision.at_once or decision.due_ns <= min(now_ns, flow.open_as_of_ns)


def _is_told_taken_over(flow: Flow) -> bool:
    """Whether it is told as connected by the SYN queue alone.

    An ACK that undoes that (`ending_of`) does so here only when that is told.
    """
    return flow.told in _CONNECTED_AT_LAST and flow.handshake.ending == Ending.TAKEN_OVER


def _report(four_tuple: FourTuple, flow: Flow, state: State, decided_ns: int) -> FlowReport:
    entry = flow.handshake
    timeline, omitted = build_timeline(entry, flow.segments, flow.segments_omitted, flow.attempts)
    connected = state in _CONNECTED_AT_LAST
    return FlowReport(
        four_tuple=four_tuple,
        state=state,
        previous=flow.told,
        previous_facts=flow.told_facts,
        handshake=entry,
        decided_ns=decided_ns,
        delay_ns=decided_ns - entry.first_syn_ns if connected else None,
        segments=flow.segments,
        timeline=timeline,
        timeline_omitted=omitted,
        flags=flow.flags,
        segments_omitted=flow.segments_omitted,
        attempts=flow.attempts,
        flood=flow.flood,
    )
