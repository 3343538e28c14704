"""A hand-built run as a packet capture: what scapy and tshark read is what was played."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from tcpstuck_bpf.cli import EXIT_BROKEN_PIPE, main
from tcpstuck_bpf.conversions.frames import Frames
from tcpstuck_bpf.errors import EXIT_NOTHING_STUCK, EXIT_STUCK, EXIT_USAGE
from tcpstuck_bpf.model import (
    Attempt,
    Ending,
    EventKind,
    FourTuple,
    Rescue,
    Row,
    Sweep,
)
from tcpstuck_bpf.rulesets import DropRule, KernelNames, Ruleset
from tcpstuck_bpf.steps import (
    Advanced,
    Ended,
    Header,
    Named,
    Observed,
    Rescued,
    Step,
    Swept,
    TallyTaken,
)
from tests.builders import (
    ACK,
    CLIENT_ISN,
    COOKIE_ISN,
    FIN,
    MSS,
    NAMES,
    PSH,
    RST,
    ack_dropped,
    ack_filtered,
    at,
    ended,
    event,
    four_tuple,
    handshake,
    header,
    identity,
    repeated,
    tally,
)
from tests.captured import Read, dissected, read, section_comment
from tests.replay.test_replay import recorded

LIMIT_S = 60
OWN = four_tuple().netns
OTHER = OWN + 7
WEB = "web (docker 3f4e5d6c7b8a)"
QUEUED, FILTERED = four_tuple(1), four_tuple(2, family=6)
RESET = four_tuple(3)._replace(netns=OTHER)
HEALTHY, SILENT = four_tuple(4), four_tuple(5)
START = header(netns_names={OTHER: WEB})

# One that repeats its SYN, whose ACK with data finds the accept queue full.
AGAIN = repeated(handshake(), at(1))
FULL = ack_dropped(AGAIN, at(1.5))
# One whose ACK and FIN a rule drops.
FIRST = ack_filtered(handshake(), at(0.25))
SECOND = ack_filtered(FIRST, at(0.75))
GONE = ended(handshake(), Ending.RESET, at(0.5))
DONE = ended(handshake(), Ending.COMPLETED, at(2.5))
RULE = DropRule("ip6", "filter", "INPUT", "input", "handle", 2, ())

STEPS: tuple[Step, ...] = (
    TallyTaken(tally(at(0))),
    Swept(
        Sweep(at(0.1), tuple(Row(who, handshake()) for who in (QUEUED, FILTERED, HEALTHY, SILENT)))
    ),
    Observed(
        (
            event(EventKind.ACK_FILTERED, FIRST, at(0.25), FILTERED),
            event(EventKind.RESET, GONE, at(0.5), RESET, tcp_flags=RST, acknowledgement=0),
            event(
                EventKind.ACK_FILTERED, SECOND, at(0.75), FILTERED, tcp_flags=FIN | PSH | ACK
            )._replace(payload_length=5),
        )
    ),
    Advanced(at(0.8)),
    Observed(
        (
            event(EventKind.SYN_REPEATED, AGAIN, at(1), QUEUED),
            event(EventKind.ACK_DROPPED, FULL, at(1.5), QUEUED, tcp_flags=PSH | ACK)._replace(
                payload_length=1200
            ),
            event(EventKind.COMPLETED, DONE, at(2.5), HEALTHY),
        )
    ),
    Advanced(at(2.6)),
    Swept(
        Sweep(
            at(5),
            (Row(QUEUED, FULL), Row(FILTERED, SECOND), Row(RESET, GONE), Row(SILENT, handshake())),
        )
    ),
    Named(NAMES._replace(rulesets={OWN: (Ruleset((RULE,), (), at(4)),)})),
    Advanced(at(5)),
    Rescued(
        Rescue(
            (
                Attempt(identity(AGAIN, QUEUED), at(6), 1, "sent"),
                Attempt(identity(AGAIN, QUEUED), at(7), 2, "failed: EPERM"),
            ),
            (),
            {},
        )
    ),
    TallyTaken(tally(at(9), kernel=5, traced=5)),
    Ended(at(9), {}, ()),
)


class Played(NamedTuple):
    """A packet that was played, and what its comments must say."""

    seconds: float
    who: FourTuple
    flags: str
    sequence: int
    acknowledgement: int
    words: tuple[str, ...]
    payload_length: int = 0


S, A = CLIENT_ISN, COOKIE_ISN
PLAYED = (
    *(
        packet
        for who in (QUEUED, FILTERED, RESET, SILENT)
        for packet in (
            Played(0, who, "S", S, 0, ("SYN",)),
            Played(
                0,
                who,
                "SA",
                A,
                S + 1,
                (f"MSS {MSS}", *(["verdict ack-missing (likely)"] * (who is SILENT))),
            ),
        )
    ),
    Played(
        0.25,
        FILTERED,
        "A",
        S + 1,
        A + 1,
        (
            "dropped before TCP: netfilter, ip6 filter INPUT, rule handle 2; "
            "reason NETFILTER_DROP, at nf_hook_slow+0xa2",
        ),
    ),
    Played(
        0.5,
        RESET,
        "R",
        S + 1,
        0,
        ("RST from the client's address", "verdict client-reset (certain)"),
    ),
    Played(
        0.75,
        FILTERED,
        "FPA",
        S + 1,
        A + 1,
        (
            "dropped before TCP: netfilter, ip6 filter INPUT, rule handle 2",
            "verdict ack-filtered (certain)",
        ),
        5,
    ),
    Played(1, QUEUED, "S", S, 0, ("SYN repeated; accept queue 51 of 50",)),
    Played(1, QUEUED, "SA", A + 1, S + 1, ("SYN-ACK with a SYN cookie",)),
    Played(1.5, QUEUED, "PA", S + 1, A + 2, ("dropped: accept queue full (51 of 50)",), 1200),
    Played(
        6,
        QUEUED,
        "SA",
        A + 1,
        S + 1,
        ("SYN-ACK repeated by us, try 1", "verdict accept-queue-full (certain)"),
    ),
)


@pytest.fixture
def captured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """The whole run's capture."""
    target = tmp_path / "run.pcapng"
    assert convert(tmp_path, target) == EXIT_STUCK
    out, err = capsys.readouterr()
    assert "stuck" in out
    assert err == f"tcpstuck-trace: {len(PLAYED)} packets of 4 handshakes written to {target}\n"
    return target


