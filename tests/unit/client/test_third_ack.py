"""The third ACK is the packet that scapy makes of the same numbers, and it brings clients alive."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import IP, TCP
from scapy.layers.inet6 import IPv6

from tcpstuck_bpf.client.synack_filter import Synack
from tcpstuck_bpf.client.synacks import SynackWatch
from tcpstuck_bpf.client.third_ack import third_ack
from tcpstuck_bpf.rescue.raw_socket import Resender
from tests.builders import four_tuple
from tests.unit.client.mending import GREETING, PORT, World, exchange, world

U32 = st.integers(0, 2**32 - 1)
FAMILIES = pytest.mark.parametrize("family", [4, 6])
STAMPS = pytest.mark.parametrize("stamps", ["1", "0"])


@FAMILIES
@given(
    numbers=st.tuples(U32, U32),
    stamps=st.none() | st.tuples(U32, U32),
    scales=st.tuples(st.none() | st.integers(0, 14), st.integers(0, 14)),
)
def test_the_packet_is_scapys(
    family: int,
    numbers: tuple[int, int],
    stamps: tuple[int, int] | None,
    scales: tuple[int | None, int],
) -> None:
    who = four_tuple(300, family)
    client_isn, server_isn = numbers
    synack = Synack(who, client_isn, server_isn, stamps, scales[0], 0)
    options: list[Any] = [("NOP", None)] * 2 + [("Timestamp", stamps[::-1])] if stamps else []
    segment = TCP(
        sport=who.client_port,
        dport=who.server_port,
        seq=(client_isn + 1) % 2**32,
        ack=(server_isn + 1) % 2**32,
        flags="A",
        window=64_000 >> (scales[1] if scales[0] is not None else 0),
        options=options,
    )
    head = (
        IP(src=who.client_ip, dst=who.server_ip, id=0, flags="DF", ttl=64)
        if family == 4
        else IPv6(src=who.client_ip, dst=who.server_ip, hlim=64)
    )
    assert third_ack(synack, scales[1]) == bytes(head / segment)


@contextlib.contextmanager
def watched(family: int, stamps: str) -> Iterator[tuple[World, SynackWatch, Resender]]:
    with (
        world(family, tcp_timestamps=stamps) as made,
        SynackWatch(made.client.inode, [PORT]) as watch,
        Resender() as resender,
    ):
        yield made, watch, resender


def seen_of(made: World, watch: SynackWatch, client: Any) -> Synack:
    watch.take_in()
    seen = watch.table.find(made.four_tuple(client))
    assert seen is not None
    assert not seen.ambiguous
    return seen.first


@FAMILIES
@STAMPS
def test_a_forgotten_client_is_accepted_and_greeted(family: int, stamps: str) -> None:
    with watched(family, stamps) as (made, watch, resender):
        client = made.forgotten()
        synack = seen_of(made, watch, client)
        assert (synack.timestamps is not None) == (stamps == "1")
        resender.send_to_server(synack.four_tuple, third_ack(synack))
        accepted = made.accept()
        assert accepted.getpeername()[:2] == client.getsockname()[:2]
        accepted.sendall(GREETING)
        assert client.recv(100) == GREETING
        assert made.server.counters()["SyncookiesRecv"] == 1
        exchange(client, accepted)


@FAMILIES
@STAMPS
def test_nobody_else_is_accepted(family: int, stamps: str) -> None:
    """Each second one of 20 forgotten clients is mended; the others stay unknown to the server."""
    with watched(family, stamps) as (made, watch, resender):
        clients = [made.forgotten() for _ in range(20)]
        for client in clients[::2]:
            synack = seen_of(made, watch, client)
            resender.send_to_server(synack.four_tuple, third_ack(synack))
        ports = {made.accept().getpeername()[1] for _ in clients[::2]}
        assert ports == {client.getsockname()[1] for client in clients[::2]}
        assert made.server.count_known(PORT) == 10


@FAMILIES
@STAMPS
@pytest.mark.parametrize("talked", [False, True])
def test_a_server_that_knows_the_connection_is_not_disturbed(
    family: int, stamps: str, talked: bool
) -> None:
    with watched(family, stamps) as (made, watch, resender):
        client = made.connect()
        accepted = made.accept()
        if talked:
            exchange(client, accepted, 1000)
        before = [made.figures(place) for place in ("server", "client")]
        synack = seen_of(made, watch, client)
        for _ in range(3):
            resender.send_to_server(synack.four_tuple, third_ack(synack))
        assert [made.figures(place) for place in ("server", "client")] == before
        assert made.server.count_known(PORT) == 1
        exchange(client, accepted)
        made.listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            made.listener.accept()


@FAMILIES
def test_a_server_that_knows_neither_resets(family: int) -> None:
    with watched(family, "1") as (made, watch, resender):
        client = made.forgotten()
        synack = seen_of(made, watch, client)
        made.restart()
        resender.send_to_server(synack.four_tuple, third_ack(synack))
        with pytest.raises(ConnectionResetError):
            client.recv(1)
