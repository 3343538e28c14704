"""Runs the kernel tests on every kernel of the matrix, with its suite's BCC, in both probe modes.

Both modes run in one guest per row; a test's id gives its mode. The printed kernel and BCC versions
come from the guest itself. A mode in which no test passed is a failure, whatever the reason:
otherwise a matrix without any test would look green.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import re
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import as_completed
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn
from xml.etree import ElementTree

from lab.errors import LabError
from lab.guests import trees
from lab.guests.in_tree import run_in_tree
from lab.guests.kernel_tests import (
    FORCE_VARIABLE,
    KERNEL_DIRECTORY,
    KERNEL_TEST_LIMIT_S,
    REPOSITORY,
    SILENCE_LIMIT_S,
    guest_count,
)
from lab.guests.matrix_report import (
    ANY_MODE,
    MODES,
    UNKNOWN,
    Cell,
    Failure,
    RowResult,
    as_json,
    complaints,
    empty_result,
    log_of,
    progress,
    table,
    verdict,
)
from lab.guests.packages import IMAGE_VARIABLE, CacheError, cache_directory
from lab.guests.programs import PROGRAMS_VARIABLE, compile_in_tree
from lab.guests.run import (
    TIMEOUT_STATUS,
    GuestDiedError,
    GuestOptions,
    guests_beside,
    run_in_guest,
    write_through,
)
from lab.guests.selection import Selection
from lab.guests.trees import ROWS, BootFiles, Row
from lab.patience import patient

if TYPE_CHECKING:
    from lab.guests.packages import Subparsers
    from lab.guests.run import Sink

ROW_LIMIT_S = 3 * 3600.0
"""For the tests of one guest; generous, so that a slow machine does not fail."""
REPORTING_S = 900.0
"""For booting the guest, and for pytest's report after the limit has passed."""
REPORT_FILE = "report.xml"
KERNEL_FILE = "kernel"
BCC_FILE = "bcc"
MESSAGE_LENGTH = 300
HEARD_LINES = 3
"""Number of lines in a tool error: what, why, remedy."""


def mode_of(test: str) -> str:
    """The mode in a test's id, such as fentry in `test_x[fentry-overflow-120]`."""
    parameters = re.search(r"\[(.*)\]$", test)
    words = parameters[1].split("-") if parameters else []
    return next((mode for mode in MODES if mode in words), ANY_MODE)


def cells_of(report: str) -> dict[str, Cell]:
    """The results by mode in pytest's JUnit XML report.

    A test that failed and then broke during clean-up has two entries in the report. An interrupted
    test has an entry like a passed test, but the suite's count excludes it.
    """
    cells = {mode: Cell() for mode in MODES}
    known: dict[str, ElementTree.Element] = {}
    read = ElementTree.fromstring(report)
    for case in read.iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        if name not in known or _complaint(known[name]) is None:
            known[name] = case
    ended = sum(int(suite.get("tests", 0)) for suite in read.iter("testsuite"))
    for name, case in itertools.islice(known.items(), ended):
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
    """The first line of pytest's failure message."""
    told = (complaint.get("message") or complaint.text or "").strip()
    return (told.splitlines() or ["no message"])[0][:MESSAGE_LENGTH]


def _heard(case: ElementTree.Element) -> str:
    """The last lines of a test's standard error, where the tool reports why it ended."""
    lines = (case.findtext("system-err") or "").splitlines()
    said = [line.strip() for line in lines if line.strip() and not line.startswith("---")]
    return f" (heard: {'; '.join(said[-HEARD_LINES:])[:MESSAGE_LENGTH]})" if said else ""


