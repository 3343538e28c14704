"""Counts test results over groups and guests."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree


@dataclass(frozen=True)
class Tally:
    """Numbers of test results; `errors` includes errors outside a test."""

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
        """A closing line like pytest's, without zero counts except passed."""
        parts = [f"{self.failed} failed"] if self.failed else []
        parts.append(f"{self.passed} passed")
        parts += [f"{self.skipped} skipped"] if self.skipped else []
        parts += [f"{self.errors} errors"] if self.errors else []
        return f"=== {', '.join(parts)} in {seconds:.0f} s ==="


def tally_junit(report: str) -> Tally:
    """The counts in pytest's JUnit XML report."""
    total = Tally()
    for suite in ElementTree.fromstring(report).iter("testsuite"):
        tests, failed, errors, skipped = (
            int(suite.get(name, "0")) for name in ("tests", "failures", "errors", "skipped")
        )
        total += Tally(tests - failed - errors - skipped, failed, errors, skipped)
    return total


def tally_report(report: str | None, status: int) -> Tally:
    """A report's counts, plus an error if there is no report or only the exit status is bad."""
    counted = tally_junit(report) if report is not None else Tally()
    if report is None or (status != 0 and counted.good):
        return counted + Tally(errors=1)
    return counted


def read_report(file: Path) -> str | None:
    """A complete report; None if pytest died before it had written the whole report."""
    try:
        report = file.read_text()
        ElementTree.fromstring(report)
    except (OSError, ValueError, ElementTree.ParseError):
        return None
    return report
