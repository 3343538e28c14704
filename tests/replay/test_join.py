"""Two recordings of the same connections, one of each side: what both ends say of each."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from lab.golden_files import kept_recording, kept_truth
from tcpstuck_bpf.cli import main
from tcpstuck_bpf.client.steps import ClientStep, Owned, Polled, WatchEnded
from tcpstuck_bpf.errors import EXIT_NOT_KNOWN, EXIT_NOTHING_STUCK, EXIT_STUCK, EXIT_USAGE
from tcpstuck_bpf.model import EventKind, FourTuple, Row, Sweep, address_bytes
from tcpstuck_bpf.recording.replay import Replay
from tcpstuck_bpf.steps import Advanced, Ended, Observed, Step, Swept, TallyTaken, WallClock
from tests import builders, client_steps
from tests.builders import SECOND_NS, START_NS, ack_dropped, at, event, four_tuple, handshake, tally
from tests.property.test_schema import VALIDATOR, assert_valid, keys_of
from tests.replay.test_json_keys import DOCS, sections
from tests.replay.test_replay import recorded
from tests.unit.client.world import OTHER_NETNS, client_socket, header, owned, poll

FULL = range(1, 13)
"""Clients whose ACK met a full accept queue."""
SILENT, ELSEWHERE, SLOW = 13, 14, 15
"""One whose ACK never came, one of another host, and one that the server accepted and forgot."""
AHEAD_NS = 1_500_000_000
"""The client's clock, against the server's."""
WAY_NS = 2_000_000
CLIENT_CLOCK = WallClock(500 * SECOND_NS, builders.header().clock.realtime_ns + AHEAD_NS)


def syn_ns(number: int) -> int:
    """When the SYN of a client came to the server."""
    return at(number / 10)


def server_s(path: Path, *, numbers: tuple[int, ...] = (*FULL, SILENT, ELSEWHERE)) -> Path:
    """The server's recording."""
    entries = {n: handshake(syn_ns(n)) for n in numbers}
    dropped = {n: ack_dropped(entries[n], syn_ns(n) + WAY_NS) for n in numbers if n in FULL}
    rows = tuple(Row(four_tuple(n), dropped.get(n, entries[n])) for n in numbers)
    steps: tuple[Step, ...] = (
        TallyTaken(tally(at(0))),
        Observed(
            tuple(
                event(EventKind.ACK_DROPPED, entry, entry.last_ack_dropped_ns, four_tuple(n))
                for n, entry in dropped.items()
            )
        ),
        Swept(Sweep(at(2), rows)),
        Advanced(at(2)),
        Swept(Sweep(at(9), rows)),
        Advanced(at(9)),
        TallyTaken(tally(at(9), kernel=len(rows), traced=len(rows))),
        Ended(at(9), {}, ("the server's note",)),
    )
    return recorded(path, steps)


def client_s(
    path: Path,
    *,
    clock: WallClock = CLIENT_CLOCK,
    numbers: tuple[int, ...] = (*FULL, SILENT, SLOW),
    gone: tuple[int, ...] = (),
    seen: Any = lambda who: who,
) -> Path:
    """The client's recording; `seen`: each 4-tuple as the client sees it."""

    def sockets(after_s: float, without: tuple[int, ...] = ()) -> Polled:
        found = []
        for n in numbers:
            if n in without:
                continue
            age_ns = round(after_s * SECOND_NS) - (syn_ns(n) - START_NS) - WAY_NS
            who: FourTuple = seen(four_tuple(n)._replace(netns=OTHER_NETNS))
            found.append(client_socket(n)._replace(four_tuple=who, age_ns=age_ns))
        poll_ = poll(0, *found)
        begin_ns = clock.monotonic_ns
        return Polled(poll_._replace(time_ns=begin_ns + round(after_s * SECOND_NS)))

    owners = Owned({client_socket(n).inode: owned() for n in numbers})
    ended = WatchEnded(clock.monotonic_ns + 10 * SECOND_NS, ("the client's note",), 1, 1)
    steps: tuple[ClientStep, ...] = (
        sockets(2.0),
        sockets(8.0),
        owners,
        sockets(9.0, gone),
        sockets(10.0, gone),
        ended,
    )
    start = header(clock=clock, netns_names={OTHER_NETNS: "shop"}, own_netns=OTHER_NETNS)
    return client_steps.recorded(path, steps, start)


