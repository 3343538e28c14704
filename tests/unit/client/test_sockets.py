"""Sockets of this test, as the tool reads them. Needs neither root nor tracing.

The oracle: what the sockets themselves say, and struct tcp_info by getsockopt.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from lab.patience import COMMAND_S, Deadline
from tcpstuck_bpf.client import sockets
from tcpstuck_bpf.client.facts import ClientSocket, Poll
from tcpstuck_bpf.client.owners import owners_of
from tcpstuck_bpf.client.sockets import SocketReader, Wanted
from tcpstuck_bpf.client.waits import Change
from tcpstuck_bpf.client.words import told
from tcpstuck_bpf.errors import CannotTraceError, UsageError
from tcpstuck_bpf.host import netns
from tcpstuck_bpf.model import SECOND_NS, address_bytes

SO_COOKIE = 57
"""include/uapi/asm-generic/socket.h"""
LOOK_AGAIN_NS = 20_000_000


@dataclass
class Server:
    """A listener, its port, and both ends of connections to it."""

    listener: socket.socket
    address: str
    ends: list[socket.socket] = field(default_factory=list)

    @property
    def port(self) -> int:
        return int(self.listener.getsockname()[1])

    def connect(self, family: int | None = None, to: str = "") -> socket.socket:
        client = socket.socket(family or self.listener.family, socket.SOCK_STREAM)
        self.ends.append(client)
        client.settimeout(COMMAND_S)
        client.connect((to or self.address, self.port))
        self.ends.append(self.listener.accept()[0])
        return client

    def read(self, **wanted: object) -> Poll:
        """One poll of all connections to this server, healthy ones too."""
        asked = Wanted((self.port,), netns=netns.own_netns())._replace(**wanted)
        with contextlib.closing(SocketReader(asked)) as reader:
            return reader.read(lambda _socket: True)


@pytest.fixture(params=[socket.AF_INET, socket.AF_INET6], ids=["ipv4", "ipv6"])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    address = "127.0.0.1" if request.param == socket.AF_INET else "::1"
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(request.param, socket.SOCK_STREAM))
        try:
            listener.bind((address, 0))
        except OSError as error:
            pytest.skip(f"{address} cannot be used here: {error}")
        listener.listen(64)
        listener.settimeout(COMMAND_S)
        found = Server(listener, address)
        yield found
        for end in found.ends:
            end.close()


def of(poll: Poll, client: socket.socket) -> ClientSocket:
    (one,) = (one for one in poll.sockets if one.four_tuple.client_port == client.getsockname()[1])
    return one


def test_the_facts_are_those_of_the_socket(server: Server) -> None:
    begun = time.monotonic_ns()
    client = server.connect()
    poll = server.read()
    one = of(poll, client)
    who = one.four_tuple
    assert (who.client_ip, who.client_port) == client.getsockname()[:2]
    assert (who.server_ip, who.server_port) == (server.address, server.port)
    assert who.family == (6 if ":" in server.address else 4)
    assert who.netns == netns.own_netns()
    assert one.inode == os.fstat(client.fileno()).st_ino
    assert one.cookie == int.from_bytes(
        client.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8), sys.byteorder
    )
    assert one.uid == os.geteuid()
    # The kernel counts in jiffies, of 10 ms at most.
    assert 0 <= one.age_ns <= time.monotonic_ns() - begun + 20_000_000
    assert one.keepalive_ns is None
    assert one.waits
    assert poll.established == len(poll.sockets) == 1
    assert (poll.unreadable, dict(poll.failures)) == (0, {})
    assert poll.namespaces == {netns.own_netns()}


def test_data_in_either_direction_is_seen(server: Server) -> None:
    clients = [server.connect() for _ in range(4)]
    ends = server.ends[1::2]
    clients[0].sendall(b"x")
    ends[1].sendall(b"220 hello\r\n")
    assert clients[1].recv(100, socket.MSG_PEEK)
    ends[2].sendall(b"220 hello\r\n")
    assert clients[2].recv(100)
    found = [of(server.read(), client) for client in clients]
    assert [(one.spoke, one.heard, one.waits) for one in found] == [
        (True, False, False),
        (False, True, False),
        (False, True, False),
        (False, False, True),
    ]


def test_a_keep_alive_timer_is_seen(server: Server) -> None:
    client = server.connect()
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 150)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    left_ns = of(server.read(), client).keepalive_ns
    assert left_ns is not None
    assert 100 * SECOND_NS < left_ns <= 151 * SECOND_NS


def test_a_server_that_answers_keep_alive_is_known_to_have_the_connection(server: Server) -> None:
    client = server.connect()
    quiet = server.connect()
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 1)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    deadline = Deadline(COMMAND_S)
    while (one := of(server.read(), client)).segs_in == 1:
        assert not deadline.passed()
        # Until the probe leaves. A bare ACK, its answer, wakes nobody who polls the socket.
        time.sleep((one.keepalive_ns or LOOK_AGAIN_NS) / SECOND_NS)
    certainties = []
    for one in (of(server.read(), client), of(server.read(), quiet)):
        assert one.waits
        change = Change("greeting-missing", one, time.monotonic_ns(), one.age_ns)
        certainties.append(told(change).certainty)
    assert certainties == ["possible", "likely"]


def test_an_ipv4_connection_of_an_ipv6_socket_is_ipv4(server: Server) -> None:
    if ":" in server.address:
        pytest.skip("the listener is of IPv6")
    try:
        client = server.connect(socket.AF_INET6, "::ffff:127.0.0.1")
    except OSError as error:
        pytest.skip(f"no IPv6 here: {error}")
    one = of(server.read(family=4), client)
    assert (one.four_tuple.server_ip, one.four_tuple.family) == ("127.0.0.1", 4)
    assert server.read(family=6).sockets == ()


def test_filters_leave_others_out(server: Server) -> None:
    server.connect()
    version = 6 if ":" in server.address else 4
    assert server.read(family=version).established == 1
    assert server.read(family=10 - version).established == 0
    assert server.read(address=address_bytes(server.address)).established == 1
    assert server.read(address=address_bytes("10.9.0.1")).established == 0
    assert server.read(ports=(server.port - 1, server.port + 1)).established == 0
    # More ranges than the kernel is asked to filter by. Others may have connections as well.
    every_other = server.read(ports=tuple(range(2 - server.port % 2, 65536, 2)))
    assert server.port in {one.four_tuple.server_port for one in every_other.sockets}
    others = server.read(ports=tuple(range(1 + server.port % 2, 65536, 2)))
    assert server.port not in {one.four_tuple.server_port for one in others.sockets}
    assert server.read(pid=os.getpid()).established == 1


def test_a_server_s_end_is_no_client(server: Server) -> None:
    """The ports asked for may be those of this host's own clients."""
    client = server.connect()
    poll = server.read(ports=(client.getsockname()[1],))
    assert (poll.sockets, poll.accepted) == ((), 1)


