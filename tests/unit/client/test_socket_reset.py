"""A client's connection is ended from outside; its application gets an error in place of a hang."""

from __future__ import annotations

import errno
import os
import socket
import struct
import subprocess
import sys

import pytest

from lab.patience import COMMAND_S, patient
from tcpstuck_bpf.client import socket_reset
from tcpstuck_bpf.client.socket_reset import Reset, end_socket, kernel_can_end_sockets
from tcpstuck_bpf.model import FourTuple
from tests.unit.client.mending import GREETING, PORT, World, exchange, world

SO_COOKIE = 57
FAMILIES = pytest.mark.parametrize("family", [4, 6])


def cookie_of(client: socket.socket) -> int:
    (cookie,) = struct.unpack("=Q", client.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8))
    return int(cookie)


def ended(who: FourTuple, cookie: int) -> Reset:
    result = end_socket(who, cookie)
    if result is Reset.NOT_SUPPORTED:
        pytest.skip("the kernel lacks CONFIG_INET_DIAG_DESTROY")
    return result


@FAMILIES
def test_the_application_gets_an_error(family: int) -> None:
    with world(family) as made:
        client, other = made.forgotten(), made.connect()
        accepted = made.accept()
        assert ended(made.four_tuple(client), cookie_of(client)) is Reset.DONE
        with pytest.raises(ConnectionAbortedError):
            client.recv(1)
        left = made.client.sockets("established")
        assert [row.local_port for row in left] == [other.getsockname()[1]]
        exchange(other, accepted)


def test_a_connection_of_an_ipv6_socket_over_ipv4() -> None:
    with world() as made:
        plain = made.client.run(socket.socket, socket.AF_INET6)
        client = made.keep(plain)
        client.connect((f"::ffff:{made.address}", PORT))
        who = made.four_tuple(client)
        assert who.family == 4
        assert ended(who, cookie_of(client)) is Reset.DONE
        with pytest.raises(ConnectionAbortedError):
            client.recv(1)


def undisturbed(made: World, client: socket.socket) -> None:
    accepted = made.accept()
    accepted.sendall(GREETING)
    assert client.recv(100) == GREETING


@FAMILIES
def test_another_socket_is_never_ended(family: int) -> None:
    with world(family) as made:
        client = made.connect()
        who, cookie = made.four_tuple(client), cookie_of(client)
        assert ended(who, cookie + 1) is Reset.GONE
        assert ended(who._replace(client_port=who.client_port - 1), cookie) is Reset.GONE
        undisturbed(made, client)


def test_a_listener_at_the_same_place_is_never_ended() -> None:
    """For a connection that is gone, sock_diag looks a listener up."""
    with world() as made:
        place = ("10.9.0.2", 40_000)
        with made.client.run(socket.create_server, place) as listener:
            client = made.connect()
            who = made.four_tuple(client)._replace(client_port=place[1])
            assert ended(who, cookie_of(client)) is Reset.GONE
            assert [row.local_port for row in made.client.sockets("listening")] == [place[1]]
            assert ended(who, cookie_of(listener)) is Reset.DONE  # so it was found


@pytest.mark.parametrize("cookie", [2**64 - 1, 2**64, -1])
def test_without_a_cookie_nothing_is_ended(cookie: int) -> None:
    with pytest.raises(ValueError, match="cookie"):
        end_socket(FourTuple(bytes(16), bytes(16), 1, 2, 3), cookie)


def test_the_kernel_says_whether_it_can() -> None:
    with world() as made:
        client = made.connect()
        can = kernel_can_end_sockets()
        result = end_socket(made.four_tuple(client), cookie_of(client))
        assert result is (Reset.DONE if can else Reset.NOT_SUPPORTED)


def answering(number: int) -> type[socket.socket]:
    class Answering(socket.socket):
        def recv(self, *_: object) -> bytes:
            return struct.pack("=IHHIIi", 20, 2, 0, 1, 0, -number)

    return Answering


@pytest.mark.parametrize(
    ("number", "meaning"),
    [
        (errno.EOPNOTSUPP, Reset.NOT_SUPPORTED),
        (errno.EPERM, Reset.NOT_PERMITTED),
        (errno.ENOENT, Reset.GONE),
    ],
)
def test_refusals_are_told_apart(
    number: int, meaning: Reset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket_reset.socket, "socket", answering(number))
    who = FourTuple(bytes(16), bytes(16), 1, 2, socket_reset.netns.own_netns())
    assert end_socket(who, 1) is meaning
    assert kernel_can_end_sockets() == (number != errno.EOPNOTSUPP)


def test_any_other_refusal_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket_reset.socket, "socket", answering(errno.EINVAL))
    with pytest.raises(OSError, match="Invalid argument"):
        kernel_can_end_sockets()


def test_who_may_not_is_told() -> None:
    """As another user, with a connection that exists."""
    if os.geteuid() != 0:
        pytest.skip("changing the user takes root")
    text = (
        "import os, sys\n"
        "from tcpstuck_bpf.client.socket_reset import end_socket\n"
        "from tcpstuck_bpf.host.netns import own_netns\n"
        "from tcpstuck_bpf.model import FourTuple, address_bytes\n"
        "home = address_bytes('127.0.0.1')\n"
        "os.setgid(65534); os.setuid(65534)\n"
        "ports, cookie = map(int, sys.argv[1:3]), int(sys.argv[3])\n"
        "print(end_socket(FourTuple(home, home, *ports, own_netns()), cookie))\n"
    )
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as client,
    ):
        numbers = (client.getsockname()[1], client.getpeername()[1], cookie_of(client))
        words = [sys.executable, "-c", text, *map(str, numbers)]
        done = subprocess.run(words, capture_output=True, text=True, timeout=patient(COMMAND_S))
        assert "NOT_PERMITTED" in done.stdout or "NOT_SUPPORTED" in done.stdout, done.stderr
        with listener.accept()[0] as accepted:
            accepted.sendall(GREETING)
            assert client.recv(100) == GREETING
