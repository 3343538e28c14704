"""A run on the client's side: polls the sockets, judges, finds owners, prints, and sums up."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Protocol

from tcpstuck_bpf.app.ready_file import write_ready_file
from tcpstuck_bpf.client.actions import Attempt, Candidate, Totals
from tcpstuck_bpf.client.facts import ClientSocket, Owners, Poll
from tcpstuck_bpf.client.output import ClientOutput, Status
from tcpstuck_bpf.client.summary import ClientSummary
from tcpstuck_bpf.client.waits import Change, Waits, inodes_of
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
        waits: Waits,
        output: ClientOutput,
        watched: str,
        owners_of: Callable[[Collection[int]], Mapping[int, Owners]],
        *,
        clock_ns: Callable[[], int] = time.monotonic_ns,
        cpu_ns: Callable[[], int] = time.process_time_ns,
        sleep: Callable[[float], None] = time.sleep,
        notes: Callable[[], str] = lambda: "",
        mending: Mending | None = None,
    ) -> None:
        self.stop = False
        self.abandoned = False
        self.failure: Exception | None = None
        """The error that ended the run early."""
        self._sockets = sockets
        self._waits = waits
        self._output = output
        self._watched = watched
        self._owners_of = owners_of
        self._clock_ns = clock_ns
        self._cpu_ns = cpu_ns
        self._sleep = sleep
        self._notes = notes
        self._mending = mending
        self._losses: Counter[str] = Counter()
        self._unread: Mapping[int, str] = {}
        self._polls = 0
        self._begun_ns = 0
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
        self._begun_ns = self._clock_ns()
        end_ns = None if duration_ns is None else self._begun_ns + duration_ns
        due_ns = self._poll(self._begun_ns)
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

    def _poll(self, begun_ns: int) -> int:
        """Poll, judge and print. Returns when the next poll is due."""
        cpu_ns = [self._cpu_ns()]
        poll = self._sockets.read(self._waits.wants)
        changes = self._waits.take(poll)
        cpu_ns.append(self._cpu_ns())
        changes = self._identified(changes)
        cpu_ns.append(self._cpu_ns())
        self._polls += 1
        self._unread = poll.failures
        losses = {
            "untracked": self._waits.untracked,
            "unreadable": poll.unreadable,
            "subflows": poll.subflows,
            "namespaces_beyond": self._sockets.beyond,
        }
        for name, number in losses.items():
            self._losses[name] = max(self._losses[name], number)
        done_ns = self._clock_ns()
        self._printing = True
        self._output.changes(changes, done_ns)
        self._output.status(
            Status(
                self._watched,
                self._waits.stuck,
                self._waits.young,
                self._waits.established,
                done_ns - self._begun_ns,
            )
        )
        self._printing = False
        cpu_ns.append(self._cpu_ns())
        if self._mending is not None:
            self._mending.renew(self._waits.candidates(), poll.time_ns)
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

    def _take(self, attempts: Sequence[Attempt]) -> None:
        """Judge and print what came of actions."""
        if not attempts:
            return
        now_ns = self._clock_ns()
        judged = [self._waits.attempted(one, now_ns) for one in attempts]
        self._printing = True
        self._output.attempts(attempts)
        self._output.changes([one for one in judged if one is not None], now_ns)
        self._printing = False

    def _identified(self, changes: list[Change]) -> list[Change]:
        """The verdicts with the owners of the sockets that are reported for the first time."""
        inodes = frozenset(inodes_of(changes))
        if not inodes:
            return changes
        owners = self._owners_of(inodes)
        named = [
            one._replace(owners=owners[one.socket.inode]) if one.socket.inode in owners else one
            for one in changes
        ]
        self._waits.note_owners({one.socket.key: one.owners for one in named})
        return named

    def _finish(self) -> ClientSummary:
        notes = []
        if self._mending is not None:
            self._take(self._mending.finish())
        if self.failure is None and not self._sockets.ended:
            try:
                self._poll(self._clock_ns())
                if self._waits.misses_any:
                    # Either the last poll missed them, or they have ended; see ABSENT_POLLS.
                    self._poll(self._clock_ns())
            except Exception as error:  # what was found before must be summed up
                if self._printing:
                    raise
                self.failure = error
        if self.failure is not None:
            notes.append(f"the run ended early: {words_of(self.failure)}")
        if self._sockets.ended:
            notes.append("the process of --pid has ended")
        now_ns = self._clock_ns()
        notes += filter(None, [self._notes()])
        summary = ClientSummary(
            watched=self._watched,
            duration_ns=now_ns - self._begun_ns,
            verdicts={name: number for name, number in self._waits.verdicts.items() if number},
            stuck=self._waits.stuck,
            ever_stuck=self._waits.ever_stuck,
            closed=self._waits.closed,
            young=self._waits.young,
            established=self._waits.established,
            seen_any=self._waits.seen_any,
            groups=tuple(self._waits.groups(now_ns)),
            polls=self._polls,
            longest_poll_ns=self._longest_poll_ns,
            pause_ns=self._longest_pause_ns,
            losses=dict(self._losses),
            unread=self._unread,
            notes=tuple(notes),
            slow=self._waits.slow,
            closed_slow=self._waits.closed_slow,
            mending=None if self._mending is None else self._mending.totals(now_ns),
        )
        self._output.summary(summary, now_ns)
        return summary
