"""A lab process inside a namespace, and the requests to it.

Parent and child use a socket pair with multiprocessing's framing: one request, one answer. The
child ends when the parent's end of the pair is closed, so the child cannot outlive its parent.
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
"""Passes our own sys.path to the child: `site` takes longer than the rest of a start."""
IMPORT_ROOT = Path(__file__).resolve().parents[2]


class End(Protocol):
    """A place to start processes in: a `Namespace`, or a stand-in for one."""

    @property
    def forks_into(self) -> int | None:
        """The network namespace's descriptor if lab processes are to be forked; None if not."""

    def popen(self, words: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
        """Start a process in this place."""


class Running(Protocol):
    """A started process, with the methods of `subprocess.Popen`."""

    @property
    def pid(self) -> int:
        """The process id."""

    def poll(self) -> int | None:
        """The exit status if the process has ended, negative for a signal; otherwise None."""

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the process to end; returns the status. Raises subprocess.TimeoutExpired."""

    def send_signal(self, number: int, /) -> None:
        """Send a signal to the process, unless it has ended."""

    def kill(self) -> None:
        """Send SIGKILL to the process."""


def pause(process: Running) -> None:
    """Send SIGSTOP and wait until the process has stopped; returns at once if it has ended."""
    if process.poll() is not None:
        return
    process.send_signal(signal.SIGSTOP)
    try:
        # With WNOWAIT, Popen can still collect an exit status.
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
    except ChildProcessError:
        # Only the parent can wait for a process; others must poll its state.
        deadline = Deadline(COMMAND_S)
        while process.poll() is None and _runs(process.pid):
            if deadline.passed():
                why = "still running"
                raise LabTimeoutError(
                    f"process {process.pid} to stop", deadline.limit_s, why
                ) from None
            time.sleep(STATE_AGAIN_S)


def _runs(pid: int) -> bool:
    """Whether any thread of a process is not stopped; False if the process has ended.

    True if a thread ends during the check; the caller then checks again.
    """
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
    """A child's answer to a request that failed."""

    what: str


class Child:
    """A child process in a namespace that runs a module's `main` and answers requests.

    A context manager. Raises LabError if the child ends or does not answer in time.
    """

    def __init__(self, end: End, module: str) -> None:
        self._module = module
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = _started(end, module, theirs.fileno())
        self._channel: Connection[Any, Any] = Connection(ours.detach())
        self._answer(Started, START_S)

    def ask(self, request: object, limit_s: float = COMMAND_S) -> Any:
        """Send a request and return the answer; `limit_s` is the limit in seconds."""
        try:
            self._channel.send(request)
        except OSError as error:
            raise self._ended() from error
        return self._answer(request, limit_s)

    def _answer(self, request: object, limit_s: float) -> Any:
        if not self._channel.poll(patient(limit_s)):
            raise LabTimeoutError(f"an answer of {self._module} to {request!r}", limit_s, "nothing")
        try:
            answer = self._channel.recv()
        except (EOFError, OSError) as error:
            raise self._ended() from error
        if isinstance(answer, Failure):
            raise LabError(
                f"{self._module} could not carry out a request", answer.what, "read the scenario"
            )
        return answer

    def _ended(self) -> LabError:
        return LabError(
            f"{self._module} has ended", "its side of the channel is closed", "see its output above"
        )

    def close(self) -> None:
        """End the child and wait for it; the kernel closes its sockets."""
        self._channel.close()
        try:
            self._process.wait(patient(COMMAND_S))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._process.pid

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


def _started(end: End, module: str, channel: int) -> Running:
    if end.forks_into is not None:
        # Imported only where it is used: most runs of the lab start few processes.
        from lab.processes.preloaded import start_module

        return start_module(module, channel, end.forks_into)
    return end.popen(
        [sys.executable, "-S", "-c", _START, json.dumps(sys.path), module, str(channel)],
        pass_fds=[channel],
        cwd=IMPORT_ROOT,
    )


def channel_of_child() -> Connection[Any, Any]:
    """Open the child's end of the channel, named on its command line, and report the start."""
    _allow_many_files()
    channel: Connection[Any, Any] = Connection(int(sys.argv[-1]))
    channel.send(Started(os.getpid()))
    return channel


def _allow_many_files() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
