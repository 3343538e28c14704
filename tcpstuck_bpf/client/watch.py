"""A run on the client's side: when it polls, looks for owners, mends and prints, and how it ends.

`client.analysis` turns the steps into verdicts, both live and in a replay.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Protocol

from tcpstuck_bpf.app.ready_file import write_ready_file
from tcpstuck_bpf.client.actions import Attempt, Candidate, Totals
from tcpstuck_bpf.client.analysis import ClientAnalysis
from tcpstuck_bpf.client.facts import ClientSocket, Owners, Poll
from tcpstuck_bpf.client.output import ClientOutput
from tcpstuck_bpf.client.recording import ClientRecorder
from tcpstuck_bpf.client.steady import SteadyPolls
from tcpstuck_bpf.client.steps import Attempted, ClientStep, Owned, Polled, WatchEnded
from tcpstuck_bpf.client.summary import ClientSummary
from tcpstuck_bpf.client.waits import Change
from tcpstuck_bpf.errors import words_of
from tcpstuck_bpf.model import SECOND_NS

PAUSE_NS = SECOND_NS // 2
"""Shortest time from the end of one poll to the next."""
SHARE = 20
"""A pause is at least this many times the CPU time of the poll before it, so that polls never cost
more than 5 % of a CPU, however many sockets there are. The search for owners and the printing of
verdicts do not count: they come once, and must not delay the next poll so much."""
SHARE_OF_OWNERS = 5
"""A pause is also at least this many times the CPU time of the search for owners before it."""
LONGEST_NAP_NS = SECOND_NS // 10
"""A signal handler only sets `stop`, and time.sleep goes on after it (PEP 475)."""


class Sockets(Protocol):
    """The machine's sockets; `client.sockets.SocketReader` reads the real ones."""

    ended: bool
    beyond: int

    def read(self, keep: Callable[[ClientSocket], bool]) -> Poll:
        """Read all sockets once; the poll has the facts of those that `keep` chooses."""


class Mending(Protocol):
    """What --rescue does; `client.mender.Mender` is the real one."""

    def renew(self, candidates: Iterable[Candidate], now_ns: int) -> None:
        """Take the reported connections that wait, as a poll found them."""

    def act(self) -> list[Attempt]:
        """Do what is due. Returns what was done and answered."""

    def finish(self) -> list[Attempt]:
        """Begin nothing more, and wait for the last answers."""

    def totals(self, now_ns: int) -> Totals:
        """What was done, and what is left alone."""


