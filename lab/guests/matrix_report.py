"""Formats the results of the kernel matrix as a table, as complaints and as JSON."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tabulate import tabulate

from lab.guests.packages import cache_directory
from lab.guests.trees import Row

MODES = ("fentry", "kprobe")
ANY_MODE = "any"
"""For tests without a mode in their id: the tool chooses the mode, or none is needed."""
UNKNOWN = "?"


@dataclass(frozen=True)
class Failure:
    """A test that failed or broke, with the reason in one line."""

    test: str
    message: str


@dataclass
class Cell:
    """The test results of one row in one mode; a test that broke counts as failed."""

    passed: int = 0
    failures: list[Failure] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    """Number of skipped tests by reason."""


@dataclass
class RowResult:
    """The results of one row's guest."""

    row: Row
    cells: dict[str, Cell]
    """Results by mode: always each of MODES, and ANY_MODE if a test belongs to it."""
    kernel: str = UNKNOWN
    """The kernel release from uname -r."""
    bcc: str = UNKNOWN
    """The version of Debian's BCC package."""
    trouble: str | None = None
    """An error outside the tests, in one line."""
    seconds: float = 0.0
    demanded: tuple[str, ...] = MODES
    """Modes in which a test must have passed; if empty, a test must have passed in any mode."""

    @property
    def untested(self) -> list[str]:
        """Modes without a passed test that were demanded or that have other results."""
        empty = Cell()
        bare = [mode for mode in MODES if not self.cells[mode].passed]
        found = [mode for mode in bare if mode in self.demanded or self.cells[mode] != empty]
        nothing = not any(cell.passed for cell in self.cells.values())
        return found or ([ANY_MODE] if nothing else [])

    @property
    def good(self) -> bool:
        """Whether tests passed in every demanded mode, and no test failed."""
        failed = any(cell.failures for cell in self.cells.values())
        return not self.untested and not failed and self.trouble is None


def empty_result(row: Row, demanded: tuple[str, ...], trouble: str | None = None) -> RowResult:
    """The result of a row without any test run."""
    cells = {mode: Cell() for mode in MODES}
    return RowResult(row, cells, trouble=trouble, demanded=demanded)


def log_of(row: Row) -> Path:
    """The log file of a row's guest, in the cache; creates its directory."""
    path = cache_directory() / "matrix" / f"{row.suite}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def progress(result: RowResult) -> str:
    """The progress line of a row that has just ended."""
    state = "good" if result.good else f"BAD, see {log_of(result.row)}"
    return f"{result.row.suite}: {state}, {result.seconds:.0f} s in its guest"


def upstream(version: str) -> str:
    """The upstream part of a Debian version, without repacking suffixes."""
    return re.split(r"[+-]", version)[0]


def table(results: Sequence[RowResult]) -> str:
    """A table with a line for each row and mode."""
    lines = [
        (
            result.row.suite,
            result.kernel,
            upstream(result.bcc),
            mode,
            cell.passed,
            len(cell.failures),
            _skips(cell),
            "" if result.row.counts else "reported only",
        )
        for result in results
        for mode, cell in result.cells.items()
    ]
    headers = ("row", "kernel", "BCC", "mode", "passed", "failed", "skipped", "note")
    columns = len(headers) if any(line[-1] for line in lines) else len(headers) - 1
    # Versions are text: 6.10 is not 6.1.
    return tabulate([line[:columns] for line in lines], headers[:columns], disable_numparse=[1, 2])


def _skips(cell: Cell) -> str:
    reasons = (f"{count} ({reason})" for reason, count in sorted(cell.skipped.items()))
    return "; ".join(reasons) or "0"


def complaints(results: Sequence[RowResult]) -> list[str]:
    """A line for each failure message with its first test, and for each other problem."""
    lines = []
    for result in results:
        where = f"{result.row.suite} ({result.kernel}, BCC {upstream(result.bcc)})"
        lines += [f"{where}: {result.trouble}"] if result.trouble else []
        lines += [
            f"{where}: no test passed in mode {mode}"
            for mode in result.untested
            if not result.cells.get(mode, Cell()).failures
        ]
        for cell in result.cells.values():
            causes = Counter(failure.message for failure in cell.failures)
            firsts = {failure.message: failure.test for failure in reversed(cell.failures)}
            for message, count in causes.items():
                others = f" and {count - 1} more" if count > 1 else ""
                lines.append(f"{where}: {firsts[message]}{others}: {message}")
    return lines


def as_json(results: Sequence[RowResult]) -> list[dict[str, Any]]:
    """The table's lines with failure and skip reasons, as JSON values."""
    return [
        {
            "row": result.row.suite,
            "counts": result.row.counts,
            "kernel": result.kernel,
            "bcc": result.bcc,
            "mode": mode,
            "passed": cell.passed,
            "failed": len(cell.failures),
            "skipped": sum(cell.skipped.values()),
            "skip_reasons": dict(cell.skipped),
            "failures": [{"test": one.test, "message": one.message} for one in cell.failures],
            "trouble": result.trouble,
            "seconds": round(result.seconds, 1),
            "demanded": list(result.demanded),
        }
        for result in results
        for mode, cell in result.cells.items()
    ]


def verdict(results: Sequence[RowResult], all_count: bool) -> int:
    """The exit status: 1 if a row that counts is not good."""
    counted = [result for result in results if all_count or result.row.counts]
    return 0 if all(result.good for result in counted) else 1
