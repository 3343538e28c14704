"""The run: from a source of observations to findings and the summary, live or replayed.

`analysis` is the part both have in common; `Live` adds the clock, the sweeps and the rescue.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import stat
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from tcpstuck_bpf.analysis import Analysis
from tcpstuck_bpf.errors import RecordingError, UsageError, words_of
from tcpstuck_bpf.files import write_whole
from tcpstuck_bpf.handshake.flow import FlowReport
from tcpstuck_bpf.host.netns_numbers import NetnsNumbers
from tcpstuck_bpf.judge.verdict import Finding
from tcpstuck_bpf.model import (
    NOT_KNOWN,
    SECOND_NS,
    Attempt,
    Coverage,
    Event,
    EventKind,
    HandshakeId,
    KernelCounters,
    KernelNames,
    KernelWarning,
    ListenerFacts,
    ListenerSeen,
    NetnsCounts,
    Row,
    Sweep,
    SweepPart,
    Tally,
    living_of,
)
from tcpstuck_bpf.recording.replay import Recorder, Replay
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
    Vanished,
)
from tcpstuck_bpf.summary import Status, Summary

if TYPE_CHECKING:
    from tcpstuck_bpf.rescue.rescuer import Rescuing

Told = TypeVar("Told")

LONGEST_POLL_NS = SECOND_NS // 5
LAST_READING_NS = SECOND_NS
"""The end of a run waits so long at most for rules that are being read."""
LAST_POLL_NS = SECOND_NS // 50
SWEEP_SHARE = 5
"""Reading and correlating the table takes at most one part in this many of the time. What a sweep
brings to tell is not counted: it comes once, and must not hold up what comes after it."""
LOOK_INTERVAL_NS = 5 * SECOND_NS
"""Between two looks for namespaces that are gone: each is a walk over every process."""
TOLD_AT_ONCE = 16
"""Lines to tell between two looks at the events, where clients are to be mended."""
MAX_UNTOLD = 4096
"""Lines that may wait to be told, where clients are to be mended."""


class Source(Protocol):
    """Where observations come from; `source.KernelSource` is the running kernel."""

    @property
    def coverage(self) -> Coverage:
        """Which probes attached."""

    @property
    def timings(self) -> Mapping[str, float]:
        """Seconds that each part of the start took."""

    @property
    def table_capacity(self) -> int:
        """How many handshakes the table holds."""

    @property
    def most_waiting(self) -> int:
        """How many events may wait to be read at any moment."""

    def poll(self, timeout_ns: int) -> list[Event]:
        """A bounded number of events that came, waiting at most that long for the first.

        A signal ends the waiting.
        """

    def sweep(self) -> Iterator[Sweep]:
        """The whole table in batches; their time is from before the first entry was read."""

    def chosen(self) -> Sweep:
        """The entries that the rescue may be for, however many others there are."""

    def forget(self, handshakes: Iterable[HandshakeId]) -> None:
        """Remove entries from the table, where they are still of that handshake."""

    def counts(self, living: Mapping[int, int] = NOT_KNOWN) -> NetnsCounts:
        """What the programs counted since they were attached, by network namespace.

        `living` has the cookies of those that are there now, by inode number, where they are known:
        what was counted in another one of that number is counted as gone.
        """

    def netns_in_full_tables(self) -> Collection[int]:
        """The network namespaces that have entries in tables that are more than half full."""

    def free(self, gone: Collection[int], living: Mapping[int, int]) -> None:
        """Make room in those tables: these network namespaces are gone.

        So are those whose number is another one's by now: `living` as for `counts`.
        """

    def listeners(self) -> tuple[ListenerFacts, ...]:
        """How the queues of each listener fared."""

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

    def close(self) -> None:
        """Nothing more will come, with or without a summary. Raises OSError."""


class Log(Protocol):
    """The kernel's warnings of full SYN queues; `kernel_log.KernelLog` is the real one."""

    @property
    def overruns(self) -> int:
        """Times that lines were overwritten before they were read."""

    def warnings(self, now_ns: int) -> tuple[KernelWarning, ...]:
        """Those that came since it was asked last."""


class Names(Protocol):
    """What says what the kernel's numbers mean; `places.Namer` asks the running kernel."""

    def __call__(self, rows: Iterable[Row]) -> KernelNames | None:
        """Names of numbers in entries, and firewall rules, that it has not told yet.

        None: nothing new.
        """

    def hurry(self) -> None:
        """The run ends: what is still to be read is read without a pause."""


