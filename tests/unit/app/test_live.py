"""A whole run: what is told, when, and how it ends."""

from __future__ import annotations

import io
import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tcpstuck_bpf.analysis import Analysis
from tcpstuck_bpf.app.live import Live
from tcpstuck_bpf.app.playback import run_replay
from tcpstuck_bpf.app.printer import Printer
from tcpstuck_bpf.judge.verdict import Finding
from tcpstuck_bpf.model import (
    Ending,
    Event,
    EventKind,
    KernelCounters,
    KernelWarning,
    Moved,
    Row,
    Sweep,
)
from tcpstuck_bpf.output.writers import JsonOutput, Selection
from tcpstuck_bpf.recording.replay import Recorder, Replay
from tcpstuck_bpf.steps import Observed
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
from tests.scripted_run import FakeKernel, live, no_counters


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


class Stalling(FakeKernel):
    """The programs go on while the tool's process does not run, before each reading of the table.

    Their events wait meanwhile, and a poll gives `at_once` of them at most.
    """

    stall_ns = 5 * SECOND_NS
    at_once = 512

    def __init__(self) -> None:
        super().__init__()
        self.waiting: list[Event] = []

    @property
    def most_waiting(self) -> int:
        return 1000

    def poll(self, timeout_ns: int) -> list[Event]:
        self.waiting += super().poll(timeout_ns if not self.waiting else 0)
        events, self.waiting = self.waiting[: self.at_once], self.waiting[self.at_once :]
        return events

    def sweep(self) -> Iterator[Sweep]:
        self.now_ns += self.stall_ns
        self.waiting += super().poll(0)
        yield from super().sweep()

    def chosen(self) -> Sweep:
        self.now_ns += self.stall_ns
        self.waiting += super().poll(0)
        return super().chosen()


@pytest.mark.parametrize("stop", [False, True])
@pytest.mark.parametrize("at_once", [512, 1])
def test_what_the_table_shows_is_judged_with_the_events_that_waited_beside_it(
    at_once: int, stop: bool
) -> None:
    """Without the kernel's counters only the event says that the accept queue was full.

    With `stop` the process stalls while the run ends: for long enough that its last reading of the
    table judges the client.
    """
    kernel = Stalling()
    kernel.at_once = at_once
    entry = handshake(accept_queue=0)
    kernel.at(at(0), entry)
    for time_ns in (at(1.2), at(1.4), at(1.6)):
        entry = ack_dropped(entry, time_ns, Moved.UNKNOWN)
        kernel.at(time_ns, entry, event(EventKind.ACK_DROPPED, entry, time_ns))
    verdicts = [line for line in live(kernel, 8, stop=stop) if line["type"] == "verdict"]
    assert [line["verdict"] for line in verdicts] == ["accept-queue-full"]
    assert "accept queue 51 of 50" in " ".join(verdicts[0]["evidence"])


@pytest.mark.parametrize("stop", [False, True])
def test_a_flood_of_events_does_not_keep_the_table_from_being_judged(stop: bool) -> None:
    """No more events are read than the ring buffer holds; at the end, in all batches together."""

    class Flooded(Stalling):
        polls = 0

        def poll(self, timeout_ns: int) -> list[Event]:
            self.polls += 1
            assert self.polls < 100_000
            super().poll(timeout_ns)
            self.now_ns += 1000
            return [event(EventKind.SYN_REPEATED, repeated(handshake(), at(1)), at(1))] * 100

    kernel = Flooded()
    kernel.at(at(0), handshake())
    if stop:
        kernel.crowd = [Row(four_tuple(n), handshake()) for n in range(2, 202)]
    assert live(kernel, 8, stop=stop)[-1]["type"] == "summary"
    if stop:
        # Once before the last sweep, and once beside all its batches; each reads a little more.
        assert kernel.polls * 100 <= 3 * kernel.most_waiting


