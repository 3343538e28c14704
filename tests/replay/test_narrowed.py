"""A recording under narrower filters: the same findings of fewer clients, and honest figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tcpstuck_bpf.cli import main
from tcpstuck_bpf.errors import EXIT_NOT_KNOWN, EXIT_NOTHING_STUCK, EXIT_STUCK, EXIT_USAGE
from tcpstuck_bpf.model import (
    Attempt,
    EventKind,
    FourTuple,
    Handshake,
    Rescue,
    Row,
    Sweep,
    TraceFilter,
    TraceSettings,
    address_bytes,
)
from tcpstuck_bpf.narrowing import NarrowedReplay
from tcpstuck_bpf.recording.replay import Replay
from tcpstuck_bpf.recording_part import Wanted
from tcpstuck_bpf.steps import (
    Advanced,
    Ended,
    Header,
    Listened,
    Observed,
    Rescued,
    Step,
    Swept,
    TallyTaken,
)
from tests.builders import (
    SECOND_NS,
    ack_dropped,
    at,
    event,
    four_tuple,
    handshake,
    header,
    identity,
    tally,
)
from tests.replay.test_replay import recorded
from tests.unit.judge.test_listener import overflown, seen

OWN = four_tuple().netns
OTHER = OWN + 7
MYSQL = four_tuple(1)
SMTP = four_tuple(2)._replace(server_port=25)
IPV6 = four_tuple(3, family=6)
ELSEWHERE = four_tuple(4)._replace(netns=OTHER)
SECOND_ADDRESS = four_tuple(5)._replace(server_address=address_bytes("192.0.2.2"))
PROXIED = four_tuple(6)._replace(server_port=443)
EVERYBODY = (MYSQL, SMTP, IPV6, ELSEWHERE, SECOND_ADDRESS, PROXIED)
PROXY_SOCKET = 4711


def entry(who: FourTuple) -> Handshake:
    return handshake(socket=PROXY_SOCKET if who is PROXIED else 0)


DROPPED_ENTRY = ack_dropped(handshake(), at(1.5))
DROPPED = event(EventKind.ACK_DROPPED, DROPPED_ENTRY, at(1.5), SMTP)


def swept(time_ns: int, clients: tuple[FourTuple, ...] = EVERYBODY) -> Swept:
    rows = (
        Row(who, DROPPED_ENTRY if who is SMTP and time_ns > at(1.5) else entry(who))
        for who in clients
    )
    return Swept(Sweep(time_ns, tuple(rows)))


def listening(who: FourTuple, **changes: Any) -> Any:
    return seen(
        overflown()._replace(
            netns=who.netns,
            server_address=who.server_address,
            server_port=who.server_port,
            **changes,
        )
    )


STEPS: tuple[Step, ...] = (
    TallyTaken(tally(at(0))),
    swept(at(1)),
    Advanced(at(1)),
    Observed((DROPPED,)),
    Advanced(at(1.6)),
    swept(at(4)),
    Advanced(at(4)),
    Listened(
        (
            *(listening(who) for who in EVERYBODY if who is not PROXIED),
            listening(PROXIED._replace(server_port=8080), socket=PROXY_SOCKET),
        )
    ),
    Rescued(
        Rescue(
            tuple(
                Attempt(identity(entry(who), who), at(4.1), 1, "failed: EPERM") for who in EVERYBODY
            ),
            (),
            {},
        )
    ),
    swept(at(8)),
    Advanced(at(8)),
    TallyTaken(tally(at(9), kernel=6, traced=6)),
    Ended(at(9), {}, ("a note",)),
)
EVERY_PORT = header(
    settings=TraceSettings(timeout_ns=3 * SECOND_NS),
    watched="every port",
    netns_names={OWN: "host", OTHER: "web (docker 3f4e5d6c7b8a)"},
)


def replayed(path: Path, capsys: pytest.CaptureFixture[str], *words: str) -> list[dict[str, Any]]:
    """The lines of a replay."""
    main(["--replay", str(path), "--json", *words])
    out, err = capsys.readouterr()
    assert err == ""
    return [json.loads(line) for line in out.splitlines()]


def of_kind(lines: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [line for line in lines if line["type"] == kind]


CASES = [
    (["-p", "25"], {SMTP}),
    (["-p", "25,443"], {SMTP, PROXIED}),
    (["-4"], {*EVERYBODY} - {IPV6}),
    (["-6"], {IPV6}),
    (["--listener", "192.0.2.2"], {SECOND_ADDRESS}),
    (["--netns", "web"], {ELSEWHERE}),
    (["--netns", str(OWN)], {*EVERYBODY} - {ELSEWHERE}),
    (["-p", "3311", "-4", "--netns", "host"], {MYSQL, SECOND_ADDRESS}),
    (["-p", "80"], set()),
]


@pytest.mark.parametrize(("words", "chosen"), CASES)
def test_findings_listeners_and_attempts_are_those_that_are_asked_for(
    words: list[str], chosen: set[FourTuple], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recorded(tmp_path / "run", STEPS, EVERY_PORT)
    whole = replayed(path, capsys)
    part = replayed(path, capsys, *words)

    def is_chosen(line: dict[str, Any]) -> bool:
        return any(
            (line["client_ip"], line["server_port"]) == (who.client_ip, who.server_port)
            for who in chosen
        )

    for kind in ("verdict", "rescue"):
        assert of_kind(whole, kind)
        assert of_kind(part, kind) == [one for one in of_kind(whole, kind) if is_chosen(one)]
    ports = {8080 if who is PROXIED else who.server_port for who in chosen}
    listeners = of_kind(part, "listener")
    assert {one["port"] for one in listeners} == ports
    assert sum(len(one["addresses"]) for one in listeners) == len(
        {(who.netns, who.server) for who in chosen}
    )
    (summary,) = of_kind(part, "summary")
    assert summary["stuck"] == len(chosen)
    assert sum(summary["verdicts"].values()) == len(chosen)


@pytest.mark.parametrize(("words", "chosen"), CASES)
def test_the_exit_status_is_that_of_the_part(
    words: list[str], chosen: set[FourTuple], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recorded(tmp_path / "run", STEPS, EVERY_PORT)
    assert main(["--replay", str(path), *words]) == (EXIT_STUCK if chosen else EXIT_NOTHING_STUCK)
    shown = capsys.readouterr().out
    assert "nothing stuck" not in shown
    assert ("no listener of port 80 is seen to send a SYN cookie" in shown) == (not chosen)


@pytest.mark.parametrize("cookies", [0, 7])
def test_a_part_without_findings_is_an_all_clear_only_where_its_listener_sent_cookies(
    cookies: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The cookies of the whole recording are no evidence for one port of it."""
    port_80 = MYSQL._replace(server_port=80)
    quiet = listening(port_80, cookies_sent=cookies, acks_refused=0)
    steps = (*STEPS[:-2], Listened((quiet,)), *STEPS[-2:])
    path = recorded(tmp_path / "run", steps, EVERY_PORT)
    assert main(["--replay", str(path), "-p", "80"]) == EXIT_NOTHING_STUCK
    shown = capsys.readouterr().out.splitlines()
    assert ("nothing stuck" in shown) == bool(cookies)
    (summary,) = of_kind(replayed(path, capsys, "-p", "80"), "summary")
    assert summary["saw_nothing"] == (not cookies)


