"""Recordings of the client's side: what a run printed, and what is refused."""

from __future__ import annotations

import contextlib
import io
import json
import os
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tcpstuck_bpf.cli import main
from tcpstuck_bpf.client.analysis import ClientAnalysis
from tcpstuck_bpf.client.output import JsonOutput, TableOutput, selection
from tcpstuck_bpf.client.playback import run_client_replay
from tcpstuck_bpf.client.recording import ClientRecorder, ClientReplay
from tcpstuck_bpf.client.rows import Rows
from tcpstuck_bpf.client.steps import ClientHeader, ClientStep, Polled, WatchEnded
from tcpstuck_bpf.client.watch import Watch
from tcpstuck_bpf.errors import EXIT_NOT_KNOWN, EXIT_STUCK, EXIT_USAGE, RecordingError
from tcpstuck_bpf.model import SECOND_NS, TraceFilter, address_bytes
from tcpstuck_bpf.output.page import Page
from tcpstuck_bpf.recording.lines import RecordedLines
from tests.client_steps import STEPS, at, recorded
from tests.replay import test_replay as server_s_side
from tests.unit.client.test_watch import Machine, ScriptedMending
from tests.unit.client.world import CLOCK, NETNS, OTHER_NETNS, client_socket, header, poll

ALL = selection([], False)
EVERY_FACT = header(
    wanted=TraceFilter((25, 3306), 6, address_bytes("fd09::1"), NETNS),
    pid=7,
    own_netns=NETNS,
    netns_names={NETNS: "host", OTHER_NETNS: "web (docker 3f4e5d6c7b8a)"},
)


def opened(path: Path) -> ClientReplay:
    return ClientReplay(RecordedLines(str(path)))


def complete(path: Path) -> str:
    """Replay to the end; the JSON."""
    stream = io.StringIO()
    replay = opened(path)
    run_client_replay(replay, JsonOutput(stream, replay.header.clock, ALL))
    return stream.getvalue()


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return recorded(tmp_path_factory.mktemp("recording") / "run").read_bytes()


@pytest.mark.parametrize("start", [header(), EVERY_FACT], ids=["few", "every"])
def test_header_and_steps_come_back(tmp_path: Path, start: ClientHeader) -> None:
    replay = opened(recorded(tmp_path / "run", start=start))
    assert replay.header == start
    assert tuple(replay.steps()) == STEPS


def test_only_the_owner_may_read_it(tmp_path: Path) -> None:
    path = recorded(tmp_path / "run")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_quiet_poll_of_500_sockets_takes_few_bytes(tmp_path: Path) -> None:
    polls = [
        Polled(poll(second, *(client_socket(n, 60 + second) for n in range(1, 501))))
        for second in range(3)
    ]
    # One that ended leaves a gap among the numbers.
    polls.append(Polled(poll(3, *(client_socket(n, 63) for n in range(1, 501) if n != 250))))
    path = recorded(tmp_path / "run", (*polls, STEPS[-1]._replace(now_ns=at(4))))
    _, first, *quiet, _ = path.read_bytes().splitlines()
    assert len(first) > 500 * 100
    assert [len(line) < 300 for line in quiet] == [True] * 3


def live(path: Path, output_for: Callable[[ClientHeader], Any]) -> None:
    """A run over scripted sockets, with a recording, and everything that may happen in it."""
    sockets = (
        client_socket(1, 60, keepalive_ns=300 * SECOND_NS),
        client_socket(2, 1.5),
        client_socket(3, 7, netns=OTHER_NETNS, server="fd09::1", client="fd09::2"),
        client_socket(4, 200, inode=0),
        client_socket(5, 7),
    )
    machine = Machine(*sockets, mending=ScriptedMending())
    start = header(own_netns=NETNS, netns_names={OTHER_NETNS: "web"})
    watch = Watch(
        machine,
        ClientAnalysis(start),
        output_for(start),
        machine.owners_of,
        recorder=ClientRecorder(str(path), start),
        clock_ns=lambda: machine.now_ns,
        cpu_ns=lambda: machine.now_ns,
        sleep=machine.sleep,
        clock_note=lambda: "its clock was set",
        mending=ScriptedMending(),
    )

    def change(number: int) -> None:
        # The kernel's hash table has no order, and its readings jitter.
        machine.sockets = tuple(
            one._replace(age_ns=one.age_ns + number * 1_000_000)
            for one in (*sockets[number % 5 :], *sockets[: number % 5])
        )
        if number == 4:
            machine.sockets = (client_socket(5, 0, bytes_received=9), *machine.sockets[:4])
        if number >= 6:
            machine.sockets = machine.sockets[:2]
        machine.beyond = 3 * (number == 3)

    machine.at_poll = change
    watch.run(6 * SECOND_NS, None)
    assert watch.recorder is not None
    watch.recorder.close()


