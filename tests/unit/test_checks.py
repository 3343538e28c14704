"""The sums of `python3 -m lab test`, against reports that pytest really wrote."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lab import checks
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
    monkeypatch.setitem(checks.GROUPS, "lint", lambda _slow: broken)
    monkeypatch.setitem(checks.GROUPS, "types", lambda _slow: checks.Tally(passed=1))
    total = checks.run_groups(["lint", "types"], slow=False)
    assert not total.good
    assert total.passed == 1


def test_a_guest_that_cannot_be_had_is_an_error_not_a_skip(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_slow: bool) -> checks.Tally:
        raise GuestError("no", "because", "do")

    monkeypatch.setitem(checks.GROUPS, "kernel", refuse)
    assert checks.run_groups(["kernel"], slow=False) == checks.Tally(errors=1)


def test_a_bad_status_without_a_bad_figure_is_an_error(tmp_path: Path) -> None:
    assert not checks.tally_report(tmp_path / "none.xml", 2).good
