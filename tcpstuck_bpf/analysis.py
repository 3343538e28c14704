"""Turns steps into findings, and into the summary at the end.

A live run and its replay share this part. Its only input is the steps in order, so a replay gives
the same results as the live run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

from tcpstuck_bpf.handshake.correlate import Correlator
from tcpstuck_bpf.handshake.flow import FlowReport, State
from tcpstuck_bpf.judge.backlog_history import ListenerHistory
from tcpstuck_bpf.judge.drop_cause import NO_NAMES
from tcpstuck_bpf.judge.kernel_warnings import WarningHistory
from tcpstuck_bpf.judge.reconcile import missed_runs_note, reconcile, total_counted, unseen_acks
from tcpstuck_bpf.judge.stuck_now import StuckNow
from tcpstuck_bpf.judge.verdict import (
    NO_ROOM_FOR_UPDATE,
    UPDATE_FOLLOWS,
    Finding,
    judge,
    with_evidence,
)
from tcpstuck_bpf.model import (
    ATTEMPT_NOT_SENT,
    ATTEMPT_SENT,
    CROWDED_NETNS,
    GONE_NETNS,
    FourTuple,
    HandshakeId,
    NetnsCount,
    NetnsCounts,
    Sweep,
    SweepPart,
    Tally,
    living_of,
)
from tcpstuck_bpf.rulesets import KernelNames
from tcpstuck_bpf.steps import (
    Advanced,
    Ended,
    Header,
    Listened,
    Logged,
    Named,
    Observed,
    Rescued,
    Step,
    Swept,
    TallyTaken,
    Vanished,
)
from tcpstuck_bpf.summary import RescueTotals, Status, Summary

MAX_RULES_AWAITED = 1024
"""Largest number of flows that wait for the firewall's rules. In a flood, a few show enough."""


_ACKS = (
    NetnsCount.COMPLETED,
    NetnsCount.COMPLETED_UNTRACKED,
    NetnsCount.ACKS_DROPPED,
    NetnsCount.ACKS_DROPPED_UNTRACKED,
)
"""Counts of segments whose cookie was valid."""


class _Basis(NamedTuple):
    """The basis of a verdict."""

    report: FlowReport
    unseen_acks: int


class _Unseen(NamedTuple):
    """The ACKs of one namespace that no program saw."""

    number: int
    known_ns: int
    """Time of the tally that first showed the last of these ACKs, which came before it."""
    cookie: int
    """Cookie of the namespace; 0 if unknown."""


