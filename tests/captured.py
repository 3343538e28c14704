"""Packet captures, read back by programs that are not ours: scapy, and tshark where it is."""

from __future__ import annotations

import json
import shutil
import subprocess
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from scapy.layers.inet import IP, TCP
from scapy.layers.inet6 import IPv6
from scapy.utils import PcapNgReader

LIMIT_S = 60
LONGEST = 65_535
"""Length of the longest packet whose IP header has its length in every case."""


class Read(NamedTuple):
    """A packet, as scapy reads it."""

    time_ns: int
    interface: str
    source: tuple[str, int]
    destination: tuple[str, int]
    sequence: int
    acknowledgement: int
    flags: str
    payload_length: int
    comments: tuple[str, ...]
    inbound: bool
    options: tuple[Any, ...]


def read(path: Path) -> list[Read]:
    """Every packet of a file in its order."""
    with PcapNgReader(str(path)) as reader:
        return [_as_read(packet) for packet in reader]


def _as_read(packet: Any) -> Read:
    network = packet[IP] if IP in packet else packet[IPv6]
    tcp = packet[TCP]
    own = network.ihl * 4 if IP in packet else len(IPv6())
    told = network.len if IP in packet else network.plen + len(IPv6())
    if packet.wirelen <= LONGEST:
        assert told == packet.wirelen
    assert len(packet) == own + tcp.dataofs * 4
    return Read(
        int(Decimal(str(packet.time)) * 10**9),
        packet.sniffed_on,
        (network.src, tcp.sport),
        (network.dst, tcp.dport),
        tcp.seq,
        tcp.ack,
        str(tcp.flags),
        packet.wirelen - own - tcp.dataofs * 4,
        tuple(comment.decode() for comment in packet.comments),
        packet.direction == 1,
        tuple(tcp.options),
    )


def section_comment(path: Path) -> str:
    """The comment of the file, which scapy does not read: the first option of the first block."""
    data = path.read_bytes()
    assert data[:4] == bytes.fromhex("0a0d0d0a")
    code, length = int.from_bytes(data[24:26], "little"), int.from_bytes(data[26:28], "little")
    assert code == 1
    return data[28 : 28 + length].decode()


def tshark(path: Path, *words: str) -> str:
    """What tshark prints with these words. Skips the test where there is none."""
    if shutil.which("tshark") is None:
        pytest.skip("no tshark: make setup installs it")
    checks = [part for one in ("ip", "tcp") for part in ("-o", f"{one}.check_checksum:TRUE")]
    done = subprocess.run(
        ["tshark", "-r", str(path), *checks, *words],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def dissected(path: Path) -> list[dict[str, Any]]:
    """tshark's fields of each packet: a list of values by the field's name."""
    fields = (
        *("frame.time_epoch", "frame.interface_name", "frame.comment", "frame.len"),
        *("ip.src", "ipv6.src", "tcp.srcport", "tcp.dstport", "tcp.seq_raw", "tcp.ack_raw"),
        *("tcp.flags", "tcp.len", "ip.checksum.status", "tcp.checksum.status"),
        *("_ws.malformed", "_ws.expert.severity", "_ws.expert.message", "frame.packet_flags"),
    )
    words = [word for field in fields for word in ("-e", field)]
    found = json.loads(tshark(path, "-T", "json", *words))
    return [packet["_source"]["layers"] for packet in found]
