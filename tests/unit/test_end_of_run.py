"""What fails at the end of a run, or ends it, takes nothing from what it has found."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tcpstuck_bpf import cli
from tcpstuck_bpf import run as run_module
from tcpstuck_bpf.analysis import Analysis
from tcpstuck_bpf.app.live import Live
from tcpstuck_bpf.app.playback import run_replay
from tcpstuck_bpf.app.printer import Printer
from tcpstuck_bpf.doctor.machine_report import _try
from tcpstuck_bpf.ending import Ending, close_all
from tcpstuck_bpf.errors import (
    EXIT_CANNOT_TRACE,
    EXIT_NOTHING_STUCK,
    EXIT_STUCK,
    CannotTraceError,
)
from tcpstuck_bpf.host import netns, netns_counters
from tcpstuck_bpf.host.bpf_syscall import RefusedError
from tcpstuck_bpf.model import KernelCounters, Sweep, TraceFilter
from tcpstuck_bpf.output.writers import JsonOutput, Selection
from tcpstuck_bpf.recording.replay import Recorder, Replay
from tcpstuck_bpf.terminal import CLEAR_LINE
from tests.builders import SECOND_NS, at, four_tuple, handshake, header
from tests.scripted_run import FakeKernel

Break = Callable[[pytest.MonkeyPatch, "Scripted"], None]


class Scripted(FakeKernel):
    """A source as the command takes it: with a client that is silent, or with none."""

    drop_reasons: Mapping[int, str] = {}

    def __init__(self, *, silent: bool = False) -> None:
        super().__init__()
        self.notes: list[str] = []
        if silent:
            self.table = {four_tuple(): handshake(first_syn_ns=1)}

    def stack(self, _number: int) -> tuple[int, ...]:
        return ()

    def poll(self, _timeout_ns: int) -> list[Any]:
        return []


def fail(*_arguments: object) -> Any:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.fixture
def _signals_as_before() -> Iterator[None]:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def _whoever_listens_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "doubts", lambda _wanted: ())


def run(source: Scripted, monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """The command on that source, for a moment."""
    monkeypatch.setattr(run_module, "_open_source", lambda *_: source)
    return cli.main(["-d", "0.01", *words])


def _no_detaching(monkeypatch: pytest.MonkeyPatch, source: Scripted) -> None:
    monkeypatch.setattr(source, "close", fail)


def _detaching_is_no_os_error(monkeypatch: pytest.MonkeyPatch, source: Scripted) -> None:
    def refuse() -> None:
        raise Exception("Failed to detach BPF from kprobe")  # as BCC does

    monkeypatch.setattr(source, "close", refuse)


def _no_closing_of_the_log(monkeypatch: pytest.MonkeyPatch, _source: Scripted) -> None:
    class Log:
        overruns = 0
        close = fail

        def warnings(self) -> tuple[()]:
            return ()

    monkeypatch.setattr(run_module, "open_kernel_log", lambda _clock_ns: (Log(), ()))


def _no_removal_of_the_ready_file(monkeypatch: pytest.MonkeyPatch, _source: Scripted) -> None:
    monkeypatch.setattr(Path, "unlink", fail)


def _no_closing_of_the_recording(monkeypatch: pytest.MonkeyPatch, _source: Scripted) -> None:
    monkeypatch.setattr(Recorder, "close", fail)


@pytest.mark.usefixtures("_signals_as_before")
def test_cookies_that_are_made_elsewhere_are_told_at_the_start_and_in_the_summary(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    note = "SYNPROXY may be in use"
    monkeypatch.setattr(run_module, "synproxy_note", lambda: note)
    assert run(Scripted(), monkeypatch, "--json") == EXIT_NOTHING_STUCK
    out, err = capsys.readouterr()
    assert json.loads(out.splitlines()[-1])["notes"] == [note]
    assert f"tcpstuck-trace: {note}" in err


@pytest.mark.usefixtures("_signals_as_before")
def test_why_there_may_be_nothing_to_see_is_told_at_the_start_and_in_the_summary(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def doubts(wanted: TraceFilter) -> tuple[str, ...]:
        asked.append(wanted.ports)
        return ("nobody listens on port 3311",)

    monkeypatch.setattr(run_module, "doubts", doubts)
    assert run(Scripted(), monkeypatch, "-p", "3311", "--json") == EXIT_NOTHING_STUCK
    out, err = capsys.readouterr()
    summary = json.loads(out.splitlines()[-1])
    assert summary["notes"] == ["nobody listens on port 3311"]
    assert summary["saw_nothing"] is True
    assert "tcpstuck-trace: nobody listens on port 3311" in err
    assert asked == [(3311,)] * 2


@pytest.mark.usefixtures("_signals_as_before")
@pytest.mark.parametrize(
    ("broken", "told"),
    [
        (_no_detaching, "not detached cleanly: Input/output error"),
        (_detaching_is_no_os_error, "not detached cleanly: Failed to detach BPF from kprobe"),
        (_no_closing_of_the_log, "log was not closed: Input/output error"),
        (_no_removal_of_the_ready_file, "ready was not removed: Input/output error"),
        (_no_closing_of_the_recording, "the recording is incomplete: Input/output error"),
    ],
)
def test_what_fails_after_the_summary_is_a_note(
    broken: Break,
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = Scripted()
    broken(monkeypatch, source)
    words = ("--json", "--record", str(tmp_path / "run"), "--ready-file", str(tmp_path / "ready"))
    assert run(source, monkeypatch, *words) == EXIT_NOTHING_STUCK
    out, err = capsys.readouterr()
    assert json.loads(out.splitlines()[-1])["type"] == "summary"
    assert told in err
    assert "Traceback" not in err
    assert source.closed == (broken not in (_no_detaching, _detaching_is_no_os_error))


@pytest.mark.usefixtures("_signals_as_before")
def test_an_error_at_the_beginning_is_not_replaced_by_one_of_closing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = Scripted()
    _no_detaching(monkeypatch, source)
    # The directory is there when the options are looked at, and then no more.
    monkeypatch.setattr("tcpstuck_bpf.run.refuse_unusable_files", lambda _options: None)
    status = run(source, monkeypatch, "--record", str(tmp_path / "missing" / "run"))
    assert status == cli.UsageError.exit_status
    err = capsys.readouterr().err
    assert "cannot record to" in err
    assert "not detached" in err


@pytest.mark.usefixtures("_signals_as_before")
def test_ctrl_c_while_it_detaches_does_not_replace_the_answer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On old kernels that takes seconds, and people are impatient."""
    source = Scripted()

    def slow() -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        source.closed = True

    monkeypatch.setattr(source, "close", slow)
    assert run(source, monkeypatch, "--json") == EXIT_NOTHING_STUCK
    assert source.closed
    assert '"type": "summary"' in capsys.readouterr().out