class Watch:
    """A run. A signal handler sets `stop`, and the run ends with the summary.

    An error after the first poll ends the run early; the summary is printed, with a note.
    """

    def __init__(
        self,
        sockets: Sockets,
        analysis: ClientAnalysis,
        output: ClientOutput,
        owners_of: Callable[[Collection[int]], Mapping[int, Owners]],
        *,
        recorder: ClientRecorder | None = None,
        clock_ns: Callable[[], int] = time.monotonic_ns,
        cpu_ns: Callable[[], int] = time.process_time_ns,
        sleep: Callable[[float], None] = time.sleep,
        clock_note: Callable[[], str] = lambda: "",
        mending: Mending | None = None,
    ) -> None:
        self.stop = False
        self.abandoned = False
        self.failure: Exception | None = None
        """The error that ended the run early."""
        self.recorder = recorder
        self._sockets = sockets
        self._analysis = analysis
        self._output = output
        self._owners_of = owners_of
        self._clock_ns = clock_ns
        self._cpu_ns = cpu_ns
        self._sleep = sleep
        self._clock_note = clock_note
        self._mending = mending
        self._steady = SteadyPolls()
        self._longest_poll_ns = self._longest_pause_ns = 0
        self._printing = False

    @property
    def reading(self) -> bool:
        """Whether a second signal must wait: never, for no foreign code is called."""
        return False

    def run(self, duration_ns: int | None, ready_file: str | None) -> ClientSummary:
        """Poll until `duration_ns` (None: without limit) has passed or `stop` is set.

        Raises what the first poll raises, UsageError if the ready file cannot be written, and
        OSError if the output fails.
        """
        begun_ns = self._clock_ns()
        end_ns = None if duration_ns is None else begun_ns + duration_ns
        due_ns = self._poll(begun_ns)
        if ready_file is not None:
            write_ready_file(ready_file)
        try:
            while not self._is_over(end_ns):
                due_ns = self._await(due_ns, end_ns)
        except Exception as error:  # after any error, the findings must still be printed
            if self._printing:
                raise
            self.failure = error
        return self._finish()

    def _is_over(self, end_ns: int | None) -> bool:
        ended = self.stop or self._sockets.ended
        return ended or (end_ns is not None and self._clock_ns() >= end_ns)

    def _await(self, due_ns: int, end_ns: int | None) -> int:
        """Sleep a little, or poll if that is due. Returns when the next poll is due."""
        now_ns = self._clock_ns()
        if now_ns >= due_ns:
            return self._poll(now_ns)
        self._mend()
        now_ns = self._clock_ns()
        until_ns = due_ns if end_ns is None else min(due_ns, end_ns)
        if until_ns > now_ns:
            self._sleep(min(until_ns - now_ns, LONGEST_NAP_NS) / SECOND_NS)
        return due_ns

    def _step(self, step: ClientStep) -> list[Change]:
        """Record a step, and judge it."""
        if self.recorder is not None:
            self.recorder.write(step)
        return self._analysis.take(step)

    def _poll(self, begun_ns: int) -> int:
        """Poll, judge and print. Returns when the next poll is due."""
        cpu_ns = [self._cpu_ns()]
        poll = self._steady.take(self._sockets.read(self._analysis.waits.wants))
        changes = self._step(Polled(poll, self._sockets.beyond))
        cpu_ns.append(self._cpu_ns())
        unowned = self._analysis.unowned
        if unowned:
            changes = self._step(Owned(self._owners_of(unowned)))
        cpu_ns.append(self._cpu_ns())
        done_ns = self._clock_ns()
        self._printing = True
        self._output.changes(changes, self._analysis.printed_ns)
        self._output.status(self._analysis.status(done_ns))
        self._printing = False
        cpu_ns.append(self._cpu_ns())
        if self._mending is not None:
            self._mending.renew(self._analysis.waits.candidates(), poll.time_ns)
        cpu_ns.append(self._cpu_ns())
        self._longest_poll_ns = max(self._longest_poll_ns, done_ns - begun_ns)
        polling_ns, searching_ns, _, renewing_ns = (
            after - before for before, after in zip(cpu_ns, cpu_ns[1:])
        )
        polling_ns += renewing_ns
        pause_ns = max(PAUSE_NS, SHARE * polling_ns, SHARE_OF_OWNERS * searching_ns)
        self._longest_pause_ns = max(self._longest_pause_ns, pause_ns)
        return done_ns + pause_ns

    def _mend(self) -> None:
        """Do to the connections that wait what is due."""
        if self._mending is not None:
            self._take(self._mending.act())

    def _take(self, attempts: list[Attempt]) -> None:
        """Judge and print what came of actions."""
        if not attempts:
            return
        step = Attempted(self._clock_ns(), tuple(attempts))
        changes = self._step(step)
        self._printing = True
        self._output.attempts(step.attempts)
        self._output.changes(changes, self._analysis.printed_ns)
        self._printing = False

    def _finish(self) -> ClientSummary:
        if self._mending is not None:
            self._take(self._mending.finish())
        if self.failure is None and not self._sockets.ended:
            try:
                self._poll(self._clock_ns())
                if self._analysis.waits.misses_any:
                    # Either the last poll missed them, or they have ended; see ABSENT_POLLS.
                    self._poll(self._clock_ns())
            except Exception as error:  # what was found before must be summed up
                if self._printing:
                    raise
                self.failure = error
        now_ns = self._clock_ns()
        changed = self._clock_note()
        ended = WatchEnded(
            now_ns,
            self._notes(changed),
            self._longest_poll_ns,
            self._longest_pause_ns,
            None if self._mending is None else self._mending.totals(now_ns),
        )
        late = self._step(ended)
        # Writing this step may have filled the recording's disk, which adds a note.
        summary = self._analysis.summary(ended._replace(notes=self._notes(changed)))
        self._output.changes(late, self._analysis.printed_ns)
        self._output.summary(summary, now_ns)
        return summary

    def _notes(self, clock_changed: str) -> tuple[str, ...]:
        early = "" if self.failure is None else f"the run ended early: {words_of(self.failure)}"
        process = "the process of --pid has ended" if self._sockets.ended else ""
        failure = None if self.recorder is None else self.recorder.failure
        recording = f"the recording is incomplete: {failure}" if failure else ""
        return tuple(filter(None, (early, process, clock_changed, recording)))
