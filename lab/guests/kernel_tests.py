"""The tests that need a kernel, shared out over guests that run beside each other.

Which tests there are pytest itself says, on this machine; each guest is given its own by name. What
a guest prints is kept in a file, and shown whole where the guest is the only one or a bad one.
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
"""Pytest's cache, which a guest cannot write: its file system is thrown away."""
LAST_FAILED = CACHE / "v" / "cache" / "lastfailed"
KERNEL_LIMIT_S = 2 * 3600.0
SLOW_LIMIT_S = 4 * KERNEL_LIMIT_S
KERNEL_TEST_LIMIT_S = 600
"""For one kernel test: emulation is some 20 times slower than the machine itself."""
FORCE_VARIABLE = "TCPSTUCK_FORCE_KERNEL_TESTS"
"""Set, it turns the skip of a kernel test that cannot run here into a failure."""
PYTEST = (sys.executable, "-m", "pytest", "-q", "--no-header", "-rsfE")
NO_TESTS_STATUS = 5
REPORT_FILE = "report.xml"
ENDED_FILE = "ended"


@dataclass
class GuestRun:
    """One guest with its tests, and what it brought back."""

    number: int
    share: Share
    directory: Path
    """Shared with the guest."""
    log: Path | None
    """What it prints; None: that goes where our own output goes."""
    status: int = 0
    seconds: float = 0.0

    @property
    def report(self) -> str | None:
        """Pytest's report; None where it did not come to write one."""
        return read_report(self.directory / REPORT_FILE)

    @property
    def not_run(self) -> list[str]:
        """The tests that had not ended, where the guest did not live to report."""
        if self.report is not None:
            return []
        file = self.directory / ENDED_FILE
        ended = set(file.read_text().splitlines()) if file.is_file() else set()
        return [test for test in self.share.tests if test not in ended]

    def tally(self) -> Tally:
        """How its tests ended."""
        return tally_report(self.report, self.status)

    def account(self, guests: int) -> str:
        """What is told of it when it has ended: all it printed, where that is of interest."""
        tally = self.tally()
        lines = []
        if self.log is not None and not tally.good:
            lines.append(self.log.read_text(errors="replace").rstrip("\n"))
        if self.report is None:
            lines.append(f"guest {self.number} ended with status {self.status} and no report;")
            lines.append(f"of its {len(self.share.tests)} tests these had not ended:")
            lines += [f"  {test}" for test in self.not_run]
        if guests > 1:
            lines.append(f"guest {self.number} of {guests}: {tally.closing_line(self.seconds)}")
        return "\n".join(lines)


def collected(selection: Selection) -> dict[str, str]:
    """Each selected test's id with a name for what it shares. Raises LabError where that fails."""
    with tempfile.TemporaryDirectory(prefix="tcpstuck-tests-") as scratch:
        written = Path(scratch) / "tests.json"
        # In the order of the files, so that the shares do not depend on chance.
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
            raise LabError("the kernel tests cannot be collected", "see above", "mend them")
        return {str(test): str(name) for test, name in json.loads(written.read_text()).items()}


def guest_command(selection: Selection, run: GuestRun) -> list[str]:
    """What a guest runs: pytest, with its tests by name."""
    words = [*PYTEST, "-p", "no:cacheprovider", f"--junitxml={run.directory / REPORT_FILE}"]
    words += ["-o", f"timeout={KERNEL_TEST_LIMIT_S}", *(["-x"] if selection.stop_early else [])]
    return [*words, *run.share.tests]


def options_for(selection: Selection, run: GuestRun) -> GuestOptions:
    """The guest's options."""
    return GuestOptions(
        shares=(run.directory,),
        environment={FORCE_VARIABLE: "1", ENDED_VARIABLE: str(run.directory / ENDED_FILE)},
        timeout_s=SLOW_LIMIT_S if selection.slow else KERNEL_LIMIT_S,
    )


def play(selection: Selection, run: GuestRun) -> GuestRun:
    """Run a guest to its end, or find that there is none to be had."""
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
    """Wait for all guests, tell of each when it has ended, and remember which tests failed."""
    total = Tally()
    for ended in as_completed(playing):
        run = ended.result()
        total += run.tally()
        if account := run.account(len(playing)):
            print(account, flush=True)
    remember_failures([one.result() for one in playing])
    return total


def remember_failures(runs: Sequence[GuestRun]) -> None:
    """Note for the next --lf, as pytest's own cache does, which tests failed or were not run."""
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
    """Start the guests; what is yielded waits for them. Nothing is left of them afterwards.

    `beside`: other groups run meanwhile, and print. `record`: write down what each test took.
    Raises LabError.
    """
    tests = collected(selection)
    if not tests:
        yield Tally
        return
    # Two runs on one kernel would find each other's probes.
    if choose_native(GuestOptions(), tracing_refusal):
        guests = 1
    shares = share_out(tests, read_durations(DURATIONS), guests)
    with tempfile.TemporaryDirectory(prefix="tcpstuck-tests-") as scratch:
        runs = list(_runs(shares, Path(scratch), beside))
        with guests_beside(len(runs)) as pool:
            playing = [pool.submit(play, selection, run) for run in runs]

            def finish_and_record() -> Tally:
                total = finish(playing)
                if record:
                    reports = [run.report for run in runs if run.report is not None]
                    record_durations(DURATIONS, reports, collected(Selection(slow=True)))
                return total

            yield finish_and_record


def _runs(shares: Sequence[Share], scratch: Path, beside: bool) -> Iterator[GuestRun]:
    """A run for each share; says where its output can be read meanwhile."""
    BUILD.mkdir(exist_ok=True)
    for number, share in enumerate(shares, 1):
        directory = scratch / str(number)
        directory.mkdir()
        log = BUILD / f"guest-{number}.log" if beside or len(shares) > 1 else None
        place = f"; see {log.relative_to(REPOSITORY)}" if log else ""
        what = f"{len(share.tests)} tests, about {share.seconds / 60:.0f} minutes alone"
        print(f"guest {number} of {len(shares)}: {what}{place}", flush=True)
        yield GuestRun(number, share, directory, log)


def guest_count(text: str) -> int:
    """A number of guests on the command line. Raises ArgumentTypeError."""
    if not re.fullmatch(r"[1-9][0-9]?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of guests from 1 to 99")
    return int(text)