def test_an_ack_that_no_program_saw_may_be_of_who_seems_silent() -> None:
    kernel = FakeKernel()
    kernel.at(at(0), handshake())
    kernel.unseen_acks = [at(0.1)]
    anew = handshake(first_syn_ns=at(20))
    kernel.at(at(20), anew)
    early, late, summary = live(kernel, 28)
    assert (early["verdict"], early["certainty"]) == ("ack-missing", "possible")
    assert "1 valid cookie ACK" in " ".join(early["evidence"])
    # It had come before the client began anew.
    assert (late["verdict"], late["certainty"]) == ("ack-missing", "likely")
    assert [row["agrees"] for row in summary["reconciliation"]] == [False]


def test_an_ack_that_is_being_processed_while_counters_are_read_was_not_missed() -> None:
    class Busy(FakeKernel):
        def counters(self, wanted: Collection[int] | None) -> KernelCounters:
            self.in_processing += self.now_ns > at(0)
            return super().counters(wanted)

    kernel = Busy()
    kernel.at(at(0), handshake())
    told, summary = live(kernel, 8)
    assert (told["verdict"], told["certainty"]) == ("ack-missing", "likely")
    assert [row["agrees"] for row in summary["reconciliation"]] == [True]


def test_an_ack_that_passed_unseen_since_counts_again() -> None:
    kernel = FakeKernel()
    kernel.at(at(0), handshake())
    kernel.at(at(20), handshake(first_syn_ns=at(20)))
    kernel.unseen_acks = [at(0.1), at(20.1)]
    told = live(kernel, 28)[:2]
    assert [line["certainty"] for line in told] == ["possible", "possible"]


def test_what_passed_unseen_in_another_namespace_of_that_number_hides_none() -> None:
    """Three ACKs passed in the first, and one in the one that has its number now."""

    class Reused(FakeKernel):
        def counters(self, wanted: Collection[int] | None) -> KernelCounters:
            first = self.now_ns < at(10)
            self.cookie = 71 if first else 72
            self.unseen_acks = [at(0.1)] * 3 if first else [at(20.1)]
            return super().counters(wanted)

    kernel = Reused()
    kernel.at(at(0), handshake())
    kernel.at(at(20), handshake(first_syn_ns=at(20)))
    told = live(kernel, 28)[:2]
    assert [line["certainty"] for line in told] == ["possible", "possible"]


def test_the_kernels_counters_are_read_where_something_is_told_from_silence() -> None:
    kernel = FakeKernel()
    kernel.at(at(0), handshake())
    done = ended(handshake(), Ending.COMPLETED, at(0.5))
    kernel.at(at(0.5), done, event(EventKind.COMPLETED, done, at(0.5)))
    live(kernel, 8)
    begin_and_end = kernel.readings
    kernel = FakeKernel()
    kernel.at(at(0), handshake())
    live(kernel, 8)
    assert begin_and_end == [None] * 4
    assert kernel.readings[:2] == kernel.readings[-2:] == [None] * 2
    silent = kernel.readings[2:-2]
    assert 0 < len(silent) <= 2 * len(kernel.sweeps)
    assert all(wanted == {four_tuple().netns} for wanted in silent)


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


def test_who_was_believed_connected_and_holds_a_cookie_is_not_counted_as_that() -> None:
    kernel = FakeKernel()
    kernel.at(at(0), handshake())
    taken = ended(handshake(), Ending.TAKEN_OVER, at(5))
    kernel.at(at(5), taken, event(EventKind.TAKEN_OVER, taken, at(5)))
    stuck = ack_dropped(handshake(), at(6))
    kernel.at(at(6), stuck, event(EventKind.ACK_DROPPED, stuck, at(6)))
    *told, summary = live(kernel, 12)
    assert [line["verdict"] for line in told] == ["ack-missing", "recovered", "accept-queue-full"]
    assert summary["verdicts"] == {"accept-queue-full": 1, "completed": 0}


