"""Recordings: what is written is read back, and a damaged file is an error with a remedy."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tcpstuck_bpf.app.playback import run_replay
from tcpstuck_bpf.cli import main
from tcpstuck_bpf.errors import EXIT_NOTHING_STUCK, EXIT_STUCK, RecordingError
from tcpstuck_bpf.model import (
    Attempt,
    EventKind,
    Handshake,
    KernelWarning,
    NetnsCount,
    Rescue,
    Row,
    Sweep,
    Tally,
)
from tcpstuck_bpf.output.writers import JsonOutput, Selection
from tcpstuck_bpf.recording import lines as recorded_lines
from tcpstuck_bpf.recording import replay
from tcpstuck_bpf.recording.replay import Recorder, Replay
from tcpstuck_bpf.rulesets import DropRule, KernelNames, Ruleset
from tcpstuck_bpf.steps import (
    Advanced,
    Ended,
    Header,
    Listened,
    Logged,
    Named,
    Observed,
    Rescued,
    Step,
    Swept,
    TallyTaken,
)
from tests.builders import (
    NAMES,
    ack_dropped,
    ack_filtered,
    at,
    event,
    four_tuple,
    handshake,
    header,
    identity,
    sweep,
    tally,
)
from tests.unit.judge.test_listener import overflown, seen

FILTERED = ack_filtered(handshake(), at(4.05))
END = Ended(at(9), {"undecodable_events": 0}, ("a note",))
STEPS: tuple[Step, ...] = (
    TallyTaken(tally(at(0))),
    Observed((event(EventKind.ACK_DROPPED, ack_dropped(handshake(), at(0.1)), at(0.1)),)),
    Swept(sweep(at(1), handshake(), handshake(syn_count=2))),
    Advanced(at(1)),
    Swept(sweep(at(4), handshake())),
    Advanced(at(4)),
    Named(
        KernelNames(
            NAMES.places,
            {**NAMES.reasons, 0: None},
            NAMES.stacks,
            {
                four_tuple().netns: (
                    Ruleset(
                        (
                            DropRule("inet", "t", "c", "input", "handle", 4, (("dport", "3311"),)),
                            DropRule("ip", "t", "c", "input", "number", 5, (), may_reset=True),
                        ),
                        ("the rules of iptables-save cannot be read: it is not installed",),
                        at(4.1),
                    ),
                )
            },
        )
    ),
    Observed((event(EventKind.ACK_FILTERED, FILTERED, at(4.05), four_tuple(2)),)),
    Swept(sweep(at(8), handshake(), handshake(syn_count=2), FILTERED)),
    Advanced(at(8)),
    Rescued(
        Rescue(
            (
                Attempt(identity(handshake()), at(4.1), 1, "sent"),
                Attempt(identity(handshake(), four_tuple(1)), at(4.2), 2, "failed: EPERM"),
            ),
            (identity(handshake(), four_tuple(1)),),
            {"not known": 3},
        )
    ),
    Listened((seen(overflown()),)),
    Logged(
        (
            KernelWarning(at(4), 3311, None, "Possible SYN flooding on port 3311."),
            KernelWarning(at(4), 3311, four_tuple().server_address, "Possible SYN flooding"),
        )
    ),
    Advanced(at(5)),
    TallyTaken(tally(at(9), kernel=2, traced=2)),
    END,
)


def recorded(path: Path, steps: tuple[Step, ...] = STEPS, start: Header | None = None) -> Path:
    recorder = Recorder(str(path), header() if start is None else start)
    for step in steps:
        recorder.write(step)
    recorder.close()
    assert recorder.failure is None
    return path


def test_a_header_is_read_back_and_one_of_before_the_names_as_well(tmp_path: Path) -> None:
    written = header(own_netns=7, netns_names={7: "host", 8: "web"})
    path = recorded(tmp_path / "run", start=written)
    assert Replay(str(path)).header == written
    first, rest = path.read_bytes().split(b"\n", 1)
    values = json.loads(first)
    del values["own_netns"], values["netns_names"]
    path.write_bytes(json.dumps(values).encode() + b"\n" + rest)
    assert Replay(str(path)).header == header()


def replayed(path: Path) -> tuple[Step, ...]:
    return tuple(Replay(str(path)).steps())


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return recorded(tmp_path_factory.mktemp("recording") / "run").read_bytes()


def test_every_step_comes_back(tmp_path: Path) -> None:
    path = recorded(tmp_path / "run")
    assert replayed(path) == STEPS
    assert Replay(str(path)).header == header()


entries = st.builds(
    handshake, syn_count=st.integers(1, 9), cookie_isn=st.integers(0, (1 << 32) - 1)
)
tables = st.dictionaries(st.integers(0, 5), entries)


@given(st.lists(tables, max_size=6))
def test_sweeps_are_rebuilt_from_differences(
    tmp_path_factory: pytest.TempPathFactory, seen: list[dict[int, Handshake]]
) -> None:
    sweeps = [
        Sweep(at(second), tuple(Row(four_tuple(n), entry) for n, entry in table.items()))
        for second, table in enumerate(seen)
    ]
    path = tmp_path_factory.mktemp("sweeps") / "run"
    recorded(path, (*map(Swept, sweeps), END))
    again = [step.sweep for step in replayed(path) if isinstance(step, Swept)]
    assert [(s.time_ns, set(s.rows)) for s in again] == [(s.time_ns, set(s.rows)) for s in sweeps]


def test_an_unchanged_table_costs_nothing(tmp_path: Path) -> None:
    many = sweep(at(1), *[handshake()] * 500)
    path = recorded(tmp_path / "run", (Swept(many), Swept(many._replace(time_ns=at(2))), END))
    first, second = path.read_bytes().splitlines()[1:3]
    assert len(second) < 100 < len(first)


def test_a_new_count_of_a_tally_comes_back_by_name(tmp_path: Path) -> None:
    counted = Tally(at(1), {}, {7: dict.fromkeys(NetnsCount, 3)}, {})
    path = recorded(tmp_path / "run", (TallyTaken(counted), END))
    assert replayed(path)[0] == TallyTaken(counted)


def complete(path: Path) -> str:
    """Replay to the end, as the tool does; the JSON."""
    stream = io.StringIO()
    opened = Replay(str(path))
    run_replay(opened, JsonOutput(stream, opened.header.clock, Selection([], nothing=False)))
    return stream.getvalue()


def test_a_replay_judges(tmp_path: Path) -> None:
    lines = [json.loads(line) for line in complete(recorded(tmp_path / "run")).splitlines()]
    told = [(line["type"], line.get("verdict"), line.get("outcome")) for line in lines]
    assert told == [
        ("verdict", "accept-queue-full", None),
        ("verdict", "ack-filtered", None),
        ("rescue", None, "sent"),
        ("rescue", None, "failed: EPERM"),
        ("listener", None, None),
        ("summary", None, None),
    ]
    rescue = lines[-1]["rescue"]
    assert (rescue["sent"], rescue["failed"]) == (1, {"failed: EPERM": 1})
    assert rescue["left_alone"] == {"not known": 3}
    assert lines[-1]["type"] == "summary"
    assert lines[-1]["notes"] == ["a note"]


@settings(max_examples=100)
@given(st.data())
def test_a_cut_recording_replays_as_far_as_it_goes(
    tmp_path_factory: pytest.TempPathFactory, recording: bytes, data: st.DataObject
) -> None:
    """Whatever byte is the last: the run was killed, or its disk was full."""
    path = tmp_path_factory.mktemp("cut") / "run"
    length = data.draw(st.integers(0, len(recording) - 1))
    path.write_bytes(recording[:length])
    whole = recording[:length].count(b"\n")
    if whole < 2:
        with pytest.raises(RecordingError):
            complete(path)
        return
    *told, summary = (json.loads(line) for line in complete(path).splitlines())
    path.write_bytes(recording)
    *all_told, all_summary = (json.loads(line) for line in complete(path).splitlines())
    told = [line for line in told if line["type"] != "listener"]
    assert told == all_told[: len(told)]
    assert all_summary["cut_off_time"] is None
    assert summary["cut_off_time"] >= summary["start_time"]
    assert f"ends early, at {summary['cut_off_time']}" in summary["notes"][0]


@pytest.mark.parametrize("tail", [b"", b'{"adv', b"\0" * 4096, b'{"end":1009000000000}'])
def test_what_follows_the_last_whole_line_does_not_count(tmp_path: Path, tail: bytes) -> None:
    """Zeros are what a file system leaves where the power failed."""
    path = recorded(tmp_path / "run", STEPS[:6])
    path.write_bytes(path.read_bytes() + tail)
    *steps, end = replayed(path)
    assert tuple(steps) == STEPS[:6]
    assert isinstance(end, Ended)
    assert (end.now_ns, end.cut_off) == (at(4), True)


@pytest.mark.parametrize("cut", [0, 30])
def test_damage_in_the_middle_is_refused_with_or_without_an_end(tmp_path: Path, cut: int) -> None:
    path = recorded(tmp_path / "run")
    lines = path.read_bytes().splitlines(keepends=True)
    for odd in (b"\n", b"{}\n", b"[]\n", b'{"advance":-1}\n', lines[-1], lines[0], b"\0\n"):
        content = b"".join([*lines[:4], odd, *lines[4:]])
        path.write_bytes(content[: len(content) - cut])
        with pytest.raises(RecordingError, match="damaged"):
            complete(path)


@pytest.mark.parametrize("tail", [b'{"advance":1009000000000}\n', b"{", b"\n", b"\0"])
def test_nothing_comes_after_the_end(tmp_path: Path, tail: bytes) -> None:
    path = recorded(tmp_path / "run")
    path.write_bytes(path.read_bytes() + tail)
    with pytest.raises(RecordingError) as refused:
        complete(path)
    assert "after the line that ends" in refused.value.why


def test_a_recording_that_holds_nothing_is_said(tmp_path: Path) -> None:
    for steps in ((), (Logged(()),)):
        with pytest.raises(RecordingError, match="is empty"):
            complete(recorded(tmp_path / "run", steps))


def test_a_line_without_an_end_is_not_read_into_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = recorded(tmp_path / "run", STEPS[:1])
    monkeypatch.setattr(recorded_lines, "_LONGEST_LINE_BYTES", 1 << 20)
    with path.open("r+b") as file:
        file.truncate(1 << 42)
    with pytest.raises(RecordingError) as refused:
        complete(path)
    assert "line 3 has more than 1 MiB" in refused.value.why


def test_a_recording_that_is_larger_than_the_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_large(*_: object) -> None:
        raise MemoryError

    for module, name in ((replay, "step_of"), (json, "loads")):
        path = recorded(tmp_path / "run")
        opened = Replay(str(path))
        with monkeypatch.context() as patched:
            patched.setattr(module, name, too_large)
            with pytest.raises(RecordingError) as refused:
                list(opened.steps())
        assert "does not fit into memory" in refused.value.why


@pytest.mark.parametrize("number", ["9" * 2_000_000, f'"{"9" * 2_000_000}"'])
def test_a_number_without_an_end_is_not_read(tmp_path: Path, number: str) -> None:
    """Where Python has no bound of its own it would take minutes."""
    path = recorded(tmp_path / "run", STEPS[:1])
    with path.open("a", encoding="ascii") as file:
        file.write(f'{{"advance":{number}}}\n')
    with pytest.raises(RecordingError, match="damaged") as refused:
        complete(path)
    assert "number that is too long" in refused.value.why


def test_few_bytes_do_not_become_many_rows(tmp_path: Path) -> None:
    """Twenty million rows from 400 kB, before the runs had to be apart."""
    many = sweep(at(1), *[handshake()] * 500)
    path = recorded(tmp_path / "run", (STEPS[0], Swept(many)))
    runs = ",".join(["[0,499]"] * 40_000)
    with path.open("a", encoding="ascii") as file:
        file.write(f'{{"sweep":{at(2)},"part":"last","rows":[],"kept":[{runs}]}}\n')
    with pytest.raises(RecordingError, match="damaged"):
        complete(path)


KILLED = """
import os, signal, sys
from tests.builders import header
from tests.replay.test_replay import STEPS
from tcpstuck_bpf.recording.replay import Recorder
recorder = Recorder(sys.argv[1], header())
for step in STEPS[:int(sys.argv[2])]:
    recorder.write(step)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(("steps", "status"), [(6, EXIT_STUCK), (1, EXIT_NOTHING_STUCK)])
