"""The correlator: merges observations of the awaiting-ACK table into flows, and reports them.

Pure: it takes events and sweeps, reads no clock, does no I/O, and needs neither root nor BCC. The
same observations and the same calls of `advance` give the same reports; replays rely on that.

A missing event proves nothing. An entry counts as silent only if an event or a sweep saw it open at
or after its deadline. An event lost in the ring buffer therefore never turns a healthy connection
into a stuck one: the entry keeps the fact or is gone, and the next sweep shows which.

Times are CLOCK_MONOTONIC nanoseconds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection

from tcpstuck_bpf.handshake.deadlines import Deadlines
from tcpstuck_bpf.handshake.entry import is_remarkable, is_torn
from tcpstuck_bpf.handshake.flood import FloodWatch
from tcpstuck_bpf.handshake.flood_marks import REAL_STATES, FloodMarks
from tcpstuck_bpf.handshake.flow import (
    SILENT_STATES,
    STUCK_STATES,
    Decision,
    Flow,
    FlowReport,
    State,
    decide,
)
from tcpstuck_bpf.handshake.flow_counts import CorrelatorStats, FlowCounts
from tcpstuck_bpf.handshake.flow_report import by_time, report_of
from tcpstuck_bpf.handshake.flow_table import FlowTable
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

DEFAULT_ROW_LIFE_NS = 15 * 60 * SECOND_NS
"""How long a judged, open entry stays in the kernel's table after its last SYN."""

_CONNECTING_ENDS = frozenset({State.COMPLETED, State.TAKEN_OVER})
_ALWAYS_REPORTED = STUCK_STATES | {
    State.RECOVERED,
    State.RESCUED,
    State.DATA_LOST,
    State.REJECTED,
    State.RESET,
    State.NO_LISTENER,
    State.REPEATING,
    State.NAMESPACE_GONE,
}
# Events that no spoofed source causes: they need an ACK of its cookie.
_KINDS_OF_REAL = frozenset(
    {EventKind.COMPLETED, EventKind.ACK_DROPPED, EventKind.ACK_FILTERED, EventKind.NO_LISTENER}
)


