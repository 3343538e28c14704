"""A forged SYN-ACK makes the client's kernel repeat the third ACK, past a strict firewall too."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator

import pytest
from scapy.layers.inet import IP, TCP
from scapy.layers.inet6 import IPv6

from lab.network.topology import INTERFACE
from tcpstuck_bpf.client.challenge import challenge
from tcpstuck_bpf.rescue.raw_socket import Resender
from tests.builders import four_tuple
from tests.unit.client.mending import GREETING, PORT, World, exchange, world

FAMILIES = pytest.mark.parametrize("family", [4, 6])
STAMPS = pytest.mark.parametrize("stamps", ["1", "0"])
ONLY_ESTABLISHED = """
table inet strict {
    chain arriving {
        type filter hook input priority 0; policy drop;
        icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept
        ct state invalid drop
        ct state established,related accept
    }
    chain leaving {
        type filter hook output priority 0;
        ct state invalid drop
    }
}
"""
STRICT = {"net/ipv4/conf/all/rp_filter": "1", "net/ipv4/conf/lo/rp_filter": "1"}


@pytest.fixture
def resender() -> Iterator[Resender]:
    with Resender() as made:
        yield made


@FAMILIES
def test_the_packet_is_scapys(family: int) -> None:
    who = four_tuple(300, family)
    segment = TCP(sport=who.server_port, dport=who.client_port, seq=0, ack=0, flags="SA", window=0)
    head = (
        IP(src=who.server_ip, dst=who.client_ip, id=0, flags="DF", ttl=64)
        if family == 4
        else IPv6(src=who.server_ip, dst=who.client_ip, hlim=64)
    )
    assert challenge(who) == bytes(head / segment)


def greeted(made: World, client: socket.socket) -> None:
    """The server accepts this client and nobody else, and both can talk."""
    accepted = made.accept()
    assert accepted.getpeername()[:2] == client.getsockname()[:2]
    accepted.sendall(GREETING)
    assert client.recv(100) == GREETING
    exchange(client, accepted)


@FAMILIES
@STAMPS
@pytest.mark.parametrize("scaling", ["1", "0"])
def test_a_forgotten_client_is_accepted_and_greeted(
    family: int, stamps: str, scaling: str, resender: Resender
) -> None:
    with world(family, tcp_timestamps=stamps, tcp_window_scaling=scaling) as made:
        made.forgotten()
        client = made.forgotten()
        resender.send(made.four_tuple(client), challenge(made.four_tuple(client)))
        greeted(made, client)
        assert made.server.counters()["SyncookiesRecv"] == 1
        assert made.server.count_known(PORT) == 1


@FAMILIES
def test_a_strict_firewall_lets_it_through(family: int, resender: Resender) -> None:
    with world(family) as made:
        made.client.pin(STRICT)
        loading = made.client.popen(["nft", "-f", "-"], stdin=subprocess.PIPE)
        loading.communicate(ONLY_ESTABLISHED.encode())
        if loading.returncode:
            pytest.skip("the kernel or nft has no connection tracking")
        client = made.forgotten()
        try:
            resender.send(made.four_tuple(client), challenge(made.four_tuple(client)))
        except PermissionError:
            pytest.fail("the rules for leaving packets refused it")
        greeted(made, client)


@FAMILIES
@STAMPS
@pytest.mark.parametrize("talked", [False, True])
def test_a_server_that_knows_the_connection_is_not_disturbed(
    family: int, stamps: str, talked: bool, resender: Resender
) -> None:
    with world(family, tcp_timestamps=stamps, tcp_invalid_ratelimit="0") as made:
        client = made.connect()
        accepted = made.accept()
        if talked:
            exchange(client, accepted, 1000)
        before = [made.figures(place) for place in ("server", "client")]
        for _ in range(3):
            resender.send(made.four_tuple(client), challenge(made.four_tuple(client)))
        assert made.client.counters()["TCPChallengeACK"] == 3
        assert [made.figures(place) for place in ("server", "client")] == before
        assert made.server.count_known(PORT) == 1
        exchange(client, accepted)


@FAMILIES
def test_a_server_that_forgot_resets(family: int, resender: Resender) -> None:
    with world(family) as made:
        client = made.forgotten()
        made.restart()
        resender.send(made.four_tuple(client), challenge(made.four_tuple(client)))
        with pytest.raises(ConnectionResetError):
            client.recv(1)


@FAMILIES
def test_a_socket_that_is_gone_disturbs_nobody(family: int, resender: Resender) -> None:
    """The host answers the stray SYN-ACK by an RST to the server, of no connection."""
    with world(family) as made:
        client, other = made.connect(), made.connect()
        accepted, kept = made.accept(), made.accept()
        who = made.four_tuple(client)
        client.close()
        accepted.close()
        resender.send(who, challenge(who))
        exchange(other, kept)


@FAMILIES
def test_a_socket_that_is_bound_to_its_device_is_reached(family: int, resender: Resender) -> None:
    """Though the packet passes the loopback device."""
    with world(family) as made:
        client = made.forgotten()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, INTERFACE.encode())
        resender.send(made.four_tuple(client), challenge(made.four_tuple(client)))
        greeted(made, client)
