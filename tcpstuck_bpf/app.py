"""The run: from a source of observations to findings and the summary, live or replayed.

`Analysis` is the part both have in common; it sees steps in order and nothing else, which is why
a replay gives what the live run gave. `run_live` adds the clock, the sweeps and the signals.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tcpstuck_bpf.correlate import Correlator
from tcpstuck_bpf.errors import RecordingError, UsageError
from tcpstuck_bpf.flow import FlowReport, State
from tcpstuck_bpf.model import (
    ATTEMPT_NOT_SENT,
    ATTEMPT_SENT,
    Attempt,
    Coverage,
    Ending,
    Event,
    HandshakeId,
    KernelCounters,
    NetnsCount,
    NetnsCounts,
    Sweep,
    Tally,
)
from tcpstuck_bpf.reconcile import count_difference, reconcile
from tcpstuck_bpf.replay import (
    Advanced,
    Ended,
    Header,
    Observed,
    Recorder,
    Replay,
    Rescued,
    Step,
    Swept,
    TallyTaken,
)
from tcpstuck_bpf.report import RescueTotals, Status, Summary
from tcpstuck_bpf.rescuing import Rescuing
from tcpstuck_bpf.verdict import Finding, judge

SECOND_NS = 1_000_000_000
LONGEST_POLL_NS = SECOND_NS // 5
SWEEP_SHARE = 5
"""Reading and correlating the table takes at most one part in this many of the time. What a sweep
brings to tell is not counted: it comes once, and must not hold up what comes after it."""


class Source(Protocol):
    """Where observations come from; `source.BccSource` is the running kernel."""

    @property
    def coverage(self) -> Coverage:
        """Which probes attached."""

    @property
    def timings(self) -> Mapping[str, float]:
        """Seconds that each part of the start took."""

    @property
    def table_capacity(self) -> int:
        """How many handshakes the table holds."""

    def poll(self, timeout_ns: int) -> list[Event]:
        """Events that came, waiting at most that long for the first."""

    def sweep(self) -> Sweep:
        """The whole table; its time is from before the first entry was read."""

    def forget(self, handshakes: Iterable[HandshakeId]) -> None:
        """Remove entries from the table, where they are still of that handshake."""

    def counts(self) -> NetnsCounts:
        """What the programs counted since they were attached."""

    def losses(self) -> Mapping[str, int]:
        """Losses that belong to no namespace, by name."""

    def close(self) -> None:
        """Detach."""


class Output(Protocol):
    """Where findings go; `output` has the table and JSON Lines."""

    def findings(self, findings: list[Finding]) -> None:
        """Show findings as they come."""

    def attempts(self, attempts: Sequence[Attempt]) -> None:
        """Show what was done for stuck clients."""

    def status(self, status: Status) -> None:
        """Nothing new: say that it is watching."""

    def summary(self, summary: Summary) -> None:
        """The end."""


class Analysis:
    """Steps in, findings and at the end a summary out."""

    def __init__(self, header: Header) -> None:
        self.header = header
        self.correlator = Correlator(
            header.settings.timeout_ns,
            header.settings.tell_healthy,
            max_flows=header.table_capacity,
        )
        self.leaving: list[HandshakeId] = []
        """Entries of the kernel's table that are needed no more, after the latest step."""
        self.reports: list[FlowReport] = []
        """The flows that came into another state at the latest Advanced."""
        self.told = 0
        self._verdicts: Counter[str] = Counter()
        self._taken_over = 0
        self._rows: int | None = None
        self._tallies: list[Tally] = []
        self._attempts: Counter[str] = Counter()
        self._left_alone: Mapping[str, int] | None = None

    def take(self, step: Step) -> list[Finding]:
        """Findings that a step brings; only Advanced brings any."""
        self.leaving = []
        if isinstance(step, Observed):
            for event in step.events:
                self.correlator.observe(event)
        elif isinstance(step, Swept):
            self.correlator.observe(step.sweep)
            self._rows = len(step.sweep.rows)
        elif isinstance(step, Rescued):
            self.correlator.note_rescue(step.rescue)
            self._attempts.update(attempt.outcome for attempt in step.rescue.attempts)
            self._left_alone = step.rescue.left_alone
        elif isinstance(step, TallyTaken):
            self._tallies = [*self._tallies[:1], step.tally]
        elif isinstance(step, Advanced):
            return self._advance(step.now_ns)
        return []

    def _advance(self, now_ns: int) -> list[Finding]:
        reports = self.reports = self.correlator.advance(now_ns)
        judged = (judge(report, self.header.coverage) for report in reports)
        findings = [finding for finding in judged if finding is not None]
        self._taken_over += sum(
            report.handshake.ending == Ending.TAKEN_OVER and report.delay_ns is not None
            for report in reports
        )
        for finding in findings:
            self._verdicts[finding.verdict] += 1
            if finding.updates is not None:
                self._verdicts[finding.updates] -= 1
        self.told += len(findings)
        if self._rows is not None:
            capacity = self.header.table_capacity
            self.leaving = self.correlator.expired(now_ns, self._rows, capacity)
            self._rows = None
        return findings

    @property
    def tallied(self) -> bool:
        """Whether there was a tally, without which there is no summary."""
        return bool(self._tallies)

    def status(self, counts: NetnsCounts, now_ns: int) -> Status:
        """What there is to say while nothing new is."""
        counted = _total(self._tallies[0].traced, counts)
        stats = self.correlator.stats()
        return Status(
            watched=self.header.watched,
            cookies_sent=counted[NetnsCount.COOKIES_SENT],
            completed=counted[NetnsCount.COMPLETED],
            waiting=stats.pending,
            still_stuck=stats.still_stuck,
            running_ns=now_ns - self._tallies[0].time_ns,
        )

    def summary(self, ended: Ended) -> Summary:
        """The end of the run, from all steps taken; a tally was among them."""
        start, end = self._tallies[0], self._tallies[-1]
        stats = self.correlator.stats()
        counted = _total(start.traced, end.traced)
        recovered = stats.told_now.get(State.RECOVERED, 0)
        told = {name: number for name, number in self._verdicts.items() if number > 0}
        # Those that an ordinary handshake took over were connected without a cookie's ACK.
        connected = counted[NetnsCount.COMPLETED] + self._taken_over
        rescued = stats.told_now.get(State.RESCUED, 0)
        told["completed"] = max(0, connected - recovered - rescued)
        losses = {
            **ended.losses,
            "flows_evicted": stats.evicted,
            "entries_let_go": stats.let_go,
            "flows_unresolved": stats.unresolved,
            "children_stillborn": counted[NetnsCount.STILLBORN],
        }
        wanted = self.header.settings.trace_filter
        return Summary(
            watched=self.header.watched,
            mode=self.header.coverage.mode,
            duration_ns=ended.now_ns - start.time_ns,
            verdicts=dict(sorted(told.items())),
            ever_stuck=stats.ever_stuck,
            still_stuck=stats.still_stuck,
            recovered=recovered,
            pending=stats.pending,
            superseded=stats.superseded,
            cookies_sent=counted[NetnsCount.COOKIES_SENT],
            lost_events=counted[NetnsCount.EVENTS_LOST],
            untracked=counted[NetnsCount.TABLE_FULL],
            unseen_syn=counted[NetnsCount.COMPLETED_UNTRACKED]
            + counted[NetnsCount.ACKS_DROPPED_UNTRACKED],
            losses=losses,
            gaps=self.header.coverage.gaps,
            reconciliation=reconcile(start, end, self.header.coverage),
            filtered=bool(wanted.ports or wanted.family or wanted.listener_address),
            notes=ended.notes,
            rescue=self._rescue_totals(rescued),
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


def _total(start: NetnsCounts, end: NetnsCounts) -> Counter[NetnsCount]:
    counted: Counter[NetnsCount] = Counter()
    for counts in count_difference(start, end).values():
        counted.update(counts)
    return counted


@dataclass
class Live:
    """A live run. `stop` is set by a signal handler and ends it with the summary."""

    source: Source
    analysis: Analysis
    output: Output
    recorder: Recorder | None
    read_kernel_counters: Callable[[], KernelCounters]
    clock_ns: Callable[[], int] = time.monotonic_ns
    stop: bool = False
    rescuing: Rescuing | None = None

    def run(self, duration_ns: int | None, ready_file: str | None) -> Summary:
        """Trace until `duration_ns` (None: for ever) has passed or `stop` is set."""
        begun = self._tally()
        if ready_file is not None:
            write_ready_file(ready_file)
        end_ns = None if duration_ns is None else begun + duration_ns
        interval_ns = min(SECOND_NS, self.analysis.header.settings.timeout_ns // 3)
        next_sweep_ns = regular_ns = soonest_ns = begun
        while not self.stop:
            now_ns = self.clock_ns()
            if end_ns is not None and now_ns >= end_ns:
                break
            until_ns = min(next_sweep_ns, end_ns or next_sweep_ns, now_ns + LONGEST_POLL_NS)
            if self.rescuing is not None and self.rescuing.due_ns is not None:
                until_ns = min(until_ns, self.rescuing.due_ns)
            self._observe_events(max(0, until_ns - now_ns))
            if self.clock_ns() >= next_sweep_ns:
                cost_ns = self._sweep()
                done_ns = self.clock_ns()
                soonest_ns = done_ns + SWEEP_SHARE * cost_ns
                regular_ns = max(done_ns + interval_ns, soonest_ns)
                self.output.status(self.analysis.status(self.source.counts(), done_ns))
            next_sweep_ns = self._next_sweep(regular_ns, soonest_ns)
        return self._finish()

    def _next_sweep(self, regular_ns: int, soonest_ns: int) -> int:
        """Where clients are to be mended, a verdict is not to wait for the regular sweep."""
        deadline_ns = self.analysis.correlator.next_deadline_ns
        if self.rescuing is None or deadline_ns is None:
            return regular_ns
        return min(regular_ns, max(deadline_ns, soonest_ns))

    def _step(self, step: Step) -> None:
        findings = self.analysis.take(step)
        if self.recorder is not None:
            self.recorder.write(step)
        if findings:
            self.output.findings(findings)

    def _observe_events(self, timeout_ns: int) -> None:
        events = tuple(self.source.poll(timeout_ns))
        if events:
            self._step(Observed(events))
            self._step(Advanced(self.clock_ns()))
        if not self.stop:
            self._rescue(events, self.analysis.reports if events else ())

    def _rescue(self, events: Sequence[Event], reports: Sequence[FlowReport]) -> None:
        if self.rescuing is None:
            return
        self.rescuing.take_in(events, reports)
        rescue = self.rescuing.act()
        if rescue is not None:
            self._step(Rescued(rescue))
            self.output.attempts(rescue.attempts)

    def _sweep(self) -> int:
        """Read, judge, tell; returns the ns that reading and correlating took."""
        begun_ns = self.clock_ns()
        self._step(Swept(self.source.sweep()))
        cost_ns = self.clock_ns() - begun_ns
        self._step(Advanced(self.clock_ns()))
        self.source.forget(self.analysis.leaving)
        if not self.stop:
            self._rescue((), self.analysis.reports)
        return cost_ns

    def _tally(self) -> int:
        before = self.read_kernel_counters()
        traced = self.source.counts()
        now_ns = self.clock_ns()
        self._step(TallyTaken(Tally(now_ns, before, traced, self.read_kernel_counters())))
        return now_ns

    def _finish(self) -> Summary:
        self._observe_events(0)
        self._sweep()
        self._tally()
        failure = self.recorder.failure if self.recorder is not None else None
        notes = (f"the recording is incomplete: {failure}",) if failure else ()
        ended = Ended(self.clock_ns(), dict(self.source.losses()), notes)
        self._step(ended)
        summary = self.analysis.summary(ended)
        self.output.summary(summary)
        return summary


def write_ready_file(path: str) -> None:
    """Say that every probe is attached: a file with our process number appears.

    Raises UsageError where it cannot be written.
    """
    try:
        Path(path).write_text(f"{os.getpid()}\n", encoding="ascii")
    except OSError as error:
        raise UsageError(
            f"cannot write the ready file {path}",
            str(error.strerror),
            "name a file in a directory that you may write to",
        ) from error


def run_replay(replay: Replay, output: Output) -> Summary:
    """Play a recording; gives what the live run gave. Raises RecordingError where it is damaged."""
    analysis = Analysis(replay.header)
    for step in replay.steps():
        findings = analysis.take(step)
        if findings:
            output.findings(findings)
        if isinstance(step, Rescued):
            output.attempts(step.rescue.attempts)
        if isinstance(step, Ended):
            if not analysis.tallied:
                raise RecordingError(
                    f"the recording of {replay.header.watched} is damaged",
                    "it holds no reading of the counters",
                    "record again",
                )
            summary = analysis.summary(step)
            output.summary(summary)
            return summary
    raise AssertionError("a recording without an end is refused when it is opened")
