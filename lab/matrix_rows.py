"""Rows of the matrix, several at a time, each by a process of its own.

run_in_guest belongs to one thread, and its clean-up to its own process. What the rows boot is made
here, one row after the other and before the first process starts: apt locks its package lists,
suites share trees and kernels, and a tree that is found stale must not have a guest over it.
"""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from lab import trees
from lab.checks import REPOSITORY
from lab.ending import sigterm_ends_program
from lab.errors import LabError
from lab.matrix_report import RowResult, empty_result, log_of, results_of, verdict
from lab.patience import COMMAND_S, Deadline
from lab.trees import Place, Row

Words = Callable[[Row, Place, Path], Sequence[str]]
"""The command that runs a row over that place and writes its results there as JSON."""


def row_words(row: Row, place: Place, report: Path, selection: Sequence[str]) -> list[str]:
    """The `matrix` command for one row; its status says whether the row is good.

    It must not outlive us, whatever ends us.
    """
    mortal = ("setpriv", "--pdeathsig", "TERM", sys.executable, "-m", "lab", "matrix")
    what = (f"--rows={row.suite}", "--place", str(place.kernel), str(place.root), *selection)
    return [*mortal, *what, "--all", "--verbose", f"--json={report}"]


def run_rows(
    rows: Sequence[Row],
    guests: int,
    words: Words,
    demanded: tuple[str, ...],
    tell: Callable[[RowResult], object],
) -> list[RowResult]:
    """Run each of the rows by its words, at most so many at a time; the results in their order.

    All that a row's process says goes to the row's log. `tell` gets each result when there is one.
    Nothing is left of a process when this returns or raises.
    """
    results: dict[Row, RowResult] = {}

    def take(result: RowResult) -> None:
        results[result.row] = result
        tell(result)

    with contextlib.ExitStack() as stack:
        stack.enter_context(sigterm_ends_program())
        prepared: deque[tuple[Row, Place]] = deque()
        for row in rows:
            try:
                prepared.append((row, trees.prepare(row)))
            except LabError as error:
                take(empty_result(row, demanded, f"{error.what}: {error.why}"))
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tcpstuck-matrix-")))
        running = _Processes()
        stack.callback(running.end)
        while prepared or running.count:
            while prepared and running.count < guests:
                row, place = prepared.popleft()
                report = scratch / f"{row.suite}.json"
                running.start(row, words(row, place, report), report)
            ended = running.next_ended()
            take(brought_back(ended.row, demanded, ended.report, ended.status))
    return [results[row] for row in rows]


def brought_back(row: Row, demanded: tuple[str, ...], report: Path, status: int) -> RowResult:
    """The result that a row's process wrote to `report` before it ended with that status.

    A report that is missing or damaged, or that the status does not go with, is trouble.
    """
    ended = f"its process ended with status {status}"
    try:
        (result,) = results_of(report.read_text())
        if (result.row, result.demanded) != (row, demanded):
            raise ValueError(f"it is of {result.row.suite}, demanded {list(result.demanded)}")
    except FileNotFoundError:
        return empty_result(row, demanded, f"{ended} and wrote no report")
    except (OSError, ValueError) as error:
        return empty_result(row, demanded, f"{ended}; its report is damaged: {error}")
    if status != verdict([result], all_count=True):
        result.trouble = "; ".join(filter(None, (ended, result.trouble)))
    return result


class _Ended(NamedTuple):
    """A row's process that has ended."""

    row: Row
    report: Path
    """Where it was to write its results."""
    status: int
    """Exit status; 128 + the signal's number for a signal."""


@dataclass
class _Processes:
    """Processes of rows, by the descriptor that becomes readable when one ends."""

    _running: dict[int, tuple[Row, Path, subprocess.Popen[bytes]]] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """How many have been started and not taken back."""
        return len(self._running)

    def start(self, row: Row, words: Sequence[str], report: Path) -> None:
        """Start a row's process."""
        with log_of(row).open("wb") as log:
            # In a session of its own: Ctrl-C is for us alone, and a process that is told twice to
            # end might break off its clean-up.
            process = subprocess.Popen(
                words,
                cwd=REPOSITORY,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._running[os.pidfd_open(process.pid)] = (row, report, process)

    def next_ended(self) -> _Ended:
        """Wait for any of them to end, as long as it takes: each has limits of its own."""
        exited = select.select(list(self._running), [], [])[0][0]
        row, report, process = self._running.pop(exited)
        os.close(exited)
        code = process.wait()
        return _Ended(row, report, code if code >= 0 else 128 - code)

    def end(self) -> None:
        """Tell all to end, which leaves them time for their clean-up; kill what does not."""
        for _, _, process in self._running.values():
            process.terminate()
        deadline = Deadline(COMMAND_S)
        for exited, (_, _, process) in self._running.items():
            try:
                process.wait(deadline.left())
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            os.close(exited)
        self._running.clear()
