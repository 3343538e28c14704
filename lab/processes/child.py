"""A process of the lab inside a namespace, and the conversation with it.

Parent and child talk over a socket pair with multiprocessing's own framing: one request, one
answer. The child ends when its end of the pair is closed, so it cannot outlive its parent.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol

from lab.errors import LabError, LabTimeoutError
from lab.patience import COMMAND_S, START_S, Deadline, patient

STATE_AGAIN_S = 0.01
_START = (
    "import importlib, json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "importlib.import_module(sys.argv[2]).main()"
)
"""With our own search path: to find it anew (`site`) takes longer than all the rest of a start."""
IMPORT_ROOT = Path(__file__).resolve().parents[2]


class End(Protocol):
    """Where processes can be started: a `Namespace`, or a stand-in for one."""

    def popen(self, words: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
        """Start a process there."""


class Running(Protocol):
    """A process that was started; as `subprocess.Popen` has it."""

    @property
    def pid(self) -> int:
        """Its process id."""

    def poll(self) -> int | None:
        """Its exit status once it has ended, below zero for a signal."""

    def wait(self, timeout: float | None = None) -> int:
        """Its exit status when it has ended. Raises subprocess.TimeoutExpired."""

    def send_signal(self, number: int, /) -> None:
        """Send it a signal, unless it has ended."""

    def kill(self) -> None:
        """SIGKILL."""


def pause(process: Running) -> None:
    """SIGSTOP, and wait until the process has stopped: it takes nothing in and does nothing."""
    if process.poll() is not None:
        return
    process.send_signal(signal.SIGSTOP)
    try:
        # WNOWAIT leaves an exit status, should there be one, to Popen.
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
    except ChildProcessError:
        # Nobody but its parent is told.
        deadline = Deadline(COMMAND_S)
        while process.poll() is None and _runs(process.pid):
            if deadline.passed():
                why = "it runs on"
                raise LabTimeoutError(
                    f"process {process.pid} to stop", deadline.limit_s, why
                ) from None
            time.sleep(STATE_AGAIN_S)


def _runs(pid: int) -> bool:
    """Whether any thread of a process is not stopped; a process that has ended has none."""
    try:
        threads = [
            thread.read_text("ascii", "replace")
            for thread in Path(f"/proc/{pid}/task").glob("*/stat")
        ]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return any(text.rpartition(")")[2].split()[0] != "T" for text in threads)


class Started(NamedTuple):
    """A child's first message."""

    pid: int


class Failure(NamedTuple):
    """A child's answer to a request it could not fulfil."""

    what: str


class Child:
    """A module's `main`, in a process of its own in a namespace, that answers requests.

    A context manager. Raises LabError where the child ends or does not answer in time.
    """

    def __init__(self, end: End, module: str) -> None:
        self._module = module
        ours, theirs = socket.socketpair()
        with theirs:
            number = str(theirs.fileno())
            self._process = end.popen(
                [sys.executable, "-S", "-c", _START, json.dumps(sys.path), module, number],
                pass_fds=[theirs.fileno()],
                cwd=IMPORT_ROOT,
            )
        self._channel: Connection[Any, Any] = Connection(ours.detach())
        self._answer(Started, START_S)

    def ask(self, request: object, limit_s: float = COMMAND_S) -> Any:
        """Send a request and return its answer, within a limit in seconds."""
        try:
            self._channel.send(request)
        except OSError as error:
            raise self._ended() from error
        return self._answer(request, limit_s)

    def _answer(self, request: object, limit_s: float) -> Any:
        if not self._channel.poll(patient(limit_s)):
            raise LabTimeoutError(f"an answer of {self._module} to {request!r}", limit_s, "silence")
        try:
            answer = self._channel.recv()
        except (EOFError, OSError) as error:
            raise self._ended() from error
        if isinstance(answer, Failure):
            raise LabError(
                f"{self._module} could not do what it was asked", answer.what, "read the scenario"
            )
        return answer

    def _ended(self) -> LabError:
        return LabError(
            f"{self._module} has ended", "its side of the channel is closed", "see its output above"
        )

    def close(self) -> None:
        """End the child and wait for it; its sockets are closed by the kernel."""
        self._channel.close()
        try:
            self._process.wait(patient(COMMAND_S))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    @property
    def exit_status(self) -> int | None:
        """The child's exit status once it has ended."""
        return self._process.poll()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def channel_of_child() -> Connection[Any, Any]:
    """A child's end of the channel, from its command line; says that the child has started."""
    _allow_many_files()
    channel: Connection[Any, Any] = Connection(int(sys.argv[-1]))
    channel.send(Started(os.getpid()))
    return channel


def _allow_many_files() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
