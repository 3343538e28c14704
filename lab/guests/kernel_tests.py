"""Runs the tests that need a kernel in one or more parallel guests.

pytest collects the tests on this machine, and each guest gets its share by name. A guest's output
goes to a log file; the log is printed if a test of the guest fails. A guest that runs alone prints
directly.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, as_completed
from dataclasses import dataclass
from pathlib import Path

from lab.errors import LabError
from lab.guests.packages import cache_directory, cached_kernel
from lab.guests.programs import PROGRAMS_VARIABLE, compile_programs
from lab.guests.run import (
    GuestOptions,
    choose_native,
    guests_beside,
    run_and_tell,
    write_through,
)
from lab.guests.selection import Selection
from lab.guests.shares import (
    COLLECTED_VARIABLE,
    ENDED_VARIABLE,
    Share,
    failed_in,
    read_durations,
    record_durations,
    share_out,
)
from lab.guests.tally import Tally, read_report, tally_report
from lab.guests.trial import tracing_refusal

REPOSITORY = Path(__file__).resolve().parents[2]
BUILD = REPOSITORY / "build"
KERNEL_DIRECTORY = "tests/kernel"
DURATIONS = REPOSITORY / KERNEL_DIRECTORY / "durations.json"
CACHE = BUILD / "pytest" / "kernel"
"""pytest's cache. A guest cannot write it, because the guest's file system is thrown away."""
LAST_FAILED = CACHE / "v" / "cache" / "lastfailed"
KERNEL_LIMIT_S = 2 * 3600.0
SLOW_LIMIT_S = 4 * KERNEL_LIMIT_S
KERNEL_TEST_LIMIT_S = 600
"""For one kernel test; emulation is some 20 times slower than the machine itself."""
FORCE_VARIABLE = "TCPSTUCK_FORCE_KERNEL_TESTS"
"""If set, a kernel test that cannot run on this kernel fails instead of being skipped."""
PYTEST = (sys.executable, "-m", "pytest", "-q", "--no-header", "-rsfE")
SILENCE_LIMIT_S = KERNEL_TEST_LIMIT_S + 300
"""For a guest that prints nothing, not even that a test has ended. The rest is for its boot."""
NO_TESTS_STATUS = 5
REPORT_FILE = "report.xml"
ENDED_FILE = "ended"


@dataclass
class GuestRun:
    """One guest, its tests and their results."""

    number: int
    share: Share
    directory: Path
    """A directory shared with the guest."""
    log: Path | None
    """The file for the guest's output; None: our own standard output and error."""
    programs: Path | None = None
    """The directory of programs compiled for the guest's kernel; None: the guest compiles all."""
    status: int = 0
    seconds: float = 0.0

    @property
    def report(self) -> str | None:
        """Pytest's report; None if pytest wrote none."""
        return read_report(self.directory / REPORT_FILE)

    @property
    def not_run(self) -> list[str]:
        """The tests that had not ended when a guest died without a report."""
        if self.report is not None:
            return []
        file = self.directory / ENDED_FILE
        ended = set(file.read_text().splitlines()) if file.is_file() else set()
        return [test for test in self.share.tests if test not in ended]

    def tally(self) -> Tally:
        """The guest's test results, counted."""
        return tally_report(self.report, self.status)

    def account(self, guests: int) -> str:
        """The text to print when the guest has ended, with its log if a test failed."""
        tally = self.tally()
        lines = []
        if self.log is not None and not tally.good:
            lines.append(self.log.read_text(errors="replace").rstrip("\n"))
        if self.report is None:
            lines.append(f"guest {self.number} ended with status {self.status} and no report;")
            lines.append(f"of its {len(self.share.tests)} tests, these had not ended:")
            lines += [f"  {test}" for test in self.not_run]
        if guests > 1:
            lines.append(f"guest {self.number} of {guests}: {tally.closing_line(self.seconds)}")
        return "\n".join(lines)


