"""A process of the lab inside a namespace, and the conversation with it.

Parent and child talk over a socket pair with multiprocessing's own framing: one request, one
answer. The child ends when its end of the pair is closed, so it cannot outlive its parent.
"""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol

from lab.errors import LabError, LabTimeoutError
from lab.patience import COMMAND_S, START_S, patient

IMPORT_ROOT = Path(__file__).resolve().parent.parent


class Place(Protocol):
    """Where processes can be started: a `Namespace`, or a stand-in for one."""

    def popen(self, words: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
        """Start a process there."""


def pause(process: subprocess.Popen[bytes]) -> None:
    """SIGSTOP, and wait until the process has stopped: it takes nothing in and does nothing."""
    if process.poll() is None:
        os.kill(process.pid, signal.SIGSTOP)
        # WNOWAIT leaves an exit status, should there be one, to Popen.
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)


class Started(NamedTuple):
    """A child's first message."""

    pid: int


class Failure(NamedTuple):
    """A child's answer to a request it could not fulfil."""

    what: str


class Child:
    """A `python -m MODULE`, in a namespace, that answers requests.

    A context manager. Raises LabError where the child ends or does not answer in time.
    """

    def __init__(self, place: Place, module: str) -> None:
        self._module = module
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = place.popen(
                [sys.executable, "-m", module, str(theirs.fileno())],
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
    channel: Connection[Any, Any] = Connection(int(sys.argv[1]))
    channel.send(Started(os.getpid()))
    return channel


def _allow_many_files() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