def table(stream: io.StringIO, start: ClientHeader) -> TableOutput:
    page = Page(
        clock=start.clock,
        width=80,
        colour=False,
        own_netns=start.own_netns,
        netns_names=start.netns_names,
    )
    return TableOutput(stream, page, Rows(page, each=False, verbose=False), ALL)


@pytest.mark.parametrize("form", ["json", "table"])
def test_a_replay_prints_what_the_run_printed(tmp_path: Path, form: str) -> None:
    printed, again = io.StringIO(), io.StringIO()

    def output_for(stream: io.StringIO, start: ClientHeader) -> Any:
        return JsonOutput(stream, start.clock, ALL) if form == "json" else table(stream, start)

    path = tmp_path / "run"
    live(path, lambda start: output_for(printed, start))
    replay = opened(path)
    run_client_replay(replay, output_for(again, replay.header))
    assert again.getvalue() == printed.getvalue()
    for word in ("greeting-missing", "server-forgot", "its clock was set", "challenge"):
        assert word in printed.getvalue()


def test_a_replay_judges(tmp_path: Path) -> None:
    lines = [json.loads(line) for line in complete(recorded(tmp_path / "run")).splitlines()]
    told = [(one["type"], one.get("verdict"), one.get("client_port")) for one in lines]
    assert told == [
        ("verdict", "greeting-missing", 40_004),
        ("verdict", "greeting-missing", 40_001),
        ("verdict", "greeting-missing", 40_002),
        ("verdict", "greeting-missing", 40_003),
        ("rescue", None, 40_002),
        ("rescue", None, 40_001),
        ("verdict", "server-forgot", 40_001),
        ("verdict", "rescued", 40_002),
        ("summary", None, None),
    ]
    summary = lines[-1]
    assert summary["notes"] == ["a note"]
    assert summary["losses"] == {"subflows": 1, "namespaces_beyond": 2}
    assert (summary["polls"], summary["established"], summary["cut_off_time"]) == (4, 6, None)
    assert summary["rescue"]["left_alone"] == {"its turn has not come": 3}


def ends_before_owners(cut: bytes) -> bool:
    """Whether the last whole line is a poll: the owners of what it shows may come after it."""
    return cut[: cut.rindex(b"\n")].rpartition(b"\n")[2].startswith(b'{"poll"')


def without_owners(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: one for name, one in line.items() if "owner" not in name} for line in lines]


@settings(max_examples=100)
@given(st.data())
def test_a_cut_recording_replays_as_far_as_it_goes(
    tmp_path_factory: pytest.TempPathFactory, recording: bytes, data: st.DataObject
) -> None:
    """Whatever byte is the last: the run was killed, or its disk was full."""
    path = tmp_path_factory.mktemp("cut") / "run"
    length = data.draw(st.integers(0, len(recording) - 1))
    path.write_bytes(recording[:length])
    if recording[:length].count(b"\n") < 2:
        with pytest.raises(RecordingError):
            complete(path)
        return
    *told, summary = (json.loads(line) for line in complete(path).splitlines())
    path.write_bytes(recording)
    *all_told, _ = (json.loads(line) for line in complete(path).splitlines())
    if ends_before_owners(recording[:length]):
        told, all_told = map(without_owners, (told, all_told))
    assert told == all_told[: len(told)]
    assert summary["cut_off_time"] >= summary["start_time"]
    assert f"ends early, at {summary['cut_off_time']}" in summary["notes"][0]
    assert (summary["longest_poll_ms"], summary["rescue"]) == (None, None)


