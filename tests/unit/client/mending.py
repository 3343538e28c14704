"""Real clients in namespaces of their own, whose server forgot them under SYN cookies.

Clients and servers are sockets of this process. What they themselves saw, `ss`, /proc and the
kernel's counters are the oracles.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator, Sequence

import pytest

from lab.errors import LabError
from lab.network.faults import ack_rule, dropping
from lab.network.topology import SERVER_ADDRESS, Topology
from lab.patience import COMMAND_S, Deadline, patient
from tcpstuck_bpf.model import FourTuple, address_bytes

PORT = 3311
GREETING = b"220 at your service\r\n"
COOKIES = "net/ipv4/tcp_syncookies"
OLD_S = 121.0
"""An age at which no cookie is valid; the test servers have none by then."""
_TCP_INFO_BYTES = 232
_LAST_ACK_AT = 56


def limited(made: socket.socket) -> socket.socket:
    """The same socket, with a limit for each wait."""
    made.settimeout(patient(COMMAND_S))
    return made


class World:
    """A server under cookies, and clients that it greets or forgets."""

    def __init__(self, topology: Topology, family: int) -> None:
        self.topology = topology
        self.server, self.client = topology.server, topology.client
        self.family = family
        self.address = SERVER_ADDRESS[family]
        self.server.pin({COOKIES: "2"})
        self._opened = contextlib.ExitStack()
        self.listen()

    def listen(self) -> None:
        kind = socket.AF_INET if self.family == 4 else socket.AF_INET6
        place = (self.address, PORT)
        self.listener = limited(self.server.run(socket.create_server, place, family=kind))
        self._opened.callback(self.listener.close)

    def restart(self) -> None:
        """The server starts anew; it refuses cookies, as one does when they are too old.

        With tcp_syncookies 0 the listener validates no cookie (cookie_v4_check): so an ACK is
        answered as it is when the cookie's two minutes are over.
        """
        self.listener.close()
        self.server.pin({COOKIES: "0"})
        self.listen()

    def connect(self, mss: int = 1460) -> socket.socket:
        """A connected client, which asks for segments of at most `mss` bytes."""

        def connected() -> socket.socket:
            kind = socket.AF_INET if self.family == 4 else socket.AF_INET6
            made = self.keep(socket.socket(kind))
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, mss)
            made.connect((self.address, PORT))
            return made

        return self.client.run(connected)

    def keep(self, made: socket.socket) -> socket.socket:
        self._opened.callback(made.close)
        return limited(made)

    def forgotten(self, mss: int = 1460) -> socket.socket:
        """A client whose ACK is lost: connected, and the server does not know it."""
        (made,) = self.all_forgotten([mss])
        return made

    def all_forgotten(self, sizes: Sequence[int]) -> list[socket.socket]:
        """A forgotten client of each MSS."""
        known = self.server.count_known(PORT)
        with dropping(self.server, ack_rule(PORT), self.family):
            made = [self.connect(mss) for mss in sizes]
        assert self.server.count_known(PORT) == known
        return made

    def accept(self) -> socket.socket:
        return self.keep(self.listener.accept()[0])

    def four_tuple(self, client: socket.socket) -> FourTuple:
        own, peer = client.getsockname(), client.getpeername()
        addresses = address_bytes(own[0]), address_bytes(peer[0])
        return FourTuple(*addresses, own[1], peer[1], self.client.inode)

    def figures(self, place: str) -> list[str]:
        """`ss`'s figures of bytes and data segments, of all connections of one end."""
        words = self.server if place == "server" else self.client
        line = words.command("ss", "-tinH", "state", "established")
        return [word for word in line.split() if word.startswith(("bytes_", "data_segs_"))]

    def close(self) -> None:
        self._opened.close()


@contextlib.contextmanager
def world(family: int = 4, **client_sysctls: str) -> Iterator[World]:
    """Skips the test where there are no namespaces; sysctls of the client are of net/ipv4."""
    if os.geteuid() != 0:
        pytest.skip("making a network namespace takes root")
    with contextlib.ExitStack() as opened:
        try:
            topology = opened.enter_context(Topology())
        except LabError as error:
            pytest.skip(f"network namespaces cannot be made here: {error}")
        topology.client.pin({f"net/ipv4/{name}": value for name, value in client_sysctls.items()})
        yield opened.enter_context(contextlib.closing(World(topology, family)))


def since_last_ack_ms(client: socket.socket) -> int:
    data = client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
    (since_ms,) = struct.unpack_from("=I", data, _LAST_ACK_AT)
    return int(since_ms)


def await_idle(client: socket.socket, ms: int = 100) -> None:
    """Wait until the last ACK of the server is so old. Time itself is what is waited for."""
    deadline = Deadline(COMMAND_S)
    while (left_ms := ms - since_last_ack_ms(client)) > 0:
        assert not deadline.passed()
        time.sleep(left_ms / 1000)


def exchange(one: socket.socket, other: socket.socket, size: int = 100_000) -> None:
    """Different bytes each way at the same time; both must arrive as they were sent."""
    there, back = os.urandom(size), os.urandom(size)
    got: dict[socket.socket, bytes] = {}

    def receive(end: socket.socket) -> None:
        data = bytearray()
        while len(data) < size and (part := end.recv(65_536)):
            data += part
        got[end] = bytes(data)

    jobs = [
        threading.Thread(target=receive, args=(one,)),
        threading.Thread(target=receive, args=(other,)),
        threading.Thread(target=one.sendall, args=(there,)),
        threading.Thread(target=other.sendall, args=(back,)),
    ]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(patient(COMMAND_S))
    assert got == {one: back, other: there}
