"""10 000 connections whose clients spoke first, beside `--client --rescue` on their port.

The tool says nothing about them, sends nothing and changes nothing. The oracle: the clients'
sockets in this process, and the kernel's count of segments that were sent. Needs root.
"""

from __future__ import annotations

import contextlib
import itertools
import resource
import socket
import struct
from collections.abc import Iterator

import pytest

from lab.network.topology import SERVER_ADDRESS, Topology
from lab.patience import COMMAND_S, LOAD_S, Deadline, patient
from lab.processes.servers import GREETING, Greeter
from tests.unit.client.test_native import topology
from tests.unit.client.test_rescue_native import segments_sent, started

__all__ = ["topology"]

EACH = 2_500
"""For each family and server; both families' answering and silent servers make four."""
LEAST_POLLS = 2
REQUEST = b"GET / HTTP/1.1\r\n\r\n"
TCP_USER_TIMEOUT, TCP_NOTSENT_LOWAT = 18, 25
"""Python's socket module lacks these on some versions (asm-generic/socket.h, linux/tcp.h)."""
OPTIONS = (
    *((socket.SOL_SOCKET, name) for name in (socket.SO_KEEPALIVE, socket.SO_REUSEADDR)),
    *((socket.SOL_SOCKET, name) for name in (socket.SO_LINGER, socket.SO_RCVBUF, socket.SO_SNDBUF)),
    *((socket.SOL_SOCKET, name) for name in (socket.SO_MARK, socket.SO_PRIORITY)),
    *(
        (socket.IPPROTO_TCP, name)
        for name in (
            *(socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT, TCP_USER_TIMEOUT),
            *(socket.TCP_NODELAY, socket.TCP_MAXSEG, socket.TCP_CORK, socket.TCP_QUICKACK),
            *(socket.TCP_LINGER2, TCP_NOTSENT_LOWAT),
        )
    ),
)


def options(clients: list[socket.socket]) -> list[list[int]]:
    return [[one.getsockopt(*option) for option in OPTIONS] for one in clients]


def await_acknowledged(clients: list[socket.socket]) -> None:
    """Wait until the clients' kernel has nothing more to send by itself."""
    deadline = Deadline(COMMAND_S)
    for one in clients:
        while unacknowledged(one):
            assert not deadline.passed()


def unacknowledged(client: socket.socket) -> int:
    (number,) = struct.unpack_from(
        "=I", client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 28), 24
    )
    return int(number)


@contextlib.contextmanager
def many_files(number: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < number:
        pytest.skip(f"a process may have {hard} files open")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, number), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def spoken(topology: Topology, server: Greeter, family: int) -> list[socket.socket]:
    """Clients that have spoken; every second one has keep-alive, and may share its port."""
    kind = socket.AF_INET if family == 4 else socket.AF_INET6

    def connect() -> list[socket.socket]:
        made = []
        for number in range(EACH):
            one = socket.socket(kind)
            one.settimeout(patient(COMMAND_S))
            # A window probe of the tool's would switch this off, and its keep-alive that.
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, number % 2)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, number % 2)
            one.connect((SERVER_ADDRESS[family], server.port))
            one.sendall(REQUEST)
            made.append(one)
        return made

    return topology.client.run(connect)


def greeting(client: socket.socket) -> bytes:
    return client.recv(len(GREETING), socket.MSG_WAITALL)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_clients_that_spoke_first_are_left_alone(topology: Topology) -> None:
    """Half of them have got an answer."""
    topology.server.pin({"net/core/somaxconn": str(2 * EACH)})
    with contextlib.ExitStack() as stack:
        stack.enter_context(many_files(5 * EACH))
        servers, clients = [], []
        for family, answers in itertools.product((4, 6), (True, False)):
            server = Greeter(topology.server, SERVER_ADDRESS[family], 0, backlog=2 * EACH)
            servers.append(stack.enter_context(server))
            if answers:
                server.resume()
            clients.append(spoken(topology, server, family))
            for one in clients[-1]:
                stack.callback(one.close)
        everybody = [one for each in clients for one in each]
        for each in clients[::2]:
            assert {greeting(one) for one in each} == {GREETING}
        for server in servers[::2]:
            server.await_accepted(EACH, LOAD_S)
        await_acknowledged(everybody)
        chosen, sent = options(everybody), segments_sent(topology)

        ports = ",".join(str(server.port) for server in servers)
        words = ["-p", ports, "-t", "10ms", "-d", "4", "--rescue"]
        tracer = stack.enter_context(started(topology, servers[0].port, *words))
        tracer.start()
        assert tracer.await_lines(1)
        tracer.await_end()

        assert segments_sent(topology) == sent
        assert options(everybody) == chosen
        for server in servers[1::2]:
            server.resume()
        for each in clients[1::2]:
            assert {greeting(one) for one in each} == {GREETING}
        assert [len(server.accepted()) for server in servers] == [EACH] * len(servers)
    (summary,) = tracer.lines
    assert (summary["established"], summary["verdicts"]) == (len(everybody), {})
    assert summary["polls"] >= LEAST_POLLS
    assert (summary["pending"], summary["ever_stuck"], summary["losses"]) == (0, 0, {})
    assert (summary["rescue"]["challenged"], summary["rescue"]["asked"]) == (0, 0)
    assert tracer.exit_status == 0
