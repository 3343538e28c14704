"""Which guest plays which kernel tests: balanced by the durations of an earlier run.

What is handed out is not a test but all tests that share what takes long to set up, such as a run
of the tool. Pure: the same tests and durations always make the same shares.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

COLLECTED_VARIABLE = "TCPSTUCK_COLLECTED_TESTS"
"""Names the file that the kernel tests' conftest writes with each test's id and what it shares."""
ENDED_VARIABLE = "TCPSTUCK_ENDED_TESTS"
"""Names the file to which it adds the id of each test that has ended."""
UNKNOWN_S = 10.0
"""For a test where no duration is known at all."""

Durations = Mapping[str, float]
"""Seconds by a test's id: its call, and what it set up and took down."""


@dataclass
class Share:
    """What one guest has to do."""

    seconds: float = 0.0
    """As long as it takes by the known durations."""
    tests: list[str] = field(default_factory=list)
    """Ids, in the order in which they were collected."""


def share_out(sharing: Mapping[str, str], durations: Durations, guests: int) -> list[Share]:
    """The tests for each of so many guests, none without tests: the longest first, to the idlest.

    `sharing` has a name for each test's id: tests of the same name stay together. A test without a
    duration counts as the median of those that have one.
    """
    typical = statistics.median(durations.values()) if durations else UNKNOWN_S
    units: dict[str, Share] = {}
    for test, name in sharing.items():
        unit = units.setdefault(name, Share())
        unit.tests.append(test)
        unit.seconds += durations.get(test, typical)
    shares = [Share() for _ in range(guests)]
    for _, unit in sorted(units.items(), key=lambda item: (-item[1].seconds, item[0])):
        idlest = min(shares, key=lambda share: (share.seconds, len(share.tests)))
        idlest.tests += unit.tests
        idlest.seconds += unit.seconds
    place = {test: number for number, test in enumerate(sharing)}
    return [
        Share(share.seconds, sorted(share.tests, key=place.__getitem__))
        for share in shares
        if share.tests
    ]


def durations_in(report: str) -> dict[str, float]:
    """The seconds of each test that passed, from a JUnit XML report as pytest writes it."""
    found: dict[str, float] = {}
    for case in ElementTree.fromstring(report).iter("testcase"):
        if all(case.find(kind) is None for kind in ("failure", "error", "skipped")):
            found[test_id(case)] = float(case.get("time", "0"))
    return found


def failed_in(report: str) -> tuple[set[str], set[str]]:
    """The ids of the tests in a JUnit XML report: of those that failed or broke, and of all."""
    failed, every = set(), set()
    for case in ElementTree.fromstring(report).iter("testcase"):
        every.add(test_id(case))
        if case.find("failure") is not None or case.find("error") is not None:
            failed.add(test_id(case))
    return failed, every


def test_id(case: ElementTree.Element) -> str:
    """Pytest's id of a test, which is a function of a module, by its entry in a report."""
    return f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}"


def read_durations(file: Path) -> dict[str, float]:
    """The recorded durations; none where there is no file."""
    if not file.is_file():
        return {}
    return {str(test): float(seconds) for test, seconds in json.loads(file.read_text()).items()}


def record_durations(file: Path, reports: Iterable[str], existing: Iterable[str]) -> None:
    """Write down what the reports' tests took; of others keep those that still exist."""
    known = set(existing)
    kept = {test: took for test, took in read_durations(file).items() if test in known}
    for report in reports:
        kept.update(durations_in(report))
    rounded = {test: round(seconds, 1) for test, seconds in sorted(kept.items())}
    file.write_text(json.dumps(rounded, indent=0) + "\n")
