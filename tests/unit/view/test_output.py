"""The live view as an output: it has the terminal until the summary, and costs little."""

from __future__ import annotations

import io
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from tcpstuck_bpf import console
from tcpstuck_bpf.judge.verdict import Finding
from tcpstuck_bpf.summary import Status, Summary
from tcpstuck_bpf.view.output import COST_SHARE, INTERVAL_NS, LiveView, ReplayView
from tests.builders import SECOND_NS, at
from tests.unit.view.world import World


class FakeScreen:
    """Notes what it is told."""

    def __init__(self, log: list[Any], failure: Exception | None = None) -> None:
        self._log = log
        self.failure = failure
        self.never_ends = False

    def start(self) -> None:
        self._log.append("start")

    def show(self, snapshot: Any) -> None:
        self._log.append(snapshot)

    def close(self) -> None:
        self._log.append("close")
        if self.never_ends:
            raise TimeoutError("the terminal takes no output")


class FakeOutput:
    """Notes the summary, and which verdicts it was given an example of."""

    def __init__(self, log: list[Any]) -> None:
        self._log = log

    def findings(self, findings: list[Finding]) -> None:
        self._log += [finding.verdict for finding in findings]

    def summary(self, _summary: Summary) -> None:
        self._log.append("summary")


class Errors(io.StringIO):
    """Standard error on a terminal, or elsewhere."""

    def __init__(self, *, terminal: bool) -> None:
        super().__init__()
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


@pytest.fixture(autouse=True)
def _nothing_stays_held() -> Iterator[None]:
    """What a view holds is the whole process's: no other test may find it held."""
    yield
    console._held = None


@pytest.fixture
def errors(monkeypatch: pytest.MonkeyPatch) -> Errors:
    """Standard error on a terminal."""
    return at_console(monkeypatch, terminal=True)


def at_console(monkeypatch: pytest.MonkeyPatch, *, terminal: bool) -> Errors:
    """Give the console a standard error. pytest replaces the process's own in every phase."""
    stream = Errors(terminal=terminal)
    monkeypatch.setattr(console, "sys", SimpleNamespace(stderr=stream))
    return stream


class Shown:
    """A live view, and what has become of it."""

    def __init__(self, cost_ns: int = 0, failure: Exception | None = None) -> None:
        self.log: list[Any] = []
        self.world = World()
        self.screen = FakeScreen(self.log, failure)
        self._now_ns = 0
        self._cost_ns = cost_ns
        self.view = LiveView(
            self.screen,  # type: ignore[arg-type]
            self.world.book,
            lambda now_ns: self.world.analysis.so_far({}, now_ns, {}),
            lambda: FakeOutput(self.log),  # type: ignore[arg-type, return-value]
            console.hold(),
            self._clock,
        )

    def _clock(self) -> int:
        self._now_ns += self._cost_ns
        return self._now_ns

    def status(self, second: float) -> None:
        """The run goes on."""
        now_ns = at(second)
        running_ns = int(second * SECOND_NS)
        self.view.status(Status("port 3311", 0, 0, 0, 0, running_ns, now_ns))

    @property
    def summary(self) -> Summary:
        """The run's summary so far."""
        return self.world.analysis.so_far({}, at(9), {})


def test_the_screen_is_taken_at_the_first_status_and_given_back_before_the_summary(
    errors: Errors,
) -> None:
    shown = Shown()
    assert shown.log == []
    shown.status(0)
    shown.status(1)
    shown.view.summary(shown.summary)
    words = [one if isinstance(one, str) else "snapshot" for one in shown.log]
    assert words == ["start", "snapshot", "snapshot", "close", "summary"]
    assert errors.getvalue() == ""


def test_a_snapshot_has_the_findings_and_the_remarks_until_then(errors: Errors) -> None:
    shown = Shown()
    console.remark("nobody listens on port 25")
    shown.status(0)
    assert shown.log[-1].remarks == ("tcpstuck-trace: nobody listens on port 25",)
    assert errors.getvalue() == "", "the view has the terminal"
    shown.view.close()
    assert errors.getvalue() == "tcpstuck-trace: nobody listens on port 25\n"


def test_where_standard_error_is_no_terminal_its_lines_do_not_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stream = at_console(monkeypatch, terminal=False)
    shown = Shown()
    console.remark("once")
    assert stream.getvalue() == "tcpstuck-trace: once\n"
    shown.status(0)
    assert shown.log[-1].remarks == ("tcpstuck-trace: once",)
    shown.view.close()
    assert stream.getvalue().count("once") == 1


@pytest.mark.parametrize("cost_ns", [0, SECOND_NS // 10, SECOND_NS])
@pytest.mark.usefixtures("errors")
def test_snapshots_take_a_small_part_of_the_time(cost_ns: int) -> None:
    shown = Shown(cost_ns)
    for tenth in range(1000):
        shown.status(tenth / 10)
    number = sum(not isinstance(one, str) for one in shown.log)
    assert number * cost_ns <= 1000 * SECOND_NS // 10 // COST_SHARE + cost_ns
    assert number >= min(100, 100 * SECOND_NS // max(INTERVAL_NS, COST_SHARE * cost_ns))


@pytest.mark.parametrize("never_ends", [False, True])
def test_a_view_that_fails_costs_neither_the_summary_nor_the_remarks(
    never_ends: bool, errors: Errors
) -> None:
    shown = Shown(failure=OSError(5, "the cable was pulled"))
    shown.screen.never_ends = never_ends
    shown.status(0)
    shown.view.summary(shown.summary)
    assert shown.log[-1] == "summary"
    assert "the live view failed: the cable was pulled" in errors.getvalue()
    assert ("the live view did not end" in errors.getvalue()) == never_ends
    shown.view.close()
    assert errors.getvalue().count("failed") == 1


def test_of_a_recording_the_end_is_shown_until_the_user_has_seen_it(errors: Errors) -> None:
    world, log = World(), []
    view = ReplayView(
        FakeScreen(log),  # type: ignore[arg-type]
        world.book,
        lambda _summary: at(5),
        lambda: FakeOutput(log),  # type: ignore[arg-type, return-value]
        console.hold(),
        lambda: log.append("waited"),
    )
    world.stuck(range(2), "ack-missing")
    summary = world.analysis.so_far({}, at(5), {})
    view.summary(summary)
    snapshot, *after = log
    assert after == ["start", "waited", "close", "ack-missing", "summary"]
    assert snapshot.ended
    assert [cause.number for cause in snapshot.causes] == [2]
    assert errors.getvalue() == ""


def test_few_of_endless_remarks_are_kept(errors: Errors) -> None:
    held = console.hold()
    for number in range(10_000):
        console.remark(str(number))
    assert len(held.lines) == console.MOST_HELD
    assert held.lines[-1].endswith(" 9999")
    console.release()
    assert len(errors.getvalue().splitlines()) == console.MOST_HELD