Lines = list[dict[str, Any]]


def joined(
    server: Path,
    client: Path,
    capsys: pytest.CaptureFixture[str],
    *words: str,
    status: int = EXIT_STUCK,
) -> tuple[Lines, dict[str, Any]]:
    """The connections, and the last line."""
    assert main(["--join", str(server), str(client), "--json", *words]) == status
    out, err = capsys.readouterr()
    assert err == ""
    *lines, summary = (json.loads(line) for line in out.splitlines())
    for line in (*lines, summary):
        assert_valid(line)
    return lines, summary


def last_octet(line: dict[str, Any]) -> int:
    return int(line["client_ip"].rpartition(".")[2])


def verdicts(line: dict[str, Any]) -> tuple[str | None, ...]:
    """The server's and the client's."""
    return tuple(line[side] and line[side]["verdict"] for side in ("server", "client"))


def test_each_connection_is_shown_as_both_sides_saw_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines, summary = joined(server_s(tmp_path / "s"), client_s(tmp_path / "c"), capsys)
    assert {last_octet(line): verdicts(line) for line in lines} == {
        **dict.fromkeys(FULL, ("accept-queue-full", "greeting-missing")),
        SILENT: ("ack-missing", "greeting-missing"),
        ELSEWHERE: ("ack-missing", None),
        SLOW: (None, "greeting-missing"),
    }
    assert len(lines) == 15
    assert [last_octet(line) for line in lines] == [*FULL, SILENT, SLOW, ELSEWHERE]
    expected_ms = (AHEAD_NS + WAY_NS) / 1_000_000
    for line in lines:
        assert line["difference_ms"] in (None, expected_ms)
        if line["client"] is not None:
            assert line["client"]["owners"][0]["pid"] == 288
            age_ns = 10 * SECOND_NS - (syn_ns(last_octet(line)) - START_NS) - WAY_NS
            assert line["client"]["age_ms"] == age_ns / 1_000_000
    assert summary["difference"] == {
        "median": expected_ms,
        "least": expected_ms,
        "most": expected_ms,
    }
    assert (summary["both"], summary["server_only"], summary["client_only"]) == (13, 1, 1)
    assert summary["notes"] == [
        "server's side: the server's note",
        "client's side: the client's note",
    ]
    assert summary["overlap_ms"] == 7_500


