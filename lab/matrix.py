"""The kernel tests on every kernel of the matrix, with the BCC of its suite, in both probe modes.

Both modes run in one guest per row; which test belongs to which mode is read from its id. What is
printed of a row's kernel and BCC is what its guest said they are. A mode in which nothing passed
is a failure, whatever the reason: a matrix that quietly tested nothing would look green.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from tabulate import tabulate

from lab import trees
from lab.checks import (
    FORCE_VARIABLE,
    KERNEL_DIRECTORY,
    KERNEL_TEST_LIMIT_S,
    REPOSITORY,
)
from lab.errors import LabError
from lab.guest import GuestDiedError, GuestOptions, run_in_guest, write_through
from lab.package_cache import IMAGE_VARIABLE, cache_directory
from lab.patience import PATIENCE_VARIABLE, patient
from lab.trees import ROWS, Row

if TYPE_CHECKING:
    from lab.guest import Sink
    from lab.package_cache import Subparsers

MODES = ("fentry", "kprobe")
ANY_MODE = "any"
"""For tests whose id names no mode: the tool chooses, or it does not matter."""
CORE = ("overflow", "ack-dropped", "ack-lost", "client-reset", "healthy", "mss")
"""The scenarios that are played where there is no time for all."""
ROW_LIMIT_S = 3600.0
"""For one guest: a slow machine is not a failure."""
REPORT_FILE = "report.xml"
KERNEL_FILE = "kernel"
BCC_FILE = "bcc"
MESSAGE_LENGTH = 300
HEARD_LINES = 3
"""As many as an error of the tool has: what, why, remedy."""
UNKNOWN = "?"


@dataclass(frozen=True)
class Failure:
    """A test that failed or broke, and in one line why."""

    test: str
    message: str


@dataclass
class Cell:
    """How the tests of one row in one mode ended; what broke counts as failed."""

    passed: int = 0
    failures: list[Failure] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    """Number of tests by the reason they were skipped for."""


@dataclass
class RowResult:
    """What a row's guest brought back."""

    row: Row
    cells: dict[str, Cell]
    """By mode; each of MODES is there, ANY_MODE where a test belongs to it."""
    kernel: str = UNKNOWN
    """The release, as uname -r has it."""
    bcc: str = UNKNOWN
    """The version of Debian's package."""
    trouble: str | None = None
    """What went wrong outside the tests, in one line."""
    seconds: float = 0.0
    demanded: tuple[str, ...] = MODES
    """Modes that tests must have been run in; without any, at least some test must have passed."""

    @property
    def untested(self) -> list[str]:
        """Modes in which something should have passed, or was only skipped."""
        empty = Cell()
        bare = [mode for mode in MODES if not self.cells[mode].passed]
        found = [mode for mode in bare if mode in self.demanded or self.cells[mode] != empty]
        nothing = not any(cell.passed for cell in self.cells.values())
        return found or ([ANY_MODE] if nothing else [])

    @property
    def good(self) -> bool:
        """Whether something passed wherever it should, and nothing failed."""
        failed = any(cell.failures for cell in self.cells.values())
        return not self.untested and not failed and self.trouble is None


def mode_of(test: str) -> str:
    """The mode that a test's id names, such as the first in `test_x[fentry-overflow-120]`."""
    parameters = re.search(r"\[(.*)\]$", test)
    words = parameters[1].split("-") if parameters else []
    return next((mode for mode in MODES if mode in words), ANY_MODE)


def cells_of(report: str) -> dict[str, Cell]:
    """The results by mode in a JUnit XML report, as pytest writes it.

    A test that failed and then broke while it was cleaned up has two entries in such a report.
    """
    cells = {mode: Cell() for mode in MODES}
    ended: dict[str, ElementTree.Element] = {}
    for case in ElementTree.fromstring(report).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        if name not in ended or _complaint(ended[name]) is None:
            ended[name] = case
    for name, case in ended.items():
        cell = cells.setdefault(mode_of(name), Cell())
        complaint, skip = _complaint(case), case.find("skipped")
        if complaint is not None:
            cell.failures.append(Failure(name, f"{first_line(complaint)}{_heard(case)}"))
        elif skip is not None:
            cell.skipped[skip.get("message") or "no reason"] += 1
        else:
            cell.passed += 1
    return cells