def convert(
    directory: Path,
    target: Path,
    *words: str,
    steps: Sequence[Step] = STEPS,
    start: Header = START,
) -> int:
    path = recorded(directory / "run", tuple(steps), start)
    return main(["--replay", str(path), "--pcap", str(target), *words])


def ends(who: FourTuple, *, from_client: bool) -> tuple[tuple[str, int], tuple[str, int]]:
    client, server = (who.client_ip, who.client_port), (who.server_ip, who.server_port)
    return (client, server) if from_client else (server, client)


def test_scapy_reads_the_packets_that_were_played_and_no_other(captured: Path) -> None:
    found = read(captured)
    assert [packet.time_ns for packet in found] == sorted(packet.time_ns for packet in found)
    expected = set()
    for one in PLAYED:
        source, destination = ends(one.who, from_client=one.flags != "SA")
        expected.add(
            Read(
                START.clock.realtime(at(one.seconds)),
                WEB if one.who.netns == OTHER else str(OWN),
                source,
                destination,
                one.sequence,
                one.acknowledgement,
                one.flags,
                one.payload_length,
                (),
                one.flags != "SA",
                (("MSS", MSS),) if one.flags == "S" else (),
            )
        )
    assert {packet._replace(comments=()) for packet in found} == expected
    assert len(found) == len(expected)


def test_each_comment_says_what_became_of_the_packet(captured: Path) -> None:
    found = {
        (packet.time_ns, packet.source, packet.destination): packet.comments
        for packet in read(captured)
    }
    for one in PLAYED:
        key = (START.clock.realtime(at(one.seconds)), *ends(one.who, from_client=one.flags != "SA"))
        comments = found[key]
        assert len(comments) == len(one.words), comments
        for comment, words in zip(comments, one.words):
            assert words in comment


