"""The matrix' sums, against reports that pytest really wrote, and its verdict."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from lab.guests import matrix, matrix_report
from lab.guests.run import TIMEOUT_STATUS, GuestDiedError, GuestOptions
from lab.guests.selection import Selection
from lab.guests.trees import BootFiles, Row

FIRST = Row("potato")
NEWEST = Row("woody", counts=False)
BOOT_FILES = BootFiles(Path("/boot/vmlinuz-2.4"), Path("/"), fresh=False)
BODY = """
import sys
import pytest

@pytest.fixture
def breaks_at_the_end():
    yield
    raise RuntimeError("unclean")

@pytest.mark.parametrize("scenario", ["overflow", "ack-dropped"])
@pytest.mark.parametrize("mode", ["fentry", "kprobe"])
def test_scenario(mode, scenario):
    assert (mode, scenario) != ("kprobe", "ack-dropped"), "told nothing"

@pytest.mark.parametrize("mode", ["fentry", "kprobe"])
def test_skip(mode):
    if mode == "fentry":
        pytest.skip("no trampolines")

@pytest.mark.parametrize("mode", ["kprobe"])
def test_twice(breaks_at_the_end, mode):
    assert 0

@pytest.mark.parametrize("mode", ["kprobe"])
def test_unclean(breaks_at_the_end, mode):
    pass

def test_mariadb():
    pass

def test_broken(no_such_fixture):
    pass

@pytest.fixture
def tool():
    print("tool: refused\\n  why: locked\\n  remedy: none", file=sys.stderr)
    assert 0, "ended"

def test_with_the_tool(tool):
    pass
