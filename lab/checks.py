"""`python3 -m lab test`: every check of the project, in groups, with one closing line for all.

The kernel group runs in a guest (or natively, see `lab.guest`); its figures come back through a
shared directory. Failed checks that are no tests, such as a linter's, count as errors.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from lab.errors import LabError
from lab.guest import GuestOptions, run_in_guest, write_through

if TYPE_CHECKING:
    from lab.package_cache import Subparsers

REPOSITORY = Path(__file__).resolve().parent.parent
PYTEST = (sys.executable, "-m", "pytest", "-q", "--no-header", "-rsfE", "-p", "no:cacheprovider")
UNIT_DIRECTORIES = ("tests/unit", "tests/property", "tests/replay", "tests/golden")
KERNEL_DIRECTORY = "tests/kernel"
KERNEL_LIMIT_S = 2 * 3600.0
KERNEL_TEST_LIMIT_S = 600
"""For one kernel test: emulation is some 20 times slower than the machine itself."""
FORCE_VARIABLE = "TCPSTUCK_FORCE_KERNEL_TESTS"
"""Set, it turns the skip of a kernel test that cannot run here into a failure."""


@dataclass(frozen=True)
class Selection:
    """Which tests of the groups that have some."""

    slow: bool = False
    kernel_files: str = "*"
    """A shell pattern of names: where two guests share the kernel group, each has its own."""


@dataclass(frozen=True)
class Tally:
    """How tests ended; errors also count whatever broke outside a test."""

    passed: int = 0
    failed: int = 0
    errors: int = 0
    skipped: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.passed + other.passed,
            self.failed + other.failed,
            self.errors + other.errors,
            self.skipped + other.skipped,
        )

    @property
    def good(self) -> bool:
        """Whether nothing failed or broke."""
        return self.failed == 0 and self.errors == 0

    def closing_line(self, seconds: float) -> str:
        """A line such as pytest ends with; what is 0 is left out, except passed."""
        parts = [f"{self.failed} failed"] if self.failed else []
        parts.append(f"{self.passed} passed")
        parts += [f"{self.skipped} skipped"] if self.skipped else []
        parts += [f"{self.errors} errors"] if self.errors else []
        return f"=== {', '.join(parts)} in {seconds:.0f} s ==="


def tally_junit(report: str) -> Tally:
    """The figures of a JUnit XML report, as pytest writes it."""
    total = Tally()
    for suite in ElementTree.fromstring(report).iter("testsuite"):
        tests, failed, errors, skipped = (
            int(suite.get(name, "0")) for name in ("tests", "failures", "errors", "skipped")
        )
        total += Tally(tests - failed - errors - skipped, failed, errors, skipped)
    return total


def _tool(*command: str) -> Tally:
    """Run a tool that prints only complaints."""
    done = subprocess.run(
        command, cwd=REPOSITORY, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    if done.returncode == 0:
        return Tally()
    print(done.stdout + done.stderr, end="", flush=True)
    return Tally(errors=1)


def _python_tool(*command: str) -> Tally:
    return _tool(sys.executable, "-m", *command)


def _lint(_selection: Selection) -> Tally:
    """Check style: Python, C, and shell where shellcheck is installed."""
    sources = sorted(
        str(path)
        for path in (*(REPOSITORY / "bpf").glob("*.[ch]"), *(REPOSITORY / "bench").glob("*.c"))
    )
    scripts = [str(REPOSITORY / name) for name in ("lab/setup.sh", ".ci/run")]
    total = _python_tool("ruff", "check", "--quiet") + _python_tool("ruff", "format", "--check")
    total += _tool("clang-format", "--dry-run", "-Werror", *sources)
    if shutil.which("shellcheck"):
        total += _tool("shellcheck", *scripts)
    return total


def _types(_selection: Selection) -> Tally:
    return _python_tool("mypy")


def _marks(slow: bool) -> list[str]:
    return [] if slow else ["-m", "not slow"]


def _unit(selection: Selection) -> Tally:
    """Run the tests that need neither root nor BCC."""
    directories = [name for name in UNIT_DIRECTORIES if (REPOSITORY / name).is_dir()]
    with tempfile.TemporaryDirectory(prefix="tcpstuck-tests-") as scratch:
        report = Path(scratch) / "unit.xml"
        command = [*PYTEST, f"--junitxml={report}", *_marks(selection.slow), *directories]
        status = subprocess.run(command, cwd=REPOSITORY, stdin=subprocess.DEVNULL).returncode
        return tally_report(report, status)


def kernel_files(pattern: str) -> list[str]:
    """The kernel tests' files whose names match. Raises LabError where none does."""
    files = sorted((REPOSITORY / KERNEL_DIRECTORY).glob("test_*.py"))
    chosen = [
        f"{KERNEL_DIRECTORY}/{file.name}" for file in files if fnmatchcase(file.name, pattern)
    ]
    if not chosen:
        raise LabError("there is nothing to test", f"no file is like {pattern}", "see tests/kernel")
    return chosen