@pytest.mark.parametrize("repeats", [(), (1, 3)])
def test_who_was_believed_connected_and_completes_a_cookie_is_counted_once(
    repeats: tuple[float, ...],
) -> None:
    kernel = FakeKernel()
    waiting = repeated(handshake(), *map(at, repeats)) if repeats else handshake()
    kernel.at(at(3) if repeats else at(0), waiting)
    taken = ended(waiting, Ending.TAKEN_OVER, at(5))
    kernel.at(at(5), taken, event(EventKind.TAKEN_OVER, taken, at(5)))
    done = ended(waiting, Ending.COMPLETED, at(6))
    kernel.at(at(6), done, event(EventKind.COMPLETED, done, at(6)))
    *told, summary = live(kernel, 12)
    assert [line["verdict"] for line in told] == (
        ["synack-missing", "completed"] if repeats else ["ack-missing", "recovered"]
    )
    connected = {"completed": 1} if repeats else {"completed": 0, "recovered": 1}
    assert summary["verdicts"] == connected


class Flooded(FakeKernel):
    """A ring buffer that fills as fast as it is read."""

    def __init__(self, waiting: int) -> None:
        super().__init__()
        self.waiting = waiting
        self.read = 0

    @property
    def most_waiting(self) -> int:
        return self.waiting

    def poll(self, timeout_ns: int) -> list[Event]:
        self.now_ns += timeout_ns + SECOND_NS // 1000
        entry = repeated(handshake(), self.now_ns)
        events = [event(EventKind.SYN_REPEATED, entry, self.now_ns)] * 100
        self.read += len(events)
        return events


def test_a_flood_of_events_neither_holds_up_the_duration_nor_the_end() -> None:
    kernel = Flooded(1000)
    assert live(kernel, 2)[-1]["type"] == "summary"
    assert len(kernel.sweeps) >= 2
    stopped = Flooded(1000)
    live(stopped, None, stop=True)
    # Before the last reading of the table, and beside it.
    assert stopped.waiting <= stopped.read < 2 * (stopped.waiting + 100)


def test_what_waits_at_the_end_is_told_but_for_what_the_table_says_as_well(
    tmp_path: Path,
) -> None:
    """The entry of a client that repeats its SYN would say everything; here there is no entry."""
    kernel = FakeKernel()
    entry = ended(handshake(), Ending.REJECTED, at(4))
    rejected = event(EventKind.ACK_REJECTED, entry, at(4), four_tuple(1))
    syn = event(EventKind.SYN_REPEATED, repeated(handshake(), at(1)), at(1), four_tuple(2))
    kernel.script = [
        (at(4), rejected.four_tuple, entry, rejected),
        (at(4), syn.four_tuple, None, syn),
    ]
    kernel.now_ns = at(5)
    lines = live(kernel, None, record=str(tmp_path / "run"), stop=True)
    assert [line["client_port"] for line in lines if line["type"] == "verdict"] == [
        four_tuple(1).client_port
    ]
    replay = Replay(str(tmp_path / "run"))
    observed = [step for step in replay.steps() if isinstance(step, Observed)]
    assert [[one.kind for one in step.events] for step in observed] == [[EventKind.ACK_REJECTED]]
    assert lines[-1]["pending"] == 0


class Impatient(FakeKernel):
    """While it reads, what a second signal sets is set: nothing can be raised there."""

    run: Live
    returned = False

    def poll(self, timeout_ns: int) -> list[Event]:
        self.now_ns += timeout_ns
        assert self.run.reading
        self.run.stop = self.run.abandoned = True
        self.returned = True
        return []


def test_a_second_signal_that_came_while_events_were_read_ends_at_once() -> None:
    kernel = Impatient()
    kernel.run = Live(
        kernel,
        Analysis(header()),
        Printer(JsonOutput(io.StringIO(), header().clock, Selection([], nothing=False))),
        None,
        kernel.counters,
        lambda: kernel.now_ns,
    )
    with pytest.raises(KeyboardInterrupt):
        kernel.run.run(None, None)
    assert (kernel.returned, kernel.run.reading) == (True, False)


def test_stop_ends_with_the_summary() -> None:
    assert live(FakeKernel(), None, stop=True)[-1]["type"] == "summary"


def test_slow_sweeps_become_rare() -> None:
    kernel = FakeKernel()
    kernel.sweep_cost_ns = SECOND_NS
    live(kernel, 60)
    assert len(kernel.sweeps) * kernel.sweep_cost_ns <= 12 * SECOND_NS


