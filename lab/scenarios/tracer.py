"""Runs a tracer with a scenario: from when the server is ready until the scenario is done.

The tracer is any command. `{ready}` in the command stands for the file that the tracer creates once
it traces.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import signal
import subprocess
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from types import TracebackType
from typing import Any

from pyroute2.inotify.inotify_fd import Inotify

from lab.errors import LabError, LabTimeoutError
from lab.patience import COMMAND_S, START_S, Deadline, patient
from lab.processes.child import Running, pause
from lab.records import FourTuple, endpoint, settled_verdicts
from lab.scenarios.scene import DONE, READY, Stage

READY_PLACEHOLDER = "{ready}"
REPORT_S = 120.0
"""For the tracer to report all expected verdicts. The tracer's own time-out is 3 s; thousands of
connections take it longer in an emulated guest."""
IN_CREATE = 0x100
IN_MOVED_TO = 0x80


def start_command(words: list[str], output: int) -> subprocess.Popen[bytes]:
    """Start a command with `output` as its standard output. Raises OSError."""
    return subprocess.Popen(words, stdout=output, stdin=subprocess.DEVNULL)


_GROUP_ROW = re.compile(r"^[\d:]{8} !(\S+) +(\d+(?: \d{3})*) .*?(\S+:\d+)(?:  .*)?$", re.M)


def clients_in_groups(table: str) -> int:
    """Number of stuck clients in a table's group rows; each group's last row counts."""
    groups = {(verdict, at): number for verdict, number, at in _GROUP_ROW.findall(table)}
    return sum(int(number.replace(" ", "")) for number in groups.values())


class Tracer:
    """A tracer's process, its output, and the hook that makes a scenario wait for it.

    A context manager that kills the process if it still runs. If the command has `--json`, the
    tracer's output is decoded. Otherwise the output is copied to our standard output; if that is a
    terminal, the tracer gets a terminal too. Raises LabError if the tracer cannot be started or
    ends before it traces.
    """

    def __init__(
        self, words: Sequence[str], start: Callable[[list[str], int], Running] = start_command
    ) -> None:
        self.lines: list[Mapping[str, Any]] = []
        """The decoded JSON lines since the start, or since `forget_lines`."""
        self.exit_status: int | None = None
        self._words = list(words)
        self._start = start
        self._decodes = "--json" in words
        self._not_json: str | None = None
        self._text = ""
        self._news = threading.Condition()
        self._process: Running | None = None
        self._reader: threading.Thread | None = None

    def __enter__(self) -> Tracer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    @property
    def pid(self) -> int:
        """The tracer's process id. Raises LabError before the start."""
        if self._process is None:
            raise LabError("the tracer has not been started", "it has no process", "start it")
        return self._process.pid

    def after(self, stage: Stage) -> None:
        """The hook for `Settings.after`."""
        if stage.name == READY:
            self.start()
            return
        self.await_reported(stage.expected, stage.netns)
        if stage.name == DONE:
            self.stop()

    def start(self) -> None:
        """Start the tracer; if the command names a ready file, returns once the file exists."""
        with tempfile.TemporaryDirectory(prefix="tcpstuck-ready-") as directory:
            ready = Path(directory) / "ready"
            words = [word.replace(READY_PLACEHOLDER, str(ready)) for word in self._words]
            with _file_appearing(directory) as inotify:
                self._process = self._begin(words)
                if words != self._words:
                    self._await_file(ready, inotify, self._process)

    def await_reported(self, expected: Mapping[FourTuple, str], netns: int) -> bool:
        """Wait until the tracer has reported all expected verdicts; False if the time runs out.

        A verdict that the tracer marks `to_be_updated` does not count; the final one must follow.

        Undecoded output is complete if it contains every client's address and port, or if its group
        rows count as many clients.
        """

        def reported() -> bool:
            if self._decodes:
                verdicts = settled_verdicts(self.lines, netns)
                return all(verdicts.get(key) == verdict for key, verdict in expected.items())
            named = all(self.names(key) for key in expected)
            return named or clients_in_groups(self._text) >= len(expected)

        with self._news:
            return self._news.wait_for(reported, patient(REPORT_S))

    def await_lines(self, count: int, limit_s: float = REPORT_S) -> bool:
        """Wait until the tracer has printed `count` decoded lines; False if the time runs out."""
        with self._news:
            return self._news.wait_for(lambda: len(self.lines) >= count, patient(limit_s))

    def seconds_to_summary(self) -> float:
        """Interrupt the tracer; returns the seconds until its summary. Raises LabTimeoutError."""
        begun = time.monotonic()
        os.kill(self.pid, signal.SIGINT)
        with self._news:
            found = self._news.wait_for(
                lambda: any(line.get("type") == "summary" for line in self.lines),
                patient(COMMAND_S),
            )
        if not found:
            raise LabTimeoutError("the summary", patient(COMMAND_S), f"{len(self.lines)} lines")
        return time.monotonic() - begun

    @property
    def running(self) -> bool:
        """Whether the process has been started and has not ended."""
        return self._process is not None and self._process.poll() is None

    def forget_lines(self) -> None:
        """Discard the decoded lines, before another scenario starts."""
        with self._news:
            self.lines.clear()

    def names(self, key: FourTuple) -> bool:
        """Whether the undecoded output so far contains a client's address and port."""
        shown = endpoint(key.client_ip, key.client_port)
        return re.search(rf"{re.escape(shown)}(?!\d)", self._text) is not None

    def pause(self) -> None:
        """Send SIGSTOP and wait until the process has stopped."""
        if self._process is not None:
            pause(self._process)

    def resume(self) -> None:
        """Send SIGCONT."""
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        """Stop the tracer with SIGINT, as Ctrl-C does, and read its output to the end."""
        if self._process is None or self._reader is None:
            return
        self._process.send_signal(signal.SIGINT)
        self.await_end()

    def await_end(self) -> None:
        """Wait until a tracer that is about to end has ended, and read its output to the end."""
        if self._process is None or self._reader is None:
            return
        try:
            self.exit_status = self._process.wait(patient(COMMAND_S))
        except subprocess.TimeoutExpired as error:
            raise LabTimeoutError(
                "the tracer to end", patient(COMMAND_S), "still running"
            ) from error
        self._reader.join(patient(COMMAND_S))
        if self._not_json is not None:
            raise LabError(
                "the tracer's output is not JSON Lines", self._not_json, "fix the tracer"
            )

    def _begin(self, words: list[str]) -> Running:
        if not self._decodes and sys.stdout.isatty():
            ours, theirs = pty.openpty()
            os.set_blocking(ours, True)
            _copy_window_size(sys.stdout.fileno(), theirs)
        else:
            ours, theirs = os.pipe()
        try:
            process = self._start(words, theirs)
        except OSError as error:
            os.close(ours)
            raise LabError(f"cannot start {words[0]}", str(error), "check its path") from error
        finally:
            os.close(theirs)
        self._reader = threading.Thread(target=self._read, args=(ours,), daemon=True)
        self._reader.start()
        return process

    def _read(self, source: int) -> None:
        undecoded = b""
        # Once the other end is closed, a terminal returns EIO; a pipe returns an empty read.
        with contextlib.suppress(OSError), os.fdopen(source, "rb", buffering=0) as output:
            while chunk := output.read(65_536):
                if self._decodes:
                    *lines, undecoded = (undecoded + chunk).split(b"\n")
                    self._take_in([self._decoded(line) for line in lines if line.strip()], "")
                else:
                    sys.stdout.buffer.write(chunk)
                    sys.stdout.flush()
                    self._take_in([], chunk.decode(errors="replace"))

    def _decoded(self, line: bytes) -> Mapping[str, Any]:
        try:
            decoded = json.loads(line)
        except ValueError:
            decoded = None
        if isinstance(decoded, dict):
            return decoded
        self._not_json = line.decode(errors="replace")
        return {}

    def _take_in(self, lines: list[Mapping[str, Any]], text: str) -> None:
        with self._news:
            self.lines += lines
            self._text += text
            self._news.notify_all()

    def _await_file(self, path: Path, inotify: int, process: Running) -> None:
        deadline = Deadline(START_S)
        ended = os.pidfd_open(process.pid)
        try:
            while not path.exists():
                # Not select(): a caller may have thousands of files open.
                readable = wait([inotify, ended], deadline.left())
                if ended in readable:
                    status = process.wait()
                    raise LabError(
                        f"{self._words[0]} ended before it traced",
                        f"exit status {status}",
                        "read its output above",
                    )
                if not readable:
                    raise LabTimeoutError(
                        "the tracer to be ready", deadline.limit_s, "no ready file"
                    )
                os.read(inotify, 4096)
        finally:
            os.close(ended)


@contextlib.contextmanager
def _file_appearing(directory: str) -> Iterator[int]:
    """A descriptor that becomes readable once a file appears in the directory."""
    inotify = Inotify(path=())
    inotify.bind()
    try:
        inotify.register_path(directory, IN_CREATE | IN_MOVED_TO)
        yield int(inotify.fd)
    finally:
        os.close(inotify.fd)
        os.close(inotify.ctlr)
        os.close(inotify.ctlw)


def _copy_window_size(terminal: int, other: int) -> None:
    size = fcntl.ioctl(terminal, termios.TIOCGWINSZ, bytes(8))
    fcntl.ioctl(other, termios.TIOCSWINSZ, size)
