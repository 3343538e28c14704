"""Changes options of another process's socket for a moment, and restores them in every case.

A child process holds the socket and the old values. If the process that changed the options ends
in any way, also by SIGKILL, the child restores them; so it does if that process takes too long,
stopped by SIGSTOP for instance. The child is spawned and not forked: a fork of a process with
threads can hang at a lock that another thread held.

What is not covered: both processes killed at once, as by SIGKILL to a whole cgroup.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import IO, NamedTuple

START_LIMIT_S = 10.0
"""For the child to start; it takes 30 ms, more on an emulated or busy machine."""
_END_LIMIT_S = 10.0
_CHILD = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from tcpstuck_bpf.client.option_guard import main; main(*sys.argv[2:])"
)
_PACKAGE_PLACE = str(Path(__file__).resolve().parents[2])
_READY, _RESTORED = b"r", b"d"


class Change(NamedTuple):
    """An integer option: its level and name, and its values, ours and the one before."""

    level: int
    name: int
    ours: int
    before: int


class GuardError(Exception):
    """The child could not be started; the text says why. No option was changed."""


def no_step(_step: str) -> None:
    """Do nothing between two steps."""


def restore(
    borrowed: socket.socket, changes: Iterable[Change], step: Callable[[str], None] = no_step
) -> None:
    """Give each option its old value, the last one first, unless it no longer has ours.

    Another value is the application's own and newer choice. Raises OSError.
    """
    for change in reversed([*changes]):
        if borrowed.getsockopt(change.level, change.name) == change.ours:
            borrowed.setsockopt(change.level, change.name, change.before)
        step(f"restored {change.level}:{change.name}")


class OptionGuard:
    """A context in which options of a socket have other values.

    `wanted` are level, name and value of each option, set in this order. If they are not restored
    within `limit_s` seconds, the child does it. `step` is called after each step. Raises GuardError
    before anything is changed, OSError if the kernel refuses a value.
    """

    def __init__(
        self,
        borrowed: socket.socket,
        wanted: Iterable[tuple[int, int, int]],
        limit_s: float,
        step: Callable[[str], None] = no_step,
    ) -> None:
        self._borrowed = borrowed
        self._limit_s = limit_s
        self._step = step
        values = (
            Change(level, name, ours, borrowed.getsockopt(level, name))
            for level, name, ours in wanted
        )
        self._changes = [change for change in values if change.ours != change.before]

    def __enter__(self) -> OptionGuard:
        self._child = self._spawn()
        self._step("guarded")
        try:
            for change in self._changes:
                self._borrowed.setsockopt(change.level, change.name, change.ours)
                self._step(f"set {change.level}:{change.name}")
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()

    @property
    def child_pid(self) -> int:
        """The child's process id."""
        return self._child.pid

    def _spawn(self) -> subprocess.Popen[bytes]:
        number = self._borrowed.fileno()
        path = json.dumps([*sys.path, _PACKAGE_PLACE])
        words = (str(number), json.dumps(self._changes), str(self._limit_s))
        try:
            child = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _CHILD, path, *words],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=[number],
                # What ends our process group or terminal must not end the child.
                start_new_session=True,
            )
        except OSError as error:
            raise GuardError(f"no child process can be started: {error.strerror}") from error
        if _first_byte(_pipe(child.stdout), START_LIMIT_S) != _READY:
            child.kill()
            _collect(child)
            raise GuardError("the child process that would restore the options did not start")
        return child

    def _end(self) -> None:
        try:
            # Before the child hears of it: it would restore if we were killed in between.
            restore(self._borrowed, self._changes, self._step)
            with contextlib.suppress(OSError):  # it was killed; the options are restored
                os.write(_pipe(self._child.stdin).fileno(), _RESTORED)
            self._step("released")
        finally:
            # If restoring failed or was interrupted, the child restores at the end of its pipe.
            _collect(self._child)


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    if pipe is None:  # never: Popen makes the pipes that it is asked for
        raise ValueError("no pipe")
    return pipe


def _collect(child: subprocess.Popen[bytes]) -> None:
    """Wait for the child's end; its pipes are closed."""
    for pipe in (child.stdin, child.stdout):
        _pipe(pipe).close()
    try:
        child.wait(_END_LIMIT_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _first_byte(pipe: IO[bytes], limit_s: float) -> bytes:
    """The next byte of a pipe; none at its end, or where the limit passes."""
    waiting = select.poll()
    waiting.register(pipe, select.POLLIN)
    if not waiting.poll(limit_s * 1000):
        return b""
    return os.read(pipe.fileno(), 1)


def main(number: str, changes: str, limit_s: str) -> None:
    """Be the child: hold the socket with this number, and restore its options if need be.

    Standard input is the pipe from the process that changes them.
    """
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    held = socket.socket(fileno=int(number))
    kept = [Change(*change) for change in json.loads(changes)]
    with contextlib.suppress(BrokenPipeError):
        os.write(sys.stdout.fileno(), _READY)
    if _first_byte(sys.stdin.buffer, float(limit_s)) != _RESTORED:
        restore(held, kept)