def pytest_command(share: Path, selection: Selection, limit_s: float) -> list[str]:
    """The guest's command: record versions, then run the tests with the distribution's Python.

    After the limit, pytest is interrupted with SIGINT, so that it still writes its report.
    """
    settings = (f"timeout={KERNEL_TEST_LIMIT_S}", "junit_logging=all")
    tests = [
        *("timeout", "--signal=INT", f"--kill-after={REPORTING_S / 2:g}", f"{limit_s:g}"),
        *("/usr/bin/python3", "-m", "pytest", "-v", "-rsfE", "--durations=40"),
        *("-p", "no:cacheprovider"),
        *(word for setting in settings for word in ("-o", setting)),
        f"--junitxml={share / REPORT_FILE}",
        *selection.kernel_words(),
        KERNEL_DIRECTORY,
    ]
    notes = (
        f"uname -r > {shlex.quote(str(share / KERNEL_FILE))}",
        "dpkg-query --show --showformat='${Version}' python3-bpfcc > "
        + shlex.quote(str(share / BCC_FILE)),
        f"exec {shlex.join(tests)}",
    )
    return ["/bin/sh", "-euc", "\n".join(notes)]


def made_ready(row: Row, boot: BootFiles) -> BootFiles:
    """Do what a row's guest would do slowly: compile the tool's programs and the tests' bytecode.

    Both are done by the programs of the row's tree. If that fails, the guest does it itself.
    """
    directory = cache_directory() / f"programs-{row.suite}"
    missing = compile_in_tree(boot.root, boot.kernel, directory, REPOSITORY)
    missing += _write_bytecode(boot.root)
    for why in missing:
        print(f"{row.suite}: left to the guest: {why}", flush=True)
    return replace(boot, programs=directory)


def _write_bytecode(tree: Path) -> list[str]:
    """Write `__pycache__` for a tree's Python and pytest; returns why not."""
    compiling = ("python3", "-m", "compileall", "-q", "tcpstuck_bpf", "lab", "tests")
    collecting = ("python3", "-m", "pytest", "-p", "no:cacheprovider", "--collect-only", "-q")
    missing = []
    for command in (compiling, (*collecting, KERNEL_DIRECTORY)):
        try:
            run_in_tree(tree, command, writable=(REPOSITORY,), cwd=REPOSITORY)
        except CacheError as error:
            missing.append(str(error))
    return missing


def run_row(
    row: Row,
    boot: BootFiles,
    selection: Selection,
    sink: Sink,
    demanded: tuple[str, ...] = MODES,
) -> RowResult:
    """Boot a row's guest and run its tests; a LabError becomes part of the result."""
    result = empty_result(row, demanded)
    with tempfile.TemporaryDirectory(prefix="tcpstuck-matrix-") as scratch:
        share = Path(scratch)
        try:
            _test_in_guest(result, share, boot, selection, sink)
        except GuestDiedError as error:
            sink(error.console.encode())
            result.trouble = str(error)
        except LabError as error:
            result.trouble = str(error)
        result.kernel = _noted(share / KERNEL_FILE)
        result.bcc = _noted(share / BCC_FILE)
    return result


