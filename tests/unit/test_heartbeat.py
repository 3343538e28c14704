"""A log shows that the tool still watches: once per interval, and only where nothing else does."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from tcpstuck_bpf import run
from tcpstuck_bpf.cli import main
from tcpstuck_bpf.errors import EXIT_USAGE
from tcpstuck_bpf.heartbeat import Heartbeat
from tcpstuck_bpf.model import SECOND_NS
from tcpstuck_bpf.options import build_parser
from tcpstuck_bpf.summary import Status
from tests.builders import header

MINUTE_NS = 60 * SECOND_NS


class Shown:
    """An output that remembers what it was given."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def findings(self, findings: Any) -> None:
        self.calls.append(("findings", findings))

    def attempts(self, attempts: Any) -> None:
        self.calls.append(("attempts", attempts))

    def status(self, status: Any) -> None:
        self.calls.append(("status", status))

    def summary(self, summary: Any) -> None:
        self.calls.append(("summary", summary))

    def close(self) -> None:
        self.calls.append(("close", None))


def status(running_ns: int) -> Status:
    return Status("port 3311", 1200, 1100, 99, 1, running_ns, running_ns)


def beats(times_ns: list[int], interval_ns: int = 5 * MINUTE_NS) -> list[str]:
    """What is said where the status comes at these times of the run."""
    said: list[str] = []
    heartbeat = Heartbeat(Shown(), interval_ns, lambda one: str(one.running_ns), said.append)
    for time_ns in times_ns:
        heartbeat.status(status(time_ns))
    return said


def test_there_is_one_line_for_each_interval() -> None:
    every_second = [second * SECOND_NS for second in range(1, 1000)]
    assert [line.split()[0] for line in beats(every_second)] == [
        str(300 * SECOND_NS),
        str(600 * SECOND_NS),
        str(900 * SECOND_NS),
    ]


def test_a_pause_is_not_made_up_for() -> None:
    """A machine that slept, or a sweep that took long."""
    times = [SECOND_NS, 100 * MINUTE_NS, 100 * MINUTE_NS + 1, 104 * MINUTE_NS, 105 * MINUTE_NS]
    assert len(beats(times)) == 2


def test_how_to_silence_it_is_said_once() -> None:
    first, *others = beats([n * 5 * MINUTE_NS for n in range(1, 5)])
    assert "every 5 min; --heartbeat off silences it" in first
    assert len(others) == 3
    assert not any("--heartbeat" in line for line in others)


def test_everything_else_passes_through() -> None:
    output = Shown()
    heartbeat = Heartbeat(output, MINUTE_NS, str, lambda _line: None)
    given: Any = object()
    heartbeat.findings(given)
    heartbeat.attempts(given)
    heartbeat.status(status(1))
    heartbeat.summary(given)
    heartbeat.close()
    assert output.calls == [
        ("findings", given),
        ("attempts", given),
        ("status", status(1)),
        ("summary", given),
        ("close", None),
    ]


@pytest.mark.parametrize(
    ("words", "terminals", "interval_ns"),
    [
        ([], (), 5 * MINUTE_NS),
        ([], ("stdout",), None),
        ([], ("stderr",), None),
        (["--json"], (), None),
        (["--json", "--heartbeat", "1h"], (), 60 * MINUTE_NS),
        (["--heartbeat", "30"], ("stdout", "stderr"), 30 * SECOND_NS),
        (["--heartbeat", "off"], (), None),
    ],
)
def test_it_is_for_logs_and_for_who_asks(
    words: list[str],
    terminals: tuple[str, ...],
    interval_ns: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(getattr(sys, name), "isatty", lambda name=name: name in terminals)
    assert run._heartbeat_interval(build_parser().parse_args(words)) == interval_ns


def test_the_line_has_the_figures(capsys: pytest.CaptureFixture[str]) -> None:
    output: Any = run._with_heartbeat(Shown(), header(), 5 * MINUTE_NS)
    output.status(status(8 * 60 * MINUTE_NS + 5 * MINUTE_NS))
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(
        "tcpstuck-trace: 1 STUCK, watching port 3311 for 8 h 05 min: 1 200 cookies sent, "
        "1 100 completed, 99 waiting (every"
    )


@pytest.mark.parametrize("value", ["0", "soon", "100ms"])
def test_what_is_no_interval_is_wrong_use(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--heartbeat", value]) == EXIT_USAGE
    assert "--heartbeat off" in capsys.readouterr().err