def test_tshark_finds_nothing_malformed_and_every_checksum_good(captured: Path) -> None:
    packets = dissected(captured)
    assert len(packets) == len(PLAYED)
    for packet, told in zip(packets, read(captured)):
        assert "_ws.malformed" not in packet
        # 1 is good, 2 is not to be verified: the payload is cut.
        assert packet["tcp.checksum.status"] == ["2" if told.payload_length else "1"]
        assert packet.get("ip.checksum.status", ["1"]) == ["1"]
        assert packet["tcp.len"] == [str(told.payload_length)]
        assert packet["tcp.seq_raw"] == [str(told.sequence)]
        assert packet["tcp.ack_raw"] == [str(told.acknowledgement)]
        assert packet["frame.interface_name"] == [told.interface]
        assert packet["frame.comment"] == list(told.comments)
        seconds, _, nanoseconds = packet["frame.time_epoch"][0].partition(".")
        assert int(seconds) * 10**9 + int(nanoseconds) == told.time_ns


def test_the_file_says_what_is_not_known(captured: Path) -> None:
    comment = section_comment(captured)
    for words in ("window 65535", "hop limit 64", "payload is not known", "none", "port 3311"):
        assert words in comment


def test_only_its_owner_may_read_it_whatever_its_name_ends_with(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        for name in ("run.pcapng", "run.txt", "run"):
            target = tmp_path / "new" / name
            target.parent.mkdir(exist_ok=True)
            assert convert(tmp_path, target) == EXIT_STUCK
            assert stat.S_IMODE(target.stat().st_mode) == 0o600
            assert len(read(target)) == len(PLAYED)
    finally:
        os.umask(before)


@pytest.mark.parametrize(
    ("words", "chosen"),
    [
        (["--only", "client-reset"], {RESET}),
        (["--only", "ack-missing,ack-filtered"], {SILENT, FILTERED}),
        (["--only", "no-listener"], set()),
        (["-6"], {FILTERED}),
        (["--netns", "web"], {RESET}),
        (["--netns", str(OWN), "-4", "--only", "accept-queue-full"], {QUEUED}),
        (["--only", "completed"], set()),
        (["--summary"], {QUEUED, FILTERED, RESET, SILENT}),
        (["--json"], {QUEUED, FILTERED, RESET, SILENT}),
    ],
)
def test_it_has_the_handshakes_that_are_asked_for(
    words: list[str], chosen: set[FourTuple], tmp_path: Path
) -> None:
    target = tmp_path / "part.pcapng"
    assert convert(tmp_path, target, *words) in (EXIT_STUCK, EXIT_NOTHING_STUCK)
    clients = {packet.source if packet.inbound else packet.destination for packet in read(target)}
    assert clients == {(who.client_ip, who.client_port) for who in chosen}
    assert f"{len(chosen)} handshakes" in section_comment(target)


def test_a_healthy_one_is_there_if_it_has_a_verdict_and_is_asked_for(tmp_path: Path) -> None:
    settings = START.settings.__class__(tell_healthy=True)
    start = header(settings=settings)
    target = tmp_path / "all.pcapng"
    convert(tmp_path, target, "--only", "completed", start=start)
    assert [packet.flags for packet in read(target)] == ["S", "SA", "A"]
    assert "connected: its cookie is valid" in read(target)[-1].comments
    convert(tmp_path, target, start=start)
    assert HEALTHY.client_ip not in {packet.source[0] for packet in read(target)}


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("missing/run.pcapng", "No such file or directory"),
        ("link", "symbolic link"),
        ("directory", "Is a directory"),
    ],
)
def test_a_file_that_cannot_be_written_is_refused_before_anything_is_shown(
    name: str, why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "link").symlink_to("victim")
    (tmp_path / "directory").mkdir()
    assert convert(tmp_path, tmp_path / name) == EXIT_USAGE
    out, err = capsys.readouterr()
    assert out == ""
    assert f"cannot write packets to {tmp_path / name}" in err.splitlines()[0]
    assert why in err.splitlines()[1]
    assert (tmp_path / "victim").read_text() == "precious"


