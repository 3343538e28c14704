"""A periodic log line with the figures of the status line, to show that the run goes on.

There is no status line if standard output is not a terminal. A run without findings would look as
if it hung.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from tcpstuck_bpf.judge.evidence import duration_text
from tcpstuck_bpf.judge.verdict import Finding
from tcpstuck_bpf.model import Attempt
from tcpstuck_bpf.summary import Status, Summary

if TYPE_CHECKING:
    from tcpstuck_bpf.app.interfaces import Output


class Heartbeat:
    """Wraps an output and prints a status line at most once per interval.

    `running_ns` of the status is the clock. `words` formats a status, and `say` prints the line.
    """

    def __init__(
        self,
        output: Output,
        interval_ns: int,
        words: Callable[[Status], str],
        say: Callable[[str], None],
    ) -> None:
        self._output = output
        self._interval_ns = interval_ns
        self._words = words
        self._say = say
        self._due_ns = interval_ns
        self._how_to_silence = f" (every {duration_text(interval_ns)}; --heartbeat off silences it)"

    def status(self, status: Status) -> None:
        """Pass the status on; print a line if the interval has passed."""
        self._output.status(status)
        if status.running_ns >= self._due_ns:
            self._due_ns = status.running_ns + self._interval_ns
            self._say(self._words(status) + self._how_to_silence)
            self._how_to_silence = ""

    def findings(self, findings: list[Finding]) -> None:
        """Pass the findings on."""
        self._output.findings(findings)

    def attempts(self, attempts: Sequence[Attempt]) -> None:
        """Pass the attempts on."""
        self._output.attempts(attempts)

    def summary(self, summary: Summary) -> None:
        """Pass the summary on."""
        self._output.summary(summary)

    def close(self) -> None:
        """Close the wrapped output."""
        self._output.close()