def _kernel(selection: Selection) -> Tally:
    """Run the tests that need a kernel, where they must not skip for the lack of one."""
    slow, files = selection.slow, kernel_files(selection.kernel_files)
    with tempfile.TemporaryDirectory(prefix="tcpstuck-tests-") as scratch:
        report = Path(scratch) / "kernel.xml"
        limit = f"timeout={KERNEL_TEST_LIMIT_S}"
        command = [*PYTEST, f"--junitxml={report}", *_marks(slow), "-o", limit, *files]
        options = GuestOptions(
            shares=(Path(scratch),),
            environment={FORCE_VARIABLE: "1"},
            timeout_s=KERNEL_LIMIT_S * (4 if slow else 1),
        )
        result = run_in_guest(
            command,
            options=options,
            stdout_sink=write_through(sys.stdout),
            stderr_sink=write_through(sys.stderr),
            cwd=REPOSITORY,
        )
        if result.timed_out:
            print(f"cut off after {options.timeout_s:g} s")
        return tally_report(report, result.status)


def tally_report(report: Path, status: int) -> Tally:
    """A report's figures; one error more where the exit status is worse than they are."""
    counted = tally_junit(report.read_text()) if report.is_file() else Tally()
    if status != 0 and counted.good:
        return counted + Tally(errors=1)
    return counted


GROUPS: dict[str, Callable[[Selection], Tally]] = {
    "lint": _lint,
    "types": _types,
    "unit": _unit,
    "kernel": _kernel,
}


def run_groups(names: list[str], selection: Selection) -> Tally:
    """Run the groups in order, all of them whatever fails, with a line after each."""
    total = Tally()
    for name in names:
        began = time.monotonic()
        try:
            counted = GROUPS[name](selection)
        except LabError as error:
            print("\n".join(error.lines()))
            counted = Tally(errors=1)
        verdict = "good" if counted.good else "BAD"
        print(f"{name}: {verdict} in {time.monotonic() - began:.0f} s", flush=True)
        total += counted
    return total


def _test_command(arguments: argparse.Namespace) -> int:
    began = time.monotonic()
    total = run_groups(
        arguments.groups or list(GROUPS), Selection(arguments.slow, arguments.kernel_files)
    )
    print(total.closing_line(time.monotonic() - began))
    return 0 if total.good else 1


def add_parser(subparsers: Subparsers) -> None:
    """Add the `test` command."""
    parser = subparsers.add_parser("test", help="run the project's checks and tests")
    parser.add_argument("groups", metavar="GROUP", nargs="*", help=f"of {', '.join(GROUPS)}")
    parser.add_argument("--slow", action="store_true", help="the slow tests too")
    parser.add_argument(
        "--kernel-files", metavar="PATTERN", default="*", help="of the kernel group only these"
    )
    parser.set_defaults(run=_test_command)
