"""The sums of `python3 -m lab test`, against reports that pytest really wrote."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lab import checks
from lab.guests import kernel_tests
from lab.guests.run import GuestError
from lab.guests.selection import Selection
from lab.guests.tally import Tally, tally_junit, tally_report


@pytest.mark.parametrize(
    ("body", "tally"),
    [
        ("def test_a(): pass\ndef test_b(): assert 0", Tally(passed=1, failed=1)),
        ("def test_a(no_such_fixture): pass", Tally(errors=1)),
        ("import pytest\ndef test_a(): pytest.skip('x')", Tally(skipped=1)),
        ("import nothing_of_this_name", Tally(errors=1)),
    ],
)
def test_figures_are_those_of_a_real_report(body: str, tally: Tally, tmp_path: Path) -> None:
    (tmp_path / "test_inner.py").write_text(body)
    report = tmp_path / "report.xml"
    inner = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", "-p", "no:randomly"]
    subprocess.run([*inner, "-c", os.devnull, str(tmp_path)], capture_output=True)
    assert tally_junit(report.read_text()) == tally


def test_closing_line_sums_and_leaves_out_what_is_none() -> None:
    total = Tally(passed=120, skipped=2) + Tally(passed=3)
    assert total.closing_line(344.6) == "=== 123 passed, 2 skipped in 345 s ==="
    assert "0 passed" in Tally(failed=1).closing_line(0)


DEFAULT = checks.Settings(Selection())


@pytest.mark.parametrize("broken", [Tally(failed=1), Tally(errors=1)])
def test_one_bad_group_makes_all_bad_and_the_others_still_run(
    broken: Tally, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(checks.GROUPS, "lint", lambda _settings: broken)
    monkeypatch.setitem(checks.GROUPS, "types", lambda _settings: Tally(passed=1))
    total = checks.run_groups(["lint", "types"], DEFAULT)
    assert not total.good
    assert total.passed == 1


def test_a_guest_that_cannot_be_had_is_an_error_not_a_skip(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: object, **_options: object) -> None:
        raise GuestError("no", "because", "do")

    monkeypatch.setattr(kernel_tests, "started", refuse)
    monkeypatch.setitem(checks.GROUPS, "types", lambda _settings: Tally(passed=1))
    assert checks.run_groups(["kernel", "types"], DEFAULT) == Tally(passed=1, errors=1)


def test_the_guests_run_beside_the_other_groups_and_are_ended_whatever_happens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    happened: list[str] = []

    @contextlib.contextmanager
    def started(
        selection: Selection, guests: int, *, beside: bool, record: bool
    ) -> Iterator[Callable[[], Tally]]:
        happened.append(f"{guests} guests started, {selection.matching}, {beside}, {record}")
        try:
            yield lambda: noted("awaited", Tally(passed=3))
        finally:
            happened.append("ended")

    def noted(what: str, tally: Tally) -> Tally:
        happened.append(what)
        return tally

    def interrupted(_settings: checks.Settings) -> Tally:
        raise KeyboardInterrupt

    monkeypatch.setattr(kernel_tests, "started", started)
    monkeypatch.setitem(checks.GROUPS, "lint", lambda _settings: noted("lint", Tally()))
    monkeypatch.setitem(checks.GROUPS, "types", interrupted)
    settings = checks.Settings(Selection(matching="x"), guests=2)
    assert checks.run_groups(["lint", "kernel"], settings) == Tally(passed=3)
    start = "2 guests started, x, True, False"
    assert happened == [start, "lint", "awaited", "ended"]
    happened.clear()
    with pytest.raises(KeyboardInterrupt):
        checks.run_groups(["types", "kernel"], settings)
    assert happened == [start, "ended"]


def test_a_bad_status_without_a_bad_figure_is_an_error() -> None:
    assert not tally_report("<testsuites/>", 2).good
    assert not tally_report(None, 0).good


@pytest.fixture
def only_tests(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The file with the only tests that need no kernel."""
    monkeypatch.setattr(checks, "UNIT_DIRECTORIES", (str(tmp_path),))
    return tmp_path / "test_inner.py"