def test_a_person_is_told_that_it_ends_early(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recorded(tmp_path / "run", STEPS[:4])
    assert main(["--replay", str(path)]) == EXIT_STUCK
    shown = capsys.readouterr().out
    assert "The recording ends early, at " in shown
    assert "nobody looked for its owner" not in shown


@settings(max_examples=300)
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


DIGITS = st.sampled_from(["0", "1", "-1", "1e5", "null", "true", '""', "[]", "{}", str(2**64 - 1)])


@settings(max_examples=300)
@given(st.data())
def test_values_of_another_kind_are_an_error_or_a_run(
    tmp_path_factory: pytest.TempPathFactory, recording: bytes, data: st.DataObject
) -> None:
    """Whole JSON, in which a number is something else: what random bytes hardly ever make."""
    text = recording.decode()
    numbers = [i for i in range(1, len(text)) if text[i].isdigit() and text[i - 1] in ":,["]
    begin = data.draw(st.sampled_from(numbers))
    end = next(i for i in range(begin, len(text)) if not text[i].isdigit())
    path = tmp_path_factory.mktemp("odd") / "run"
    path.write_text(text[:begin] + data.draw(DIGITS) + text[end:])
    with contextlib.suppress(RecordingError):
        assert complete(path).endswith("\n")


@pytest.mark.parametrize(
    "odd",
    [
        b"{}\n",
        b"[]\n",
        b'{"owners":[]}\n',
        b'{"poll":1,"sockets":[],"kept":[],"established":0}\n',
        b'{"poll":1000000000000,"sockets":[],"kept":[[0,9]],"established":0}\n',
        b'{"poll":1000000000000,"sockets":[],"kept":[[0,0],[0,0]],"established":0}\n',
    ],
    ids=["empty", "list", "owners", "earlier", "unknown-number", "twice"],
)
def test_a_line_that_nobody_wrote_is_damage(tmp_path: Path, odd: bytes) -> None:
    first, *rest = recorded(tmp_path / "run").read_bytes().splitlines(keepends=True)
    (tmp_path / "odd").write_bytes(b"".join([first, rest[0], odd, *rest[1:]]))
    with pytest.raises(RecordingError, match="damaged") as refused:
        complete(tmp_path / "odd")
    assert "line 3 " in refused.value.why


def test_a_recording_without_polls_is_damaged_and_an_empty_one_is_said(tmp_path: Path) -> None:
    with pytest.raises(RecordingError, match="damaged"):
        complete(recorded(tmp_path / "run", STEPS[-1:]))
    with pytest.raises(RecordingError, match="is empty"):
        complete(recorded(tmp_path / "run", ()))


def test_a_side_that_nobody_knows_is_damage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recorded(tmp_path / "run")
    path.write_bytes(path.read_bytes().replace(b'"side":"client"', b'"side":"middle"'))
    assert main(["--replay", str(path)]) == EXIT_USAGE
    assert "is damaged" in capsys.readouterr().err


def test_a_full_disk_ends_the_recording_only_and_is_said() -> None:
    machine = Machine(client_socket(1, 60), recorder=ClientRecorder("/dev/full", header()))
    assert machine.run(2).notes == ("the recording is incomplete: No space left on device",)
    assert machine.summed.stuck == 1


def lines_of(
    path: Path, capsys: pytest.CaptureFixture[str], *words: str, status: int = EXIT_STUCK
) -> list[dict[str, Any]]:
    assert main(["--replay", str(path), "--json", *words]) == status
    out, err = capsys.readouterr()
    assert err == ""
    return [json.loads(line) for line in out.splitlines()]


@pytest.mark.parametrize(
    ("words", "ports"),
    [
        ([], {40_001, 40_002, 40_003, 40_004}),
        (["--client"], {40_001, 40_002, 40_003, 40_004}),
        (["-p", "25"], {40_003}),
        (["-4"], {40_001, 40_002, 40_004}),
        (["-6"], {40_003}),
        (["--listener", "fd09::1"], {40_003}),
        (["--netns", "web"], {40_003}),
        (["--netns", str(NETNS)], {40_001, 40_002, 40_004}),
    ],
)
def test_a_part_has_the_verdicts_of_its_connections_alone(
    words: list[str], ports: set[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = replace(EVERY_FACT, wanted=TraceFilter((25, 3306)))
    path = recorded(tmp_path / "run", start=start)
    whole = lines_of(path, capsys)[:-1]
    *lines, summary = lines_of(path, capsys, *words)
    assert lines == [one for one in whole if one["client_port"] in ports]
    assert sum(summary["verdicts"].values()) == len(ports)
    narrowed = len(ports) < 4
    assert (summary["established"] is None) == narrowed
    assert any("verdicts cover " in note for note in summary["notes"]) == narrowed


def test_a_part_in_which_nothing_waited_is_no_all_clear(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The recording had losses, and healthy connections of the part cannot be told apart."""
    path = recorded(tmp_path / "run", start=header(wanted=TraceFilter()))
    (summary,) = lines_of(path, capsys, "-p", "110", status=EXIT_NOT_KNOWN)
    assert (summary["saw_nothing"], summary["established"]) == (True, None)
    assert main(["--replay", str(path), "-p", "110"]) == EXIT_NOT_KNOWN
    shown = " ".join(capsys.readouterr().out.split())
    assert "no connection of port 110 is seen to wait" in shown
    assert "connections, of which" not in shown


def test_with_another_time_out_it_is_judged_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A shorter one: its owner is known once the run itself asked; a longer one: at once."""
    path = recorded(tmp_path / "run")
    only = ("--only", "greeting-missing")
    *verdicts, summary = lines_of(path, capsys, "-t", "500ms", *only)
    (first,) = (one for one in verdicts if one["client_port"] == 40_003 and "verdict" in one)
    assert first["owners"] == []
    assert first["owner_unknown"] == "nobody looked for its owner"
    (group,) = summary["stuck_groups"]
    assert [one["name"] for one in group["processes"]] == ["postfix"]
    assert "judged with a time-out of 500.0 ms" in summary["notes"][1]
    longer = [one for one in lines_of(path, capsys, "-t", "13s", *only) if "verdict" in one]
    assert [one["client_port"] for one in longer] == [40_004, 40_001, 40_002]
    assert [one["name"] for one in longer[2]["owners"]] == ["php-fpm"]


@pytest.mark.parametrize("option", ["--each", "-v", "--summary"])
def test_the_options_of_the_table_work(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recorded(tmp_path / "run")
    assert main(["--replay", str(path), option]) == EXIT_STUCK
    shown = capsys.readouterr().out
    assert ("40004" in shown) == (option != "--summary")
    assert ("evidence" in shown or "seen: " in shown) == (option == "-v")


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["--plot", "x.svg"], "--plot cannot be combined with a recording of the client's side"),
        (["--pcap", "x"], "--pcap cannot be combined with a recording of the client's side"),
        (["--metrics-file", "x"], "--metrics-file cannot be combined with a recording of the"),
        (["--pid", "7"], "--pid cannot be combined with --replay"),
        (["--client", "--rescue"], "--rescue cannot be combined with --replay"),
        (["--record", "x"], "--record cannot be combined with --replay"),
        (["--only", "ack-missing"], "--only ack-missing cannot be combined with a recording"),
        (["-p", "443"], "-p selects more than the recording contains"),
        (["--netns", "nowhere"], "the recording has no network namespace nowhere"),
    ],
)
def test_what_does_not_fit_is_refused_in_three_lines(
    words: list[str], what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recorded(tmp_path / "run")
    assert main(["--replay", str(path), *words]) == EXIT_USAGE
    out, err = capsys.readouterr()
    assert out == ""
    first, why, remedy = err.splitlines()
    assert what in first
    assert (why[:7], remedy[:10]) == ("  why: ", "  remedy: ")


@pytest.mark.parametrize(
    "words", [["--client"], ["--only", "greeting-missing"]], ids=["side", "verdict"]
)
def test_a_recording_of_the_server_s_side_is_not_the_client_s(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = server_s_side.recorded(tmp_path / "run")
    assert main(["--replay", str(path), *words]) == EXIT_USAGE
    assert "cannot be combined with this recording" in capsys.readouterr().err


def test_a_recording_is_read_from_standard_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = recorded(tmp_path / "run")
    with path.open() as stream:
        monkeypatch.setattr("sys.stdin", stream)
        assert main(["--replay", "-", "--json"]) == EXIT_STUCK
    assert capsys.readouterr().out == complete(path)


def test_a_bad_directory_is_refused_before_anything_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(tmp_path / "missing" / "run")
    assert main(["--client", "-p", "1", "-d", "1ms", "--record", path]) == EXIT_USAGE
    assert f"--record {path} cannot be written" in capsys.readouterr().err


def test_times_are_those_of_the_run(tmp_path: Path) -> None:
    steps: tuple[ClientStep, ...] = (
        Polled(poll(0, client_socket(1, 60))),
        WatchEnded(at(2), (), 1, 1),
    )
    summary = json.loads(complete(recorded(tmp_path / "run", steps)).splitlines()[-1])
    assert summary["start_time"] == "2023-11-14T22:13:20.000000Z"
    assert CLOCK.realtime_ns == 1_700_000_000 * SECOND_NS
    assert summary["duration_ms"] == 2_000


def test_a_run_without_privileges_can_be_recorded_and_replayed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On this machine's own sockets; the port is nobody's."""
    path = tmp_path / "run"
    here = ["--netns", "/proc/self/ns/net"]
    words = ["--client", "-p", "1", "-d", "1ms", "--json", *here, "--record", str(path)]
    status = main(words)
    printed = capsys.readouterr().out
    assert printed
    assert main(["--replay", str(path), "--json"]) == status
    assert capsys.readouterr().out == printed
    assert path.stat().st_uid == os.geteuid()
