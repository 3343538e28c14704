"""However the asking process ends, the application's options are as they were.

This process is the application; another one borrows its socket and is killed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from lab.patience import COMMAND_S, patient
from tcpstuck_bpf.client import option_guard
from tcpstuck_bpf.client.borrowed_socket import _KEEP_ALIVE, Answer, Wanted, Way, ask
from tcpstuck_bpf.client.option_guard import GuardError, OptionGuard
from tests.unit.client.mending import OLD_S, await_idle, world
from tests.unit.client.test_borrowed_socket import (
    KEEP_ALIVE,
    descriptors,
    options_of,
    set_up,
    wanted,
)

ASKER = """
import os, signal, sys
from tcpstuck_bpf.client.borrowed_socket import Wanted, Way, ask
pid, fd, inode, way, last, number, whom = sys.argv[1:]
def step(name):
    if name == last:
        os.kill(0 if whom == "group" else os.getpid(), int(number))
print(ask(Wanted(int(pid), int(fd), int(inode)), 121, way=Way(way), step=step).answer.value)
"""
"""Asks, and kills itself or its process group after one of the steps."""
CHANGED = [f"{level}:{name}" for level, name, _ in _KEEP_ALIVE]
STEPS = [
    *("borrowed", "guarded"),
    *(f"set {option}" for option in CHANGED),
    "answered",
    *(f"restored {option}" for option in reversed(CHANGED)),
    "released",
]
LONG_S = 60.0


@contextlib.contextmanager
def connection() -> Iterator[socket.socket]:
    """A connected socket that needs no namespace."""
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as client,
    ):
        yield client


def killed_at(meant: Wanted, step: str, way: Way, number: int, whom: str) -> tuple[int, str]:
    """The status of an asking process, and what it printed.

    Returns when the guard has ended as well: it inherits the standard error.
    """
    if os.geteuid() != 0:
        pytest.skip("borrowing from another process can take root")
    words = [*map(str, (meant.pid, meant.fd, meant.inode, way.value, step, int(number), whom))]
    asker = subprocess.Popen(
        [sys.executable, "-c", ASKER, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        printed, _ = asker.communicate(timeout=patient(COMMAND_S))
    finally:
        asker.kill()
        asker.wait()
    return asker.returncode, printed


@pytest.mark.parametrize("step", STEPS)
def test_killed_after_any_step(step: str) -> None:
    with connection() as client:
        set_up(client, "off, its own values")
        before = options_of(client)
        status, _ = killed_at(wanted(client), step, Way.KEEP_ALIVE, signal.SIGKILL, "itself")
        assert status == -signal.SIGKILL
        assert options_of(client) == before


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_killed_with_its_process_group(number: int) -> None:
    with connection() as client:
        before = options_of(client)
        last = f"set {CHANGED[-1]}"
        status, _ = killed_at(wanted(client), last, Way.KEEP_ALIVE, number, "group")
        assert status != 0
        assert options_of(client) == before


@pytest.mark.parametrize("step", ["borrowed", "asked"])
def test_a_window_probe_leaves_nothing_to_restore(step: str) -> None:
    if os.geteuid() != 0:
        pytest.skip("a window probe takes CAP_NET_ADMIN")
    with connection() as client:
        before = options_of(client)
        status, _ = killed_at(wanted(client), step, Way.WINDOW_PROBE, signal.SIGKILL, "itself")
        assert status == -signal.SIGKILL
        assert options_of(client) == before


def test_every_step_is_killed_at_and_changes_what_it_says() -> None:
    """What the application sees after each step, when nobody is killed."""
    seen: dict[str, list[int]] = {}
    with world() as made:
        client = made.connect()
        set_up(client, "off, its own values")
        await_idle(client)
        before = options_of(client)
        outcome = ask(
            wanted(client),
            OLD_S,
            way=Way.KEEP_ALIVE,
            step=lambda name: seen.update({name: options_of(client)}),
        )
        assert outcome.answer is Answer.SERVER_KNOWS
        assert [*seen] == STEPS
        assert seen["guarded"] == seen["released"] == before
        between = [seen[step] for step in STEPS[1:6]]
        assert all(one != other for one, other in zip(between, between[1:]))


def asking(client: socket.socket, limit_s: float = LONG_S) -> OptionGuard:
    return OptionGuard(client, _KEEP_ALIVE, limit_s)


@pytest.mark.parametrize("settings", KEEP_ALIVE)
def test_a_guard_that_is_killed_is_not_missed(settings: str) -> None:
    with connection() as client:
        set_up(client, settings)
        before = options_of(client)
        with asking(client) as guard:
            os.kill(guard.child_pid, signal.SIGKILL)
            os.waitid(os.P_PID, guard.child_pid, os.WEXITED | os.WNOWAIT)
            assert options_of(client) != before
        assert options_of(client) == before


def test_a_guard_does_not_wait_for_ever() -> None:
    """Its parent may be stopped."""
    with connection() as client:
        before = options_of(client)
        with asking(client, 0.2) as guard:
            assert options_of(client) != before
            os.waitid(os.P_PID, guard.child_pid, os.WEXITED | os.WNOWAIT)
            assert options_of(client) == before
        assert options_of(client) == before


def test_what_the_application_sets_meanwhile_stays() -> None:
    with connection() as client:
        with asking(client):
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 77)
        assert client.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 77
        assert client.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 0


def test_a_failure_in_between_restores() -> None:
    with connection() as client:
        before = options_of(client)
        with pytest.raises(KeyboardInterrupt), asking(client):
            raise KeyboardInterrupt
        assert options_of(client) == before
        refused = (*_KEEP_ALIVE, (socket.IPPROTO_TCP, socket.TCP_MAXSEG, -5))
        with pytest.raises(OSError, match="Invalid"), OptionGuard(client, refused, LONG_S):
            pass
        assert options_of(client) == before


def test_an_interrupt_while_restoring_leaves_it_to_the_guard() -> None:
    with connection() as client:
        before = options_of(client)

        def interrupt(step: str) -> None:
            if step.startswith("restored"):
                raise KeyboardInterrupt

        guard = OptionGuard(client, _KEEP_ALIVE, LONG_S, interrupt)
        with pytest.raises(KeyboardInterrupt), guard:
            assert options_of(client) != before
        assert options_of(client) == before


def test_without_a_guard_nothing_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    with connection() as client:
        before = options_of(client)
        with monkeypatch.context() as patched:
            patched.setattr(sys, "executable", "/nowhere")
            with pytest.raises(GuardError, match="No such file"), asking(client):
                pass
            outcome = ask(wanted(client), OLD_S, way=Way.KEEP_ALIVE)
            assert outcome.answer is Answer.REFUSED
        monkeypatch.setattr(option_guard, "_CHILD", "import sys; sys.stdin.read()")
        monkeypatch.setattr(option_guard, "START_LIMIT_S", 0.2)
        with pytest.raises(GuardError, match="did not start"), asking(client):
            pass
        assert options_of(client) == before


def test_no_process_and_no_descriptor_is_left() -> None:
    with connection() as client:
        before = descriptors()
        with asking(client) as guard:
            pass
        assert descriptors() == before
        with pytest.raises(ProcessLookupError):
            os.kill(guard.child_pid, 0)