@pytest.mark.usefixtures("_signals_as_before")
def test_notes_that_nobody_can_read_are_no_reason_to_end() -> None:
    """Standard error on a full disk, or closed at its other end."""
    ours, theirs = os.pipe()
    os.close(ours)
    program = (
        "import sys\n"
        "from tcpstuck_bpf import cli, run\n"
        "from tests.unit.test_end_of_run import Scripted\n"
        "source = Scripted()\n"
        "source.notes.append('a note')\n"
        "run._open_source = lambda *_: source\n"
        "sys.exit(cli.main(['-d', '0.01', '--json']))\n"
    )
    with Path("/dev/full").open("w") as full:
        for stderr in (full, theirs):
            ended = subprocess.run(
                [sys.executable, "-c", program],
                stdout=subprocess.PIPE,
                stderr=stderr,
                timeout=60,
                check=False,
            )
            assert ended.returncode == EXIT_NOTHING_STUCK
            assert b'"type": "summary"' in ended.stdout
    os.close(theirs)


@pytest.mark.usefixtures("_signals_as_before")
def test_no_status_line_stays_where_a_run_is_abandoned(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is said next, and the prompt, would stand behind it."""
    source = Scripted()

    def interrupt(_timeout_ns: int) -> list[Any]:
        raise KeyboardInterrupt

    def first(_timeout_ns: int) -> list[Any]:
        if source.sweeps:
            monkeypatch.setattr(source, "poll", interrupt)
        return []

    monkeypatch.setattr(source, "poll", first)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    assert run(source, monkeypatch, "-d", "60", "-t", "0.003") == cli.EXIT_INTERRUPTED
    out = capsys.readouterr().out
    assert "no cookies yet, watching every port" in out
    assert out.endswith(CLEAR_LINE)
    assert source.closed


def refused(*_arguments: object) -> Any:
    raise RefusedError(errno.ENOMEM)


def live_of(kernel: FakeKernel, recorder: Recorder | None = None) -> tuple[Live, io.StringIO]:
    stream = io.StringIO()
    output = JsonOutput(stream, header().clock, Selection([], nothing=False))
    read = kernel.counters
    made = Live(kernel, Analysis(header()), Printer(output), recorder, read, lambda: kernel.now_ns)
    return made, stream


def lines_of(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


@pytest.mark.parametrize(
    ("method", "note"),
    [
        ("poll", "events that waited"),
        ("sweep", "the last sweep of the table failed"),
        ("forget", "the last sweep of the table failed"),
        ("counts", "the counters were not compared"),
        ("losses", "the losses"),
        ("counters", "the counters were not compared"),
    ],
)
def test_what_fails_at_the_end_is_a_note_of_the_summary_live_and_replayed(
    method: str, note: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = FakeKernel()
    kernel.at(at(0), handshake())
    recorder = Recorder(str(tmp_path / "run"), header())
    made, stream = live_of(kernel, recorder)
    finish = made._finish

    def break_it() -> Any:
        monkeypatch.setattr(kernel, method, refused)
        kernel.script.append((1 << 62, four_tuple(), None, None))
        if method == "counters":
            made.read_kernel_counters = refused
        return finish()

    monkeypatch.setattr(made, "_finish", break_it)
    assert made.run(5 * SECOND_NS, None).still_stuck == 1
    recorder.close()
    verdict, summary = lines_of(stream)
    assert verdict["verdict"] == "ack-missing"
    assert [told for told in summary["notes"] if note in told and "ENOMEM" in told]
    again = io.StringIO()
    output = JsonOutput(again, header().clock, Selection([], nothing=False))
    run_replay(Replay(str(tmp_path / "run")), output)
    assert lines_of(again) == [verdict, summary]


def test_what_ends_a_run_early_leaves_its_findings_and_is_said() -> None:
    kernel = FakeKernel()
    kernel.at(at(0), handshake())
    made, stream = live_of(kernel)

    def counters(wanted: Collection[int] | None) -> KernelCounters:
        if kernel.now_ns > at(5):
            raise CannotTraceError("the counters cannot be read", "no /proc", "mount it")
        return kernel.counters(wanted)

    sweep = kernel.sweep

    def no_sweep() -> Iterator[Sweep]:
        return refused() if kernel.now_ns > at(5) else sweep()  # type: ignore[no-any-return]

    kernel.sweep = no_sweep  # type: ignore[method-assign]
    made.read_kernel_counters = counters
    summary = made.run(60 * SECOND_NS, None)
    assert kernel.now_ns < at(10)
    assert summary.still_stuck == 1
    assert [line["type"] for line in lines_of(stream)] == ["verdict", "summary"]
    assert "the run ended early: ENOMEM" in summary.notes[0]


def test_an_output_that_fails_is_not_taken_for_the_run() -> None:
    class Broken(io.StringIO):
        def flush(self) -> None:
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    for seconds in (2, 8):
        kernel = FakeKernel()
        kernel.at(at(0), handshake())
        made, _ = live_of(kernel)
        made.printer = Printer(JsonOutput(Broken(), header().clock, Selection([], nothing=False)))
        with pytest.raises(BrokenPipeError):
            made.run(seconds * SECOND_NS, None)


@pytest.mark.usefixtures("_signals_as_before")
@pytest.mark.parametrize("silent", [True, False])
def test_a_run_that_ends_early_is_no_healthy_one(
    silent: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = Scripted(silent=silent)
    sweep, sweeps = source.sweep, iter(range(2))

    def once() -> Iterator[Sweep]:
        return sweep() if next(sweeps, None) == 0 else refused()  # type: ignore[no-any-return]

    monkeypatch.setattr(source, "sweep", once)
    status = run(source, monkeypatch, "-d", "60", "-t", "0.003", "--json")
    assert status == (EXIT_STUCK if silent else EXIT_CANNOT_TRACE)
    out, err = capsys.readouterr()
    assert json.loads(out.splitlines()[-1])["notes"][0].startswith("the run ended early: ENOMEM")
    assert len(err.splitlines()[-3:]) == 3
    assert "ENOMEM" in err


def test_an_error_that_nobody_expected_does_not_look_like_a_stuck_client(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for error in (ValueError("odd"), OSError(errno.EMFILE, os.strerror(errno.EMFILE))):

        def surprise(*_: object, raised: Exception = error) -> Any:
            raise raised

        monkeypatch.setattr(cli, "_run", surprise)
        assert cli.main([]) == EXIT_CANNOT_TRACE
        err = capsys.readouterr().err
        assert len(err.splitlines()) == 3
        assert str(error.args[-1]) in err
        assert "Traceback" not in err


def test_all_is_let_go_of_whatever_fails() -> None:
    done: list[str] = []
    notes: list[str] = []

    def failing(name: str) -> Callable[[], None]:
        def close() -> None:
            done.append(name)
            raise ValueError(name)

        return close

    with pytest.raises(ValueError, match="one"):
        close_all([failing("one"), failing("two")])
    ending = Ending(notes.append)
    ending.add("first", failing("a"))
    ending.add("second", failing("b"))
    with pytest.raises(KeyError, match="the error itself"), ending:
        raise KeyError("the error itself")
    assert done == ["one", "two", "b", "a"]
    assert notes == ["second: b", "first: a"]


def test_a_doctor_that_cannot_detach_says_so_and_has_its_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = Scripted()
    monkeypatch.setattr(source, "close", fail)
    trial = _try(lambda _settings: source, "fentry")
    assert trial.problem == ""
    assert [gap.why for gap in trial.gaps if gap.probe == "clean end"] == [
        "the programs were not detached cleanly: Input/output error"
    ]


def test_a_namespace_that_no_thread_can_enter_is_one_that_cannot_be_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_thread(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", no_thread)
    path = Path("/proc/self/ns/net")
    with pytest.raises(OSError, match="no thread"):
        netns.inside(path, lambda: 1)
    assert netns_counters._read_inside(path, lambda: {"one": 1}, netns.own_netns()) == {}


class EndedByItsSweeps(Scripted):
    """A run that ends after two sweeps, however long they take."""

    def poll(self, timeout_ns: int) -> list[Any]:
        if len(self.sweeps) >= 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().poll(timeout_ns)


@pytest.mark.usefixtures("_signals_as_before")
def test_a_run_without_a_terminal_says_that_it_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_module, "_heartbeat_interval", lambda _options: 1)
    assert run(EndedByItsSweeps(), monkeypatch, "-d", "60", "-t", "0.003") == EXIT_NOTHING_STUCK
    beats = [line for line in capsys.readouterr().err.splitlines() if "cookies sent" in line]
    assert beats
    assert beats[0].startswith("tcpstuck-trace: no cookies yet, watching every port for ")
    assert "--heartbeat off" in beats[0]


@pytest.mark.usefixtures("_signals_as_before")
def test_a_namespace_without_a_name_is_called_by_its_container(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    called = {four_tuple().netns: "web \x1b[2J (docker 3f4e5d6c7b8a)"}
    monkeypatch.setattr(run_module.netns_owners, "names", lambda: called)
    monkeypatch.setattr(run_module.netns, "own_netns", lambda: 1)
    assert run(Scripted(silent=True), monkeypatch, "-t", "0.003") == 1
    shown = capsys.readouterr().out
    assert "in network namespace web \\x1b[2J (docker 3f4e5d6c7b8a):" in shown
