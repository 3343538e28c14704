"""A whole run by a script, scraped while it goes on."""

from __future__ import annotations

import http.client
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest

from tcpstuck_bpf.analysis import Analysis
from tcpstuck_bpf.app.interfaces import Output
from tcpstuck_bpf.app.live import Live
from tcpstuck_bpf.app.printer import Printer
from tcpstuck_bpf.model import EventKind
from tcpstuck_bpf.output import metrics
from tcpstuck_bpf.output.writers import JsonOutput, Selection
from tcpstuck_bpf.run import exporter_for
from tests.builders import SECOND_NS, ack_dropped, at, event, handshake, header
from tests.exported import needs_prometheus_client
from tests.scripted_run import FakeKernel

LIMIT_S = 30.0


@pytest.fixture(autouse=True)
def _library() -> None:
    needs_prometheus_client()


class Scraped(FakeKernel):
    """A kernel that has the metrics fetched whenever it is asked for events."""

    def __init__(self) -> None:
        super().__init__()
        self.address: Any = None
        self.answers: list[tuple[int, str]] = []

    def poll(self, timeout_ns: int) -> Any:
        client = http.client.HTTPConnection(*self.address, timeout=LIMIT_S)
        client.request("GET", "/metrics")
        answer = client.getresponse()
        self.answers.append((answer.status, answer.read().decode()))
        client.close()
        return super().poll(timeout_ns)


class Options:
    """As parsed."""

    dry_run = False

    def __init__(self, metrics: tuple[str, int] | None, metrics_file: str | None) -> None:
        self.metrics = metrics
        self.metrics_file = metrics_file


def test_a_run_is_scraped_while_its_lines_are_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The run's time is the script's, the cost of a snapshot this machine's.
    monkeypatch.setattr(metrics, "COST_SHARE", 0)
    target = tmp_path / "m.prom"
    exporter = exporter_for(Options(("127.0.0.1", 0), str(target)))  # type: ignore[arg-type]
    assert exporter is not None
    kernel, stream = Scraped(), io.StringIO()
    dropped = ack_dropped(handshake(), at(0.1))
    kernel.at(at(1), dropped, event(EventKind.ACK_DROPPED, dropped, at(1)))
    analysis = Analysis(header())
    # Only what is shown is selected.
    shown: Output = JsonOutput(stream, header().clock, Selection(["client-reset"], nothing=False))
    output = exporter.beside_live(shown, analysis, kernel.counts, kernel.losses)
    told = capsys.readouterr().err
    kernel.address = re.findall(r"http://([\d.]+):(\d+)/metrics\n", told)[0]
    run = Live(
        kernel, analysis, Printer(output), None, kernel.counters, clock_ns=lambda: kernel.now_ns
    )
    run.run(6 * SECOND_NS, None)
    output.close()
    exporter.close()
    statuses = [status for status, _ in kernel.answers]
    assert statuses[0] == 503
    assert statuses == sorted(statuses, reverse=True)
    assert "\ntcpstuck_stuck_clients 1.0\n" in kernel.answers[-1][1]
    assert "\ntcpstuck_running 1.0\n" in kernel.answers[-1][1]
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [line["type"] for line in lines] == ["summary"]
    assert lines[0]["stuck"] == 1
    assert "\ntcpstuck_stuck_clients 1.0\n" in target.read_text()
    assert "\ntcpstuck_running 0.0\n" in target.read_text()


def test_metrics_that_fail_take_nothing_from_the_run() -> None:
    from tcpstuck_bpf.exporter.export import Beside

    class Failing:
        """Metrics that meet a bug."""

        def __getattr__(self, _name: str) -> Any:
            raise ZeroDivisionError("a bug")

    def told(beside: bool) -> tuple[str, list[str]]:
        kernel, stream, notes = FakeKernel(), io.StringIO(), list[str]()
        kernel.at(at(0), handshake())
        output: Output = JsonOutput(stream, header().clock, Selection([], nothing=False))
        if beside:
            output = Beside(Failing(), output, notes.append)
        run = Live(
            kernel,
            Analysis(header()),
            Printer(output),
            None,
            kernel.counters,
            clock_ns=lambda: kernel.now_ns,
        )
        run.run(8 * SECOND_NS, None)
        output.close()
        return stream.getvalue(), notes

    without, _ = told(beside=False)
    assert told(beside=True) == (without, ["the metrics are no longer updated: a bug"])
    assert '"ack-missing"' in without


def test_nothing_is_imported_or_opened_where_nothing_is_asked_for() -> None:
    assert exporter_for(Options(None, None)) is None  # type: ignore[arg-type]