def _complaint(case: ElementTree.Element) -> ElementTree.Element | None:
    return next((one for kind in ("failure", "error") for one in case.iter(kind)), None)


def first_line(complaint: ElementTree.Element) -> str:
    """Why a test failed: pytest's own first line of it."""
    told = (complaint.get("message") or complaint.text or "").strip()
    return (told.splitlines() or ["no message"])[0][:MESSAGE_LENGTH]


def _heard(case: ElementTree.Element) -> str:
    """What a test's processes said last on standard error: the tool says there why it ended."""
    lines = (case.findtext("system-err") or "").splitlines()
    said = [line.strip() for line in lines if line.strip() and not line.startswith("---")]
    return f" (heard: {'; '.join(said[-HEARD_LINES:])[:MESSAGE_LENGTH]})" if said else ""


def pytest_command(share: Path, select: str | None) -> list[str]:
    """What a guest runs: it notes its versions, then the tests, by the distribution's Python."""
    settings = (f"timeout={KERNEL_TEST_LIMIT_S}", "junit_logging=all")
    tests = [
        *("/usr/bin/python3", "-m", "pytest", "-v", "-rsfE", "--durations=10"),
        *("-p", "no:cacheprovider", "-m", "not slow"),
        *(word for setting in settings for word in ("-o", setting)),
        f"--junitxml={share / REPORT_FILE}",
        *(("-k", select) if select else ()),
        KERNEL_DIRECTORY,
    ]
    notes = (
        f"uname -r > {shlex.quote(str(share / KERNEL_FILE))}",
        "dpkg-query --show --showformat='${Version}' python3-bpfcc > "
        + shlex.quote(str(share / BCC_FILE)),
        f"exec {shlex.join(tests)}",
    )
    return ["/bin/sh", "-euc", "\n".join(notes)]


def guest_environment(ours: Mapping[str, str], kernel: Path) -> dict[str, str]:
    """The settings of the tests in a guest of that kernel, the user's patience among them."""
    passed_on = {name: ours[name] for name in (PATIENCE_VARIABLE,) if name in ours}
    settings = {FORCE_VARIABLE: "1", IMAGE_VARIABLE: str(kernel), "PYTHONPATH": str(REPOSITORY)}
    return {**passed_on, **settings}


def run_row(
    row: Row, select: str | None, sink: Sink, demanded: tuple[str, ...] = MODES
) -> RowResult:
    """Boot a row's guest and run the tests in it; no LabError gets out, it is a result."""
    result = RowResult(row, {mode: Cell() for mode in MODES}, demanded=demanded)
    with tempfile.TemporaryDirectory(prefix="tcpstuck-matrix-") as scratch:
        share = Path(scratch)
        try:
            _test_in_guest(result, share, select, sink)
        except GuestDiedError as error:
            sink(error.console.encode())
            result.trouble = f"{error.what}: {error.why}"
        except LabError as error:
            result.trouble = f"{error.what}: {error.why}"
        result.kernel = _noted(share / KERNEL_FILE)
        result.bcc = _noted(share / BCC_FILE)
    return result


def _test_in_guest(result: RowResult, share: Path, select: str | None, sink: Sink) -> None:
    place = trees.prepare(result.row)
    options = GuestOptions(
        kernel=place.kernel,
        root=place.root,
        views=(REPOSITORY, place.kernel.parent),
        shares=(share,),
        environment=guest_environment(os.environ, place.kernel),
        timeout_s=patient(ROW_LIMIT_S),
    )
    ran = run_in_guest(
        pytest_command(share, select),
        options=options,
        stdout_sink=sink,
        stderr_sink=sink,
        cwd=REPOSITORY,
    )
    result.seconds = ran.total_s
    report = share / REPORT_FILE
    if report.is_file():
        try:
            result.cells = cells_of(report.read_text())
        except (ElementTree.ParseError, UnicodeDecodeError) as error:
            result.trouble = f"the report is damaged: {error}"
    if ran.timed_out:
        result.trouble = f"cut off after {options.timeout_s:g} s"
    elif ran.status != 0 and not any(cell.failures for cell in result.cells.values()):
        result.trouble = result.trouble or f"pytest ended with status {ran.status}"


