"""One socket is looked up again by its cookie, and found only while it is the same connection."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import pytest

from lab.network.topology import INTERFACE
from lab.patience import COMMAND_S, Deadline
from tcpstuck_bpf.client.facts import ClientSocket
from tcpstuck_bpf.client.socket_reset import Reset, end_socket
from tcpstuck_bpf.client.sockets import SocketReader, Wanted
from tcpstuck_bpf.host import netns
from tests.unit.client.mending import GREETING, PORT, World, world

FAMILIES = pytest.mark.parametrize("family", [4, 6])


@contextlib.contextmanager
def reading(made: World) -> Iterator[SocketReader]:
    """A reader of the clients' namespace, which is not ours."""
    way = netns.way(made.client.name)
    with contextlib.closing(
        SocketReader(Wanted((PORT,), netns=made.client.inode, way=way))
    ) as reader:
        yield reader


def only(reader: SocketReader) -> ClientSocket:
    (found,) = reader.read(lambda _socket: True).sockets
    return found


def lasting(one: ClientSocket | None) -> ClientSocket | None:
    """Without what time changes."""
    return None if one is None else one._replace(age_ns=0, last_ack_ns=0)


@FAMILIES
def test_the_same_socket_is_found_with_what_it_has_now(family: int) -> None:
    with world(family) as made, reading(made) as reader:
        client = made.connect()
        known = only(reader)
        assert lasting(reader.again(known)) == lasting(known)
        made.accept().sendall(GREETING)
        assert client.recv(100) == GREETING
        now = reader.again(known)
        assert now is not None
        assert (now.bytes_received, now.waits) == (len(GREETING), False)


@FAMILIES
def test_another_or_an_ended_one_is_not(family: int) -> None:
    with world(family) as made, reading(made) as reader:
        client = made.connect()
        known = only(reader)
        assert reader.again(known._replace(cookie=known.cookie + 1)) is None
        port = known.four_tuple.client_port
        other = known._replace(four_tuple=known.four_tuple._replace(client_port=port - 1))
        assert reader.again(other) is None
        client.close()
        assert reader.again(known) is None


@FAMILIES
def test_one_whose_server_closed_is_not(family: int) -> None:
    with world(family) as made, reading(made) as reader:
        client = made.connect()
        known = only(reader)
        made.accept().close()
        assert client.recv(1) == b""
        deadline = Deadline(COMMAND_S)
        while reader.again(known) is not None:
            assert not deadline.passed()


def test_an_ipv6_socket_that_is_connected_over_ipv4_is_found() -> None:
    with world() as made, reading(made) as reader:
        client = made.keep(made.client.run(socket.socket, socket.AF_INET6))
        client.connect((f"::ffff:{made.address}", PORT))
        known = only(reader)
        assert lasting(reader.again(known)) == lasting(known)


@FAMILIES
def test_one_that_is_bound_to_its_device_is_found_and_ended(family: int) -> None:
    with world(family) as made, reading(made) as reader:
        client = made.connect()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, INTERFACE.encode())
        known = only(reader)
        assert known.interface > 0
        assert lasting(reader.again(known)) == lasting(known)
        result = end_socket(known.four_tuple, known.cookie, known.interface)
        if result is Reset.NOT_SUPPORTED:
            pytest.skip("the kernel lacks CONFIG_INET_DIAG_DESTROY")
        assert result is Reset.DONE
        with pytest.raises(ConnectionAbortedError):
            client.recv(1)


def test_a_namespace_that_was_never_read_is_an_error() -> None:
    with world() as made, reading(made) as reader:
        made.connect()
        known = only(reader)
        elsewhere = known._replace(four_tuple=known.four_tuple._replace(netns=1))
        with pytest.raises(FileNotFoundError):
            reader.again(elsewhere)
