"""Writes findings: a table for people, or JSON Lines for programs."""

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
    """Selects the findings that the user asked to see; the summary counts all findings."""

    def __init__(self, only: Collection[str], nothing: bool) -> None:
        self._only = frozenset(only)
        self.nothing = nothing

    @property
    def chooses(self) -> bool:
        """Whether only some verdicts are to be shown."""
        return bool(self._only)

    def of(self, findings: list[Finding]) -> list[Finding]:
        """The findings to show, in order."""
        if self.nothing:
            return []
        return [f for f in findings if not self._only or self._is_asked_for(f)]

    def _is_asked_for(self, finding: Finding) -> bool:
        """Whether to show a finding. One of a SYN flood is shown only if it corrects another."""
        is_correction = finding.updates is not None
        return finding.verdict in self._only and (is_correction or not finding.flood_suspected)


class TableOutput:
    """The table, with a status line that is rewritten in place on a terminal."""

    def __init__(self, stream: TextIO, renderer: TableRenderer, selection: Selection) -> None:
        self._stream = stream
        self._renderer = renderer
        self._selection = selection
        self._terminal = terminal.understands_escapes(stream)
        self._status_shown = False
        self._lines = 0
        """Number of lines printed."""

    def _clear(self) -> None:
        if self._status_shown:
            self._stream.write(CLEAR_LINE)
            self._status_shown = False

    def findings(self, findings: list[Finding]) -> None:
        """Print rows below those already printed."""
        self._renderer.note(findings)
        self._put(list(self._renderer.findings(self._selection.of(findings))))

    def _put(self, lines: Sequence[str]) -> None:
        if not lines:
            return
        self._clear()
        self._lines += len(lines)
        for line in lines:
            self._stream.write(terminal.line(line))
        self._stream.flush()

    def attempts(self, attempts: Sequence[Attempt]) -> None:
        """Print attempts to rescue, unless only the summary is wanted."""
        lines = list(self._renderer.attempts(attempts))
        if not self._selection.nothing:
            self._put(lines)

    def status(self, status: Status) -> None:
        """Print the rows of the groups that are due, and a status line.

        The next output replaces the status line. Without a terminal there is none.
        """
        self._put(list(self._renderer.due(status.now_ns)))
        if self._terminal:
            self._stream.write(CLEAR_LINE + printable(self._renderer.status(status)))
            self._stream.flush()
            self._status_shown = True

    def close(self) -> None:
        """Print the last rows and clear the status line, so that later output begins a line."""
        self._put(list(self._renderer.rest()))
        self._clear()
        self._stream.flush()

    def summary(self, summary: Summary) -> None:
        """Print the summary."""
        nothing = self._selection.nothing
        self._put(list(self._renderer.summary(summary, above=self._lines, advise=nothing)))


class JsonOutput:
    """JSON Lines, flushed at once, and nothing else."""

    def __init__(self, stream: TextIO, clock: WallClock, selection: Selection) -> None:
        self._stream = stream
        self._clock = clock
        self._selection = selection

    def findings(self, findings: list[Finding]) -> None:
        """Print a line for each finding."""
        for finding in self._selection.of(findings):
            self._stream.write(verdict_line(finding, self._clock) + "\n")
        self._stream.flush()

    def attempts(self, attempts: Sequence[Attempt]) -> None:
        """Print a line for each attempt."""
        if not self._selection.nothing:
            for attempt in attempts:
                self._stream.write(attempt_line(attempt, self._clock) + "\n")
            self._stream.flush()

    def close(self) -> None:
        """Do nothing; every line is flushed already."""

    def status(self, status: Status) -> None:
        """Print nothing; JSON has no status line."""

    def summary(self, summary: Summary) -> None:
        """Print the listeners, then the summary as the last line."""
        for listener in summary.listeners:
            self._stream.write(listener_line(listener) + "\n")
        self._stream.write(summary_line(summary, self._clock) + "\n")
        self._stream.flush()