def _test_in_guest(
    result: RowResult, share: Path, boot: BootFiles, selection: Selection, sink: Sink
) -> None:
    environment = {
        FORCE_VARIABLE: "1",
        IMAGE_VARIABLE: str(boot.kernel),
        "PYTHONPATH": str(REPOSITORY),
    }
    views = [REPOSITORY, boot.kernel.parent]
    if boot.programs is not None:
        environment[PROGRAMS_VARIABLE] = str(boot.programs)
        views.append(boot.programs)
    options = GuestOptions(
        kernel=boot.kernel,
        root=boot.root,
        views=tuple(views),
        shares=(share,),
        environment=environment,
        timeout_s=patient(ROW_LIMIT_S + REPORTING_S),
        silence_s=SILENCE_LIMIT_S,
    )
    ran = run_in_guest(
        pytest_command(share, selection, patient(ROW_LIMIT_S)),
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
    if ran.timed_out or ran.status == TIMEOUT_STATUS:
        result.trouble = f"cut off after {ran.total_s:.0f} s"
    elif ran.status != 0 and not any(cell.failures for cell in result.cells.values()):
        result.trouble = result.trouble or f"pytest ended with status {ran.status}"


def _noted(path: Path) -> str:
    return path.read_text().strip() if path.is_file() else UNKNOWN


def run_rows(
    rows: Sequence[Row],
    guests: int,
    prepare: Callable[[Row], BootFiles],
    run: Callable[[Row, BootFiles], RowResult],
    demanded: tuple[str, ...],
    tell: Callable[[RowResult], object],
) -> list[RowResult]:
    """Run the rows, at most `guests` at a time; returns results in row order.

    `tell` is called with each result. All boot files are prepared before the first guest starts:
    apt locks its package lists, suites share trees and kernels, and a stale tree can only be
    replaced while no guest uses it.
    """
    results: dict[Row, RowResult] = {}
    with guests_beside(guests) as pool:
        prepared = {}
        for row in rows:
            try:
                prepared[row] = prepare(row)
            except LabError as error:
                results[row] = empty_result(row, demanded, str(error))
                tell(results[row])
        running = {pool.submit(run, row, boot): row for row, boot in prepared.items()}
        for ended in as_completed(running):
            row, wrong = running[ended], ended.exception()
            # An error in one row must not discard hours of results from the others.
            results[row] = empty_result(row, demanded, repr(wrong)) if wrong else ended.result()
            tell(results[row])
    return [results[row] for row in rows]


def _results(arguments: argparse.Namespace) -> list[RowResult]:
    # Tests selected by name may be independent of the modes.
    demanded = () if arguments.select else MODES
    selection = Selection(core=arguments.core, matching=arguments.select)

    def prepare(row: Row) -> BootFiles:
        if not arguments.place:
            return made_ready(row, trees.prepare(row))
        kernel, root = arguments.place
        return made_ready(row, BootFiles(kernel, root, fresh=False))

    def run(row: Row, boot: BootFiles) -> RowResult:
        if arguments.verbose:
            return run_row(row, boot, selection, write_through(sys.stdout), demanded)
        with log_of(row).open("wb", buffering=0) as log:
            return run_row(row, boot, selection, log.write, demanded)

    def tell(result: RowResult) -> None:
        if not arguments.verbose:
            print(progress(result), flush=True)

    rows = list(dict.fromkeys(arguments.rows or ROWS))
    return run_rows(rows, arguments.guests, prepare, run, demanded, tell)


def _matrix_command(refuse: Callable[[str], NoReturn], arguments: argparse.Namespace) -> int:
    if arguments.verbose and arguments.guests > 1:
        refuse("--verbose needs a single guest: the output of several would be mixed")
    if arguments.place and (arguments.guests > 1 or len(arguments.rows or ROWS) > 1):
        refuse("--place needs exactly one row")
    results = _results(arguments)
    print(table(results), *complaints(results), sep="\n", flush=True)
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(as_json(results), indent=2) + "\n")
    return verdict(results, arguments.all)


def add_parser(subparsers: Subparsers) -> None:
    """Add the `matrix` command."""
    parser = subparsers.add_parser("matrix", help="run the kernel tests on every kernel")
    suites = ", ".join(row.suite for row in ROWS)
    parser.add_argument(
        "--rows", metavar="ROW", nargs="+", type=trees.row_named, help=f"one of {suites}"
    )
    parser.add_argument(
        "--all", action="store_true", help="the newest kernels can fail the run too"
    )
    parser.add_argument(
        "--guests", metavar="N", type=guest_count, default=1, help="parallel rows; default 1"
    )
    parser.add_argument(
        "--place",
        metavar=("IMAGE", "TREE"),
        nargs=2,
        type=Path,
        help="boot this kernel over this tree instead of the row's newest",
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the table to FILE as JSON")
    parser.add_argument("--verbose", action="store_true", help="print the guests' output")
    subset = parser.add_mutually_exclusive_group()
    subset.add_argument("--core", action="store_true", help="run only tests marked core")
    subset.add_argument("--select", metavar="EXPRESSION", help="pytest's -k")
    parser.set_defaults(run=functools.partial(_matrix_command, parser.error))
