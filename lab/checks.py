"""`python3 -m lab test`: runs the project's checks in groups and prints one closing line.

The kernel group runs in guests (or natively, see `lab.guests.run`). The other groups run in
parallel with it. A failed check that is not a test, such as a linter's, counts as an error.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from lab.errors import LabError
from lab.guests import kernel_tests
from lab.guests.kernel_tests import (
    BUILD,
    DURATIONS,
    NO_TESTS_STATUS,
    PYTEST,
    REPOSITORY,
    guest_count,
)
from lab.guests.selection import Selection
from lab.guests.tally import Tally, read_report, tally_report

if TYPE_CHECKING:
    from lab.guests.packages import Subparsers

UNIT_DIRECTORIES = ("tests/unit", "tests/property", "tests/replay", "tests/golden")
PROPERTIES = "tests/property"
"""These execute the same lines with many inputs, and twice as slowly under coverage."""
UNIT, KERNEL = "unit", "kernel"
SCRIPTS = ("lab/setup.sh", ".ci/run", "lab/deb/trial.sh", "packaging/debian/tcpstuck-trace.postrm")
PYTHON = (sys.executable, "-m")
COVERAGE = BUILD / "coverage"
QUICK_MODE = "fentry"
"""The probe mode of a run that is limited to the core scenarios."""


@dataclass(frozen=True)
class Settings:
    """What to run, and how."""

    selection: Selection
    guests: int = 1
    """Number of guests that share the kernel tests."""
    coverage: bool = False
    """Measure which lines of the tool are executed by the tests that need no kernel.

    Guests do not measure coverage. On this machine, coverage costs the tool's --doctor a sixth more
    CPU time.
    """
    record: bool = False
    """Record the duration of each kernel test."""


def _tool(*command: str) -> Tally:
    """Run a tool that prints nothing on success."""
    done = subprocess.run(
        command, cwd=REPOSITORY, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    if done.returncode == 0:
        return Tally()
    print(done.stdout + done.stderr, end="", flush=True)
    return Tally(errors=1)


def _lint(_settings: Settings) -> Tally:
    """Check the style of Python and C, and of shell if shellcheck is installed."""
    total = _tool(*PYTHON, "ruff", "check", "--quiet") + _tool(*PYTHON, "ruff", "format", "--check")
    sources = (*(REPOSITORY / "bpf").glob("*.[ch]"), *(REPOSITORY / "bench").glob("*.c"))
    total += _tool("clang-format", "--dry-run", "-Werror", *sorted(map(str, sources)))
    if shutil.which("shellcheck"):
        total += _tool("shellcheck", *SCRIPTS)
    return total


def _types(_settings: Settings) -> Tally:
    return _tool(*PYTHON, "mypy")


def _unit(settings: Settings) -> Tally:
    """Run the tests that need neither root nor BCC."""
    if not settings.coverage:
        return _pytest(settings, UNIT_DIRECTORIES, [sys.executable])
    # With --lf, one pytest must know all that failed.
    apart = (PROPERTIES,) if PROPERTIES in UNIT_DIRECTORIES else ()
    apart = () if settings.selection.last_failed else apart
    measured = [directory for directory in UNIT_DIRECTORIES if directory not in apart]
    total = _pytest(settings, measured, _measured("run"))
    if apart and (total.good or not settings.selection.stop_early):
        total += _pytest(settings, apart, [sys.executable])
    return total


def _pytest(settings: Settings, directories: Sequence[str], python: Sequence[str]) -> Tally:
    selection = settings.selection
    with tempfile.TemporaryDirectory(prefix="tcpstuck-tests-") as scratch:
        report = Path(scratch) / "unit.xml"
        options = [f"--junitxml={report}", "-o", f"cache_dir={BUILD / 'pytest' / 'unit'}"]
        options += ["--lf"] if selection.last_failed else []
        options += ["-x"] if selection.stop_early else []
        _, *pytest = PYTEST
        command = [*python, *pytest, *options, *selection.words(), *directories]
        status = subprocess.run(command, cwd=REPOSITORY, stdin=subprocess.DEVNULL).returncode
        if status == NO_TESTS_STATUS and selection.narrowed:
            return Tally()
        return tally_report(read_report(report), status)


def _measured(*words: str) -> list[str]:
    """A coverage.py command on the data collected since `_forget_coverage`."""
    return ["/usr/bin/env", f"COVERAGE_FILE={COVERAGE / 'data'}", *PYTHON, "coverage", *words]


def _forget_coverage() -> None:
    shutil.rmtree(COVERAGE, ignore_errors=True)
    COVERAGE.mkdir(parents=True)


def _tell_coverage() -> None:
    """Print the share of executed lines, and write the lines that were missed to a file."""
    subprocess.run(_measured("combine", "--quiet"), cwd=REPOSITORY, check=True)
    table = COVERAGE / "table.txt"
    with table.open("wb") as stream:
        missing = _measured("report", "--skip-covered", "--show-missing")
        subprocess.run(missing, cwd=REPOSITORY, check=True, stdout=stream)
    (total,) = re.findall(r"^TOTAL .* (\d+)%$", table.read_text(), re.MULTILINE)
    part = f"{total} % of the tool's lines"
    print(f"the tests without a kernel execute {part}; see {table.relative_to(REPOSITORY)}")


GROUPS: dict[str, Callable[[Settings], Tally]] = {"lint": _lint, "types": _types, UNIT: _unit}


def run_groups(names: Sequence[str], settings: Settings) -> Tally:
    """Run all groups even if one fails, and print a line after each.

    The guests of the kernel group boot and run in parallel with the other groups.
    """
    others = [name for name in names if name != KERNEL]
    total = Tally()
    with contextlib.ExitStack() as stack:
        began = time.monotonic()
        guests = _begin_guests(stack, settings, bool(others)) if KERNEL in names else None
        for name in others:
            total += _timed(name, functools.partial(GROUPS[name], settings), time.monotonic())
        if guests is not None:
            total += _timed(KERNEL, guests, began)
    if settings.selection.narrowed and {UNIT, KERNEL} & set(names) and total == Tally():
        print("no test matches the selection")
        total = Tally(errors=1)
    return total


def _begin_guests(
    stack: contextlib.ExitStack, settings: Settings, beside: bool
) -> Callable[[], Tally]:
    """Start the guests; returns a function that waits for the guests and counts results.

    If no guest can start, prints the reason; the returned function then counts one error.
    """
    try:
        return stack.enter_context(
            kernel_tests.started(
                settings.selection, settings.guests, beside=beside, record=settings.record
            )
        )
    except LabError as error:
        print("\n".join(error.lines()))
        return lambda: Tally(errors=1)


def _timed(name: str, run: Callable[[], Tally], began: float) -> Tally:
    try:
        counted = run()
    except LabError as error:
        print("\n".join(error.lines()))
        counted = Tally(errors=1)
    verdict = "good" if counted.good else "BAD"
    print(f"{name}: {verdict} in {time.monotonic() - began:.0f} s", flush=True)
    return counted


def _test_command(refuse: Callable[[str], NoReturn], arguments: argparse.Namespace) -> int:
    if arguments.record_durations and arguments.guests > 1:
        refuse("--record-durations needs a single guest: parallel guests slow each other down")
    groups = [*GROUPS, KERNEL]
    if arguments.coverage and UNIT not in (arguments.groups or groups):
        refuse(f"--coverage needs the group {UNIT}")
    for name in arguments.groups:
        if name not in groups:
            refuse(f"there is no group {name!r}; choose from {', '.join(groups)}")
    selection = Selection(
        slow=arguments.slow,
        core=arguments.core,
        mode=QUICK_MODE if arguments.core else None,
        matching=arguments.matching,
        last_failed=arguments.last_failed,
        stop_early=arguments.stop_early,
    )
    settings = Settings(selection, arguments.guests, arguments.coverage, arguments.record_durations)
    began = time.monotonic()
    if settings.coverage:
        _forget_coverage()
    total = run_groups(arguments.groups or groups, settings)
    if settings.coverage:
        _tell_coverage()
    print(total.closing_line(time.monotonic() - began))
    return 0 if total.good else 1


def add_parser(subparsers: Subparsers) -> None:
    """Add the `test` command."""
    parser = subparsers.add_parser("test", help="run the project's checks and tests")
    parser.add_argument(
        "groups", metavar="GROUP", nargs="*", help=f"one of {', '.join([*GROUPS, KERNEL])}"
    )
    parser.add_argument("--slow", action="store_true", help="include the slow tests")
    parser.add_argument(
        "--core", action="store_true", help=f"run only the core kernel tests, with {QUICK_MODE}"
    )
    parser.add_argument(
        "-k", dest="matching", metavar="EXPR", help="run only matching tests, as with pytest's -k"
    )
    parser.add_argument(
        "--lf", dest="last_failed", action="store_true", help="run only tests that failed last time"
    )
    parser.add_argument(
        "-x", dest="stop_early", action="store_true", help="stop each guest at its first failure"
    )
    parser.add_argument(
        "--guests",
        metavar="N",
        type=guest_count,
        default=1,
        help="split the kernel tests among N guests; default 1",
    )
    parser.add_argument(
        "--coverage", action="store_true", help="measure coverage of the tests that need no kernel"
    )
    parser.add_argument(
        "--record-durations",
        action="store_true",
        help=f"record kernel test durations in {DURATIONS.relative_to(REPOSITORY)}",
    )
    parser.set_defaults(run=functools.partial(_test_command, parser.error))
