"""Every golden recording as a packet capture: its packets are those of the committed timelines."""

from __future__ import annotations

import calendar
import json
import re
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from lab.golden import RECORDINGS
from lab.golden_files import LINES, kept_file, kept_recording
from tcpstuck_bpf.cli import main
from tests.captured import Read, dissected, read, section_comment

SEGMENT = re.compile(r"^([A-Z,]+|no flags), seq ISN([+-]\d+), ack (0x[0-9a-f]{8})")
PAYLOAD = re.compile(r", (\d+) bytes of data")
LETTERS = {"FIN": "F", "SYN": "S", "RST": "R", "PSH": "P", "ACK": "A"}
ORDER = "FSRPA"
"""scapy's order of flags."""
MICROSECOND_NS = 1_000


class Told(NamedTuple):
    """A packet, as a timeline tells it."""

    time_us: int
    client: tuple[str, int]
    flags: str
    sequence: int
    acknowledgement: int
    payload_length: int


@pytest.fixture(params=RECORDINGS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def target(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """The capture of a recording."""
    (tmp_path / "run").write_bytes(kept_recording(name))
    path = tmp_path / "run.pcapng"
    main(["--replay", str(tmp_path / "run"), "--pcap", str(path), "--summary"])
    assert "left out" not in capsys.readouterr().err
    return path


def last_verdicts(name: str) -> list[dict[str, Any]]:
    """The committed line of each connection that is valid in the end."""
    lines = kept_file(name, LINES).read_text("utf-8").splitlines()
    verdicts = [one for one in map(json.loads, lines) if one["type"] == "verdict"]
    last = {(one["client_ip"], one["client_port"], one["cookie_isn"]): one for one in verdicts}
    return [one for one in last.values() if one["verdict"] != "completed"]


def microseconds(text: str) -> int:
    moment = datetime.fromisoformat(text.replace("Z", "+00:00"))
    return calendar.timegm(moment.utctimetuple()) * 10**6 + moment.microsecond


def told_by(verdict: dict[str, Any]) -> Iterator[Told]:
    """The client's packets in a verdict's timeline."""
    client = (verdict["client_ip"], verdict["client_port"])
    begun_us = microseconds(verdict["syn_time"])
    isn = verdict["client_isn"]
    for entry in verdict["timeline"]:
        time_us = begun_us + round(entry["time_ms"] * 1000)
        segment = SEGMENT.match(entry["detail"])
        payload = PAYLOAD.search(entry["detail"])
        length = int(payload[1]) if payload else 0
        if entry["what"] in ("SYN", "SYN repeated", "SYN dropped"):
            yield Told(time_us, client, "S", isn, 0, length)
        elif segment is not None:
            letters = {LETTERS[flag] for flag in segment[1].split(",")}
            flags = "".join(letter for letter in ORDER if letter in letters)
            sequence = (isn + int(segment[2])) % 2**32
            yield Told(time_us, client, flags, sequence, int(segment[3], 16), length)


def as_told(packet: Read) -> Told:
    return Told(
        packet.time_ns // MICROSECOND_NS,
        packet.source,
        packet.flags,
        packet.sequence,
        packet.acknowledgement,
        packet.payload_length,
    )


def test_it_has_every_packet_of_the_timelines_and_their_numbers(name: str, target: Path) -> None:
    verdicts = last_verdicts(name)
    packets = read(target)
    assert len({packet.source for packet in packets if packet.inbound}) == len(verdicts)
    came = [as_told(packet) for packet in packets if packet.inbound]
    expected = [told for verdict in verdicts for told in told_by(verdict)]
    assert expected or not verdicts
    for told in expected:
        # Two times are rounded: that of the first SYN, and the one since.
        near = [one for one in came if abs(one.time_us - told.time_us) <= 1]
        assert told[1:] in [one[1:] for one in near], told


def test_it_has_each_cookie_and_each_rescue(name: str, target: Path) -> None:
    verdicts = last_verdicts(name)
    answers = [packet for packet in read(target) if not packet.inbound]
    sent = {(*one.destination, one.sequence, one.acknowledgement) for one in answers}
    for one in verdicts:
        isn = (one["client_isn"] + 1) % 2**32
        assert (one["client_ip"], one["client_port"], one["cookie_isn"], isn) in sent
    repeated = [one for one in answers if "SYN-ACK repeated by us" in one.comments[0]]
    assert len(repeated) == sum(one["rescue_tries"] for one in verdicts)
    assert len(answers) - len(repeated) == sum(one["syn_count"] for one in verdicts)


def test_the_last_packet_of_each_has_the_committed_verdict(name: str, target: Path) -> None:
    last = {
        packet.source if packet.inbound else packet.destination: packet for packet in read(target)
    }
    verdicts = last_verdicts(name)
    assert len(last) == len(verdicts)
    for one in verdicts:
        comment = last[one["client_ip"], one["client_port"]].comments[-1]
        certainty = f"({one['certainty']}{', suspected SYN flood' * one['flood_suspected']})"
        assert comment.startswith(f"verdict {one['verdict']} {certainty}: {one['meaning']}")


def test_tshark_finds_nothing_malformed_and_no_bad_checksum(name: str, target: Path) -> None:
    packets = dissected(target)
    assert len(packets) == len(read(target))
    for packet in packets:
        assert "_ws.malformed" not in packet
        cut = packet["tcp.len"] != ["0"]
        assert packet["tcp.checksum.status"] == ["2" if cut else "1"]
        assert packet.get("ip.checksum.status", ["1"]) == ["1"]
        told = " ".join(packet.get("_ws.expert.message", []))
        assert "ACKed segment that wasn't captured" not in told
    assert f"{len(last_verdicts(name))} handshakes" in section_comment(target)
