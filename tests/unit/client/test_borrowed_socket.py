"""The server is asked through the application's own socket, which then is as it was before."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.network.faults import dropping, no_syn_rule
from lab.patience import COMMAND_S, patient
from tcpstuck_bpf.client import borrowed_socket
from tcpstuck_bpf.client.borrowed_socket import (
    COOKIE_LIFE_S,
    Answer,
    TooYoungError,
    Wanted,
    Way,
    ask,
)
from tcpstuck_bpf.host.bpf_syscall import RefusedError
from tests.unit.client.mending import GREETING, OLD_S, PORT, World, await_idle, exchange, world

SHORT_S = 0.5
LONG_ENOUGH_MS = {Way.WINDOW_PROBE: 100, Way.KEEP_ALIVE: 1000}
"""The idle time after which the question leaves at once."""
WAYS = pytest.mark.parametrize("way", [*Way])
SO_COOKIE, TCP_USER_TIMEOUT = 57, 18
OPTIONS = (
    *((socket.SOL_SOCKET, name) for name in (socket.SO_KEEPALIVE, socket.SO_REUSEADDR)),
    *(
        (socket.IPPROTO_TCP, name)
        for name in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
    ),
    *((socket.IPPROTO_TCP, name) for name in (socket.TCP_NODELAY, TCP_USER_TIMEOUT)),
)
KEEP_ALIVE = {
    "off": (),
    "off, its own values": ((socket.TCP_KEEPIDLE, 600), (socket.TCP_KEEPCNT, 4)),
    "on": ((None, 1),),
    "on, its own values": (
        *((None, 1), (socket.TCP_KEEPIDLE, 600)),
        *((socket.TCP_KEEPINTVL, 30), (socket.TCP_KEEPCNT, 2)),
    ),
}
CASES = pytest.mark.parametrize(
    ("way", "family", "settings"),
    [
        (Way.WINDOW_PROBE, 4, "off"),
        (Way.WINDOW_PROBE, 6, "on, its own values"),
        (Way.KEEP_ALIVE, 4, "off"),
        (Way.KEEP_ALIVE, 6, "off, its own values"),
        (Way.KEEP_ALIVE, 6, "on"),
        (Way.KEEP_ALIVE, 4, "on, its own values"),
    ],
)


def options_of(client: socket.socket) -> list[int]:
    return [client.getsockopt(level, name) for level, name in OPTIONS]


def set_up(client: socket.socket, settings: str) -> None:
    for name, value in KEEP_ALIVE[settings]:
        if name is None:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, value)
        else:
            client.setsockopt(socket.IPPROTO_TCP, name, value)


def wanted(client: socket.socket, pid: int = 0) -> Wanted:
    number = client.fileno()
    (cookie,) = struct.unpack("=Q", client.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8))
    return Wanted(pid or os.getpid(), number, os.fstat(number).st_ino, cookie)


def descriptors() -> set[str]:
    """The open files of this process."""
    return {str(entry) for entry in Path("/proc/self/fd").iterdir()}


@contextlib.contextmanager
def unchanged(client: socket.socket) -> Iterator[None]:
    """Options, flags and descriptors of this process are as before at the end."""

    def state() -> tuple[object, ...]:
        return (options_of(client), os.get_blocking(client.fileno()), descriptors())

    before = state()
    yield
    assert state() == before


def idle(made: World, settings: str = "off") -> socket.socket:
    client = made.forgotten()
    set_up(client, settings)
    await_idle(client)
    return client


def probes(made: World) -> dict[str, int]:
    counters = made.client.counters()
    return {name: counters[name] for name in ("TCPKeepAlive", "TCPWinProbe")}


@CASES
def test_a_server_that_forgot(way: Way, family: int, settings: str) -> None:
    with world(family) as made:
        client = idle(made, settings)
        made.restart()
        with unchanged(client):
            assert ask(wanted(client), OLD_S, way=way).answer is Answer.SERVER_FORGOT
        with pytest.raises(ConnectionResetError):
            client.recv(1)
        assert sum(probes(made).values()) == 1


@WAYS
def test_an_application_that_waits_is_woken(way: Way) -> None:
    """It takes the error before anyone else can look."""
    with world() as made:
        client = idle(made)
        made.restart()
        errors: list[BaseException] = []

        def wait() -> None:
            try:
                client.recv(1)
            except OSError as error:
                errors.append(error)

        waiting = threading.Thread(target=wait)
        waiting.start()
        assert ask(wanted(client), OLD_S, way=way).answer is Answer.SERVER_FORGOT
        waiting.join(patient(COMMAND_S))
        assert [type(error) for error in errors] == [ConnectionResetError]


@CASES
def test_a_slow_server(way: Way, family: int, settings: str) -> None:
    """The kernel knows the connection, and nobody has accepted it yet."""
    with world(family, tcp_timestamps="1" if family == 4 else "0") as made:
        client = made.connect()
        set_up(client, settings)
        await_idle(client)
        with unchanged(client):
            assert ask(wanted(client), OLD_S, way=way).answer is Answer.SERVER_KNOWS
        assert sum(probes(made).values()) == 1
        accepted = made.accept()
        accepted.sendall(GREETING)
        assert client.recv(100) == GREETING
        exchange(client, accepted)


@CASES
def test_a_server_out_of_reach(way: Way, family: int, settings: str) -> None:
    with world(family) as made:
        client = made.connect()
        set_up(client, settings)
        await_idle(client, LONG_ENOUGH_MS[way])
        with dropping(made.server, no_syn_rule(PORT), family):
            with unchanged(client):
                outcome = ask(wanted(client), OLD_S, limit_s=SHORT_S, way=way)
            assert outcome.answer is Answer.NO_ANSWER
        assert sum(probes(made).values()) == 1
        accepted = made.accept()
        accepted.sendall(GREETING)
        assert client.recv(100) == GREETING
        exchange(client, accepted)


@WAYS
def test_no_number_of_questions_ends_the_connection(way: Way) -> None:
    with world() as made:
        client = made.connect()
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 1)
        await_idle(client, LONG_ENOUGH_MS[way])
        with dropping(made.server, no_syn_rule(PORT), 4), unchanged(client):
            for _ in range(4):
                outcome = ask(wanted(client), OLD_S, limit_s=0.1, way=way)
                assert outcome.answer is Answer.NO_ANSWER
        assert sum(probes(made).values()) == 4
        assert ask(wanted(client), OLD_S, way=way).answer is Answer.SERVER_KNOWS
        exchange(client, made.accept())


def test_where_possible_no_option_is_changed_for_a_moment() -> None:
    with world() as made:
        client = made.connect()
        await_idle(client)
        assert ask(wanted(client), OLD_S).answer is Answer.SERVER_KNOWS
        assert probes(made) == {"TCPKeepAlive": 0, "TCPWinProbe": 1}


def test_an_address_that_may_be_used_again_stays_so() -> None:
    """The end of TCP_REPAIR would take SO_REUSEADDR away."""
    with world() as made:
        client = made.connect()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        await_idle(client)
        with unchanged(client):
            assert ask(wanted(client), OLD_S).answer is Answer.SERVER_KNOWS
        assert probes(made) == {"TCPKeepAlive": 1, "TCPWinProbe": 0}


def test_without_the_privilege_keep_alive_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(borrowed_socket, "_TCP_REPAIR", 9999)  # an option that no kernel has
    with world() as made:
        client = made.connect()
        await_idle(client)
        assert ask(wanted(client), OLD_S).answer is Answer.SERVER_KNOWS
        assert probes(made) == {"TCPKeepAlive": 1, "TCPWinProbe": 0}
        outcome = ask(wanted(client), OLD_S, way=Way.WINDOW_PROBE)
        assert outcome.answer is Answer.REFUSED


@pytest.mark.parametrize("age", [-1.0, 0.0, 59.0, COOKIE_LIFE_S, float("nan"), float("inf")])
def test_while_a_cookie_may_live_nothing_is_asked(age: float) -> None:
    with pytest.raises(TooYoungError, match="cookie"):
        ask(Wanted(os.getpid(), 0, 0), age)


@WAYS
@pytest.mark.parametrize("mss", [536, 1460])
def test_why_a_young_connection_is_refused(
    way: Way, mss: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within the cookie's life the question itself does the harm, and in two ways.

    The probe's sequence number is one too low. A cookie whose index of MSS is the highest (1460) is
    then invalid: an RST ends a connection that could have been mended. Any other makes a connection
    that waits for a byte which the client never sent, so that the client's data never arrives.
    """
    monkeypatch.setattr(borrowed_socket, "COOKIE_LIFE_S", 0)
    with world() as made:
        client = made.forgotten(mss)
        await_idle(client)
        outcome = ask(wanted(client), 1, limit_s=1.5, way=way)
        if mss == 1460:
            assert outcome.answer is Answer.SERVER_FORGOT
            assert made.server.counters()["SyncookiesFailed"] == 1
            return
        accepted = made.accept()
        accepted.sendall(GREETING)
        assert client.recv(100) == GREETING
        client.sendall(b"hello")
        assert made.server.counters()["TCPOFOQueue"] >= 1
        accepted.setblocking(False)
        with pytest.raises(BlockingIOError):
            accepted.recv(100)


