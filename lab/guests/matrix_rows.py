"""Rows of the matrix, several at a time, each by a process of its own.

What the rows boot is made here, one row after the other and before the first process starts: apt
locks its package lists, suites share trees and kernels, and a tree that is found stale must not
have a guest over it.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from lab.ending import sigterm_ends_program
from lab.errors import LabError
from lab.guests import trees
from lab.guests.kernel_tests import REPOSITORY
from lab.guests.matrix_report import RowResult, empty_result, log_of, results_of, verdict
from lab.guests.process_group import MORTAL, Processes
from lab.guests.trees import BootFiles, Row

Words = Callable[[Row, BootFiles, Path], Sequence[str]]
"""The command that runs a row over that place and writes its results there as JSON."""


def row_words(row: Row, boot: BootFiles, report: Path, selection: Sequence[str]) -> list[str]:
    """The `matrix` command for one row; its status says whether the row is good.

    It must not outlive us, whatever ends us.
    """
    matrix = (*MORTAL, sys.executable, "-m", "lab", "matrix")
    what = (f"--rows={row.suite}", "--place", str(boot.kernel), str(boot.root), *selection)
    return [*matrix, *what, "--all", "--verbose", f"--json={report}"]


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
        prepared: deque[tuple[Row, BootFiles]] = deque()
        for row in rows:
            try:
                prepared.append((row, trees.prepare(row)))
            except LabError as error:
                take(empty_result(row, demanded, f"{error.what}: {error.why}"))
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tcpstuck-matrix-")))
        running = Processes[tuple[Row, Path]]()
        stack.callback(running.end)
        while prepared or running.count:
            while prepared and running.count < guests:
                row, boot = prepared.popleft()
                report = scratch / f"{row.suite}.json"
                process = words(row, boot, report)
                running.start((row, report), process, log_of(row), REPOSITORY)
            (row, report), status = running.next_ended()
            take(brought_back(row, demanded, report, status))
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
