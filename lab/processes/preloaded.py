"""Runs the tool in a process that has already imported its modules, for several hundred tests.

In an emulated guest, starting the interpreter and importing the modules takes longer than loading
the BPF programs. multiprocessing's fork server imports the modules once. Each forked process runs
the tool's entry point with its own arguments, environment and standard streams.
"""

from __future__ import annotations

import multiprocessing

# A context imports it at its first start. Tools start in several threads at once, and Python 3.9
# hands the second thread a module whose import has only begun.
import multiprocessing.popen_forkserver
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing.reduction import DupFd
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lab.processes.child import Running

MODULES = [
    "tcpstuck_bpf.cli",
    "tcpstuck_bpf.app.live",
    "tcpstuck_bpf.run",
    "tcpstuck_bpf.kernel.open_source",
    "tcpstuck_bpf.rescue.rescuer",
]
"""Modules that a live run imports, some of them late."""
TOOL = [sys.executable, "-m", "tcpstuck_bpf"]


def start_tool(words: Sequence[str], output: int) -> Running:
    """Start the tool with our environment, as `subprocess.Popen` would.

    `words` begin with TOOL; `output` is the descriptor of the tool's standard output. The tool
    shares our standard error. Raises ValueError for another command.
    """
    if list(words[: len(TOOL)]) != TOOL:
        raise ValueError(f"{words[0]} is not the tool")
    return Preloaded(words[len(TOOL) :], output)


class Preloaded:
    """A process of the fork server, with the `subprocess.Popen` methods that `Tracer` needs."""

    def __init__(self, words: Sequence[str], output: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(MODULES)
        streams = _Streams(output, sys.__stderr__.fileno() if sys.__stderr__ else output)
        self._process = context.Process(
            target=_run, args=(list(words), dict(os.environ), streams), daemon=True
        )
        self._process.start()

    @property
    def pid(self) -> int:
        """The process id."""
        return int(self._process.pid or 0)

    def poll(self) -> int | None:
        """The exit status if the process has ended, negative for a signal; otherwise None."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the process to end; returns the status. Raises subprocess.TimeoutExpired."""
        self._process.join(timeout)
        status = self.poll()
        if status is None:
            raise subprocess.TimeoutExpired("tcpstuck-trace", timeout or 0.0)
        return status

    def send_signal(self, number: int) -> None:
        """Send a signal to the process, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL to the process."""
        self.send_signal(signal.SIGKILL)


class _Streams:
    """The files for the standard streams of a process that the fork server will fork."""

    def __init__(self, output: int, errors: int) -> None:
        self._numbers = (output, errors)

    def __getstate__(self) -> tuple[Any, ...]:
        # Pickle calls this during the request to the fork server; DupFd works only then.
        return tuple(map(DupFd, self._numbers))

    def __setstate__(self, passed: tuple[Any, ...]) -> None:
        self._numbers = (passed[0].detach(), passed[1].detach())

    def take(self) -> None:
        """Make these files our standard output and error; standard input is /dev/null."""
        nothing = os.open(os.devnull, os.O_RDONLY)
        for number, file in enumerate((nothing, *self._numbers)):
            os.dup2(file, number)
            os.close(file)
        sys.stdout = os.fdopen(1, "w", closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)


def _run(words: list[str], environment: dict[str, str], streams: _Streams) -> None:
    from tcpstuck_bpf.__main__ import main

    streams.take()
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["tcpstuck-trace", *words]
    sys.exit(main())