class Correlator:
    """Merges events and sweeps into flows, and reports flows that enter a reportable state.

    `timeout_ns`: silence of this length becomes a verdict. `tell_healthy`: completed flows are
    reported too. `max_flows` bounds the flows in memory, the reports that wait for `advance`, and
    the evicted entries that wait for `expired`. `row_life_ns`: how long after its last SYN a
    judged, open entry may stay in the kernel's table.
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
        self._counts = FlowCounts()
        self.flows = FlowTable(self._counts, max(1, max_flows), row_life_ns)
        self.deadlines = Deadlines()
        """Times at which a sweep would decide flows known from events or from chosen rows."""
        self.flood = FloodWatch()
        """Detects silent flows that look like part of a SYN flood; callers pass it ACK counts."""
        self._marks = FloodMarks(self.flood, self.flows, self._counts, timeout_ns)
        self._ready: deque[FlowReport] = deque(maxlen=max(1, max_flows))
        self._unstuck: list[HandshakeId] = []
        self._sweep_ns = 0
        self._young_in_sweep = 0

    def observe(self, observation: Event | Sweep) -> None:
        """Process an event, or a sweep or one batch of it."""
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
            self._counts.duplicate += 1
        # The program that emits a completion removes the entry; after other events the entry stays.
        flow.in_table = flow.handshake.ending != Ending.COMPLETED
        if event.kind in _KINDS_OF_REAL:
            self.flood.note_real(event.four_tuple)
        self.flows.touched.add(event.four_tuple)

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
                and four_tuple not in self.flows
                and not is_remarkable(handshake)
            ):
                young += 1
                if chosen:
                    self.deadlines.note(handshake.first_syn_ns + self._timeout_ns)
                continue
            if is_torn(handshake):
                self._counts.torn += 1
                continue
            flow = self._flow_of(four_tuple, handshake)
            if flow is None:
                continue
            flow.in_table = True
            if flow.note(handshake, sweep.time_ns) or flow.unsettled:
                self.flows.touched.add(four_tuple)
        if sweep.time_ns == self._sweep_ns and not chosen:
            self._young_in_sweep += young
        if sweep.part is not SweepPart.MORE:
            self.deadlines.forget_until(sweep.time_ns)

    def note_rescue(self, rescue: Rescue) -> None:
        """Note the rescuer's attempts; attempts for forgotten flows are ignored."""
        for attempt in rescue.attempts:
            flow = self.flows.named(attempt.handshake)
            if flow is not None:
                flow.attempts += (attempt,)
        for handshake in rescue.unanswered:
            flow = self.flows.named(handshake)
            if flow is not None:
                flow.unanswered = True
                self.flows.touched.add(handshake.four_tuple)

    @property
    def netns_of_stuck(self) -> set[int]:
        """The network namespaces with stuck flows."""
        return {who.netns for who, flow in self.flows.items() if flow.state in STUCK_STATES}

    def note_gone(self, netns: Collection[int], now_ns: int, until_ns: int | None = None) -> None:
        """Note that these network namespaces are gone; `advance` reports the stuck flows there.

        `until_ns` is given if the inode numbers have been reused: the latest time at which the old
        namespaces still had them. A flow seen later may be in a new namespace, and is left alone.
        """
        for four_tuple, flow in self.flows.items():
            if four_tuple.netns not in netns or flow.state not in STUCK_STATES:
                continue
            if until_ns is None or _last_segment_ns(flow.handshake) <= until_ns:
                self._keep_ready(self._reported_in(four_tuple, flow, State.NAMESPACE_GONE, now_ns))

    def _reported_in(
        self, four_tuple: FourTuple, flow: Flow, state: State, decided_ns: int
    ) -> FlowReport:
        self._enter(four_tuple, flow, state, reported=True)
        report = report_of(four_tuple, flow, state, decided_ns)
        flow.reported = state
        flow.reported_handshake, flow.reported_segments = flow.handshake, flow.segments
        return report

    def _flow_of(self, four_tuple: FourTuple, handshake: Handshake) -> Flow | None:
        """The flow of an observation; None if the observation belongs to an older handshake."""
        known = self.flows.get(four_tuple)
        if known is not None:
            if known.handshake.first_syn_ns == handshake.first_syn_ns:
                return known
            if known.handshake.first_syn_ns > handshake.first_syn_ns:
                self._counts.late += 1
                return None
            self._supersede(four_tuple, known)
        return self.flows.begin(four_tuple, handshake)

    def _supersede(self, four_tuple: FourTuple, flow: Flow) -> None:
        """End a flow whose 4-tuple has a new handshake; a report that is due is kept ready."""
        report = self._settle(four_tuple, flow, flow.seen_ns)
        if report is not None:
            self._keep_ready(report)
        self._counts.supersede(flow)
        if flow.state in STUCK_STATES:
            self._counts.acquit(flow, is_real=False)
            self._note_unstuck(four_tuple, flow)

    def _keep_ready(self, report: FlowReport) -> None:
        if len(self._ready) == self._ready.maxlen:
            self._counts.evicted += 1
        self._ready.append(report)

    def advance(self, now_ns: int) -> list[FlowReport]:
        """Report the flows that entered a reportable state, in order of their deciding facts."""
        reports = list(self._ready)
        self._ready.clear()
        not_yet = set()
        for four_tuple in self.flows.touched:
            flow = self.flows[four_tuple]
            report = self._settle(four_tuple, flow, now_ns)
            if report is not None:
                reports.append(report)
            elif flow.unsettled and flow.open_as_of_ns > now_ns:
                not_yet.add(four_tuple)
        self.flows.touched = not_yet
        reports.sort(key=by_time)
        return self._marks.mark(reports)

    def _settle(self, four_tuple: FourTuple, flow: Flow, now_ns: int) -> FlowReport | None:
        """Move a flow into the state that its facts give at `now_ns`; returns any report due."""
        report = self._settled(four_tuple, flow, now_ns)
        self._counts.review_taken_over(flow)
        return report

    def _settled(self, four_tuple: FourTuple, flow: Flow, now_ns: int) -> FlowReport | None:
        if flow.flood and flow.handshake.syn_count > 1:
            self.flood.note_real(four_tuple)
        decision = decide(flow.handshake, flow.reported, self._timeout_ns)
        state = decision.state
        if state in _CONNECTING_ENDS and flow.ever_stuck:
            state = State.RESCUED if flow.drawn_by_attempt() else State.RECOVERED
        elif state is State.SILENT and flow.unanswered:
            state = State.UNANSWERED
        elif state is State.TAKEN_OVER and flow.reported is not None:
            state = State.COMPLETED
        if flow.state is State.NAMESPACE_GONE and flow.handshake == flow.reported_handshake:
            state = flow.state
        flow.unsettled = state is not flow.state
        if not flow.unsettled:
            return None
        if not _is_due(decision, flow, now_ns):
            self.deadlines.note(decision.due_ns)
            return None
        flow.unsettled = False
        wants_completed = self._tell_healthy or flow.reported is not None
        if state in _ALWAYS_REPORTED or (wants_completed and state is State.COMPLETED):
            return self._reported_in(four_tuple, flow, state, decision.decided_ns)
        self._enter(four_tuple, flow, state, reported=False)
        return None

    def _enter(self, four_tuple: FourTuple, flow: Flow, state: State, *, reported: bool) -> None:
        """Move a flow into a state; leaving the silent states clears its flood mark."""
        self._counts.move(flow, state, reported=reported)
        if flow.state in STUCK_STATES and state not in STUCK_STATES:
            self._note_unstuck(four_tuple, flow)
        if state not in SILENT_STATES:
            self._counts.acquit(flow, is_real=state in REAL_STATES)
        flow.state = state

    def _note_unstuck(self, four_tuple: FourTuple, flow: Flow) -> None:
        self._unstuck.append(HandshakeId(four_tuple, flow.handshake.first_syn_ns))

    def take_unstuck(self) -> list[HandshakeId]:
        """The handshakes that were reported as stuck and no longer are; each is returned once.

        This includes clients that gave up and reused their port, which are not reported.
        """
        unstuck, self._unstuck = self._unstuck, []
        return unstuck

    def netns_of_silent(self, now_ns: int) -> set[int]:
        """The network namespaces with flows that `advance` would judge for lack of an ACK."""
        found: set[int] = set()
        for who in self.flows.touched:
            if who.netns not in found and self._is_silent(self.flows[who], now_ns):
                found.add(who.netns)
        return found

    def _is_silent(self, flow: Flow, now_ns: int) -> bool:
        decision = decide(flow.handshake, flow.reported, self._timeout_ns)
        return flow.handshake.ending == Ending.NONE and _is_due(decision, flow, now_ns)

    def stats(self) -> CorrelatorStats:
        """The current counts."""
        undecided = sum(
            flow.state is None and flow.seen_ns >= self._sweep_ns for _, flow in self.flows.items()
        )
        pending = self._young_in_sweep + undecided
        return self._counts.stats(pending=pending, flows=len(self.flows))


def _last_segment_ns(entry: Handshake) -> int:
    return max(entry.last_syn_ns, entry.last_ack_dropped_ns, entry.last_ack_filtered_ns)


def _is_due(decision: Decision, flow: Flow, now_ns: int) -> bool:
    return decision.at_once or decision.due_ns <= min(now_ns, flow.open_as_of_ns)
