"""Runs the tool, and the lab's own processes, forked from one that has imported their modules.

In an emulated guest, starting the interpreter and importing the modules takes longer than loading
the BPF programs or connecting a hundred clients. multiprocessing's fork server imports the modules
once. Each forked process runs an entry point with its own arguments, environment and standard
streams. That pays off for several hundred tests; others start few processes.
"""

from __future__ import annotations

import ctypes
import importlib
import multiprocessing

# A context imports it at its first start. Tools start in several threads at once, and Python 3.9
# hands the second thread a module whose import has only begun.
import multiprocessing.popen_forkserver
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
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
    "lab.processes.client_process",
    "lab.processes.greeter_process",
]
"""Modules that a live run imports, some of them late, and those of the lab's processes."""
CLONE_NEWNET = 0x40000000
"""From linux/sched.h."""
TOOL = [sys.executable, "-m", "tcpstuck_bpf"]


def start_tool(words: Sequence[str], output: int) -> Running:
    """Start the tool with our environment, as `subprocess.Popen` would.

    `words` begin with TOOL; `output` is the descriptor of the tool's standard output. The tool
    shares our standard error. Raises ValueError for another command.
    """
    if list(words[: len(TOOL)]) != TOOL:
        raise ValueError(f"{words[0]} is not the tool")
    files = _Files(output, sys.__stderr__.fileno() if sys.__stderr__ else output)
    return Preloaded(_run_tool, list(words[len(TOOL) :]), dict(os.environ), files)


def start_module(module: str, channel: int, netns: int) -> Running:
    """Start a lab process that runs a module's `main`, in a network namespace.

    `channel` is the descriptor of its channel (`lab.processes.child`), `netns` that of the
    namespace. It shares our standard output and error.
    """
    return Preloaded(_run_module, module, _Files(1, 2, channel, netns))


class Preloaded:
    """A process of the fork server, with the `subprocess.Popen` methods that the lab needs.

    `arguments` are those of `run`, which must be a function of this module.
    """

    def __init__(self, run: Callable[..., None], *arguments: object) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(MODULES)
        self._process = context.Process(target=run, args=arguments, daemon=True)
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
            raise subprocess.TimeoutExpired(self._process.name, timeout or 0.0)
        return status

    def send_signal(self, number: int) -> None:
        """Send a signal to the process, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL to the process."""
        self.send_signal(signal.SIGKILL)


class _Files:
    """Open files for a process that the fork server will fork; the first two become its streams."""

    def __init__(self, *numbers: int) -> None:
        self._numbers = numbers

    def __getstate__(self) -> tuple[Any, ...]:
        # Pickle calls this during the request to the fork server; DupFd works only then.
        return tuple(map(DupFd, self._numbers))

    def __setstate__(self, passed: tuple[Any, ...]) -> None:
        self._numbers = tuple(one.detach() for one in passed)

    def take(self) -> tuple[int, ...]:
        """Make the first two our standard output and error; returns the others' descriptors.

        Standard input is /dev/null.
        """
        nothing = os.open(os.devnull, os.O_RDONLY)
        for number, file in enumerate((nothing, *self._numbers[:2])):
            os.dup2(file, number)
            os.close(file)
        sys.stdout = os.fdopen(1, "w", closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
        return self._numbers[2:]


def _run_tool(words: list[str], environment: dict[str, str], files: _Files) -> None:
    from tcpstuck_bpf.__main__ import main

    files.take()
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["tcpstuck-trace", *words]
    sys.exit(main())


def _run_module(module: str, files: _Files) -> None:
    channel, namespace = files.take()
    # Python has os.setns from 3.12 on, and pyroute2 would have to be imported.
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(namespace, CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    os.close(namespace)
    sys.argv = [module, str(channel)]
    importlib.import_module(module).main()