@pytest.mark.parametrize("narrowed", [[], ["-4"]])
def test_handshakes_that_are_all_too_young_are_no_all_clear(
    narrowed: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recorded(tmp_path / "run", STEPS, EVERY_PORT)
    words = ["--replay", str(path), "-t", "60", *narrowed]
    assert main(words) == EXIT_NOT_KNOWN
    shown = capsys.readouterr().out
    number = 6 - len(narrowed)
    answer = f"nothing is known yet: all {number} handshakes are too young for a verdict"
    assert answer in shown.splitlines()
    assert "nothing stuck" not in shown


def test_what_cannot_be_told_apart_any_more_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recorded(tmp_path / "run", STEPS, EVERY_PORT)
    (whole,) = of_kind(replayed(path, capsys), "summary")
    (part,) = of_kind(replayed(path, capsys, "-p", "25"), "summary")
    assert "completed" in whole["verdicts"]
    assert "completed" not in part["verdicts"]
    for figure in ("cookies_sent", "reconciliation", "watched"):
        assert part[figure] == whole[figure]
    first, note = part["notes"]
    assert first == "a note"
    assert note.startswith("findings and listeners cover port 25 only. Cookies sent")
    assert "whole recording (every port)" in note


def test_what_it_is_restricted_to_anyway_changes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recorded(tmp_path / "run")
    assert replayed(path, capsys, "-p", "3311") == replayed(path, capsys)
    assert replayed(path, capsys, "-t", "3") == replayed(path, capsys)


def watching(**changes: Any) -> Header:
    settings = TraceSettings(TraceFilter(**changes), timeout_ns=3 * SECOND_NS)
    return header(settings=settings, watched="something", netns_names={OWN: "host", OTHER: "web"})


@pytest.mark.parametrize(
    ("words", "start", "what"),
    [
        (["-p", "25"], watching(ports=(3311,)), "-p selects"),
        (["-p", "25,3311"], watching(ports=(3311,)), "-p selects"),
        (["-6"], watching(family=4), "-4 or -6 selects"),
        (
            ["--listener", "192.0.2.9"],
            watching(listener_address=four_tuple().server_address),
            "--listener selects",
        ),
        (["--netns", "web"], watching(netns=OWN), "--netns selects"),
        (["--netns", "wb"], watching(), "has no network namespace wb"),
        (["-t", "2"], EVERY_PORT, "-t 2.0 s is too short"),
        (["-t", "15m"], EVERY_PORT, "-t 15 min is too long"),
    ],
)
def test_what_the_recording_does_not_hold_is_refused(
    words: list[str],
    start: Header,
    what: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = recorded(tmp_path / "run", STEPS, start)
    assert main(["--replay", str(path), *words]) == EXIT_USAGE
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 3)
    assert what in err
    if "wb" in words:
        assert "did you mean web?" in err


def silent(path: Path, capsys: pytest.CaptureFixture[str], *words: str) -> list[float]:
    """When the silent client was told, in seconds after its SYN."""
    lines = of_kind(replayed(path, capsys, *words), "verdict")
    return [line["age_ms"] / 1000 for line in lines if line["verdict"] == "ack-missing"]


SILENT_STEPS: tuple[Step, ...] = (
    TallyTaken(tally(at(0))),
    *(
        step
        for second in range(1, 12)
        for step in (swept(at(second), (MYSQL,)), Advanced(at(second)))
    ),
    TallyTaken(tally(at(12), kernel=1, traced=1)),
    Ended(at(12), {}, ()),
)


@pytest.mark.parametrize(
    ("timeout", "seconds"), [("3", [3]), ("2.25", [2.25]), ("6", [6]), ("14m", [])]
)
def test_another_time_out_judges_anew(
    timeout: str, seconds: list[float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recorded(tmp_path / "run", SILENT_STEPS, EVERY_PORT)
    assert silent(path, capsys, "-t", timeout) == seconds
    (summary,) = of_kind(replayed(path, capsys, "-t", timeout), "summary")
    said = any("judged with a time-out of" in note for note in summary["notes"])
    assert said == (timeout != "3")


def test_who_connected_late_was_not_stuck_for_a_longer_time_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The recorded run told it as stuck, then as recovered."""
    done = handshake(ending=1, ended_ns=at(5))
    completed = event(EventKind.COMPLETED, done, at(5), MYSQL)
    steps = (
        *SILENT_STEPS[:9],
        Observed((completed,)),
        Advanced(at(5.1)),
        Swept(Sweep(at(6), ())),
        Advanced(at(6)),
        TallyTaken(tally(at(12), kernel=1, traced=1)),
        Ended(at(12), {}, ()),
    )
    path = recorded(tmp_path / "run", steps, EVERY_PORT)
    verdicts = [one["verdict"] for one in of_kind(replayed(path, capsys), "verdict")]
    assert verdicts == ["ack-missing", "recovered"]
    assert of_kind(replayed(path, capsys, "-t", "6"), "verdict") == []


def test_a_run_with_all_knows_who_connected_early(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = TraceSettings(timeout_ns=3 * SECOND_NS, tell_healthy=True)
    path = recorded(tmp_path / "run", SILENT_STEPS, header(settings=settings))
    assert silent(path, capsys, "-t", "1") == [1]


def test_clients_that_a_full_table_let_go_of_forbid_a_longer_time_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    start = header(
        settings=TraceSettings(timeout_ns=3 * SECOND_NS), watched="every port", table_capacity=8
    )
    crowd = tuple(four_tuple(n) for n in range(7))
    steps = (
        TallyTaken(tally(at(0), 0, 0)),
        swept(at(4), crowd),
        Advanced(at(4)),
        swept(at(5), crowd[4:]),
        Advanced(at(5)),
        TallyTaken(tally(at(9), kernel=7, traced=7)),
        Ended(at(9), {}, ()),
    )
    path = recorded(tmp_path / "run", steps, start)
    assert main(["--replay", str(path), "-t", "5"]) == EXIT_USAGE
    assert "table was full, and 3 clients" in capsys.readouterr().err
    with path.open() as file:
        monkeypatch.setattr("sys.stdin", file)
        assert main(["--replay", "-", "-t", "5"]) == EXIT_USAGE
    assert "standard input does not allow" in capsys.readouterr().err


def test_all_of_a_recording_is_replayed_as_it_was(tmp_path: Path) -> None:
    path = str(recorded(tmp_path / "run", STEPS, EVERY_PORT))
    assert list(NarrowedReplay(path, Wanted()).steps()) == list(Replay(path).steps())
    assert NarrowedReplay(path, Wanted()).header == EVERY_PORT
