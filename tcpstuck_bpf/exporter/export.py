"""Implements `--metrics` and `--metrics-file`, in addition to the run's own output."""

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
    """Passes everything to the metrics first, then to the output.

    Scrapes still work if standard output fails. An error in the metrics never reaches the output:
    `note` reports it once, and the metrics are not updated any more.
    """

    def __init__(self, metrics: Output, output: Output, note: Callable[[str], None]) -> None:
        self._metrics: Output | None = metrics
        self._output = output
        self._note = note

    def _pass_to_metrics(self, deliver: Callable[[Output], None]) -> None:
        if self._metrics is None:
            return
        try:
            deliver(self._metrics)
        except Exception as error:  # no error in the metrics may end the run
            self._metrics = None
            self._note(f"the metrics are no longer updated: {words_of(error)}")

    def findings(self, findings: list[Finding]) -> None:
        """Pass the findings to both."""
        self._pass_to_metrics(lambda metrics: metrics.findings(findings))
        self._output.findings(findings)

    def attempts(self, attempts: Sequence[Attempt]) -> None:
        """Pass the attempts to both."""
        self._pass_to_metrics(lambda metrics: metrics.attempts(attempts))
        self._output.attempts(attempts)

    def status(self, status: Status) -> None:
        """Pass the status to both."""
        self._pass_to_metrics(lambda metrics: metrics.status(status))
        self._output.status(status)

    def summary(self, summary: Summary) -> None:
        """Pass the summary to both."""
        self._pass_to_metrics(lambda metrics: metrics.summary(summary))
        self._output.summary(summary)

    def close(self) -> None:
        """Close the output. Raises OSError if it fails."""
        self._output.close()


class Exporter:
    """Serves and writes metrics until it is closed.

    Raises UsageError if the address or the file is unusable, and CannotTraceError if
    prometheus_client is missing (`exposition`).
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
        """Wrap a live run's output so that it also updates the metrics, and start serving them."""

        def so_far(now_ns: int) -> Summary:
            return analysis.so_far(counts(), now_ns, losses())

        if self._server is not None:
            self._server.start()
            remark(f"metrics at http://{self._server.address}/metrics")
        return self._beside(output, analysis, so_far, time.time_ns)

    def beside_replay(self, output: Output, analysis: Analysis) -> Output:
        """Wrap a replay's output. Metrics are published at the end only, with recorded times."""

        def so_far(_now_ns: int) -> Summary:
            raise AssertionError("a replay has no intermediate summaries")

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
        """Write the file a last time and stop serving. Raises OSError if that fails."""
        close_all(one.close for one in (self._server, self._file) if one is not None)
