"""A whole run with a source of our own: no kernel, no clock, no waiting."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tcpstuck_bpf.analysis import Analysis
from tcpstuck_bpf.app import Live, run_replay
from tcpstuck_bpf.errors import UsageError
from tcpstuck_bpf.model import (
    Attempt,
    Coverage,
    Ending,
    Event,
    EventKind,
    FourTuple,
    Handshake,
    HandshakeId,
    KernelCounters,
    ListenerFacts,
    NetnsCounts,
    Row,
    Sweep,
    SweepPart,
)
from tcpstuck_bpf.output import JsonOutput, Selection
from tcpstuck_bpf.replay import Recorder, Replay
from tcpstuck_bpf.rescue import RescuePolicy, Rescuer
from tcpstuck_bpf.rescuing import Rescuing
from tcpstuck_bpf.verdict import Finding
from tests.builders import (
    SECOND_NS,
    ack_dropped,
    at,
    ended,
    event,
    four_tuple,
    handshake,
    header,
    repeated,
)
from tests.unit import test_rescuing


class FakeKernel:
    """A source whose table changes at given times, and the clock that goes with it.

    Polling is what passes the time.
    """

    timings: Mapping[str, float] = {}
    table_capacity = 1024
    coverage: Coverage = header().coverage

    def __init__(self) -> None:
        self.now_ns = at(0)
        self.table: dict[FourTuple, Handshake] = {}
        self.script: list[tuple[int, FourTuple, Handshake | None, Event | None]] = []
        self.crowd: list[Row] = []
        """Entries of others that come first in a sweep, each in a batch of its own."""
        self.sweeps: list[int] = []
        self.choices: list[int] = []
        self.sweep_cost_ns = 0
        self.forgotten: list[FourTuple] = []
        self.closed = False

    def at(self, time_ns: int, entry: Handshake | None, told: Event | None = None) -> None:
        """Client 0's entry becomes this, None for gone, and perhaps an event tells of it."""
        self.script.append((time_ns, four_tuple(), entry, told))

    def poll(self, timeout_ns: int) -> list[Event]:
        self.now_ns += timeout_ns
        events = []
        while self.script and self.script[0][0] <= self.now_ns:
            _, who, entry, told = self.script.pop(0)
            self.table.pop(who, None)
            if entry is not None:
                self.table[who] = entry
            if told is not None:
                events.append(told)
        return events

    def sweep(self) -> Iterator[Sweep]:
        begun = self.now_ns
        self.sweeps.append(begun)
        for row in self.crowd:
            self.now_ns += self.sweep_cost_ns
            yield Sweep(begun, (row,), SweepPart.MORE)
        self.now_ns += self.sweep_cost_ns
        yield Sweep(begun, tuple(Row(*item) for item in self.table.items()))

    def chosen(self) -> Sweep:
        self.choices.append(self.now_ns)
        return Sweep(
            self.now_ns, tuple(Row(*item) for item in self.table.items()), SweepPart.CHOSEN
        )

    def forget(self, handshakes: Iterable[HandshakeId]) -> None:
        for who, first_syn_ns in handshakes:
            assert self.table[who].first_syn_ns == first_syn_ns
            self.forgotten.append(who)
            del self.table[who]

    def counts(self) -> NetnsCounts:
        return {}

    def listeners(self) -> tuple[ListenerFacts, ...]:
        return ()

    def losses(self) -> Mapping[str, int]:
        return {"undecodable_events": 0}

    def close(self) -> None:
        self.closed = True


def no_counters() -> KernelCounters:
    return {}


def live(
    kernel: FakeKernel,
    seconds: float | None,
    only: str = "",
    record: str | None = None,
    **more: Any,
) -> list[dict[str, Any]]:
    """Run it for so many seconds; the JSON lines."""
    stream = io.StringIO()
    output = JsonOutput(stream, header().clock, Selection([only] if only else [], nothing=False))
    recorder = None if record is None else Recorder(record, header())
    run = Live(
        kernel, Analysis(header()), output, recorder, no_counters, lambda: kernel.now_ns, **more
    )
    run.run(None if seconds is None else int(seconds * SECOND_NS), None)
    if recorder is not None:
        recorder.close()
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_silent_client_is_told_once_after_the_timeout() -> None:
    kernel = FakeKernel()
    kernel.at(at(0), handshake())
    (verdict, summary) = live(kernel, 8)
    assert verdict["verdict"] == "ack-missing"
    assert verdict["age_ms"] == 3000
    assert summary["stuck"] == 1
    assert kernel.now_ns >= at(8)


