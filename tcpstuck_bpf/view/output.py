"""An Output that shows the run in the live view, and prints the summary when the view is gone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tcpstuck_bpf.app.interfaces import Output
from tcpstuck_bpf.console import Held, release, remark
from tcpstuck_bpf.errors import words_of
from tcpstuck_bpf.judge.verdict import Finding
from tcpstuck_bpf.model import SECOND_NS, Attempt
from tcpstuck_bpf.summary import Status, Summary
from tcpstuck_bpf.view.screen import Screen
from tcpstuck_bpf.view.snapshot import Book

INTERVAL_NS = SECOND_NS * 3 // 4
"""Least time between two snapshots; a run calls `status` about once a second."""
COST_SHARE = 20
"""Snapshots take at most one part in COST_SHARE of the run's time."""


class LiveView:
    """Shows the run on the screen until `summary` or `close`.

    The screen is taken over at the first status, when the run has begun. `afterwards` makes the
    output that prints the summary, once the terminal is free again and has its last size. `held`
    has the lines for standard error. `clock_ns` is CLOCK_MONOTONIC.
    """

    def __init__(
        self,
        screen: Screen,
        book: Book,
        so_far: Callable[[int], Summary],
        afterwards: Callable[[], Output],
        held: Held,
        clock_ns: Callable[[], int],
    ) -> None:
        self._screen = screen
        self._book = book
        self._so_far = so_far
        self._afterwards = afterwards
        self._held = held
        self._clock_ns = clock_ns
        self._started = False
        self._next_ns = 0

    def findings(self, findings: list[Finding]) -> None:
        """Take findings; the next snapshot has them."""
        self._book.take(findings)

    def attempts(self, attempts: Sequence[Attempt]) -> None:
        """Do nothing: the summary of each snapshot has the totals."""

    def status(self, status: Status) -> None:
        """Show a new snapshot if one is due."""
        if not self._started:
            self._started = True
            self._screen.start()
        if status.running_ns < self._next_ns:
            return
        begun_ns = self._clock_ns()
        summary = self._so_far(status.now_ns)
        self._screen.show(self._book.snapshot(summary, status.now_ns, self._held.lines))
        cost_ns = self._clock_ns() - begun_ns
        self._next_ns = status.running_ns + max(INTERVAL_NS, COST_SHARE * cost_ns)

    def summary(self, summary: Summary) -> None:
        """Give the terminal back, and print the summary."""
        self.close()
        _print(summary, self._book, self._afterwards())

    def close(self) -> None:
        """Give the terminal back, and write what waited for standard error."""
        _leave(self._screen)


class ReplayView:
    """Shows the end of a recording on the screen until the user quits, then prints the summary.

    `afterwards` and `held` are those of `LiveView`. `wait` returns when the user has quit. `now_ns`
    gives the recording's last time.
    """

    def __init__(
        self,
        screen: Screen,
        book: Book,
        now_ns: Callable[[Summary], int],
        afterwards: Callable[[], Output],
        held: Held,
        wait: Callable[[], object],
    ) -> None:
        self._screen = screen
        self._book = book
        self._now_ns = now_ns
        self._afterwards = afterwards
        self._held = held
        self._wait = wait

    def findings(self, findings: list[Finding]) -> None:
        """Take findings; the view has them."""
        self._book.take(findings)

    def attempts(self, attempts: Sequence[Attempt]) -> None:
        """Do nothing: the summary has the totals."""

    def status(self, status: Status) -> None:
        """Do nothing: a replay has no status."""

    def summary(self, summary: Summary) -> None:
        """Show the end of the recording until the user quits, and print the summary."""
        now_ns = self._now_ns(summary)
        self._screen.show(self._book.snapshot(summary, now_ns, self._held.lines, ended=True))
        self._screen.start()
        self._wait()
        self.close()
        _print(summary, self._book, self._afterwards())

    def close(self) -> None:
        """Give the terminal back, and write what waited for standard error."""
        _leave(self._screen)


def _print(summary: Summary, book: Book, output: Output) -> None:
    """Print the summary. The output needs a finding of each cause, for what to do about it."""
    output.findings(book.examples())
    output.summary(summary)


def _leave(screen: Screen) -> None:
    """Give the terminal back. A failure of the view is a remark, and never costs the summary."""
    try:
        screen.close()
    except TimeoutError as error:
        remark(f"the live view did not end: {words_of(error)}")
    if screen.failure is not None:
        remark(f"the live view failed: {words_of(screen.failure)}")
        screen.failure = None
    release()
