"""Processes beside each other, none of which outlives us; for guests, which want one each.

run_in_guest belongs to one thread, and its clean-up to its own process.
"""

from __future__ import annotations

import os
import select
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

from lab.patience import COMMAND_S, Deadline

MORTAL = ("setpriv", "--pdeathsig", "TERM")
"""Before a command: it is told to end when we have ended, whatever ended us."""

Label = TypeVar("Label")


@dataclass
class Processes(Generic[Label]):
    """Processes by the descriptor that becomes readable when one ends; each has a label."""

    _running: dict[int, tuple[Label, subprocess.Popen[bytes]]] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """How many have been started and not taken back."""
        return len(self._running)

    def start(self, label: Label, words: Sequence[str], log: Path | None, cwd: Path) -> None:
        """Start a process; what it says goes to the log, or where ours goes."""
        if log is None:
            self._note(label, self._popen(words, None, cwd))
            return
        with log.open("wb") as stream:
            self._note(label, self._popen(words, stream.fileno(), cwd))

    def next_ended(self) -> tuple[Label, int]:
        """Wait for any of them to end, as long as it takes: each has limits of its own.

        The label and the exit status; 128 + the signal's number for a signal.
        """
        exited = select.select(list(self._running), [], [])[0][0]
        label, process = self._running.pop(exited)
        os.close(exited)
        code = process.wait()
        return label, code if code >= 0 else 128 - code

    def end(self) -> None:
        """Tell all to end, which leaves them time for their clean-up; kill what does not."""
        for _, process in self._running.values():
            process.terminate()
        deadline = Deadline(COMMAND_S)
        for exited, (_, process) in self._running.items():
            try:
                process.wait(deadline.left())
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            os.close(exited)
        self._running.clear()

    def _note(self, label: Label, process: subprocess.Popen[bytes]) -> None:
        self._running[os.pidfd_open(process.pid)] = (label, process)

    @staticmethod
    def _popen(words: Sequence[str], stream: int | None, cwd: Path) -> subprocess.Popen[bytes]:
        # In a session of its own: Ctrl-C is for us alone, and a process that is told twice to end
        # might break off its clean-up.
        return subprocess.Popen(
            words,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            start_new_session=True,
        )
