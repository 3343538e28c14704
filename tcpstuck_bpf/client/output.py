"""Writes what the client's side finds: a table for people, or JSON Lines for programs."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple, Protocol, TextIO

from tcpstuck_bpf import terminal
from tcpstuck_bpf.client.actions import Attempt
from tcpstuck_bpf.client.export import attempt_line, summary_line, verdict_line
from tcpstuck_bpf.client.rows import Rows
from tcpstuck_bpf.client.summary import ClientSummary, Status, summary_lines
from tcpstuck_bpf.client.waits import Change
from tcpstuck_bpf.judge.evidence import duration_text
from tcpstuck_bpf.output.page import Page, grouped
from tcpstuck_bpf.steps import WallClock
from tcpstuck_bpf.terminal import CLEAR_LINE, printable


class Selection(NamedTuple):
    """Which verdicts to show; the summary counts all."""

    only: frozenset[str]
    """Empty: all."""
    nothing: bool
    """Show only the summary."""

    def of(self, changes: Iterable[Change]) -> list[Change]:
        """The verdicts to show, in order."""
        if self.nothing:
            return []
        return [one for one in changes if not self.only or one.verdict in self.only]


def selection(only: Collection[str], nothing: bool) -> Selection:
    """The selection for --only and --summary."""
    return Selection(frozenset(only), nothing)


class ClientOutput(Protocol):
    """A form of output. Methods raise OSError."""

    def changes(self, changes: Sequence[Change], now_ns: int) -> None:
        """Print the verdicts of one poll."""

    def attempts(self, attempts: Sequence[Attempt]) -> None:
        """Print what was done to connections."""

    def status(self, status: Status) -> None:
        """Show that the run goes on."""

    def summary(self, summary: ClientSummary, now_ns: int) -> None:
        """Print the summary."""

    def close(self) -> None:
        """Clear the status line."""


class TableOutput:
    """The table, with a status line that is rewritten in place on a terminal."""

    def __init__(self, stream: TextIO, page: Page, rows: Rows, chosen: Selection) -> None:
        self._stream = stream
        self._page = page
        self._rows = rows
        self._chosen = chosen
        self._terminal = terminal.understands_escapes(stream)
        self._status_shown = False

    def changes(self, changes: Sequence[Change], now_ns: int) -> None:
        """Print rows below those already printed."""
        lines = [*self._rows.changes(self._chosen.of(changes), now_ns)]
        if lines:
            self._put(lines)

    def attempts(self, attempts: Sequence[Attempt]) -> None:
        """Print lines for what has no row."""
        lines = [] if self._chosen.nothing else [*self._rows.attempts(attempts)]
        if lines:
            self._put(lines)

    def status(self, status: Status) -> None:
        """Rewrite the status line; without a terminal there is none."""
        if self._terminal:
            text = printable(status_text(status, self._page.width - 1))
            self._stream.write(f"{CLEAR_LINE}{text}")
            self._stream.flush()
            self._status_shown = True

    def summary(self, summary: ClientSummary, now_ns: int) -> None:
        """Print the last rows and the summary."""
        self._put([*summary_lines(summary, self._page, self._rows, now_ns)])

    def close(self) -> None:
        """Clear the status line, so that later output begins a line."""
        self._put([])

    def _put(self, lines: Sequence[str]) -> None:
        if self._status_shown:
            self._stream.write(CLEAR_LINE)
            self._status_shown = False
        for line in lines:
            self._stream.write(terminal.line(line))
        self._stream.flush()


class JsonOutput:
    """JSON Lines, flushed at once, and nothing else."""

    def __init__(self, stream: TextIO, clock: WallClock, chosen: Selection) -> None:
        self._stream = stream
        self._clock = clock
        self._chosen = chosen

    def changes(self, changes: Sequence[Change], _now_ns: int) -> None:
        """Print a line for each verdict."""
        for change in self._chosen.of(changes):
            self._put(verdict_line(change, self._clock))
        self._stream.flush()

    def attempts(self, attempts: Sequence[Attempt]) -> None:
        """Print a line for each action."""
        for attempt in [] if self._chosen.nothing else attempts:
            self._put(attempt_line(attempt, self._clock))
        self._stream.flush()

    def status(self, status: Status) -> None:
        """Print nothing; JSON has no status line."""

    def summary(self, summary: ClientSummary, _now_ns: int) -> None:
        """Print the last line."""
        self._put(summary_line(summary, self._clock))
        self._stream.flush()

    def close(self) -> None:
        """Do nothing; every line is flushed already."""

    def _put(self, line: str) -> None:
        self._stream.write(f"{line}\n")


def status_text(status: Status, width: int) -> str:
    """The status line. If it is too long, it leaves out what is watched, then the last figures."""
    stuck = "nothing waits too long" if status.established else "no connections yet"
    if status.stuck:
        stuck = f"{grouped(status.stuck)} WAITING"
    running = duration_text(status.running_ns)
    figures = f"{grouped(status.established)} connections, {grouped(status.young)} just begun"
    lines = (
        f"{stuck}, watching {status.watched} for {running}: {figures}",
        f"{stuck} after {running}: {figures}",
        f"{stuck}, {running}",
        stuck,
    )
    return next((line for line in lines if len(line) <= width), lines[-1][:width])
