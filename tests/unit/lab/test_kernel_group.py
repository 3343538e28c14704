"""The kernel tests shared out over guests: by stand-ins that boot nothing, and by pytest itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import groupby
from pathlib import Path

import pytest

from lab.guests import kernel_tests
from lab.guests.kernel_tests import ENDED_FILE, REPORT_FILE, GuestRun, collected
from lab.guests.run import HARNESS_STATUS, GuestError, GuestOptions, guests_beside
from lab.guests.selection import Selection
from lab.guests.shares import COLLECTED_VARIABLE, Share
from lab.guests.tally import Tally

SHARED = "tracer by "
TWO_OF_THREE = "tests/kernel/test_x.py::test_a\ntests/kernel/test_x.py::test_c\n"


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(kernel_tests, "CACHE", tmp_path / "cache")
    last_failed = tmp_path / "cache" / "v" / "cache" / "lastfailed"
    monkeypatch.setattr(kernel_tests, "LAST_FAILED", last_failed)
    return last_failed


def guest(number: int, directory: Path, *tests: str) -> GuestRun:
    own = directory / str(number)
    own.mkdir()
    return GuestRun(number, Share(1.0, list(tests)), own, directory / f"{number}.log")


def reporting(run: GuestRun, body: str) -> list[str]:
    """A stand-in: pytest over that text, with the report where the lab looks for it."""
    (run.directory / "test_inner.py").write_text(body)
    options = ["-q", f"--junitxml={run.directory / REPORT_FILE}", "-c", os.devnull]
    return [sys.executable, "-m", "pytest", *options, str(run.directory)]


def dying(run: GuestRun, ended: str, report: str | None = None) -> list[str]:
    """A stand-in that ends with the status of a guest that died."""
    code = f"import sys; print('the console'); open({ENDED_FILE!r}, 'w').write({ended!r})"
    if report is not None:
        code += f"; open({REPORT_FILE!r}, 'w').write({report!r})"
    return ["env", "-C", str(run.directory), sys.executable, "-c", f"{code}; sys.exit(125)"]


def played(monkeypatch: pytest.MonkeyPatch, *runs: tuple[GuestRun, list[str]]) -> Tally:
    words = {run.number: words for run, words in runs}
    natively = GuestOptions(native="always", timeout_s=60)
    monkeypatch.setattr(kernel_tests, "guest_command", lambda _, run: words[run.number])
    monkeypatch.setattr(kernel_tests, "options_for", lambda *_: natively)
    with guests_beside(len(runs)) as pool:
        playing = [pool.submit(kernel_tests.play, Selection(), run) for run, _ in runs]
        return kernel_tests.finish(playing)


def test_the_guests_make_one_tally_and_a_bad_ones_output_is_shown_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = guest(1, tmp_path, "a"), guest(2, tmp_path, "b")
    tally = played(
        monkeypatch,
        (good, reporting(good, "def test_a(): pass\ndef test_b(): pass")),
        (bad, reporting(bad, "def test_c(): assert 0\ndef test_d(): pass")),
    )
    assert tally == Tally(passed=3, failed=1)
    said = capsys.readouterr().out
    assert bad.log is not None
    assert bad.log.read_text().rstrip("\n") in said
    assert "=== 2 passed in" in said
    assert said.count("test_inner.py") == bad.log.read_text().count("test_inner.py")


def test_a_guest_that_cannot_be_had_is_an_error_that_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_command: object, **_options: object) -> None:
        raise GuestError("no guest", "no kernel", "fetch one")

    monkeypatch.setattr("lab.guests.run.run_in_guest", refuse)
    assert played(monkeypatch, (guest(1, tmp_path, "a"), [])) == Tally(errors=1)
    said = capsys.readouterr().out
    assert "no kernel" in said
    assert f"status {HARNESS_STATUS}" in said


@pytest.mark.parametrize("report", [None, "", "<testsuites><testsuite tests='3'>"])
def test_a_guest_that_died_names_what_it_had_not_run(
    tmp_path: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    report: str | None,
) -> None:
    """A report that it was still writing is none."""
    tests = [f"tests/kernel/test_x.py::test_{letter}" for letter in "abc"]
    run = guest(1, tmp_path, *tests)
    assert played(monkeypatch, (run, dying(run, TWO_OF_THREE, report))) == Tally(errors=1)
    said = capsys.readouterr().out
    assert "the console" in said
    assert "status 125" in said
    assert [test for test in tests if test in said] == ["tests/kernel/test_x.py::test_b"]
    assert "test_b" in cache.read_text()


def test_pytest_itself_finds_what_failed_last() -> None:
    """What was not run counts as failed; what has passed since does not."""
    first, second, third, *_ = collected(Selection())
    run = GuestRun(1, Share(1.0, [first, second]), Path("/nowhere"), None)
    kernel_tests.remember_failures([run])
    last = Selection(last_failed=True)
    assert list(collected(last)) == [first, second]
    module, _, name = first.partition("::")
    classname = module[: -len(".py")].replace("/", ".")
    case = f"<testcase classname='{classname}' name='{name}' time='1'/>"
    kernel_tests.remember_failures([_reported(f"<testsuites>{case}</testsuites>")])
    assert list(collected(last)) == [second]
    assert third not in collected(last)


class _reported(GuestRun):  # noqa: N801
    """A guest whose report is that text."""

    def __init__(self, text: str) -> None:
        super().__init__(1, Share(), Path("/nowhere"), None)
        self._text = text

    @property
    def report(self) -> str:
        return self._text


def test_each_test_that_pytest_has_is_collected_with_what_it_shares() -> None:
    words = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    listed = subprocess.run(
        [*words, "tests/kernel"], cwd=kernel_tests.REPOSITORY, capture_output=True, text=True
    ).stdout.splitlines()
    tests = collected(Selection(slow=True))
    assert set(tests) == {line for line in listed if "::" in line}
    for mode in ("fentry", "kprobe"):
        sharing = [test for test, name in tests.items() if name == f"{SHARED}{mode}"]
        assert all(mode in test for test in sharing)
        assert len({test.partition("::")[0] for test in sharing}) > 1
    told = {name for test, name in tests.items() if "test_told.py" in test}
    assert told == {"tests/kernel/test_told.py"}


def test_the_core_is_the_same_in_both_modes_and_quick_in_one() -> None:
    core = collected(Selection(core=True))
    by_fentry = collected(Selection(core=True, mode="fentry"))
    assert {test.replace("fentry", "kprobe") for test in by_fentry} == core.keys() - by_fentry
    assert by_fentry
    assert set(core) < set(collected(Selection()))
    matching = collected(Selection(core=True, mode="fentry", matching="mss or overflow"))
    assert matching.keys() < by_fentry.keys()
    assert matching


@pytest.mark.parametrize("seed", range(3))
def test_tests_of_one_tracer_follow_one_another_however_they_are_shuffled(
    seed: int, tmp_path: Path
) -> None:
    written = tmp_path / "tests.json"
    words = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    subprocess.run(
        [*words, f"--randomly-seed={seed}", "tests/kernel"],
        cwd=kernel_tests.REPOSITORY,
        env={**os.environ, COLLECTED_VARIABLE: str(written)},
        capture_output=True,
        check=True,
    )
    tests = json.loads(written.read_text())
    names = list(tests.values())
    modes = [mode for mode, _ in groupby(name for name in names if name.startswith(SHARED))]
    assert modes == [f"{SHARED}fentry", f"{SHARED}kprobe"]
    assert names[-1].startswith(SHARED)
    for mode in modes:
        assert "-spoofed-" in [test for test in tests if tests[test] == mode][-1]


def test_the_tests_are_shared_out_and_what_their_guests_bring_back_is_counted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    natively = GuestOptions(native="always", timeout_s=60)
    monkeypatch.setattr(kernel_tests, "REPOSITORY", tmp_path)
    monkeypatch.setattr(kernel_tests, "BUILD", tmp_path / "build")
    monkeypatch.setattr(kernel_tests, "collected", lambda _: {"a": "a", "b": "b", "c": "a"})
    monkeypatch.setattr(kernel_tests, "choose_native", lambda *_: False)
    monkeypatch.setattr(kernel_tests, "options_for", lambda *_: natively)
    monkeypatch.setattr(
        kernel_tests,
        "guest_command",
        lambda _, run: reporting(
            run, "".join(f"def test_{one}(): pass\n" for one in run.share.tests)
        ),
    )
    with kernel_tests.started(Selection(), 2, beside=False, record=False) as finish:
        assert finish() == Tally(passed=3)
    said = capsys.readouterr().out
    assert "guest 1 of 2: === 2 passed in" in said
    assert "guest 2 of 2: === 1 passed in" in said


def test_without_a_test_there_is_no_guest() -> None:
    nothing = Selection(matching="nothing_is_named_like_this")
    with kernel_tests.started(nothing, 2, beside=False, record=False) as finish:
        assert finish() == Tally()