def collected(selection: Selection) -> dict[str, str]:
    """The ids of the selected tests, each with the name of its shared set-up. Raises LabError."""
    with tempfile.TemporaryDirectory(prefix="tcpstuck-tests-") as scratch:
        written = Path(scratch) / "tests.json"
        # Collect in file order, so that the shares are deterministic.
        words = [*PYTEST, "--collect-only", "-p", "no:randomly", "-o", f"cache_dir={CACHE}"]
        words += [*(["--lf"] if selection.last_failed else []), *selection.kernel_words()]
        done = subprocess.run(
            [*words, KERNEL_DIRECTORY],
            cwd=REPOSITORY,
            env={**os.environ, COLLECTED_VARIABLE: str(written)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        if done.returncode == NO_TESTS_STATUS:
            return {}
        if done.returncode != 0:
            print(done.stdout + done.stderr, end="")
            raise LabError("the kernel tests cannot be collected", "see above", "fix them")
        return {str(test): str(name) for test, name in json.loads(written.read_text()).items()}


def guest_command(selection: Selection, run: GuestRun) -> list[str]:
    """The guest's command: pytest with the guest's tests by name."""
    words = [*PYTEST, "-p", "no:cacheprovider", f"--junitxml={run.directory / REPORT_FILE}"]
    words += ["-o", f"timeout={KERNEL_TEST_LIMIT_S}", *(["-x"] if selection.stop_early else [])]
    return [*words, *run.share.tests]


def options_for(selection: Selection, run: GuestRun) -> GuestOptions:
    """The guest's options."""
    environment = {FORCE_VARIABLE: "1", ENDED_VARIABLE: str(run.directory / ENDED_FILE)}
    if run.programs is not None:
        environment[PROGRAMS_VARIABLE] = str(run.programs)
    return GuestOptions(
        shares=(run.directory,),
        views=() if run.programs is None else (run.programs,),
        environment=environment,
        timeout_s=SLOW_LIMIT_S if selection.slow else KERNEL_LIMIT_S,
        # Slow tests have longer limits of their own.
        silence_s=None if selection.slow else SILENCE_LIMIT_S,
    )


def play(selection: Selection, run: GuestRun) -> GuestRun:
    """Run a guest to its end; if no guest can start, the run gets an error status."""
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        says, complains = write_through(sys.stdout), write_through(sys.stderr)
        if run.log is not None:
            says = complains = stack.enter_context(run.log.open("wb", buffering=0)).write
        command, options = guest_command(selection, run), options_for(selection, run)
        run.status = run_and_tell(command, options, says, complains, REPOSITORY)
    run.seconds = time.monotonic() - began
    return run


def finish(playing: Sequence[Future[GuestRun]]) -> Tally:
    """Wait for all guests, print an account of each when it ends, and record failed tests."""
    total = Tally()
    for ended in as_completed(playing):
        run = ended.result()
        total += run.tally()
        if account := run.account(len(playing)):
            print(account, flush=True)
    remember_failures([one.result() for one in playing])
    return total


def remember_failures(runs: Sequence[GuestRun]) -> None:
    """Record the tests that failed or did not run for the next --lf, as pytest's cache does."""
    known: Mapping[str, bool] = {}
    with contextlib.suppress(OSError, ValueError):
        known = json.loads(LAST_FAILED.read_text())
    bad = set(known)
    for run in runs:
        failed, ended = failed_in(run.report) if run.report is not None else (set(), set())
        bad = (bad - ended) | failed | set(run.not_run)
    LAST_FAILED.parent.mkdir(parents=True, exist_ok=True)
    LAST_FAILED.write_text(json.dumps(dict.fromkeys(sorted(bad), True), indent=2))


@contextlib.contextmanager
def started(
    selection: Selection, guests: int, *, beside: bool, record: bool
) -> Iterator[Callable[[], Tally]]:
    """Start the guests; yields a function that waits for them. All guests end with the context.

    `beside`: other groups run and print meanwhile. `record`: record each test's duration. Raises
    LabError.
    """
    tests = collected(selection)
    if not tests:
        yield Tally
        return
    native = choose_native(GuestOptions(), tracing_refusal)
    # Two runs on one kernel would see each other's probes.
    shares = share_out(tests, read_durations(DURATIONS), 1 if native else guests)
    programs = None if native else _compiled_programs()
    with tempfile.TemporaryDirectory(prefix="tcpstuck-tests-") as scratch:
        runs = list(_runs(shares, Path(scratch), beside, programs))
        with guests_beside(len(runs)) as pool:
            playing = [pool.submit(play, selection, run) for run in runs]

            def finish_and_record() -> Tally:
                total = finish(playing)
                if record:
                    reports = [run.report for run in runs if run.report is not None]
                    record_durations(DURATIONS, reports, collected(Selection(slow=True)))
                return total

            yield finish_and_record


def _compiled_programs() -> Path:
    """The directory of programs for the guests' kernel. Raises LabError without that kernel."""
    directory = cache_directory() / "programs"
    for missing in compile_programs(cached_kernel(), directory):
        print(f"the guests compile some programs themselves: {missing}", flush=True)
    directory.mkdir(exist_ok=True)
    return directory


def _runs(
    shares: Sequence[Share], scratch: Path, beside: bool, programs: Path | None
) -> Iterator[GuestRun]:
    """Create a run for each share, and print where its output is."""
    BUILD.mkdir(exist_ok=True)
    for number, share in enumerate(shares, 1):
        directory = scratch / str(number)
        directory.mkdir()
        log = BUILD / f"guest-{number}.log" if beside or len(shares) > 1 else None
        place = f"; see {log.relative_to(REPOSITORY)}" if log else ""
        what = f"{len(share.tests)} tests, about {share.seconds / 60:.0f} minutes alone"
        print(f"guest {number} of {len(shares)}: {what}{place}", flush=True)
        yield GuestRun(number, share, directory, log, programs)


def guest_count(text: str) -> int:
    """Parse a number of guests. Raises ArgumentTypeError."""
    if not re.fullmatch(r"[1-9][0-9]?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of guests from 1 to 99")
    return int(text)
