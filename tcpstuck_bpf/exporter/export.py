"""`--metrics` and `--metrics-file`: what the options ask for, beside the run's own output."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from tcpstuck_bpf.analysis import Analysis
from tcpstuck_bpf.app.interfaces import Output
from tcpstuck_bpf.console import remark
from tcpstuck_bpf.ending import close_all
from tcpstuck_bpf.errors import words_of
from tcpstuck_bpf.exporter.exposition import Exposition
from tcpstuck_bpf.exporter.server import Address, MetricsServer
from tcpstuck_bpf.exporter.textfile import MetricsFile
from tcpstuck_bpf.judge.verdict import Finding
from tcpstuck_bpf.model import Attempt, NetnsCounts
from tcpstuck_bpf.output.metrics import Metrics
from tcpstuck_bpf.summary import Status, Summary


class Beside:
    """An output, and metrics beside it that are told everything first.

    Standard output may fail, and those who scrape are still there. What fails in the metrics takes
    nothing from the output: `note` is told, once, and they are kept no longer.
    """

    def __init__(self, metrics: Output, output: Output, note: Callable[[str], None]) -> None:
        self._metrics: Output | None = metrics
        self._output = output
        self._note = note

    def _tell_metrics(self, tell: Callable[[Output], None]) -> None:
        if self._metrics is None:
            return
        try:
            tell(self._metrics)
        except Exception as error:  # whatever it is, the run goes on
            self._metrics = None
            self._note(f"the metrics stay as they are: {words_of(error)}")

    def findings(self, findings: list[Finding]) -> None:
        """To both."""
        self._tell_metrics(lambda metrics: metrics.findings(findings))
        self._output.findings(findings)

    def attempts(self, attempts: Sequence[Attempt]) -> None:
        """To both."""
        self._tell_metrics(lambda metrics: metrics.attempts(attempts))
        self._output.attempts(attempts)

    def status(self, status: Status) -> None:
        """To both."""
        self._tell_metrics(lambda metrics: metrics.status(status))
        self._output.status(status)

    def summary(self, summary: Summary) -> None:
        """To both."""
        self._tell_metrics(lambda metrics: metrics.summary(summary))
        self._output.summary(summary)

    def close(self) -> None:
        """Nothing more will come. Raises OSError where the output fails."""
        self._output.close()


class Exporter:
    """Serves and writes metrics, until it is closed.

    Raises UsageError where it can listen at no such address, or write no such file, and
    CannotTraceError where the library is missing (`exposition`).
    """

    def __init__(self, address: tuple[str, int] | None, path: str | None) -> None:
        self._exposition = Exposition()
        self._file = None if path is None else MetricsFile(path, self._exposition, remark)
        self._server = (
            None if address is None else MetricsServer(Address(*address), self._exposition)
        )

    def beside_live(
        self,
        output: Output,
        analysis: Analysis,
        counts: Callable[[], NetnsCounts],
        losses: Callable[[], Mapping[str, int]],
    ) -> Output:
        """An output that keeps metrics too; from now on they are served."""

        def so_far(now_ns: int) -> Summary:
            return analysis.so_far(counts(), now_ns, losses())

        if self._server is not None:
            self._server.start()
            remark(f"metrics at http://{self._server.address}/metrics")
        return self._beside(output, analysis, so_far, time.time_ns)

    def beside_replay(self, output: Output, analysis: Analysis) -> Output:
        """The same where only the end is told, at the time of the recording."""

        def so_far(_now_ns: int) -> Summary:
            raise AssertionError("a replay has no moments between")

        return self._beside(output, analysis, so_far, None)

    def _beside(
        self,
        output: Output,
        analysis: Analysis,
        so_far: Callable[[int], Summary],
        realtime_ns: Callable[[], int] | None,
    ) -> Output:
        if self._file is not None:
            self._file.start()
        metrics = Metrics(
            analysis.header,
            so_far,
            analysis.correlator.flows.is_suspected,
            self._exposition.replace,
            time.monotonic_ns,
            realtime_ns,
        )
        return Beside(metrics, output, remark)

    def close(self) -> None:
        """Write the file the last time, and serve no more. Raises OSError where that fails."""
        close_all(one.close for one in (self._server, self._file) if one is not None)