def test_a_healthy_client_is_not_told() -> None:
    kernel = FakeKernel()
    kernel.at(at(0), handshake())
    kernel.at(at(2.9), None)
    (summary,) = live(kernel, 8)
    assert summary["ever_stuck"] == 0


def test_the_end_tells_what_is_due_and_counts_what_is_not() -> None:
    kernel = FakeKernel()
    kernel.at(at(0), handshake())
    assert [line["type"] for line in live(kernel, 2.9)] == ["summary"]
    kernel = FakeKernel()
    kernel.at(at(0), handshake())
    assert live(kernel, 2.9)[-1]["pending"] == 1


def test_a_late_completion_recovers_and_its_entry_is_forgotten() -> None:
    kernel = FakeKernel()
    kernel.at(at(0), handshake())
    done = ended(handshake(), Ending.COMPLETED, at(5))
    kernel.at(at(5), done, event(EventKind.COMPLETED, done, at(5)))
    lines = live(kernel, 8)
    assert [line.get("verdict") for line in lines] == ["ack-missing", "recovered", None]
    assert lines[1]["delay_ms"] == 5000
    assert lines[2]["stuck"] == 0
    assert lines[2]["ever_stuck"] == 1
    assert kernel.forgotten == [four_tuple()]


def test_a_lost_event_does_not_hide_a_completion() -> None:
    kernel = FakeKernel()
    kernel.at(at(0), handshake())
    kernel.at(at(5), ended(handshake(), Ending.COMPLETED, at(5)))
    assert [line.get("verdict") for line in live(kernel, 8)][:2] == ["ack-missing", "recovered"]


def test_what_is_not_shown_is_counted() -> None:
    kernel = FakeKernel()
    kernel.at(at(0), ack_dropped(handshake(), at(0.1)))
    (summary,) = live(kernel, 8, only="ack-missing")
    assert summary["verdicts"]["accept-queue-full"] == 1


def test_the_summary_counts_who_was_connected_by_an_ordinary_handshake() -> None:
    kernel = FakeKernel()
    kernel.at(at(0), handshake())
    taken = ended(handshake(), Ending.TAKEN_OVER, at(5))
    kernel.at(at(5), taken, event(EventKind.TAKEN_OVER, taken, at(5)))
    summary = live(kernel, 8)[-1]
    assert summary["verdicts"] == {"completed": 0, "recovered": 1}
    kernel = FakeKernel()
    repeating = repeated(handshake(), at(1), at(3))
    kernel.at(at(3), repeating)
    taken = ended(repeating, Ending.TAKEN_OVER, at(5))
    kernel.at(at(5), taken, event(EventKind.TAKEN_OVER, taken, at(5)))
    *told, summary = live(kernel, 8)
    assert [line["verdict"] for line in told] == ["synack-missing", "completed"]
    assert summary["verdicts"] == {"completed": 1}


def test_stop_ends_with_the_summary() -> None:
    assert live(FakeKernel(), None, stop=True)[-1]["type"] == "summary"


def test_slow_sweeps_become_rare() -> None:
    kernel = FakeKernel()
    kernel.sweep_cost_ns = SECOND_NS
    live(kernel, 60)
    assert len(kernel.sweeps) * kernel.sweep_cost_ns <= 12 * SECOND_NS


def test_telling_much_does_not_put_off_the_next_sweep() -> None:
    kernel = FakeKernel()
    kernel.at(at(0), handshake())

    class SlowOutput(JsonOutput):
        def findings(self, findings: list[Finding]) -> None:
            kernel.now_ns += 30 * SECOND_NS
            super().findings(findings)

    output = SlowOutput(io.StringIO(), header().clock, Selection([], nothing=False))
    run = Live(kernel, Analysis(header()), output, None, no_counters, lambda: kernel.now_ns)
    run.run(60 * SECOND_NS, None)
    told_ns = next(time_ns for time_ns in kernel.sweeps if time_ns >= at(3))
    following_ns = next(time_ns for time_ns in kernel.sweeps if time_ns > told_ns)
    assert following_ns <= told_ns + 32 * SECOND_NS


def test_a_recorded_run_replays_to_the_identical_lines(tmp_path: Path) -> None:
    kernel = FakeKernel()
    kernel.at(at(0), handshake())
    done = ended(handshake(), Ending.COMPLETED, at(5))
    kernel.at(at(5), done, event(EventKind.COMPLETED, done, at(5)))
    path = str(tmp_path / "run")
    lines = live(kernel, 8, record=path)
    stream = io.StringIO()
    run_replay(Replay(path), JsonOutput(stream, header().clock, Selection([], nothing=False)))
    assert [json.loads(line) for line in stream.getvalue().splitlines()] == lines