def test_the_answer_can_be_sent_to_a_colleague(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = server_s(tmp_path / "s")
    who = "of python3 (pid 288) to 192.0.2.1:3311"
    _, summary = joined(server, client_s(tmp_path / "c", numbers=(*FULL,)), capsys)
    assert summary["answer"] == (
        f"12 connections {who} wait for a greeting; of all 12 the server has no record: accept "
        "queue full"
    )
    _, summary = joined(server, client_s(tmp_path / "c"), capsys)
    assert summary["answer"] == (
        f"14 connections {who} wait for a greeting; of 13 the server has no record: accept queue "
        "full (12), no ACK got to the server (1); of 1 the server's side reported nothing"
    )
    _, summary = joined(server, client_s(tmp_path / "c", numbers=(SLOW,)), capsys)
    assert summary["answer"] == (
        f"1 connection {who} waits for a greeting; of it the server's side reported nothing"
    )


def test_a_person_reads_a_row_for_each_and_the_answer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    words = ["--join", str(server_s(tmp_path / "s")), str(client_s(tmp_path / "c"))]
    assert main(words) == EXIT_STUCK
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    text = " ".join(shown.split())
    assert (
        "! 10.0.0.13:40000 to 192.0.2.1:3311 server: ack-missing (likely): no ACK got here; client "
        "likely thinks it is connected client: greeting-missing, waits for 8.7 s, of python3 (pid "
        "288) ! 10.0.0.15:40000 to 192.0.2.1:3311 server: reported nothing client: greeting-missing"
    ) in text
    assert "connected client: reported nothing 14 connections" in text
    assert "14 connections of python3 (pid 288) to 192.0.2.1:3311 wait for a greeting" in text
    assert "were established 1.5 s after their SYN came to the server (median; from 1.5 s" in text
    assert main([*words, "--summary"]) == EXIT_STUCK
    assert "reported nothing client" not in capsys.readouterr().out


def test_what_waits_no_more_is_not_in_the_answer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    client = client_s(tmp_path / "c", gone=(*FULL, SILENT, SLOW))
    lines, summary = joined(server_s(tmp_path / "s"), client, capsys)
    assert {line["client"]["waits"] for line in lines if line["client"]} == {False}
    assert summary["answer"] == (
        "no connection waits at the client when its recording ends; the server's side ends with "
        "14 stuck clients"
    )


def test_a_4_tuple_that_comes_again_is_joined_by_its_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of two handshakes with the same addresses and ports, the one at the right time."""
    first, again = handshake(at(0.1)), handshake(at(8.5), client_isn=77)
    who = four_tuple(1)
    steps: tuple[Step, ...] = (
        TallyTaken(tally(at(0))),
        Swept(Sweep(at(4), (Row(who, first),))),
        Advanced(at(4)),
        Swept(Sweep(at(9), (Row(who, again),))),
        Advanced(at(9)),
        Swept(Sweep(at(13), (Row(who, again),))),
        Advanced(at(13)),
        TallyTaken(tally(at(13), kernel=2, traced=2)),
        Ended(at(13), {}, ()),
    )
    server = recorded(tmp_path / "s", steps)
    lines, _ = joined(server, client_s(tmp_path / "c", numbers=(1,)), capsys)
    (both,) = (line for line in lines if line["client"])
    assert both["difference_ms"] == (AHEAD_NS + WAY_NS) / 1_000_000
    assert len(lines) == 2


@pytest.mark.parametrize("name", ["overflow", "overflow-ipv6"])
def test_what_a_real_server_recorded_is_joined_with_its_clients(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Who was forgotten is what the clients' own record says; the times are the recording's."""
    (tmp_path / "s").write_bytes(kept_recording(name))
    expected = kept_truth(name).expected
    assert expected
    assert main(["--replay", str(tmp_path / "s"), "--json"]) == EXIT_STUCK
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    begun = {four(line): line["syn_time"] for line in told if line["type"] == "verdict"}
    clock = Replay(str(tmp_path / "s")).header.clock
    now_ns = clock.monotonic_ns + 3600 * SECOND_NS
    sockets = []
    for number, who in enumerate(expected, 1):
        moment = datetime.fromisoformat(begun[who].replace("Z", "+00:00"))
        age_s = (clock.realtime(now_ns) / SECOND_NS) - moment.timestamp() - WAY_NS / SECOND_NS
        client, port, server, server_port = who
        one = client_socket(number, age_s, client=client, server=server, port=server_port)
        sockets.append(one._replace(four_tuple=one.four_tuple._replace(client_port=port)))
    steps: tuple[ClientStep, ...] = (
        Polled(poll(0, *sockets)._replace(time_ns=now_ns)),
        WatchEnded(now_ns, (), 1, 1),
    )
    client_steps.recorded(tmp_path / "c", steps, header(clock=clock))
    lines, summary = joined(tmp_path / "s", tmp_path / "c", capsys)
    both = [line for line in lines if line["server"] and line["client"]]
    assert {four(line): line["server"]["verdict"] for line in both} == expected
    assert summary["client_only"] == 0
    assert summary["answer"].endswith(
        f"of all {len(expected)} the server has no record: accept queue full"
    )


def four(line: dict[str, Any]) -> tuple[str, int, str, int]:
    """Addresses and ports of a line."""
    return (line["client_ip"], line["client_port"], line["server_ip"], line["server_port"])


@pytest.mark.parametrize("hours", [1, -1])
def test_clocks_that_differ_too_much_are_said_and_nothing_is_claimed(
    hours: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shifted = replace(CLIENT_CLOCK, realtime_ns=CLIENT_CLOCK.realtime_ns + hours * 3600 * SECOND_NS)
    server, client = server_s(tmp_path / "s"), client_s(tmp_path / "c", clock=shifted)
    lines, summary = joined(server, client, capsys)
    assert {line["server"] is None or line["client"] is None for line in lines} == {True}
    assert len(lines) == 14 + 14
    assert (summary["both"], summary["difference"]) == (0, None)
    assert abs(summary["apart_ms"] - 3_600_000) < 2_000
    assert summary["overlap_ms"] < 0
    assert main(["--join", str(server), str(client), "--summary"]) == EXIT_STUCK
    text = " ".join(capsys.readouterr().out.split())
    assert "do not overlap: the " + ("server" if hours > 0 else "client") + "'s ends " in text
    assert "the hosts' clocks differ by so much" in text
    assert "a NAT" not in text


def test_addresses_that_no_side_shares_are_put_down_to_a_nat(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = server_s(tmp_path / "s")
    behind = address_bytes("192.168.7.7")
    client = client_s(tmp_path / "c", seen=lambda who: who._replace(client_address=behind))
    assert main(["--join", str(server), str(client), "--summary"]) == EXIT_STUCK
    text = " ".join(capsys.readouterr().out.split())
    assert "no address and port are in both recordings: a NAT or a proxy" in text
    assert "the recordings overlap for 7.5 s" in text


def test_the_exit_status_is_that_of_the_worse_side(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    healthy: tuple[Step, ...] = (
        TallyTaken(tally(at(0))),
        Advanced(at(9)),
        TallyTaken(tally(at(9))),
        Ended(at(9), {}, ()),
    )
    nothing: tuple[ClientStep, ...] = (
        Polled(poll(0, established=3)),
        WatchEnded(poll(9).time_ns, (), 1, 1),
    )
    server = recorded(tmp_path / "s", healthy)
    calm = client_steps.recorded(tmp_path / "calm", nothing)
    _, summary = joined(server, calm, capsys, status=EXIT_NOTHING_STUCK)
    assert summary["answer"] == "neither side reported a connection"
    lossy = (nothing[0]._replace(beyond=2), nothing[1])
    unknown = client_steps.recorded(tmp_path / "unknown", lossy)
    joined(server, unknown, capsys, status=EXIT_NOT_KNOWN)
    joined(server_s(tmp_path / "stuck"), unknown, capsys, status=EXIT_STUCK)


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["c", "s"], "the recordings of --join are in the wrong order"),
        (["s", "s"], "--join needs a recording of each side"),
        (["c", "c"], "--join needs a recording of each side"),
        (["s", "missing"], "cannot read the recording"),
        (["s"], "--join: expected 2 arguments"),
        (["s", "c", "-p", "3306"], "--port cannot be combined with --join"),
        (["s", "c", "--client"], "--client cannot be combined with --join"),
        (["s", "c", "--replay", "s"], "--replay cannot be combined with --join"),
    ],
)
def test_wrong_use_is_told_in_three_lines(
    words: list[str],
    what: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    server_s(tmp_path / "s")
    client_s(tmp_path / "c")
    assert main(["--join", *words]) == EXIT_USAGE
    out, err = capsys.readouterr()
    assert out == ""
    first, why, remedy = err.splitlines()
    assert what in first
    assert (why[:7], remedy[:10]) == ("  why: ", "  remedy: ")


def test_a_damaged_recording_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = recorded(tmp_path / "s", (Advanced(at(1)), Ended(at(2), {}, ())))
    for first, second in (
        (server, client_s(tmp_path / "c")),
        (server_s(tmp_path / "t"), client_steps.recorded(tmp_path / "d", client_steps.STEPS[-1:])),
    ):
        assert main(["--join", str(first), str(second)]) == EXIT_USAGE
        assert "is damaged" in capsys.readouterr().err


def test_a_key_more_or_less_is_not_valid(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines, summary = joined(server_s(tmp_path / "s"), client_s(tmp_path / "c"), capsys)
    for line in (lines[0], summary):
        assert not VALIDATOR.is_valid({**line, "surplus": 1})
        for key in line:
            assert not VALIDATOR.is_valid({name: line[name] for name in line if name != key}), key


@pytest.mark.parametrize(
    ("heading", "definition"),
    [
        ("joined", "joined"),
        ("server (of joined)", "joined_server"),
        ("client (of joined)", "joined_client"),
        ("joined_summary", "joined_summary"),
    ],
)
def test_docs_and_schema_list_the_same_keys(heading: str, definition: str) -> None:
    documented = dict(sections((DOCS / "json.md").read_text("utf-8")))
    assert keys_of(definition) == documented[heading]