def test_what_is_no_longer_what_was_meant_is_left_alone() -> None:
    with world() as made:
        client = made.connect()
        meant = wanted(client)
        await_idle(client)
        other = made.connect()
        for change in (
            {"inode": meant.inode + 1},
            {"cookie": (meant.cookie or 0) + 1},
            {"fd": 100_000},
            {"fd": other.fileno()},
            {"fd": 0},
        ):
            assert ask(meant._replace(**change), OLD_S).answer is Answer.GONE
        assert ask(meant._replace(pid=2**22 - 1), OLD_S).answer is Answer.GONE
        client.shutdown(socket.SHUT_WR)
        assert ask(meant, OLD_S).answer is Answer.GONE
        assert probes(made) == {"TCPKeepAlive": 0, "TCPWinProbe": 0}


def test_who_has_data_is_left_alone() -> None:
    with world() as made:
        client, other = made.connect(), made.connect()
        made.accept().sendall(GREETING)
        made.accept()
        client.recv(100, socket.MSG_PEEK)
        assert ask(wanted(client), OLD_S).answer is Answer.SERVER_KNOWS
        with dropping(made.server, no_syn_rule(PORT), 4):
            other.sendall(b"hello")
            assert ask(wanted(other), OLD_S).answer is Answer.REFUSED
        assert probes(made) == {"TCPKeepAlive": 0, "TCPWinProbe": 0}


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ([(socket.IPPROTO_TCP, TCP_USER_TIMEOUT, 30_000)], "TCP_USER_TIMEOUT"),
        ([(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 1)], "one probe"),
    ],
)
def test_keep_alive_that_would_end_early_is_left_alone(
    options: list[tuple[int, int, int]], word: str
) -> None:
    with world() as made:
        client = made.connect()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option in options:
            client.setsockopt(*option)
        await_idle(client)
        with unchanged(client):
            outcome = ask(wanted(client), OLD_S, way=Way.KEEP_ALIVE)
            assert outcome.answer is Answer.REFUSED
            assert word in outcome.reason
            assert ask(wanted(client), OLD_S).answer is Answer.SERVER_KNOWS


@pytest.mark.parametrize(
    ("number", "answer"),
    [(1, Answer.NOT_OURS), (38, Answer.REFUSED), (3, Answer.GONE), (9, Answer.GONE)],
)
def test_what_the_kernel_says_of_borrowing(
    number: int, answer: Answer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise RefusedError(number)

    monkeypatch.setattr(borrowed_socket, "system_call", refuse)
    outcome = ask(Wanted(1, 3, 4), OLD_S)
    assert outcome.answer is answer
    assert os.strerror(number) in outcome.reason


def test_who_may_not_borrow_is_told() -> None:
    """As a user who is neither root nor the owner of the process."""
    if os.geteuid() != 0:
        pytest.skip("changing the user takes root")
    text = (
        "import os, sys; from tcpstuck_bpf.client.borrowed_socket import Wanted, ask; "
        "os.setgid(65534); os.setuid(65534); print(ask(Wanted(int(sys.argv[1]), 0, 1), 121))"
    )
    words = [sys.executable, "-c", text, str(os.getpid())]
    done = subprocess.run(words, capture_output=True, text=True, timeout=patient(COMMAND_S))
    assert "NOT_OURS" in done.stdout, done.stderr
