"""A whole run that mends clients: what is sent does not wait for what is told."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from pathlib import Path

from tcpstuck_bpf.analysis import Analysis
from tcpstuck_bpf.app.live import Live
from tcpstuck_bpf.app.playback import run_replay
from tcpstuck_bpf.app.printer import Printer
from tcpstuck_bpf.judge.verdict import Finding
from tcpstuck_bpf.model import (
    Attempt,
    Ending,
    EventKind,
    HandshakeId,
    Row,
    Sweep,
    SweepPart,
)
from tcpstuck_bpf.output.writers import JsonOutput, Selection
from tcpstuck_bpf.recording.replay import Recorder, Replay
from tcpstuck_bpf.rescue.planner import Rescuer
from tcpstuck_bpf.rescue.policy import RescuePolicy
from tcpstuck_bpf.rescue.rescuer import Rescuing
from tests.builders import (
    SECOND_NS,
    ack_dropped,
    at,
    ended,
    event,
    four_tuple,
    handshake,
    header,
)
from tests.scripted_run import FakeKernel, live, no_counters
from tests.unit.rescue import test_rescuing


def rescuer_beside(kernel: FakeKernel, tables: test_rescuing.Kernel) -> Rescuing:
    """The rescue with its defaults, on the fake kernel's clock."""
    return Rescuing(Rescuer(RescuePolicy()), tables, tables, lambda: kernel.now_ns, dry_run=False)


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
        Printer(output),
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