def test_what_a_killed_run_has_seen_is_told(
    steps: int, status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(tmp_path / "run")
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, path, str(steps)], timeout=60, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    assert main(["--replay", path, "--json"]) == status
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["ever_stuck"] == (status == EXIT_STUCK)
    assert summary["cut_off_time"] is not None
    assert main(["--replay", path]) == status
    shown = capsys.readouterr().out
    assert "The recording ends early, at " in shown
    assert "note: the recording ends early, at " in shown


@settings(max_examples=200)
@given(st.data())
def test_a_damaged_recording_is_an_error_or_a_run(
    tmp_path_factory: pytest.TempPathFactory, recording: bytes, data: st.DataObject
) -> None:
    damaged = bytearray(recording)
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("damaged") / "run"
    path.write_bytes(damaged)
    with contextlib.suppress(RecordingError):
        assert complete(path).endswith("\n")


def test_values_that_cannot_be_are_damage(tmp_path: Path) -> None:
    """Whole JSON, and numbers that no recorder has written."""
    text = recorded(tmp_path / "run").read_text()
    address = four_tuple().server_address.hex()
    for whole, odd in (
        (
            f'"listeners":[[[{four_tuple().netns},"{address}"',
            f'"listeners":[[[{four_tuple().netns},""',
        ),
        ('"table_capacity":1024', f'"table_capacity":{1 << 63}'),
    ):
        assert whole in text
        (tmp_path / "odd").write_text(text.replace(whole, odd))
        with pytest.raises(RecordingError, match="damaged"):
            complete(tmp_path / "odd")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not a recording"),
        (b"\x7fELF\x02\x01\x01\x00", "not a recording"),
        (b'{"format": "something else"}\n', "not a recording"),
        (b"[1, 2]\n", "not a recording"),
        (gzip.compress(b"anything"), "compressed"),
        (b"[" * 100_000, "not a recording"),
        (b'{"format": "tcpstuck-recording", "version": 2}\n', "newer"),
        (b'{"format": "tcpstuck-recording", "version": 1}\n', "damaged"),
    ],
)
def test_what_is_no_recording_is_said(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(RecordingError, match=words):
        Replay(str(path))


def test_what_is_no_recording_is_not_read_to_its_end(tmp_path: Path) -> None:
    """A disk image or a capture named by mistake may be larger than the memory."""
    path = tmp_path / "image"
    with path.open("wb") as file:
        file.truncate(1 << 42)
    with pytest.raises(RecordingError, match="not a recording"):
        Replay(str(path))


def test_a_directory_or_missing_file_is_said(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(RecordingError, match="cannot read"):
            Replay(str(path))
    for path in (tmp_path, tmp_path / "missing" / "run"):
        with pytest.raises(RecordingError, match="cannot record"):
            Recorder(str(path), header())


def test_a_recording_without_counters_is_damaged(tmp_path: Path) -> None:
    with pytest.raises(RecordingError, match="damaged"):
        complete(recorded(tmp_path / "run", (Advanced(at(1)), END)))


def test_a_full_disk_ends_the_recording_only() -> None:
    recorder = Recorder("/dev/full", header())
    for step in STEPS:
        recorder.write(step)
    recorder.close()
    assert recorder.failure == "No space left on device"