def test_a_full_disk_is_said_in_the_summary_and_tracing_goes_on() -> None:
    kernel = FakeKernel()
    kernel.at(at(0), handshake())
    lines = live(kernel, 8, record="/dev/full")
    assert lines[0]["verdict"] == "ack-missing"
    assert lines[-1]["notes"] == ["the recording is incomplete: No space left on device"]


def test_the_ready_file_holds_our_process_number_or_is_refused(tmp_path: Path) -> None:
    kernel = FakeKernel()
    stream = io.StringIO()
    output = JsonOutput(stream, header().clock, Selection([], nothing=True))
    run = Live(kernel, Analysis(header()), output, None, no_counters, lambda: kernel.now_ns)
    run.run(SECOND_NS, str(tmp_path / "ready"))
    assert int((tmp_path / "ready").read_text("ascii")) > 0
    with pytest.raises(UsageError, match="ready file"):
        run.run(SECOND_NS, str(tmp_path / "missing" / "ready"))


def test_a_rescue_is_told_recorded_and_played_back(tmp_path: Path) -> None:
    kernel = FakeKernel()
    tables = test_rescuing.Kernel()
    entry = handshake()
    tables.entries = {four_tuple(): entry}
    rescuing = rescuer_beside(kernel, tables)
    done = ended(entry, Ending.COMPLETED, at(4), 1)
    kernel.at(at(0), entry)
    kernel.at(at(4), None, event(EventKind.COMPLETED, done, at(4)))
    path = tmp_path / "run"
    lines = live(kernel, 8, record=str(path), rescuing=rescuing)
    told = [(line["type"], line.get("verdict"), line.get("outcome")) for line in lines]
    assert told == [
        ("verdict", "ack-missing", None),
        ("rescue", None, "sent"),
        ("verdict", "rescued", None),
        ("summary", None, None),
    ]
    assert [who for who, _ in tables.sent] == [four_tuple()]
    assert lines[-1]["verdicts"] == {"completed": 0, "rescued": 1}
    assert (lines[-1]["stuck"], lines[-1]["recovered"]) == (0, 0)
    assert lines[-1]["rescue"]["rescued"] == 1
    stream = io.StringIO()
    replay = Replay(str(path))
    run_replay(replay, JsonOutput(stream, replay.header.clock, Selection([], nothing=False)))
    assert [json.loads(line) for line in stream.getvalue().splitlines()] == lines


def test_who_may_be_mended_is_judged_at_the_deadline_and_not_at_the_next_regular_sweep() -> None:
    """The kernel told of the dropped ACK, so it is known when the verdict is due."""
    dropped = ack_dropped(handshake(), at(0.45))
    due = at(0.45) + header().settings.timeout_ns

    def sweep_after_it(*, mending: bool) -> int:
        kernel = FakeKernel()
        kernel.at(at(0), handshake())
        kernel.at(at(0.45), dropped, event(EventKind.ACK_DROPPED, dropped, at(0.45)))
        tables = test_rescuing.Kernel()
        tables.entries = {four_tuple(): dropped}
        rescuing = rescuer_beside(kernel, tables)
        live(kernel, 5, rescuing=rescuing if mending else None)
        looks = kernel.choices if mending else kernel.sweeps
        return min(time_ns for time_ns in looks if time_ns >= due)

    assert sweep_after_it(mending=True) - due <= SECOND_NS // 10
    assert sweep_after_it(mending=True) < sweep_after_it(mending=False)


def rescuer_beside(kernel: FakeKernel, tables: test_rescuing.Kernel) -> Rescuing:
    """The rescue with its defaults, on the fake kernel's clock."""
    return Rescuing(Rescuer(RescuePolicy()), tables, tables, lambda: kernel.now_ns, dry_run=False)


