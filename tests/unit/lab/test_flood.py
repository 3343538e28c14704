"""The SYN flood of the exercises: what it sends, and to whom it refuses to send."""

from __future__ import annotations

import ipaddress
import subprocess
import sys
from pathlib import Path

import pytest

from lab.errors import LabError
from lab.flood import connected_network, forged_syns
from lab.network.segments import parse_segment

REPOSITORY = Path(__file__).resolve().parents[3]
LIMIT_S = 60
USAGE, FAILED = 2, 3
SERVER, CLIENT, PORT = "192.168.56.10", "192.168.56.20", 3311
NETWORK = ipaddress.IPv4Network("192.168.56.0/24")
# As the kernel prints it on a little-endian machine, whose lab this is.
ROUTES = """\
Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT
eth0\t00000000\t0202000A\t0003\t0\t0\t0\t00000000\t0\t0\t0
eth0\t0002000A\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0
eth1\t0038A8C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0
"""


def test_the_network_of_a_server_on_the_same_link_is_found() -> None:
    assert connected_network(ROUTES, SERVER) == NETWORK


@pytest.mark.parametrize(
    ("server", "why"),
    [
        ("192.168.57.10", "behind a gateway"),
        ("8.8.8.8", "not an address of a private network"),
        ("127.0.0.1", "not an address of a private network"),
        ("fd00::1", "IPv6"),
    ],
)
def test_no_other_server_gets_a_forged_packet(server: str, why: str) -> None:
    with pytest.raises(LabError, match=why):
        connected_network(ROUTES, server)


def test_without_a_route_nothing_is_sent() -> None:
    with pytest.raises(LabError, match="no route"):
        connected_network(ROUTES.splitlines()[0], SERVER)


def test_each_syn_has_another_address_and_none_is_a_real_hosts() -> None:
    packets = list(forged_syns(NETWORK, {SERVER, CLIENT}, SERVER, PORT, 250))
    segments = [parse_segment(packet) for packet in packets]
    sources = set()
    for segment in segments:
        assert segment is not None
        assert (segment.destination_ip, segment.destination_port) == (SERVER, PORT)
        assert segment.flags == 0x02
        assert ipaddress.IPv4Address(segment.source_ip) in NETWORK
        sources.add(segment.source_ip)
    assert len(sources) == len(packets)
    assert not sources & {SERVER, CLIENT}


def test_more_syns_than_addresses_come_from_other_ports() -> None:
    packets = list(forged_syns(ipaddress.IPv4Network("10.0.0.0/29"), set(), SERVER, PORT, 100))
    ends = {(one.source_ip, one.source_port) for one in map(parse_segment, packets) if one}
    assert len(ends) == len(packets)


def test_a_network_without_another_address_is_refused() -> None:
    only = ipaddress.IPv4Network("10.0.0.1/32")
    with pytest.raises(LabError, match="no other address"):
        next(forged_syns(only, {"10.0.0.1"}, "10.0.0.1", PORT, 1))


@pytest.mark.parametrize(
    ("words", "status", "why"),
    [
        (("127.0.0.1",), FAILED, "not an address of a private network"),
        (("127.0.0.1", "-n", "0"), USAGE, "0 is not a number from 1"),
        ((), USAGE, "HOST"),
    ],
)
def test_wrong_use_is_refused(words: tuple[str, ...], status: int, why: str) -> None:
    """As a person starts it, in a machine that has only Python."""
    done = subprocess.run(
        [sys.executable, "-S", str(REPOSITORY / "lab" / "flood"), *words],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert (done.returncode, done.stdout) == (status, "")
    assert why in done.stderr
    assert "Traceback" not in done.stderr