def test_what_other_processes_take_during_a_sweep_does_not_put_off_the_next() -> None:
    """Only an event would else tell of a client in time; on a busy machine it may be minutes."""
    kernel = FakeKernel()
    kernel.sweep_cost_ns, kernel.stolen_ns = SECOND_NS // 100, 10 * SECOND_NS
    kernel.at(at(15), handshake())
    lines = live(kernel, 60)
    assert [line.get("verdict") for line in lines] == ["ack-missing", None]
    assert len(kernel.sweeps) >= 5


def test_telling_much_does_not_put_off_the_next_sweep() -> None:
    kernel = FakeKernel()
    kernel.at(at(0), handshake())

    class SlowOutput(JsonOutput):
        def findings(self, findings: list[Finding]) -> None:
            kernel.now_ns += 30 * SECOND_NS
            super().findings(findings)

    output = SlowOutput(io.StringIO(), header().clock, Selection([], nothing=False))
    run = Live(
        kernel, Analysis(header()), Printer(output), None, no_counters, lambda: kernel.now_ns
    )
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


def test_the_kernels_warning_is_in_the_timeline_live_and_replayed(tmp_path: Path) -> None:
    kernel = FakeKernel()
    kernel.at(at(0), handshake())
    warning = KernelWarning(at(0.001), 3311, None, "Possible SYN flooding on port 3311. Sending.")

    class Log:
        overruns = 2

        def warnings(self) -> tuple[KernelWarning, ...]:
            nonlocal coming
            come, coming = (coming, ()) if kernel.now_ns >= at(0.1) else ((), coming)
            return come

    coming: tuple[KernelWarning, ...] = (warning,)
    path = str(tmp_path / "run")
    lines = live(kernel, 8, record=path, kernel_log=Log())
    assert [entry["what"] for entry in lines[0]["timeline"]] == ["SYN", "kernel's log"]
    assert lines[0]["timeline"][1]["detail"] == warning.text
    assert lines[-1]["losses"]["kernel_log_overruns"] == 2
    stream = io.StringIO()
    run_replay(Replay(path), JsonOutput(stream, header().clock, Selection([], nothing=False)))
    assert [json.loads(line) for line in stream.getvalue().splitlines()] == lines


def test_the_kernels_warning_is_read_before_a_client_is_judged_however_late() -> None:
    """The process did not run since before the kernel wrote the warning."""
    kernel = Stalling()
    entry = handshake(accept_queue=0)
    kernel.at(at(0), entry)
    for time_ns in (at(1.2), at(1.4), at(1.6)):
        entry = ack_dropped(entry, time_ns, Moved.UNKNOWN)
        kernel.at(time_ns, entry, event(EventKind.ACK_DROPPED, entry, time_ns))
    written = [KernelWarning(at(1.1), 3311, None, "Possible SYN flooding on port 3311. Sending.")]

    class Log:
        overruns = 0

        def warnings(self) -> tuple[KernelWarning, ...]:
            return (written.pop(),) if written and kernel.now_ns >= written[0].time_ns else ()

    (verdict, *_) = live(kernel, 8, kernel_log=Log())
    assert "kernel's log" in [entry["what"] for entry in verdict["timeline"]]


def test_a_full_disk_is_said_in_the_summary_and_tracing_goes_on() -> None:
    kernel = FakeKernel()
    kernel.at(at(0), handshake())
    lines = live(kernel, 8, record="/dev/full")
    assert lines[0]["verdict"] == "ack-missing"
    assert lines[-1]["notes"] == ["the recording is incomplete: No space left on device"]


def test_a_disk_that_has_no_room_for_the_last_line_is_said_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without its end a recording ends early: the run must not end as if it were complete."""
    write = Recorder.write_line

    def fail_at_the_end(self: Recorder, values: Mapping[str, Any]) -> None:
        if "end" in values:
            self.failure = "No space left on device"
        else:
            write(self, values)

    monkeypatch.setattr(Recorder, "write_line", fail_at_the_end)
    lines = live(FakeKernel(), 1, record=str(tmp_path / "run"))
    assert lines[-1]["notes"] == ["the recording is incomplete: No space left on device"]