def test_only_the_sockets_of_one_process(server: Server) -> None:
    client = server.connect()
    other = subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE)
    with other:
        assert server.read(pid=other.pid).established == 0
        asked = Wanted((server.port,), pid=other.pid)
        reader = SocketReader(asked)
        assert not reader.ended
        assert other.stdin is not None
        other.stdin.close()
        other.wait(COMMAND_S)
        assert reader.read(lambda _socket: True).gone == {netns.own_netns()}
        assert reader.ended
        reader.close()
    with pytest.raises(UsageError, match=f"no process {other.pid}"):
        SocketReader(asked)
    assert of(server.read(pid=os.getpid()), client)


def test_a_process_whose_files_may_not_be_listed_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(sockets, "held_sockets", refuse)
    with pytest.raises(CannotTraceError) as refused:
        SocketReader(Wanted((25,), pid=os.getpid()))
    assert "root" in refused.value.remedy


def test_the_owners_are_the_processes_that_have_it_open(server: Server) -> None:
    client = server.connect()
    other = server.connect()
    inodes = [os.fstat(one.fileno()).st_ino for one in (client, other)]
    command = [sys.executable, "-S", "-c", "input()"]
    number = client.fileno()
    with subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[number]) as heir:
        copy = os.dup(number)
        found = owners_of(inodes)
        os.close(copy)
        name = Path("/proc/self/comm").read_text()[:-1]
        pids = [(one.pid, one.fd) for one in found[inodes[0]].processes]
        assert pids == sorted([(os.getpid(), number), (heir.pid, number)])
        (own,) = found[inodes[1]].processes
        assert (own.name, own.pid, own.fd) == (name, os.getpid(), other.fileno())
        assert heir.stdin is not None
        heir.stdin.close()


def test_a_socket_without_an_owner_is_in_the_answer() -> None:
    (found,) = owners_of([1 << 40]).values()
    assert (found.processes, found.more) == ((), 0)
    assert owners_of([]) == {}


def test_a_silent_subflow_of_mptcp_is_left_out_and_counted(server: Server) -> None:
    """Another subflow of the same connection may carry the data."""
    if ":" in server.address:
        pytest.skip("one family is enough")
    protocol = 262  # IPPROTO_MPTCP of include/uapi/linux/in.h
    try:
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, protocol)
        client = socket.socket(socket.AF_INET, socket.SOCK_STREAM, protocol)
    except OSError as error:
        pytest.skip(f"no MPTCP here: {error}")
    with listener, client:
        listener.bind((server.address, 0))
        listener.listen(1)
        client.connect(listener.getsockname())
        ports = (listener.getsockname()[1],)
        poll = server.read(ports=ports)
        assert (poll.sockets, poll.subflows) == ((), 1)
        client.sendall(b"x")
        poll = server.read(ports=ports)
        assert (len(poll.sockets), poll.subflows) == (1, 0)
