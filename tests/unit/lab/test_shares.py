"""Which guest gets which tests, and what a real report of pytest says they took."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.guests import shares
from lab.guests.shares import share_out

NAMES = st.sampled_from("abcdefgh")
TESTS = st.dictionaries(st.text("tuvw", min_size=1), NAMES, max_size=30)
SECONDS = st.integers(0, 1000).map(float)

INNER = """
import pytest

@pytest.mark.parametrize("options", ["", "-p 1,2 --listener ::1", "a[b]"])
def test_good(options):
    pass

def test_bad():
    assert 0

@pytest.fixture
def broken():
    yield
    raise ValueError

def test_broken(broken):
    pass

def test_skipped():
    pytest.skip("x")
"""


@given(TESTS, st.dictionaries(st.text("tuvwx", min_size=1), SECONDS), st.integers(1, 5))
def test_every_test_is_in_one_share_with_all_that_it_shares_something_with(
    sharing: dict[str, str], durations: dict[str, float], guests: int
) -> None:
    made = share_out(sharing, durations, guests)
    assert sorted(test for share in made for test in share.tests) == sorted(sharing)
    assert len(made) == min(guests, len(set(sharing.values())))
    names = [{sharing[test] for test in share.tests} for share in made]
    assert sum(map(len, names)) == len(set(sharing.values()))


@given(TESTS, st.randoms(), st.integers(1, 5))
def test_chance_and_order_decide_nothing(
    sharing: dict[str, str], chance: random.Random, guests: int
) -> None:
    durations = dict.fromkeys(sharing, 1.0)
    shuffled = list(sharing.items())
    chance.shuffle(shuffled)
    made, again = (share_out(tests, durations, guests) for tests in (sharing, dict(shuffled)))
    assert [set(share.tests) for share in made] == [set(share.tests) for share in again]


@given(st.lists(SECONDS, min_size=1, max_size=20), st.integers(1, 5))
def test_no_share_is_longer_than_another_by_more_than_its_shortest_part(
    seconds: list[float], guests: int
) -> None:
    durations = {f"test {number}": took for number, took in enumerate(seconds)}
    made = share_out({test: test for test in durations}, durations, guests)
    for share in made:
        assert share.seconds == sum(durations[test] for test in share.tests)
        shortest = min(durations[test] for test in share.tests)
        assert share.seconds - shortest <= min(other.seconds for other in made)


def test_a_test_that_is_not_known_counts_as_the_median() -> None:
    durations = {"one": 1.0, "two": 1.0, "long": 100.0}
    sharing = {test: test for test in ("new", *durations)}
    made = share_out(sharing, durations, 2)
    assert [(share.seconds, share.tests) for share in made] == [
        (100.0, ["long"]),
        (3.0, ["new", "one", "two"]),
    ]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Pytest's own, of tests that lie where the kernel's do."""
    top = tmp_path_factory.mktemp("top")
    directory = top / "tests" / "kernel"
    directory.mkdir(parents=True)
    (directory / "test_inner.py").write_text(INNER)
    (directory / "__init__.py").touch()
    (directory.parent / "__init__.py").touch()
    file = top / "report.xml"
    words = [sys.executable, "-m", "pytest", "-q", f"--junitxml={file}", "-c", os.devnull]
    subprocess.run([*words, "--rootdir", top, "tests/kernel"], cwd=top, capture_output=True)
    return file.read_text()


def named(*tests: str) -> set[str]:
    return {f"tests/kernel/test_inner.py::{test}" for test in tests}


GOOD = named("test_good[]", "test_good[-p 1,2 --listener ::1]", "test_good[a[b]]")


def test_what_passed_is_what_tells_how_long_it_takes(report: str) -> None:
    assert shares.durations_in(report).keys() == GOOD


def test_what_failed_or_broke_is_known_by_pytests_own_ids(report: str) -> None:
    failed, every = shares.failed_in(report)
    assert failed == named("test_bad", "test_broken")
    assert every == failed | GOOD | named("test_skipped")


def test_durations_of_tests_that_were_not_run_stay_while_these_exist(
    report: str, tmp_path: Path
) -> None:
    file = tmp_path / "durations.json"
    (again,) = named("test_good[]")
    file.write_text(json.dumps({"gone": 1.5, "other": 2.5, again: 1e6}))
    shares.record_durations(file, [report], [*GOOD, "other"])
    recorded = shares.read_durations(file)
    assert recorded.keys() == {*GOOD, "other"}
    assert recorded["other"] == 2.5
    assert recorded[again] < 1e6


def test_without_a_file_nothing_is_known(tmp_path: Path) -> None:
    assert shares.read_durations(tmp_path / "none.json") == {}
