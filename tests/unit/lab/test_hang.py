"""The load generator against servers on this machine; what happened is told by the servers."""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from lab import hang
from lab.records import ClientRecord, FourTuple, endpoint

REPOSITORY = Path(__file__).resolve().parents[3]
LIMIT_S = 60
GREETING = b"220 ready\r\n"
ALL_GREETED, NOT_GREETED, USAGE, FAILED = 0, 1, 2, 3
Address = tuple[str, int]


class Server:
    """A listener, and what it has accepted."""

    def __init__(self, family: int, address: str) -> None:
        self.listener = socket.create_server((address, 0), family=family, backlog=100)
        self.listener.settimeout(LIMIT_S)
        self.accepted: dict[Address, socket.socket] = {}

    @property
    def port(self) -> int:
        return int(self.listener.getsockname()[1])

    def accept(self, count: int) -> list[Address]:
        peers = []
        for _ in range(count):
            connection, peer = self.listener.accept()
            connection.settimeout(LIMIT_S)
            self.accepted[peer[:2]] = connection
            peers.append(peer[:2])
        return peers

    def greet(self, peers: Sequence[Address]) -> None:
        for peer in peers:
            self.accepted[peer].sendall(GREETING)


@pytest.fixture(params=[(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")], ids=["4", "6"])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    one = Server(*request.param)
    with contextlib.ExitStack() as opened:
        opened.enter_context(one.listener)
        yield one
        for connection in one.accepted.values():
            connection.close()


@contextlib.contextmanager
def hanging(*words: object) -> Iterator[subprocess.Popen[str]]:
    """The command as a person starts it, in a machine that has only Python."""
    with subprocess.Popen(
        [sys.executable, "-S", str(REPOSITORY / "lab" / "hang"), *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def read_until(process: subprocess.Popen[str], wanted: str) -> str:
    assert process.stdout is not None
    for line in process.stdout:
        if wanted in line:
            return line
    raise AssertionError(f"it ended without: {wanted}")


def rest_of(process: subprocess.Popen[str]) -> tuple[str, str]:
    said, complained = process.communicate(timeout=LIMIT_S)
    return said, complained


def test_those_who_wait_are_counted_and_listed(server: Server) -> None:
    address = server.listener.getsockname()[0]
    with hanging(address, server.port, "-n", 12, "--list") as process:
        peers = server.accept(12)
        server.greet(peers[:7])
        read_until(process, "12 connected, 7 greeted, 5 wait for a greeting\n")
        process.send_signal(signal.SIGINT)
        said, complained = rest_of(process)
    assert (process.returncode, complained) == (NOT_GREETED, "")
    assert said.startswith("5 of 12 clients still waited for a greeting:\n")
    listed = re.findall(r"^  (\S+) > (\S+) for \d+\.\d s$", said, re.MULTILINE)
    to = endpoint(address, server.port)
    assert sorted(listed) == sorted((endpoint(*peer), to) for peer in peers[7:])


def test_it_ends_when_the_server_has_closed_every_connection(server: Server) -> None:
    with hanging(server.listener.getsockname()[0], server.port, "-n", 3) as process:
        peers = server.accept(3)
        server.greet(peers)
        for peer in peers:
            server.accepted[peer].close()
        said, complained = rest_of(process)
    assert (process.returncode, complained) == (ALL_GREETED, "")
    assert "3 connected, 3 greeted, 0 wait for a greeting, 3 closed by the server\n" in said


def test_it_ends_after_its_time_and_closes(server: Server) -> None:
    words = (server.listener.getsockname()[0], server.port, "-n", 2, "--for", "0.5")
    with hanging(*words) as process:
        peers = server.accept(2)
        rest_of(process)
        assert process.returncode == NOT_GREETED
        assert [server.accepted[peer].recv(1) for peer in peers] == [b"", b""]


def test_a_client_that_speaks_first_says_its_line(server: Server) -> None:
    words = (server.listener.getsockname()[0], server.port, "-n", 2, "--say", "GET / HTTP/1.0")
    with hanging(*words) as process:
        line = b"GET / HTTP/1.0\r\n"
        for peer in server.accept(2):
            assert server.accepted[peer].recv(100) == line
            server.greet([peer])
        read_until(process, "2 greeted, 0 wait")
        process.send_signal(signal.SIGTERM)
        rest_of(process)
    assert process.returncode == ALL_GREETED


def test_who_is_refused_is_told_by_the_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with hanging("127.0.0.1", port, "-n", 4) as process:
        said, _ = rest_of(process)
    assert process.returncode == NOT_GREETED
    assert "0 wait for a greeting, 4 failed (ECONNREFUSED)\n" in said


@pytest.mark.parametrize(
    ("words", "status", "why"),
    [
        (("127.0.0.1", "0"), USAGE, "0 is not a number from 1 to 65535"),
        (("127.0.0.1", "-n", "0"), USAGE, "0 is not a number from 1"),
        (("127.0.0.1", "--for", "soon"), USAGE, "'soon' is not a number of seconds"),
        (("no host",), FAILED, "cannot find the host no host"),
    ],
)
def test_wrong_use_is_refused(words: tuple[str, ...], status: int, why: str) -> None:
    with hanging(*words) as process:
        said, complained = rest_of(process)
    assert (process.returncode, said) == (status, "")
    assert why in complained
    assert "Traceback" not in complained


def test_the_list_is_short_unless_told_otherwise() -> None:
    def waiting(port: int) -> ClientRecord:
        return ClientRecord(FourTuple("192.0.2.1", port, "192.0.2.9", 25), 0, 1_000_000_000)

    clients = [waiting(port) for port in range(40_000, 40_013)]
    short = hang.listed(clients, 3_500_000_000)
    assert short[0] == "  192.0.2.1:40000 > 192.0.2.9:25 for 2.5 s"
    assert short[-1] == "  and 3 more; --list shows all"
    assert len(short) == 10 + 1
    assert len(hang.listed(clients, 3_500_000_000, None)) == len(clients)
