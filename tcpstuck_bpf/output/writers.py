"""Where findings go: a table for people, or JSON Lines for programs."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TextIO

from tcpstuck_bpf import terminal
from tcpstuck_bpf.judge.verdict import Finding
from tcpstuck_bpf.model import Attempt
from tcpstuck_bpf.output.export import attempt_line, listener_line, summary_line, verdict_line
from tcpstuck_bpf.output.render import TableRenderer
from tcpstuck_bpf.steps import WallClock
from tcpstuck_bpf.summary import Status, Summary
from tcpstuck_bpf.terminal import CLEAR_LINE, printable


class Selection:
    """Which findings the user asked to see; the summary counts all of them."""

    def __init__(self, only: Collection[str], nothing: bool) -> None:
        self._only = frozenset(only)
        self.nothing = nothing

    def of(self, findings: list[Finding]) -> list[Finding]:
        """The findings to be shown, in their order."""
        if self.nothing:
            return []
        return [f for f in findings if not self._only or self._is_asked_for(f)]

    def _is_asked_for(self, finding: Finding) -> bool:
        """A SYN flood's is not, but where it corrects what was shown."""
        told_before = finding.updates is not None
        return finding.verdict in self._only and (told_before or not finding.flood_suspected)


class TableOutput:
    """The table, with a status line rewritten in place where the stream is a terminal."""

    def __init__(self, stream: TextIO, renderer: TableRenderer, selection: Selection) -> None:
        self._stream = stream
        self._renderer = renderer
        self._selection = selection
        self._terminal = stream.isatty()
        self._status_shown = False

    def _clear(self) -> None:
        if self._status_shown:
            self._stream.write(CLEAR_LINE)
            self._status_shown = False

    def findings(self, findings: list[Finding]) -> None:
        """Rows, below those already shown."""
        self._put(list(self._renderer.findings(self._selection.of(findings))))

    def _put(self, lines: Sequence[str]) -> None:
        if not lines:
            return
        self._clear()
        for line in lines:
            self._stream.write(terminal.line(line))
        self._stream.flush()

    def attempts(self, attempts: Sequence[Attempt]) -> None:
        """What was done for stuck clients, where that is asked for."""
        lines = list(self._renderer.attempts(attempts))
        if not self._selection.nothing:
            self._put(lines)

    def status(self, status: Status) -> None:
        """Rows of the groups that are due, and one line that the next output replaces.

        Where the stream is no terminal there is no such line.
        """
        self._put(list(self._renderer.due(status.now_ns)))
        if self._terminal:
            self._stream.write(CLEAR_LINE + printable(self._renderer.status(status)))
            self._stream.flush()
            self._status_shown = True

    def close(self) -> None:
        """Nothing more will come: what is said next does not stand behind a status line."""
        self._put(list(self._renderer.rest()))
        self._clear()
        self._stream.flush()

    def summary(self, summary: Summary) -> None:
        """The end."""
        self._clear()
        for line in self._renderer.summary(summary):
            self._stream.write(terminal.line(line))
        self._stream.flush()


class JsonOutput:
    """JSON Lines, each flushed, nothing else."""

    def __init__(self, stream: TextIO, clock: WallClock, selection: Selection) -> None:
        self._stream = stream
        self._clock = clock
        self._selection = selection

    def findings(self, findings: list[Finding]) -> None:
        """One line each."""
        for finding in self._selection.of(findings):
            self._stream.write(verdict_line(finding, self._clock) + "\n")
        self._stream.flush()

    def attempts(self, attempts: Sequence[Attempt]) -> None:
        """One line each."""
        if not self._selection.nothing:
            for attempt in attempts:
                self._stream.write(attempt_line(attempt, self._clock) + "\n")
            self._stream.flush()

    def close(self) -> None:
        """Nothing is left to be done."""

    def status(self, status: Status) -> None:
        """Nothing: a program waits for lines, not for reassurance."""

    def summary(self, summary: Summary) -> None:
        """The listeners, then the last line."""
        for listener in summary.listeners:
            self._stream.write(listener_line(listener) + "\n")
        self._stream.write(summary_line(summary, self._clock) + "\n")
        self._stream.flush()