@pytest.mark.parametrize(
    "words",
    [
        ["-p", "25"],
        ["--record", "run"],
        ["--doctor"],
        ["--build", "built"],
        ["--explain"],
        ["--print-bpf"],
        ["--dry-run"],
    ],
)
def test_it_needs_a_recording(
    words: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*words, "--pcap", "run.pcapng"]) == EXIT_USAGE
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 3)
    assert "--pcap" in err.splitlines()[0]
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_recording_leaves_the_older_file_as_it_was(tmp_path: Path) -> None:
    path = recorded(tmp_path / "run", STEPS, START)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join((*lines[:-2], b"{}\n", lines[-1])))
    target = tmp_path / "run.pcapng"
    target.write_text("older")
    assert main(["--replay", str(path), "--pcap", str(target)]) == EXIT_USAGE
    assert target.read_text() == "older"
    assert sorted(one.name for one in tmp_path.iterdir()) == ["run", "run.pcapng"]


def test_a_recording_that_was_cut_off_is_converted_as_far_as_it_goes(tmp_path: Path) -> None:
    path = recorded(tmp_path / "run", STEPS, START)
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-2]))
    target = tmp_path / "run.pcapng"
    assert main(["--replay", str(path), "--pcap", str(target)]) == EXIT_STUCK
    assert len(read(target)) == len(PLAYED)


def test_a_full_disk_is_told_after_the_findings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(tmp_path, Path("/dev/full"), "--summary") == EXIT_USAGE
    out, err = capsys.readouterr()
    assert "stuck" in out
    assert "cannot write packets to /dev/full" in err
    assert "No space left on device" in err


def test_who_reads_the_output_may_be_gone(tmp_path: Path) -> None:
    """As in `| head`: the file is complete before the summary is printed."""
    path = str(recorded(tmp_path / "run", STEPS, START))
    target = tmp_path / "run.pcapng"
    ours, theirs = os.pipe()
    os.close(ours)
    words = ["--replay", path, "--summary", "--pcap", str(target)]
    done = subprocess.run(
        [sys.executable, "-m", "tcpstuck_bpf", *words],
        stdout=theirs,
        stderr=subprocess.PIPE,
        timeout=LIMIT_S,
        check=False,
    )
    os.close(theirs)
    assert (done.returncode, done.stderr) == (EXIT_BROKEN_PIPE, b"")
    assert len(read(target)) == len(PLAYED)


def test_a_program_may_read_it_from_a_pipe(captured: Path, tmp_path: Path) -> None:
    """As the shell's >( ) makes one."""
    ours, theirs = os.pipe()
    convert(tmp_path, Path(f"/dev/fd/{theirs}"))
    os.close(theirs)
    with os.fdopen(ours, "rb") as pipe:
        assert pipe.read() == captured.read_bytes()


def test_many_packets_are_sorted_on_disk(
    captured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places: list[str | None] = []

    def two_at_once(directory: str | None) -> Frames:
        places.append(directory)
        return Frames(directory, at_once=2)

    monkeypatch.setattr("tcpstuck_bpf.conversions.capture.Frames", two_at_once)
    target = tmp_path / "sorted" / "run.pcapng"
    target.parent.mkdir()
    convert(tmp_path, target)
    assert target.read_bytes() == captured.read_bytes()
    assert places == [str(target.parent)]
    assert list(target.parent.iterdir()) == [target]


def test_it_changes_nothing_of_what_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(recorded(tmp_path / "run", STEPS, START))
    for words in (["--json"], ["-v"], []):
        status = main(["--replay", path, *words])
        without = capsys.readouterr().out
        assert main(["--replay", path, *words, "--pcap", str(tmp_path / "out")]) == status
        assert capsys.readouterr().out == without


def test_names_of_strangers_become_printable_text(tmp_path: Path) -> None:
    hostile = "\x1b[2J\x00\udcff" + "n" * 100_000
    rule = RULE._replace(table=hostile)
    names = KernelNames(
        dict.fromkeys(NAMES.places, hostile),
        NAMES.reasons,
        NAMES.stacks,
        {OWN: (Ruleset((rule,), (), at(4)),)},
    )
    steps = [Named(names) if isinstance(step, Named) else step for step in STEPS]
    target = tmp_path / "run.pcapng"
    convert(tmp_path, target, steps=steps, start=header(netns_names={OTHER: hostile}))
    for packet in read(target):
        assert packet.interface.isprintable()
        assert all(comment.isprintable() for comment in packet.comments)
    assert len(dissected(target)) == len(PLAYED)
