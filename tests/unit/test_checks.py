"""The sums of `python3 -m lab test`, against reports that pytest really wrote."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lab import checks
from lab.errors import LabError
from lab.guest import GuestError


@pytest.mark.parametrize(
    ("body", "tally"),
    [
        ("def test_a(): pass\ndef test_b(): assert 0", checks.Tally(passed=1, failed=1)),
        ("def test_a(no_such_fixture): pass", checks.Tally(errors=1)),
        ("import pytest\ndef test_a(): pytest.skip('x')", checks.Tally(skipped=1)),
        ("import nothing_of_this_name", checks.Tally(errors=1)),
    ],
)
def test_figures_are_those_of_a_real_report(body: str, tally: checks.Tally, tmp_path: Path) -> None:
    (tmp_path / "test_inner.py").write_text(body)
    report = tmp_path / "report.xml"
    inner = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", "-p", "no:randomly"]
    subprocess.run([*inner, "-c", os.devnull, str(tmp_path)], capture_output=True)
    assert checks.tally_junit(report.read_text()) == tally


def test_closing_line_sums_and_leaves_out_what_is_none() -> None:
    total = checks.Tally(passed=120, skipped=2) + checks.Tally(passed=3)
    assert total.closing_line(344.6) == "=== 123 passed, 2 skipped in 345 s ==="
    assert "0 passed" in checks.Tally(failed=1).closing_line(0)


@pytest.mark.parametrize("broken", [checks.Tally(failed=1), checks.Tally(errors=1)])
def test_one_bad_group_makes_all_bad_and_the_others_still_run(
    broken: checks.Tally, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(checks.GROUPS, "lint", lambda _selection: broken)
    monkeypatch.setitem(checks.GROUPS, "types", lambda _selection: checks.Tally(passed=1))
    total = checks.run_groups(["lint", "types"], checks.Selection())
    assert not total.good
    assert total.passed == 1


def test_a_guest_that_cannot_be_had_is_an_error_not_a_skip(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_selection: checks.Selection) -> checks.Tally:
        raise GuestError("no", "because", "do")

    monkeypatch.setitem(checks.GROUPS, "kernel", refuse)
    assert checks.run_groups(["kernel"], checks.Selection()) == checks.Tally(errors=1)


def test_a_bad_status_without_a_bad_figure_is_an_error(tmp_path: Path) -> None:
    assert not checks.tally_report(tmp_path / "none.xml", 2).good


@pytest.mark.parametrize("letters", ["a-e", "n-s"])
def test_a_pattern_and_its_opposite_are_all_kernel_tests(letters: str) -> None:
    one, other = (checks.kernel_files(f"test_[{sign}{letters}]*") for sign in ("", "!"))
    assert one
    assert other
    assert sorted(one + other) == checks.kernel_files("*")
    found = {file.name for file in (checks.REPOSITORY / "tests" / "kernel").glob("test_*.py")}
    assert {Path(name).name for name in one + other} == found


def test_a_pattern_that_no_kernel_test_is_like_is_refused() -> None:
    with pytest.raises(LabError):
        checks.kernel_files("test_[0-9]*")


def test_ci_runs_every_kernel_test_once() -> None:
    """Two of three guests share them: what the one's pattern leaves out must be the other's."""
    script = (checks.REPOSITORY / ".ci" / "run").read_text()
    patterns = re.findall(r"--kernel-files '([^']+)'", script)
    assert len(patterns) == 2
    named = sorted(name for pattern in patterns for name in checks.kernel_files(pattern))
    assert named == checks.kernel_files("*")
