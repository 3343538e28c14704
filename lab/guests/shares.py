"""Distributes the kernel tests to guests, balanced by the durations of an earlier run.

Tests that share a long set-up, such as a run of the tool, stay together. `share_out` is pure: the
same tests and durations always give the same shares.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

COLLECTED_VARIABLE = "TCPSTUCK_COLLECTED_TESTS"
"""The path of the file where the kernel tests' conftest writes each test's id and set-up."""
ENDED_VARIABLE = "TCPSTUCK_ENDED_TESTS"
"""The path of the file where conftest appends the id of each test that has ended."""
UNKNOWN_S = 10.0
"""The assumed duration of a test if no durations are recorded."""

Durations = Mapping[str, float]
"""Seconds by test id: the test's call, set-up and tear-down."""


@dataclass
class Share:
    """The tests of one guest."""

    seconds: float = 0.0
    """The expected duration, from recorded durations."""
    tests: list[str] = field(default_factory=list)
    """Test ids, in the order of collection."""


def share_out(sharing: Mapping[str, str], durations: Durations, guests: int) -> list[Share]:
    """Distribute the tests to at most `guests` guests; no guest is without tests.

    The longest group goes first, each to the guest with the least work. `sharing` maps each test's
    id to a group name; tests of a group stay together. A test without a duration counts as the
    median of the recorded durations.
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
    """The seconds of each passed test, from pytest's JUnit XML report."""
    found: dict[str, float] = {}
    for case in ElementTree.fromstring(report).iter("testcase"):
        if all(case.find(kind) is None for kind in ("failure", "error", "skipped")):
            found[test_id(case)] = float(case.get("time", "0"))
    return found


def failed_in(report: str) -> tuple[set[str], set[str]]:
    """The ids of the failed or broken tests, and of all tests, in a JUnit XML report."""
    failed, every = set(), set()
    for case in ElementTree.fromstring(report).iter("testcase"):
        every.add(test_id(case))
        if case.find("failure") is not None or case.find("error") is not None:
            failed.add(test_id(case))
    return failed, every


def test_id(case: ElementTree.Element) -> str:
    """Pytest's id of a module-level test function, from its entry in a report."""
    return f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}"


def read_durations(file: Path) -> dict[str, float]:
    """The recorded durations; empty if there is no file."""
    if not file.is_file():
        return {}
    return {str(test): float(seconds) for test, seconds in json.loads(file.read_text()).items()}


def record_durations(file: Path, reports: Iterable[str], existing: Iterable[str]) -> None:
    """Record the durations from the reports; keep older ones of tests that still exist."""
    known = set(existing)
    kept = {test: took for test, took in read_durations(file).items() if test in known}
    for report in reports:
        kept.update(durations_in(report))
    rounded = {test: round(seconds, 1) for test, seconds in sorted(kept.items())}
    file.write_text(json.dumps(rounded, indent=0) + "\n")