class Analysis:
    """Takes steps, and returns findings and finally a summary."""

    def __init__(self, header: Header) -> None:
        self.header = header
        self.correlator = Correlator(
            header.settings.timeout_ns,
            header.settings.tell_healthy,
            max_flows=header.table_capacity,
        )
        self.leaving: list[HandshakeId] = []
        """Entries of the kernel's table that are no longer needed after the latest step."""
        self.reports: list[FlowReport] = []
        """Flows that changed their state at the latest Advanced."""
        self.reported = 0
        self._verdicts: Counter[str] = Counter()
        self._stuck = StuckNow()
        self._names = NO_NAMES
        self._rules_awaited: dict[FourTuple, _Basis] = {}
        """Flows that got a verdict before the rules were read; at most MAX_RULES_AWAITED."""
        self._never_updated = 0
        self._listeners = ListenerHistory()
        self._warnings = WarningHistory()
        self._rows = 0
        self._table_seen = False
        self._tallies: list[Tally] = []
        self._unseen: dict[int, _Unseen] = {}
        self._attempts: Counter[str] = Counter()
        self._left_alone: Mapping[str, int] | None = None
        self._taking: Mapping[type, Callable[[Any], list[Finding] | None]] = {
            Observed: self._observed,
            Swept: lambda step: self._sweep(step.sweep),
            Advanced: lambda step: self._advance(step.now_ns),
            TallyTaken: lambda step: self._take_tally(step.tally),
            Rescued: self._rescued,
            Named: self._named,
            Listened: lambda step: self._listeners.take_listeners(step.listeners),
            Logged: lambda step: self._warnings.take(step.warnings),
            Vanished: lambda step: self.correlator.note_gone(
                step.netns, step.now_ns, step.until_ns
            ),
            Ended: lambda _step: None,
        }

    def take(self, step: Step) -> list[Finding]:
        """Take a step and return its findings: from Advanced, and from Named with late rules."""
        self.leaving = []
        return self._taking[type(step)](step) or []

    def _observed(self, step: Observed) -> None:
        for event in step.events:
            self.correlator.observe(event)

    def _rescued(self, step: Rescued) -> None:
        self.correlator.note_rescue(step.rescue)
        self._attempts.update(attempt.outcome for attempt in step.rescue.attempts)
        self._left_alone = step.rescue.left_alone

    def _named(self, step: Named) -> list[Finding]:
        self._names = self._names.with_more(step.names)
        return list(self._updates(step.names.rulesets))

    def _sweep(self, sweep: Sweep) -> None:
        self.correlator.observe(sweep)
        self._listeners.take_sweep(sweep)
        if sweep.part is not SweepPart.CHOSEN:
            self._rows += len(sweep.rows)
            self._table_seen = sweep.part is SweepPart.LAST

    def _advance(self, now_ns: int) -> list[Finding]:
        reports = self.reports = self.correlator.advance(now_ns)
        judged = (self._judged(_Basis(report, self._unseen_beside(report))) for report in reports)
        findings = [finding for finding in judged if finding is not None]
        for finding in findings:
            self._stuck.take(finding)
            self._verdicts[finding.verdict] += 1
            if finding.updates is not None:
                self._verdicts[finding.updates] -= 1
        for identity in self.correlator.take_unstuck():
            self._stuck.leave(identity)
        self.reported += len(findings)
        if self._table_seen:
            capacity = self.header.table_capacity
            self.leaving = self.correlator.flows.expired(now_ns, self._rows, capacity)
            self._listeners.take_leaving(self.leaving)
            self._stuck.settle(lambda one: self.correlator.flows.named(one) is not None)
            self._rows = 0
            self._table_seen = False
        return findings

    def _judged(self, basis: _Basis) -> Finding | None:
        """The verdict on a flow. If rules for it are still to be read, another verdict follows."""
        finding = judge(basis.report, self.header.coverage, self._names, basis.unseen_acks)
        self._rules_awaited.pop(basis.report.four_tuple, None)
        if finding is None:
            return None
        finding = self._with_warnings(finding)
        if finding.drop is None or not finding.drop.netfilter.needs_reading:
            return finding
        if len(self._rules_awaited) >= MAX_RULES_AWAITED:
            self._never_updated += 1
            return with_evidence(finding, NO_ROOM_FOR_UPDATE)
        self._rules_awaited[basis.report.four_tuple] = basis
        return with_evidence(finding, UPDATE_FOLLOWS)._replace(to_be_updated=True)

    def _updates(self, read: Collection[int]) -> Iterator[Finding]:
        """Updated verdicts that waited for the rules of these network namespaces."""
        for basis in [one for who, one in self._rules_awaited.items() if who.netns in read]:
            finding = self._judged(basis)
            if finding is not None and not finding.to_be_updated:
                self._stuck.take(finding)
                yield finding._replace(updates=finding.verdict)

    @property
    def names(self) -> KernelNames:
        """The names of the kernel's numbers that are known by now."""
        return self._names

    @property
    def awaits_rules(self) -> bool:
        """Whether a verdict waits for rules and will be updated."""
        return bool(self._rules_awaited)

    def _take_tally(self, tally: Tally) -> None:
        self._tallies = [*self._tallies[:1], tally]
        for netns, counts in tally.traced.items():
            if netns in (GONE_NETNS, CROWDED_NETNS):
                continue
            acks = sum(counts.get(which, 0) for which in _ACKS)
            self.correlator.flood.note_acks(netns, tally.time_ns, acks)
        unseen = unseen_acks(self._tallies[0], tally, self.header.coverage)
        living = living_of(tally.kernel_before)
        for netns, number in unseen.items():
            known, cookie = self._unseen.get(netns), living.get(netns, 0)
            if known is None or cookie != known.cookie or number > known.number:
                self._unseen[netns] = _Unseen(number, tally.time_ns, cookie)

    def _unseen_beside(self, report: FlowReport) -> int:
        """Number of unseen ACKs in a flow's namespace; 0 if the flow's own cannot be among them."""
        unseen = self._unseen.get(report.four_tuple.netns)
        if unseen is None or report.handshake.first_syn_ns > unseen.known_ns:
            return 0
        return unseen.number

    def _with_warnings(self, finding: Finding) -> Finding:
        endpoint = self._listeners.endpoint(finding.four_tuple, finding.listener_socket)
        timeline = self._warnings.added_to(
            finding.timeline, endpoint, finding.first_syn_ns, finding.verdict_ns
        )
        return finding if timeline is finding.timeline else finding._replace(timeline=timeline)

    @property
    def tallied(self) -> bool:
        """Whether there was a tally; a summary needs one."""
        return bool(self._tallies)

    @property
    def begun_ns(self) -> int:
        """Time of the first tally, when the run began. Needs at least one tally."""
        return self._tallies[0].time_ns

    @property
    def saw_cookies(self) -> bool:
        """Whether a cookie's SYN-ACK or ACK was counted between the first tally and the last."""
        counted = total_counted(self._tallies[0].traced, self._tallies[-1].traced)
        return any(counted[which] for which in (NetnsCount.COOKIES_SENT, *_ACKS))

    def is_stuck(self, identity: HandshakeId) -> bool:
        """Whether a client that was reported stuck still is.

        A client whose flow has been forgotten stays stuck, until its 4-tuple is used again.
        """
        return identity in self._stuck or identity.four_tuple not in self.correlator.flows

    def status(self, counts: NetnsCounts, now_ns: int) -> Status:
        """The current figures for the status line."""
        counted = total_counted(self._tallies[0].traced, counts)
        stats = self.correlator.stats()
        return Status(
            watched=self.header.watched,
            cookies_sent=counted[NetnsCount.COOKIES_SENT],
            completed=counted[NetnsCount.COMPLETED],
            waiting=stats.pending,
            still_stuck=stats.still_stuck,
            running_ns=now_ns - self.begun_ns,
            now_ns=now_ns,
            flood_suspected=stats.flood_suspected,
            data_lost=stats.reported_now.get(State.DATA_LOST, 0),
        )

    def so_far(self, counts: NetnsCounts, now_ns: int, losses: Mapping[str, int]) -> Summary:
        """The current summary, without the listener reports. Needs at least one tally.

        Judging listeners would look at every client of a flood. The kernel's counters are compared
        as of the latest tally. A verdict that still waits for rules does not count as lost.
        """
        summed = self._summed(Ended(now_ns, losses, ()), counts)
        return summed._replace(losses={**summed.losses, "causes_not_updated": self._never_updated})

    def summary(self, ended: Ended) -> Summary:
        """The summary of all steps taken, which must include a tally."""
        summed = self._summed(ended, self._tallies[-1].traced)
        return summed._replace(listeners=self._listeners.reports(self.header.coverage.gaps))

    def _summed(self, ended: Ended, counts: NetnsCounts) -> Summary:
        """A summary without reports of listeners."""
        start, end = self._tallies[0], self._tallies[-1]
        stats = self.correlator.stats()
        counted = total_counted(start.traced, counts)
        recovered = stats.reported_now.get(State.RECOVERED, 0)
        verdicts = {name: number for name, number in self._verdicts.items() if number > 0}
        # Handshakes that an ordinary one took over were connected without a cookie's ACK.
        connected = counted[NetnsCount.COMPLETED] + stats.taken_over
        rescued = stats.reported_now.get(State.RESCUED, 0)
        data_lost = stats.reported_now.get(State.DATA_LOST, 0)
        if not self.header.selection:  # the counters cover the whole recording, not a part
            verdicts["completed"] = max(0, connected - recovered - rescued - data_lost)
        losses = {
            **ended.losses,
            "flows_evicted": stats.evicted,
            "entries_let_go": stats.let_go,
            "flows_unresolved": stats.unresolved,
            "children_stillborn": counted[NetnsCount.STILLBORN],
            "table_busy": counted[NetnsCount.TABLE_BUSY],
            "listeners_forgotten": self._listeners.forgotten,
            "causes_not_updated": self._never_updated + len(self._rules_awaited),
        }
        wanted = self.header.settings.trace_filter
        reconciliation = reconcile(start, end, self.header.coverage)
        missed_runs = missed_runs_note(losses.get("programs_not_run", 0), reconciliation)
        return Summary(
            watched=self.header.watched,
            mode=self.header.coverage.mode,
            duration_ns=ended.now_ns - start.time_ns,
            verdicts=dict(sorted(verdicts.items())),
            ever_stuck=stats.ever_stuck,
            still_stuck=stats.still_stuck,
            recovered=recovered,
            data_lost=data_lost,
            namespace_gone=stats.reported_now.get(State.NAMESPACE_GONE, 0),
            pending=stats.pending,
            superseded=stats.superseded,
            cookies_sent=counted[NetnsCount.COOKIES_SENT],
            lost_events=counted[NetnsCount.EVENTS_LOST],
            untracked=counted[NetnsCount.TABLE_FULL] + counted[NetnsCount.TABLE_BUSY],
            unseen_syn=counted[NetnsCount.COMPLETED_UNTRACKED]
            + counted[NetnsCount.ACKS_DROPPED_UNTRACKED],
            losses=losses,
            gaps=self.header.coverage.gaps,
            reconciliation=reconciliation,
            filtered=bool(wanted.ports or wanted.family or wanted.listener_address),
            notes=(*ended.notes, *filter(None, [missed_runs])),
            cut_off_ns=ended.now_ns if ended.cut_off else None,
            rescue=self._rescue_totals(rescued),
            seen=self._listeners.seen,
            flood_suspected=stats.flood_suspected,
            stuck=self._stuck.groups(),
            selection=self.header.selection,
            acks_unknown=max(0, counted[NetnsCount.ACKS_DROPPED_UNTRACKED] - stats.begun_by_ack),
        )

    def _rescue_totals(self, rescued: int) -> RescueTotals | None:
        if self._left_alone is None:
            return None
        failed = {
            outcome: number
            for outcome, number in self._attempts.items()
            if outcome not in (ATTEMPT_SENT, ATTEMPT_NOT_SENT)
        }
        return RescueTotals(
            sent=self._attempts[ATTEMPT_SENT],
            not_sent=self._attempts[ATTEMPT_NOT_SENT],
            failed=failed,
            rescued=rescued,
            left_alone=self._left_alone,
        )
