"""A line for logs from time to time: still watching, with the figures of the status line.

Where standard output is no terminal there is no status line, and a run that finds nothing would
look like one that hangs.
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
    """An output that also says, at most once in each interval, that the run goes on.

    Its clock is the run's: `running_ns` of the status. `words` puts a status into words, and `say`
    says them.
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
        """Nothing new; after an interval that is a line."""
        self._output.status(status)
        if status.running_ns >= self._due_ns:
            self._due_ns = status.running_ns + self._interval_ns
            self._say(self._words(status) + self._how_to_silence)
            self._how_to_silence = ""

    def findings(self, findings: list[Finding]) -> None:
        """Passed on."""
        self._output.findings(findings)

    def attempts(self, attempts: Sequence[Attempt]) -> None:
        """Passed on."""
        self._output.attempts(attempts)

    def summary(self, summary: Summary) -> None:
        """Passed on."""
        self._output.summary(summary)

    def close(self) -> None:
        """Passed on."""
        self._output.close()
