"""A live run: when it polls, sweeps, judges, rescues and prints, and how it ends.

`analysis` turns the steps into findings, both live and in a replay.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tcpstuck_bpf.analysis import Analysis
from tcpstuck_bpf.app.cadence import Cadence
from tcpstuck_bpf.app.interfaces import Log, Names, Source
from tcpstuck_bpf.app.namespaces import NamespaceWatch
from tcpstuck_bpf.app.printer import Printer
from tcpstuck_bpf.app.ready_file import write_ready_file
from tcpstuck_bpf.errors import words_of
from tcpstuck_bpf.handshake.flow import FlowReport
from tcpstuck_bpf.model import (
    SECOND_NS,
    Event,
    EventKind,
    KernelCounters,
    ListenerFacts,
    ListenerSeen,
    Row,
    Sweep,
    SweepPart,
    Tally,
    living_of,
)
from tcpstuck_bpf.recording.replay import Recorder
from tcpstuck_bpf.steps import (
    Advanced,
    Ended,
    Listened,
    Logged,
    Named,
    Observed,
    Rescued,
    Step,
    Swept,
    TallyTaken,
)
from tcpstuck_bpf.summary import Summary

if TYPE_CHECKING:
    from tcpstuck_bpf.rescue.rescuer import Rescuing

LONGEST_POLL_NS = SECOND_NS // 5
"""One poll waits at most this long for an event."""
LAST_READING_NS = SECOND_NS
"""The end of a run waits at most this long for firewall rules that are being read."""
LAST_POLL_NS = SECOND_NS // 50
"""One poll waits at most this long while the end of a run waits for rules."""


@dataclass
class Live:
    """A live run.

    A signal handler sets `stop`, and the run ends with the summary. A second signal that arrives
    while `reading` is set only sets `abandoned`: an exception raised then would be lost in the C
    library that reads.

    An error after the start ends the run early. The summary is still printed, with a note about the
    error. If the output itself fails, the run raises the error.
    """

    source: Source
    analysis: Analysis
    printer: Printer
    recorder: Recorder | None
    read_kernel_counters: Callable[[Collection[int] | None], KernelCounters]
    """Reads the counters of the network namespaces with these inode numbers; None means all."""
    clock_ns: Callable[[], int] = time.monotonic_ns
    cpu_ns: Callable[[], int] = time.process_time_ns
    """The CPU time of this process. On a busy machine a reading may take seconds of which it gets
    few; the next one must not be put off for that."""
    stop: bool = False
    reading: bool = field(default=False, init=False)
    abandoned: bool = False
    rescuing: Rescuing | None = None
    name: Names | None = None
    """None: names cannot be looked up."""
    describe: Callable[[Iterable[ListenerFacts]], tuple[ListenerSeen, ...]] | None = None
    """Finds the owners of changed listeners; None: listeners are not described."""
    kernel_log: Log | None = None
    """None: the log may not be read."""
    namespaces: NamespaceWatch | None = None
    """None: the run does not look for removed network namespaces."""
    notes: tuple[str, ...] = ()
    """Notes for the summary that were known at the start."""
    doubts: Callable[[], tuple[str, ...]] | None = None
    """Returns reasons why a run without cookies may have had nothing to see."""
    clock_note: Callable[[], str] | None = None
    """Returns a note if the wall clock was changed during the run; empty if not."""
    failure: Exception | None = field(default=None, init=False)
    """The error that ended the run early."""
    _left_at_end: int = field(default=0, init=False)
    """Number of events that may still be read beside rows once the run is to end."""
    _noted_at_end: list[str] = field(default_factory=list, init=False)
    _sweeps: Cadence = field(init=False)
    """The schedule of sweeps. Their cost is the CPU time of reading and correlating, without
    printing: a burst of verdicts comes once and must not delay the next sweep."""
    _choices: Cadence = field(init=False)
    _tallies: Cadence = field(default_factory=Cadence, init=False)
    """The schedule of tallies. Their cost is the time that they take: a tally waits for other CPUs
    (`settle`), and no event is read meanwhile."""

    def __post_init__(self) -> None:
        interval_ns = min(SECOND_NS, self.analysis.header.settings.timeout_ns // 3)
        self._left_at_end = self.source.most_waiting
        self._sweeps, self._choices = Cadence(interval_ns), Cadence(interval_ns)

    def run(self, duration_ns: int | None, ready_file: str | None) -> Summary:
        """Trace until `duration_ns` (None: without limit) has passed or `stop` is set.

        Raises an error that prevents the start, and OSError if the output fails. Any other error
        becomes `failure` and a note in the summary.
        """
        begun = self._tally()
        if ready_file is not None:
            write_ready_file(ready_file)
        try:
            self._trace(begun, duration_ns)
        except Exception as error:  # after any error, the findings must still be printed
            if self.printer.failed:
                raise
            self.failure = error
        return self._finish()

    def _trace(self, begun: int, duration_ns: int | None) -> None:
        end_ns = None if duration_ns is None else begun + duration_ns
        while not self.stop:
            now_ns = self.clock_ns()
            if end_ns is not None and now_ns >= end_ns:
                break
            until_ns = min(self._sweeps.due_ns, now_ns + LONGEST_POLL_NS)
            if end_ns is not None:
                until_ns = min(until_ns, end_ns)
            self._watch(until_ns)
            if self.clock_ns() >= self._sweeps.due_ns:
                cost_ns = self._sweep()
                done_ns = self.clock_ns()
                self._sweeps.note(done_ns, cost_ns)
                status = self.analysis.status(self.source.counts(), done_ns)
                self.printer.status(status)

    def _watch(self, until_ns: int) -> None:
        """Read events until `until_ns`, rescue the clients that are due, and print."""
        if self.rescuing is not None:
            until_ns = min(until_ns, self._next_choice_ns(), self.rescuing.due_ns or until_ns)
        self._name(())
        self._observe_events(0 if self.printer.has_waiting else max(0, until_ns - self.clock_ns()))
        if self.rescuing is not None and self.clock_ns() >= self._next_choice_ns():
            self._look_at_chosen()
        self._print()

    def _next_choice_ns(self) -> int:
        """Time of the next reading of rows for a rescue; it is read more often than the table."""
        deadline_ns = self.analysis.correlator.deadlines.next_ns
        if deadline_ns is None:
            return self._choices.due_ns
        return min(self._choices.due_ns, max(deadline_ns, self._choices.soonest_ns))

    def _look_at_chosen(self) -> None:
        begun_ns = self.cpu_ns()
        self._take_in(self.source.chosen())
        self._choices.note(self.clock_ns(), self.cpu_ns() - begun_ns)
        self._judge()
        self._rescue((), self.analysis.reports)

    def _step(self, step: Step) -> None:
        findings = self.analysis.take(step)
        if self.recorder is not None:
            self.recorder.write(step)
        self.printer.add(findings)

    def _print(self) -> None:
        """Print the waiting lines; with --rescue only a few, so that it is not delayed."""
        if self.rescuing is None:
            self.printer.print_all()
        else:
            self.printer.print_some()

    def _poll(self, timeout_ns: int) -> tuple[Event, ...]:
        """Read events. Raises KeyboardInterrupt if a second signal arrived meanwhile."""
        self.reading = True
        try:
            return tuple(self.source.poll(timeout_ns))
        finally:
            self.reading = False
            if self.abandoned:
                raise KeyboardInterrupt

    def _observe_events(self, timeout_ns: int) -> None:
        events = self._poll(timeout_ns)
        # Rescue first: each completed client frees a slot of the accept queue, and judging takes
        # longer.
        self._rescue(events, ())
        self._observe(events)

    def _observe(self, events: tuple[Event, ...]) -> None:
        if events:
            self._name(Row(event.four_tuple, event.handshake) for event in events)
            self._step(Observed(events))
            self._judge()
            self._rescue((), self.analysis.reports)

    def _observe_waiting(self) -> None:
        """Process the events that wait at the end of the run, but no endless stream of new ones."""
        left = self.source.most_waiting
        while left > 0 and (events := self._poll(0)):
            left -= len(events)
            self._observe(_news(events))

    def _read_log(self) -> None:
        warnings = () if self.kernel_log is None else self.kernel_log.warnings()
        if warnings:
            self._step(Logged(warnings))

    def _name(self, rows: Iterable[Row]) -> None:
        """Look up names. Their step precedes the rows that need them; a replay relies on that."""
        names = None if self.name is None else self.name(rows)
        if names is not None:
            self._step(Named(names))

    def _take_in(self, sweep: Sweep) -> None:
        """Take in rows of the table, and the events that they had caused when they were read.

        A program changes an entry, then emits the event. If this process did not run for some
        seconds, the rows show what events say that still wait, and judging the rows alone would
        miss, for example, how long the accept queue was. The ring buffer's size bounds the events,
        so a flood does not keep the rows from being judged. Once the run is to end, it bounds them
        for all readings together, so a flood does not delay the end.
        """
        self._name(sweep.rows)
        self._step(Swept(sweep))
        if not self.stop:
            self._left_at_end = self.source.most_waiting
        left = self._left_at_end
        while left > 0 and (events := self._poll(0)):
            left -= len(events)
            told = _news(events) if self.stop else events
            self._rescue(told, ())
            self._name(Row(event.four_tuple, event.handshake) for event in told)
            if told:
                self._step(Observed(told))
        if self.stop:
            self._left_at_end = left

    def _rescue(self, events: Sequence[Event], reports: Sequence[FlowReport]) -> None:
        if self.rescuing is None or self.stop:
            return
        self.rescuing.take_in(events, reports)
        rescue = self.rescuing.act()
        if rescue is not None:
            self._step(Rescued(rescue))
            self.printer.add(rescue.attempts)

    def _sweep(self) -> int:
        """Read the whole table, judge, rescue and print.

        Returns the CPU time of reading and correlating, in nanoseconds.
        """
        cost_ns = 0
        batches = self.source.sweep()
        while True:
            begun_ns, begun_cpu_ns = self.clock_ns(), self.cpu_ns()
            batch = next(batches)
            self._take_in(batch)
            cost_ns += self.cpu_ns() - begun_cpu_ns
            self._judge()
            leaving = self.analysis.leaving
            self._rescue((), self.analysis.reports)
            if batch.part is SweepPart.LAST:
                break
            if not self.stop:
                self._watch(begun_ns)
        self.source.forget(leaving)
        changed = self.describe(self.source.listeners()) if self.describe is not None else ()
        if changed:
            self._step(Listened(changed))
        self._look_for_namespaces()
        self._print()
        return cost_ns

    def _look_for_namespaces(self) -> None:
        """Check for removed network namespaces; their clients no longer count as stuck."""
        if self.namespaces is None or not self.namespaces.is_due:
            return
        steps = self.namespaces.look(self.analysis.correlator.netns_of_stuck)
        for step in steps:
            self._step(step)
        if steps:
            self._judge()
            self._rescue((), self.analysis.reports)

    def _judge(self) -> None:
        """Move flows into the states that are due.

        Before that the kernel's log is read, which may have been written while this process did not
        run. Before silent clients are judged, the kernel's counters are read again: they show
        whether ACKs passed unseen.
        """
        self._read_log()
        now_ns = self.clock_ns()
        if now_ns >= self._tallies.due_ns:
            silent = self.analysis.correlator.netns_of_silent(now_ns)
            if silent:
                self._tally(silent)
                done_ns = self.clock_ns()
                self._tallies.note(done_ns, done_ns - now_ns)
        self._step(Advanced(now_ns))

    def _tally(self, wanted: Collection[int] | None = None) -> int:
        """Read the kernel's counters, the programs' own, and the kernel's again.

        Between the first two readings, packets that the kernel has counted already pass the
        programs. Returns the time of the middle reading.
        """
        begun_ns = self.clock_ns()
        before = self.read_kernel_counters(wanted)
        living = living_of(before)
        if self.namespaces is not None:
            self.namespaces.note_living(living, begun_ns)
        self.source.settle()
        traced = self.source.counts(living)
        now_ns = self.clock_ns()
        after = self.read_kernel_counters(wanted)
        self._step(TallyTaken(Tally(now_ns, before, traced, after)))
        return now_ns

    def _await_rules(self) -> None:
        """Wait up to LAST_READING_NS for the firewall rules that reported verdicts still lack."""
        until_ns = self.clock_ns() + LAST_READING_NS
        while self.name is not None and self.analysis.awaits_rules:
            self.name.hurry()
            self._name(())
            now_ns = self.clock_ns()
            if now_ns >= until_ns or not self.analysis.awaits_rules:
                break
            self._observe_events(min(LAST_POLL_NS, until_ns - now_ns))

    @property
    def _notes(self) -> tuple[str, ...]:
        early = "" if self.failure is None else f"the run ended early: {words_of(self.failure)}"
        failure = self.recorder.failure if self.recorder is not None else None
        recording = f"the recording is incomplete: {failure}" if failure else ""
        return tuple(filter(None, (early, *self.notes, *self._noted_at_end, recording)))

    @contextlib.contextmanager
    def _noted(self, what: str) -> Iterator[None]:
        """Turn an error in the block into a note of the summary, unless the output failed."""
        try:
            yield
        except Exception as error:  # no error here may cost the findings
            if self.printer.failed:
                raise
            self._noted_at_end.append(f"{what}: {words_of(error)}")

    def _finish(self) -> Summary:
        with self._noted("events that waited at the end were not read"):
            self._observe_waiting()
        if self.namespaces is not None:
            self.namespaces.hurry()
        with self._noted("the last sweep of the table failed"):
            self._sweep()
        with self._noted("firewall rules were not read at the end"):
            self._await_rules()
        with self._noted("the counters were not compared at the end"):
            self._tally()
        if self.doubts is not None and not self.analysis.saw_cookies:
            with self._noted("the check for listening sockets and SYN cookies failed"):
                self._noted_at_end += self.doubts()
        overruns = 0 if self.kernel_log is None else self.kernel_log.overruns
        losses: dict[str, int] = {"kernel_log_overruns": overruns}
        with self._noted("the losses counted by the programs are unknown"):
            losses = {**self.source.losses(), **losses}
        with self._noted("changes of the wall clock are unknown"):
            clock_note = "" if self.clock_note is None else self.clock_note()
            self._noted_at_end += filter(None, [clock_note])
        ended = Ended(self.clock_ns(), losses, self._notes)
        self._step(ended)
        # Writing this step may have filled the recording's disk, which adds a note.
        ended = ended._replace(notes=self._notes)
        self.printer.print_all()
        summary = self.analysis.summary(ended)
        self.printer.summary(summary)
        return summary


def _news(events: tuple[Event, ...]) -> tuple[Event, ...]:
    """The events without repeated SYNs.

    At the end of a run a flood may have filled the ring buffer with them, and the table's entries,
    which are read then, have the same facts.
    """
    return tuple(event for event in events if event.kind != EventKind.SYN_REPEATED)