def test_a_flood_does_not_hold_up_the_rescue(tmp_path: Path) -> None:
    """Reading and judging the whole table takes longer than a cookie lives."""
    kernel = FakeKernel()
    kernel.at(at(0), handshake())
    kernel.crowd = [Row(four_tuple(number), handshake()) for number in range(1, 201)]
    kernel.sweep_cost_ns = SECOND_NS
    tables = test_rescuing.Kernel()
    tables.entries = {four_tuple(): handshake()}
    path = str(tmp_path / "run")
    lines = live(kernel, 8, record=path, rescuing=rescuer_beside(kernel, tables))
    assert tables.sent[0][0] == four_tuple()
    first = next(line for line in lines if line["type"] in ("verdict", "rescue"))
    assert first["verdict"] == "ack-missing"
    sent = next(line for line in lines if line["type"] == "rescue")
    moment = datetime.strptime(sent["time"], "%Y-%m-%dT%H:%M:%S.%f%z")
    told = datetime.strptime(first["verdict_time"], "%Y-%m-%dT%H:%M:%S.%f%z")
    assert moment - told <= timedelta(seconds=2)
    replay = Replay(path)
    stream = io.StringIO()
    run_replay(replay, JsonOutput(stream, replay.header.clock, Selection([], nothing=False)))
    assert [json.loads(line) for line in stream.getvalue().splitlines()] == lines


def test_who_can_be_mended_does_not_wait_until_all_verdicts_are_told(tmp_path: Path) -> None:
    """100 clients of known addresses are due at once; to tell of them takes 10 s."""
    kernel = FakeKernel()
    tables = test_rescuing.Kernel()
    sent_ns: list[int] = []

    class SlowOutput(JsonOutput):
        def findings(self, findings: list[Finding]) -> None:
            kernel.now_ns += len(findings) * SECOND_NS // 10
            super().findings(findings)

        def attempts(self, attempts: Sequence[Attempt]) -> None:
            sent_ns.extend(attempt.time_ns for attempt in attempts)
            super().attempts(attempts)

    for number in range(100):
        kernel.table[four_tuple(number)] = tables.entries[four_tuple(number)] = handshake()
        tables.completed_ns[four_tuple(number)] = at(-60)
    stream = io.StringIO()
    clock = header().clock
    output = SlowOutput(stream, clock, Selection([], nothing=False))
    recorder = Recorder(str(tmp_path / "run"), header())
    Live(
        kernel,
        Analysis(header()),
        output,
        recorder,
        no_counters,
        lambda: kernel.now_ns,
        rescuing=rescuer_beside(kernel, tables),
    ).run(30 * SECOND_NS, None)
    recorder.close()
    due_ns = at(0) + header().settings.timeout_ns
    assert len([time_ns for time_ns in sent_ns if time_ns <= due_ns + 2 * SECOND_NS]) >= 100
    told = stream.getvalue().splitlines()
    verdicts = [line for line in map(json.loads, told) if line["type"] == "verdict"]
    assert len({line["client_ip"] for line in verdicts}) == len(kernel.table)
    replayed = io.StringIO()
    run_replay(
        Replay(str(tmp_path / "run")), JsonOutput(replayed, clock, Selection([], nothing=False))
    )
    assert replayed.getvalue().splitlines() == told


def test_who_is_chosen_and_connects_is_neither_pending_nor_unresolved() -> None:
    kernel = FakeKernel()
    kernel.at(at(0), handshake())
    kernel.at(at(0.9), None)
    tables = test_rescuing.Kernel()
    summary = live(kernel, 200, rescuing=rescuer_beside(kernel, tables))[-1]
    assert kernel.choices
    assert summary["pending"] == 0
    assert summary["losses"]["flows_unresolved"] == 0


def test_what_the_rescue_tells_does_not_keep_ended_entries_in_the_table() -> None:
    """One client ends, and the sweep that shows it shows another one to be mended."""
    kernel = FakeKernel()
    stuck = handshake()
    kernel.at(at(0), handshake())
    kernel.at(at(2.5), ended(handshake(), Ending.RESET, at(2.5)))
    kernel.table[four_tuple(1)] = stuck
    tables = test_rescuing.Kernel()
    tables.entries = {four_tuple(1): stuck}
    tables.completed_ns = {four_tuple(1): at(-60)}

    class NothingChosen(FakeKernel):
        def chosen(self) -> Sweep:
            return Sweep(self.now_ns, (), SweepPart.CHOSEN)

        def forget(self, handshakes: Iterable[HandshakeId]) -> None:
            super().forget(handshakes)
            if self.forgotten:
                forgotten_by.setdefault("sweep", self.sweeps[-1])

    forgotten_by: dict[str, int] = {}
    kernel.__class__ = NothingChosen
    lines = live(kernel, 8, rescuing=rescuer_beside(kernel, tables))
    assert "rescue" in {line["type"] for line in lines}
    assert forgotten_by["sweep"] == min(when for when in kernel.sweeps if when >= at(2.5))
