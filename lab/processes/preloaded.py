"""The tool in a process that has its modules already, as several hundred tests need it.

To start the interpreter and read the modules takes an emulated guest as long as to load the
programs and more. A process of multiprocessing's fork server has read them once; what it forks runs
the tool's own entry point with its own words, environment and standard streams.
"""

from __future__ import annotations

import multiprocessing
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
    "tcpstuck_bpf.kernel.source",
    "tcpstuck_bpf.rescue.rescuer",
]
"""What a live run imports, some of it late."""
TOOL = [sys.executable, "-m", "tcpstuck_bpf"]


def start_tool(words: Sequence[str], output: int) -> Running:
    """Start the tool beside us, as `subprocess.Popen` would, with our environment.

    `words` begin with TOOL; `output` is the file its standard output goes to. What it says on
    standard error goes where ours does. Raises ValueError for another command.
    """
    if list(words[: len(TOOL)]) != TOOL:
        raise ValueError(f"{words[0]} is not the tool")
    return Preloaded(words[len(TOOL) :], output)


class Preloaded:
    """A process of the fork server; what `subprocess.Popen` has and a tracer needs."""

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
        """Its process id."""
        return int(self._process.pid or 0)

    def poll(self) -> int | None:
        """Its exit status once it has ended, below zero for a signal."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Its exit status when it has ended. Raises subprocess.TimeoutExpired."""
        self._process.join(timeout)
        status = self.poll()
        if status is None:
            raise subprocess.TimeoutExpired("tcpstuck-trace", timeout or 0.0)
        return status

    def send_signal(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)


class _Streams:
    """Files for the standard streams of a process that is about to be forked elsewhere."""

    def __init__(self, output: int, errors: int) -> None:
        self._numbers = (output, errors)

    def __getstate__(self) -> tuple[Any, ...]:
        # Called while the process is described to the fork server: only then can files be passed.
        return tuple(map(DupFd, self._numbers))

    def __setstate__(self, passed: tuple[Any, ...]) -> None:
        self._numbers = (passed[0].detach(), passed[1].detach())

    def take(self) -> None:
        """Make them our own standard streams; standard input is empty."""
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