def test_an_expression_that_no_test_is_like_is_an_error(only_tests: Path) -> None:
    only_tests.write_text("def test_a(): pass")
    nothing = checks.Settings(Selection(matching="nothing_is_named_like_this"))
    assert not checks.run_groups(["unit", "kernel"], nothing).good
    one = checks.Settings(Selection(matching="test_a"))
    assert checks.run_groups(["unit"], one) == Tally(passed=1)


def test_what_failed_last_is_run_alone(only_tests: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "BUILD", only_tests.parent / "build")
    only_tests.write_text("def test_a(): assert 0\ndef test_b(): pass")
    assert checks.run_groups(["unit"], DEFAULT) == Tally(passed=1, failed=1)
    last = checks.Settings(Selection(last_failed=True))
    assert checks.run_groups(["unit"], last) == Tally(failed=1)


@pytest.mark.parametrize(
    ("words", "measured"),
    [([], ["one"]), (["--lf"], ["one", "two"])],
)
def test_what_tries_many_inputs_is_not_measured(
    words: list[str],
    measured: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A test knows by its tracer whether it is measured."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        noted = f"open({str(tmp_path / 'measured')!r}, 'a').write('{name} ')"
        text = f"import sys\ndef test_{name}():\n    if sys.gettrace(): {noted}\n"
        text += "    import tcpstuck_bpf.model\n"
        (tmp_path / name / f"test_{name}.py").write_text(text)
    monkeypatch.setattr(checks, "BUILD", tmp_path / "build")
    monkeypatch.setattr(checks, "COVERAGE", kernel_tests.BUILD / f"coverage-of-{tmp_path.name}")
    monkeypatch.setattr(checks, "PROPERTIES", str(tmp_path / "two"))
    monkeypatch.setattr(checks, "UNIT_DIRECTORIES", (str(tmp_path / "one"), checks.PROPERTIES))
    try:
        assert run("unit", "--coverage", *words) == 0
    finally:
        shutil.rmtree(checks.COVERAGE)
    assert sorted((tmp_path / "measured").read_text().split()) == measured
    assert "=== 2 passed in" in capfd.readouterr().out


def test_coverage_is_told_of_the_tool_and_nothing_else(
    only_tests: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = kernel_tests.BUILD / f"coverage-of-{only_tests.parent.name}"
    monkeypatch.setattr(checks, "COVERAGE", directory)
    only_tests.write_text("def test_a():\n    from tcpstuck_bpf import model, wire")
    try:
        assert run("unit", "--coverage") == 0
        said, table = capfd.readouterr().out, (directory / "table.txt").read_text()
    finally:
        shutil.rmtree(directory)
    files = re.findall(r"^(\S+)\.py\b", table, re.MULTILINE)
    assert files
    assert {Path(file).parts[0] for file in files} == {"tcpstuck_bpf"}
    (total,) = re.findall(r"^TOTAL .* (\d+)%$", table, re.MULTILINE)
    assert 0 < int(total) < 50
    assert f"execute {total} % of" in said
    assert "=== 1 passed in" in said


def run(*words: str) -> int:
    """The exit status of `lab test` with these words."""
    parser = argparse.ArgumentParser()
    checks.add_parser(parser.add_subparsers())
    arguments = parser.parse_args(["test", *words])
    return int(arguments.run(arguments))


@pytest.mark.parametrize(
    "words",
    [
        ["--guests", "0"],
        ["--guests", "2", "--record-durations"],
        ["nonesuch"],
        ["--coverage", "lint"],
    ],
)
def test_a_senseless_choice_is_wrong_use(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(*words)
    assert ended.value.code == 2
    assert words[0] in capsys.readouterr().err