"""


def real_report(directory: Path, body: str) -> str:
    (directory / "test_inner.py").write_text(body)
    report = directory / "report.xml"
    words = shlex.split(matrix.pytest_command(directory, Selection(), 60)[2].splitlines()[-1])
    options = words[words.index("pytest") + 1 : -1]
    inner = [sys.executable, "-m", "pytest", *options, "-c", os.devnull, str(directory)]
    subprocess.run(inner, capture_output=True, check=False)
    return report.read_text()


def good_cells() -> dict[str, matrix_report.Cell]:
    return {mode: matrix_report.Cell(passed=1) for mode in matrix_report.MODES}


class TestCells:
    def test_every_test_is_counted_once_under_its_mode(self, tmp_path: Path) -> None:
        cells = matrix.cells_of(real_report(tmp_path, BODY))
        counted = {
            mode: (
                cell.passed,
                sorted(failure.test.split("::")[1] for failure in cell.failures),
                sum(cell.skipped.values()),
            )
            for mode, cell in cells.items()
        }
        assert counted == {
            "fentry": (2, [], 1),
            "kprobe": (
                2,
                ["test_scenario[kprobe-ack-dropped]", "test_twice[kprobe]", "test_unclean[kprobe]"],
                0,
            ),
            "any": (1, ["test_broken", "test_with_the_tool"], 0),
        }
        assert cells["fentry"].skipped == Counter({"no trampolines": 1})

    def test_a_failure_is_told_in_one_line_that_says_why(self, tmp_path: Path) -> None:
        cells = matrix.cells_of(real_report(tmp_path, BODY))
        told = {one.test.split("::")[1]: one.message for one in cells["kprobe"].failures}
        assert "told nothing" in told["test_scenario[kprobe-ack-dropped]"]
        assert "unclean" in told["test_unclean[kprobe]"]
        assert all("\n" not in message for message in told.values())
        (tool,) = (one for one in cells["any"].failures if one.test.endswith("the_tool"))
        assert "tool: refused; why: locked; remedy: none" in tool.message

    def test_failures_of_one_cause_are_one_complaint(self) -> None:
        failures = [matrix_report.Failure(test, "lost") for test in ("a", "b", "c")]
        failures.append(matrix_report.Failure("d", "late"))
        result = matrix_report.RowResult(
            FIRST, {**good_cells(), "kprobe": matrix_report.Cell(0, failures)}
        )
        told = [line.split(": ", 1)[1] for line in matrix_report.complaints([result])]
        assert told == ["a and 2 more: lost", "d: late"]

    @pytest.mark.parametrize(
        ("test", "mode"),
        [
            ("test_x[fentry]", "fentry"),
            ("test_x[overflow-kprobe-4]", "kprobe"),
            ("test_fentry_alone", "any"),
            ("test_x[kprobes-overflow]", "any"),
        ],
    )
    def test_the_mode_is_a_parameter_not_a_word_of_the_name(self, test: str, mode: str) -> None:
        assert matrix.mode_of(test) == mode


class TestVerdict:
    @pytest.mark.parametrize(
        ("mode", "cell"),
        [
            ("fentry", matrix_report.Cell(passed=5, failures=[matrix_report.Failure("t", "m")])),
            ("any", matrix_report.Cell(passed=5, failures=[matrix_report.Failure("t", "m")])),
            ("kprobe", matrix_report.Cell()),
            ("kprobe", matrix_report.Cell(skipped=Counter({"no kprobes": 9}))),
        ],
    )
    def test_a_mode_with_a_failure_or_without_a_pass_is_bad(
        self, mode: str, cell: matrix_report.Cell
    ) -> None:
        result = matrix_report.RowResult(FIRST, {**good_cells(), mode: cell})
        assert not result.good
        assert matrix_report.verdict([result], all_count=False) == 1
        assert matrix_report.complaints([result])

    def test_a_mode_that_only_some_tests_name_may_be_empty(self) -> None:
        result = matrix_report.RowResult(FIRST, {**good_cells(), "any": matrix_report.Cell()})
        assert matrix_report.verdict([result], all_count=False) == 0
        assert matrix_report.complaints([result]) == []

    @pytest.mark.parametrize(
        ("cells", "good"),
        [
            ({"any": matrix_report.Cell(passed=2)}, True),
            ({"any": matrix_report.Cell(passed=2), "kprobe": matrix_report.Cell(passed=1)}, True),
            (
                {
                    "any": matrix_report.Cell(passed=2),
                    "kprobe": matrix_report.Cell(skipped=Counter("x")),
                },
                False,
            ),
            (
                {"any": matrix_report.Cell(passed=2, failures=[matrix_report.Failure("t", "m")])},
                False,
            ),
            ({"any": matrix_report.Cell(skipped=Counter({"no image": 2}))}, False),
            ({}, False),
        ],
    )
    def test_tests_selected_by_name_need_not_be_of_any_mode(
        self, cells: dict[str, matrix_report.Cell], good: bool
    ) -> None:
        all_cells = {**{mode: matrix_report.Cell() for mode in matrix_report.MODES}, **cells}
        result = matrix_report.RowResult(FIRST, all_cells, demanded=())
        assert result.good == good
        assert bool(matrix_report.complaints([result])) != good

    def test_trouble_outside_the_tests_is_bad_however_many_passed(self) -> None:
        result = matrix_report.RowResult(FIRST, good_cells(), trouble="cut off")
        assert matrix_report.verdict([result], all_count=False) == 1
        assert "cut off" in matrix_report.complaints([result])[0]

    def test_the_newest_count_only_when_asked(self) -> None:
        bad = {mode: matrix_report.Cell() for mode in matrix_report.MODES}
        results = [
            matrix_report.RowResult(FIRST, good_cells()),
            matrix_report.RowResult(NEWEST, bad),
        ]
        assert matrix_report.verdict(results, all_count=False) == 0
        assert matrix_report.verdict(results, all_count=True) == 1
        assert matrix_report.complaints(results)


class TestReport:
    RESULTS = (
        matrix_report.RowResult(FIRST, good_cells(), "2.2.10", "0.18.0+ds-2"),
        matrix_report.RowResult(
            NEWEST,
            {
                "fentry": matrix_report.Cell(skipped=Counter({"no trampolines": 2, "slow": 1})),
                "kprobe": matrix_report.Cell(
                    passed=3, failures=[matrix_report.Failure("t[kprobe]", "lost")]
                ),
                "any": matrix_report.Cell(passed=1),
            },
            "2.4",
            "0.37.0+ds-8",
        ),
    )

    def test_the_table_has_a_line_for_each_row_and_mode(self) -> None:
        lines = [line.split() for line in matrix_report.table(self.RESULTS).splitlines()[2:]]
        assert [line[:4] for line in lines] == [
            ["potato", "2.2.10", "0.18.0", "fentry"],
            ["potato", "2.2.10", "0.18.0", "kprobe"],
            ["woody", "2.4", "0.37.0", "fentry"],
            ["woody", "2.4", "0.37.0", "kprobe"],
            ["woody", "2.4", "0.37.0", "any"],
        ]
        assert " ".join(lines[2]).endswith("0 0 2 (no trampolines); 1 (slow) reported only")

    def test_the_notes_have_a_column_where_there_are_any(self) -> None:
        assert matrix_report.table(self.RESULTS).splitlines()[0].split()[-1] == "note"
        assert matrix_report.table(self.RESULTS[:1]).splitlines()[0].split()[-1] == "skipped"

    def test_the_file_says_the_same_and_why(self) -> None:
        written = json.loads(json.dumps(matrix_report.as_json(self.RESULTS)))
        table = matrix_report.table(self.RESULTS).splitlines()[2:]
        assert len(written) == len(table)
        for entry, line in zip(written, table):
            words = line.split()
            assert [entry["row"], entry["kernel"], entry["mode"]] == [words[0], words[1], words[3]]
            assert [str(entry[key]) for key in ("passed", "failed")] == words[4:6]
        assert written[2]["skipped"] == sum(written[2]["skip_reasons"].values()) == 3
        assert written[3]["failures"] == [{"test": "t[kprobe]", "message": "lost"}]

    def test_every_failure_is_told_with_its_kernel_and_an_empty_mode_too(self) -> None:
        told = matrix_report.complaints(self.RESULTS)
        assert len(told) == 2
        assert all("woody (2.4, BCC 0.37.0)" in line for line in told)
        assert "no test passed in mode fentry" in told[0]
        assert told[1].endswith("t[kprobe]: lost")


class TestGuest:
    def test_the_command_is_valid_shell_and_hands_the_selection_over(self, tmp_path: Path) -> None:
        share = tmp_path / "with space"
        shell, options, script = matrix.pytest_command(share, Selection(matching="a or b-c"), 60)
        subprocess.run([shell, "-n", options, script], check=True)
        assert "-k 'a or b-c'" in script
        assert "-k" not in matrix.pytest_command(share, Selection(), 60)[2].split()

    def test_what_was_done_before_the_limit_is_reported(self, tmp_path: Path) -> None:
        (tmp_path / "test_inner.py").write_text(
            "import os, signal\n"
            "def test_done():\n    pass\n"
            # As if its time were up.
            "def test_endless():\n    os.kill(os.getppid(), signal.SIGALRM)\n    signal.pause()\n"
        )
        script = matrix.pytest_command(tmp_path, Selection(), 600)[2].splitlines()[-1]
        _, *words, _ = shlex.split(script)
        python = words.index("/usr/bin/python3")
        ours = ("-p", "no:randomly", "-c", os.devnull, str(tmp_path))
        ended = subprocess.run(
            [*words[:python], sys.executable, *words[python + 1 :], *ours],
            capture_output=True,
            check=False,
            timeout=60,
        )
        assert ended.returncode == TIMEOUT_STATUS
        cells = matrix.cells_of((tmp_path / matrix.REPORT_FILE).read_text())
        assert cells[matrix_report.ANY_MODE].passed == 1

    def test_a_row_that_was_cut_off_keeps_what_it_has(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        report = real_report(tmp_path, "def test_done():\n    pass\n")

        def cut_off(*_command: object, options: GuestOptions, **_rest: object) -> object:
            (options.shares[0] / matrix.REPORT_FILE).write_text(report)
            return SimpleNamespace(status=TIMEOUT_STATUS, timed_out=False, total_s=7.0)

        monkeypatch.setattr(matrix, "run_in_guest", cut_off)
        result = matrix.run_row(FIRST, BOOT_FILES, Selection(), len)
        assert (result.trouble, result.good) == ("cut off after 7 s", False)
        assert result.cells[matrix_report.ANY_MODE].passed == 1

    @pytest.mark.parametrize("report", ["", "<testsuites><testsuite", "\udcff"])
    def test_a_report_that_was_not_written_to_its_end_is_a_result(
        self, monkeypatch: pytest.MonkeyPatch, report: str
    ) -> None:
        def die_while_writing(*_command: object, options: GuestOptions, **_rest: object) -> object:
            written = options.shares[0] / matrix.REPORT_FILE
            written.write_text(report, errors="surrogateescape")
            return SimpleNamespace(status=137, timed_out=False, total_s=1.0)

        monkeypatch.setattr(matrix, "run_in_guest", die_while_writing)
        result = matrix.run_row(FIRST, BOOT_FILES, Selection(), len)
        assert "the report is damaged" in str(result.trouble)
        assert not result.good

    def test_a_guest_that_dies_is_a_result_and_its_console_is_kept(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def die(*_arguments: object) -> None:
            raise GuestDiedError("the guest did not boot", "QEMU ended early", "Kernel panic")

        monkeypatch.setattr(matrix, "_test_in_guest", die)
        kept: list[bytes] = []
        result = matrix.run_row(FIRST, BOOT_FILES, Selection(), kept.append)
        assert kept == [b"Kernel panic"]
        assert result.trouble == "the guest did not boot: QEMU ended early"
        assert not result.good
        assert matrix_report.UNKNOWN in matrix_report.table([result])