@dataclass
class Live:
    """A live run. `stop` is set by a signal handler and ends it with the summary.

    `abandoned` is set by one as well, while `reading` is: an exception that it raised instead would
    be lost in the C library that reads.

    What fails once the run traces ends it, and takes nothing from what it has found: the summary
    comes, with a note. Only where the output itself fails there is nobody to tell.
    """

    source: Source
    analysis: Analysis
    output: Output
    recorder: Recorder | None
    read_kernel_counters: Callable[[Collection[int] | None], KernelCounters]
    """The counters of the network namespaces with these inode numbers; None: of all."""
    clock_ns: Callable[[], int] = time.monotonic_ns
    stop: bool = False
    reading: bool = field(default=False, init=False)
    abandoned: bool = False
    rescuing: Rescuing | None = None
    name: Names | None = None
    """None: no names are to be had."""
    describe: Callable[[Iterable[ListenerFacts]], tuple[ListenerSeen, ...]] | None = None
    """Says whose the listeners are, of those that have changed; None: they are of no interest."""
    kernel_log: Log | None = None
    """None where it may not be read."""
    find_gone: Callable[[Collection[int]], Collection[int]] | None = None
    """Says to which of these network namespaces nothing leads any more; None: it is not asked."""
    find_living: Callable[[Collection[int]], Mapping[int, int]] | None = None
    """The cookies of these network namespaces, as far as they are known, by inode number; None: it
    is not asked whose the numbers are by now."""
    notes: tuple[str, ...] = ()
    """Sentences that were known at the start, for the summary."""
    clock_note: Callable[[], str] | None = None
    """Says at the end what has become of the clock that the run prints its times by."""
    failure: Exception | None = field(default=None, init=False)
    """What ended the run before its time."""
    _noted_at_end: list[str] = field(default_factory=list, init=False)
    _output_failed: bool = field(default=False, init=False)
    _soonest_choice_ns: int = field(default=0, init=False)
    _regular_choice_ns: int = field(default=0, init=False)
    _next_look_ns: int = field(default=0, init=False)
    """When namespaces may be looked for again."""
    _numbers: NetnsNumbers = field(default_factory=NetnsNumbers, init=False)
    _next_tally_ns: int = field(default=0, init=False)
    _untold: deque[Finding | Attempt] = field(default_factory=deque, init=False)
    """In the order in which it is to be told."""

    @property
    def _interval_ns(self) -> int:
        return min(SECOND_NS, self.analysis.header.settings.timeout_ns // 3)

    def run(self, duration_ns: int | None, ready_file: str | None) -> Summary:
        """Trace until `duration_ns` (None: for ever) has passed or `stop` is set.

        Raises what keeps it from beginning, and OSError where the output fails; what else ends it
        is `failure` and a note in the summary.
        """
        begun = self._tally()
        if ready_file is not None:
            write_ready_file(ready_file)
        try:
            self._trace(begun, duration_ns)
        except Exception as error:  # whatever it is, what was found is still to be told
            if self._output_failed:
                raise
            self.failure = error
        return self._finish()

    def _trace(self, begun: int, duration_ns: int | None) -> None:
        end_ns = None if duration_ns is None else begun + duration_ns
        self._soonest_choice_ns = self._regular_choice_ns = next_sweep_ns = begun
        while not self.stop:
            now_ns = self.clock_ns()
            if end_ns is not None and now_ns >= end_ns:
                break
            until_ns = min(next_sweep_ns, end_ns or next_sweep_ns, now_ns + LONGEST_POLL_NS)
            self._watch(until_ns)
            if self.clock_ns() >= next_sweep_ns:
                cost_ns = self._sweep()
                done_ns = self.clock_ns()
                next_sweep_ns = done_ns + max(self._interval_ns, SWEEP_SHARE * cost_ns)
                status = self.analysis.status(self.source.counts(), done_ns)
                self._put_out(self.output.status, status)

    def _put_out(self, put: Callable[[Told], None], told: Told) -> None:
        try:
            put(told)
        except BaseException:
            self._output_failed = True
            raise

    def _watch(self, until_ns: int) -> None:
        """Take in what events tell, and where clients are to be mended, do so in time."""
        if self.rescuing is not None:
            until_ns = min(until_ns, self._next_choice_ns(), self.rescuing.due_ns or until_ns)
        self._read_log()
        self._name(())
        self._observe_events(0 if self._untold else max(0, until_ns - self.clock_ns()))
        if self.rescuing is not None and self.clock_ns() >= self._next_choice_ns():
            self._look_at_chosen()
        self._tell()

    def _next_choice_ns(self) -> int:
        """Where clients are to be mended, a verdict is not to wait for a whole sweep."""
        deadline_ns = self.analysis.correlator.next_deadline_ns
        if deadline_ns is None:
            return self._regular_choice_ns
        return min(self._regular_choice_ns, max(deadline_ns, self._soonest_choice_ns))

    def _look_at_chosen(self) -> None:
        begun_ns = self.clock_ns()
        self._take_in(self.source.chosen())
        done_ns = self.clock_ns()
        self._soonest_choice_ns = done_ns + SWEEP_SHARE * (done_ns - begun_ns)
        self._regular_choice_ns = max(done_ns + self._interval_ns, self._soonest_choice_ns)
        self._judge()
        self._rescue((), self.analysis.reports)

    def _step(self, step: Step) -> None:
        findings = self.analysis.take(step)
        if self.recorder is not None:
            self.recorder.write(step)
        self._untold += findings

    def _tell(self) -> None:
        """Tell what there is to tell; where clients are to be mended, little at a time.

        To put a verdict into words takes longer than to send a packet, and a client that gets in
        tells at once whether the next one may follow.
        """
        if self.rescuing is None:
            self._tell_first(len(self._untold))
        else:
            self._tell_first(max(TOLD_AT_ONCE, len(self._untold) - MAX_UNTOLD))

    def _tell_first(self, most: int) -> None:
        some = [self._untold.popleft() for _ in range(min(most, len(self._untold)))]
        for kind, alike in itertools.groupby(some, type):
            if kind is Attempt:
                attempts = [one for one in alike if isinstance(one, Attempt)]
                self._put_out(self.output.attempts, attempts)
            else:
                findings = [one for one in alike if isinstance(one, Finding)]
                self._put_out(self.output.findings, findings)

    def _poll(self, timeout_ns: int) -> tuple[Event, ...]:
        """Raises KeyboardInterrupt where a second signal came meanwhile."""
        self.reading = True
        try:
            return tuple(self.source.poll(timeout_ns))
        finally:
            self.reading = False
            if self.abandoned:
                raise KeyboardInterrupt

    def _observe_events(self, timeout_ns: int) -> None:
        events = self._poll(timeout_ns)
        # Who got in makes room for the next at once; to judge what came takes longer.
        self._rescue(events, ())
        self._observe(events)

    def _observe(self, events: tuple[Event, ...]) -> None:
        if events:
            self._name(Row(event.four_tuple, event.handshake) for event in events)
            self._step(Observed(events))
            self._judge()
            self._rescue((), self.analysis.reports)

    def _observe_waiting(self) -> None:
        """Take in the events that wait at the end, not all those that go on coming.

        But for repeated SYNs, which a flood may have filled the buffer with: all that such an event
        tells is in the table's entry, which is read right after.
        """
        left = self.source.most_waiting
        while left > 0 and (events := self._poll(0)):
            left -= len(events)
            self._observe(tuple(e for e in events if e.kind is not EventKind.SYN_REPEATED))

    def _read_log(self) -> None:
        warnings = () if self.kernel_log is None else self.kernel_log.warnings(self.clock_ns())
        if warnings:
            self._step(Logged(warnings))

    def _name(self, rows: Iterable[Row]) -> None:
        """Names come before what they are needed for, so that a replay has them as well."""
        names = None if self.name is None else self.name(rows)
        if names is not None:
            self._step(Named(names))

    def _take_in(self, sweep: Sweep) -> None:
        self._name(sweep.rows)
        self._step(Swept(sweep))

    def _rescue(self, events: Sequence[Event], reports: Sequence[FlowReport]) -> None:
        if self.rescuing is None or self.stop:
            return
        self.rescuing.take_in(events, reports)
        rescue = self.rescuing.act()
        if rescue is not None:
            self._step(Rescued(rescue))
            self._untold += rescue.attempts

    def _sweep(self) -> int:
        """Read, judge, tell; returns the ns that reading and correlating took."""
        cost_ns = 0
        batches = self.source.sweep()
        while True:
            begun_ns = self.clock_ns()
            batch = next(batches)
            self._take_in(batch)
            cost_ns += self.clock_ns() - begun_ns
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
        self._tell()
        return cost_ns

    def _look_for_namespaces(self) -> None:
        """Whoever is stuck in one that has been removed is stuck for nobody here.

        Where tables fill, those that are gone make room for others.
        """
        begun_ns = self.clock_ns()
        if self.find_gone is None or begun_ns < self._next_look_ns:
            return
        stuck, crowd = self.analysis.correlator.netns_of_stuck, self.source.netns_in_full_tables()
        if not stuck and not crowd:
            return
        wanted = {*stuck, *crowd}
        found = self.find_gone(wanted)
        gone = stuck.intersection(found)
        living = self._living(wanted.difference(found), begun_ns)
        if crowd:
            self.source.free(found, living)
        reused = self._numbers.take_reused(stuck - gone)
        done_ns = self.clock_ns()
        self._next_look_ns = done_ns + max(LOOK_INTERVAL_NS, SWEEP_SHARE * (done_ns - begun_ns))
        steps = [Vanished(done_ns, (netns,), until_ns) for netns, until_ns in reused.items()]
        if gone:
            steps.append(Vanished(done_ns, tuple(sorted(gone))))
        for step in steps:
            self._step(step)
        if steps:
            self._judge()
            self._rescue((), self.analysis.reports)

    def _living(self, wanted: Collection[int], now_ns: int) -> Mapping[int, int]:
        """The cookies of the network namespaces with these numbers, as far as they are known."""
        if self.find_living is None or not wanted:
            return NOT_KNOWN
        living = self.find_living(wanted)
        self._numbers.note(living, now_ns)
        return living

    def _judge(self) -> None:
        """What is told from silence is told beside the kernel's own count of the ACKs that came."""
        now_ns = self.clock_ns()
        if now_ns >= self._next_tally_ns:
            silent = self.analysis.correlator.netns_of_silent(now_ns)
            if silent:
                self._tally(silent)
                done_ns = self.clock_ns()
                self._next_tally_ns = done_ns + SWEEP_SHARE * (done_ns - now_ns)
        self._step(Advanced(now_ns))

    def _tally(self, wanted: Collection[int] | None = None) -> int:
        begun_ns = self.clock_ns()
        before = self.read_kernel_counters(wanted)
        living = living_of(before)
        self._numbers.note(living, begun_ns)
        traced = self.source.counts(living)
        now_ns = self.clock_ns()
        after = self.read_kernel_counters(wanted)
        self._step(TallyTaken(Tally(now_ns, before, traced, after)))
        return now_ns

    def _await_rules(self) -> None:
        """Give the rules that a verdict still waits for a moment to be read."""
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
        """What fails inside is a note of the summary, unless it is the output."""
        try:
            yield
        except Exception as error:  # the answer is there; whatever this is, it adds to it only
            if self._output_failed:
                raise
            self._noted_at_end.append(f"{what}: {words_of(error)}")

    def _finish(self) -> Summary:
        with self._noted("events that waited at the end were not read"):
            self._observe_waiting()
        self._next_look_ns = 0
        with self._noted("the table was not read to its end once more"):
            self._sweep()
        with self._noted("rules that were to be read at the end were not"):
            self._await_rules()
        with self._noted("the counters were not compared at the end"):
            self._tally()
        overruns = 0 if self.kernel_log is None else self.kernel_log.overruns
        losses: dict[str, int] = {"kernel_log_overruns": overruns}
        with self._noted("the losses that the programs counted are not known"):
            losses = {**self.source.losses(), **losses}
        with self._noted("what became of the clock is not known"):
            clock_note = "" if self.clock_note is None else self.clock_note()
            self._noted_at_end += filter(None, [clock_note])
        ended = Ended(self.clock_ns(), losses, self._notes)
        self._step(ended)
        # The line that says so may be the first that found no room.
        ended = ended._replace(notes=self._notes)
        self._tell_first(len(self._untold))
        summary = self.analysis.summary(ended)
        self._put_out(self.output.summary, summary)
        return summary


def remove_ready_file(path: str | None) -> None:
    """It stands for a run that traces: that of one that has ended must not be taken for another's.

    A named pipe stays, for somebody waits at its other end. Raises OSError where it cannot be
    removed.
    """
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        if path is not None and stat.S_ISREG(Path(path).lstat().st_mode):
            Path(path).unlink()


def write_ready_file(path: str) -> None:
    """Say that every probe is attached: a file with our process number appears, whole.

    A named pipe is written to; see `files` for what else may be there.

    Raises UsageError where it cannot be written.
    """
    try:
        write_whole(path, f"{os.getpid()}\n".encode("ascii"))
    except OSError as error:
        raise UsageError(
            f"cannot write the ready file {path}",
            str(error.strerror),
            "name a file in a directory that you may write to, or a named pipe",
        ) from error


def run_replay(replay: Replay, output: Output, analysis: Analysis | None = None) -> Summary:
    """Play a recording; gives what the live run gave, as far as it goes.

    `analysis`: a fresh one of its header, where somebody else looks at it too.

    Raises RecordingError where it is damaged.
    """
    analysis = Analysis(replay.header) if analysis is None else analysis
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
                    "it holds no reading of the counters, with which a run begins",
                    "record again",
                )
            summary = analysis.summary(step)
            output.summary(summary)
            return summary
    raise AssertionError("the last of the steps is an end")