def _noted(path: Path) -> str:
    return path.read_text().strip() if path.is_file() else UNKNOWN


def upstream(version: str) -> str:
    """The upstream part of a Debian version, without what repacking added."""
    return re.split(r"[+-]", version)[0]


def table(results: Sequence[RowResult]) -> str:
    """A line for each row and mode."""
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
    headers = ("row", "kernel", "BCC", "mode", "passed", "failed", "skipped", "")
    # Versions are text: 6.10 is not 6.1.
    return tabulate(lines, headers, disable_numparse=[1, 2])


def _skips(cell: Cell) -> str:
    reasons = (f"{count} ({reason})" for reason, count in sorted(cell.skipped.items()))
    return "; ".join(reasons) or "0"


def complaints(results: Sequence[RowResult]) -> list[str]:
    """A line for each cause of failures with the first test that met it, and for all else."""
    lines = []
    for result in results:
        where = f"{result.row.suite} ({result.kernel}, BCC {upstream(result.bcc)})"
        lines += [f"{where}: {result.trouble}"] if result.trouble else []
        lines += [
            f"{where}: nothing was tested in mode {mode}"
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
    """The table's lines with the reasons, for a file."""
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
        }
        for result in results
        for mode, cell in result.cells.items()
    ]


def verdict(results: Sequence[RowResult], all_count: bool) -> int:
    """The exit status: 1 where a row that counts is not good."""
    counted = [result for result in results if all_count or result.row.counts]
    return 0 if all(result.good for result in counted) else 1


def _run_logged(
    row: Row, select: str | None, demanded: tuple[str, ...], verbose: bool
) -> RowResult:
    """Run a row; what its guest prints goes to a file in the cache, or to our own output."""
    if verbose:
        return run_row(row, select, write_through(sys.stdout), demanded)
    path = cache_directory() / "matrix" / f"{row.suite}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb", buffering=0) as log:
        result = run_row(row, select, log.write, demanded)
    state = "good" if result.good else f"BAD, see {path}"
    print(f"{row.suite}: {state}, {result.seconds:.0f} s in its guest", flush=True)
    return result


def _matrix_command(arguments: argparse.Namespace) -> int:
    select = " or ".join(CORE) if arguments.core else arguments.select
    chosen = arguments.rows or ROWS
    # Whoever selects tests by name may mean such as have nothing to do with the modes.
    demanded = () if arguments.select else MODES
    results = [_run_logged(row, select, demanded, arguments.verbose) for row in chosen]
    print(table(results), *complaints(results), sep="\n", flush=True)
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(as_json(results), indent=2) + "\n")
    return verdict(results, arguments.all)


def add_parser(subparsers: Subparsers) -> None:
    """Add the `matrix` command."""
    parser = subparsers.add_parser("matrix", help="the kernel tests on every kernel")
    suites = ", ".join(row.suite for row in ROWS)
    parser.add_argument(
        "--rows", metavar="ROW", nargs="+", type=trees.row_named, help=f"of {suites}"
    )
    parser.add_argument("--all", action="store_true", help="the newest kernels' rows count too")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the table there as JSON")
    parser.add_argument("--verbose", action="store_true", help="show what the guests print")
    subset = parser.add_mutually_exclusive_group()
    subset.add_argument("--core", action="store_true", help=f"only {', '.join(CORE)}")
    subset.add_argument("--select", metavar="EXPRESSION", help="pytest's -k")
    parser.set_defaults(run=_matrix_command)
