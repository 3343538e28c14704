"""Rows of the matrix as processes of their own, by stand-ins that boot nothing."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.guests import matrix, matrix_rows, trees
from lab.guests.kernel_tests import REPOSITORY
from lab.guests.matrix_report import (
    ANY_MODE,
    MODES,
    Cell,
    Failure,
    RowResult,
    as_json,
    empty_result,
    log_of,
    results_of,
)
from lab.guests.packages import CacheError
from lab.guests.trees import ROWS, BootFiles, Row
from lab.patience import PATIENCE_VARIABLE

FIRST, SECOND, THIRD = Row("potato"), Row("woody"), Row("sarge", counts=False)
BOOT_FILES = BootFiles(Path("/boot/vmlinuz-2.4"), Path("/tree"), fresh=False)

TEXTS = st.text(max_size=5)
FAILURES = st.lists(st.builds(Failure, TEXTS, TEXTS), max_size=3)
SKIPS = st.dictionaries(TEXTS, st.integers(1, 9), max_size=3).map(Counter)
CELLS = st.builds(Cell, st.integers(0, 9), FAILURES, SKIPS)
RESULTS = st.builds(
    RowResult,
    st.builds(Row, TEXTS, st.booleans()),
    st.fixed_dictionaries(dict.fromkeys(MODES, CELLS), optional={ANY_MODE: CELLS}),
    kernel=TEXTS,
    bcc=TEXTS,
    trouble=st.none() | TEXTS,
    seconds=st.integers(0, 100_000).map(lambda tenths: tenths / 10),
    demanded=st.sampled_from([(), MODES]),
)
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=5,
)


def good_result(row: Row, **other: Any) -> RowResult:
    return RowResult(row, {mode: Cell(passed=1) for mode in MODES}, **other)


def written(*results: RowResult) -> str:
    return json.dumps(as_json(results))


class TestFile:
    @given(st.lists(RESULTS, max_size=3, unique_by=lambda result: result.row.suite))
    def test_results_come_back_from_a_file_as_they_were(self, results: list[RowResult]) -> None:
        assert results_of(written(*results)) == results

    def test_a_row_that_nothing_is_known_of_comes_back_too(self) -> None:
        result = empty_result(FIRST, (), "cut off")
        (back,) = results_of(written(result))
        assert (back, back.good) == (result, False)

    @given(RESULTS, st.data())
    def test_a_file_cut_off_anywhere_is_refused(self, result: RowResult, data: Any) -> None:
        text = written(result)
        with pytest.raises(ValueError, match=r"\S"):
            results_of(text[: data.draw(st.integers(0, len(text) - 1))])

    @given(RESULTS, st.data(), JSON_VALUES)
    def test_what_was_not_written_so_is_refused_or_all_taken(
        self, result: RowResult, data: Any, value: object
    ) -> None:
        lines = as_json([result])
        line = data.draw(st.sampled_from(lines))
        line[data.draw(st.sampled_from(sorted(line)))] = value
        try:
            found = results_of(json.dumps(lines))
        except ValueError:
            return
        assert as_json(found) == lines
        assert isinstance(matrix.table(found) + str(matrix.complaints(found)), str)

    @pytest.mark.parametrize("text", ["", "{}", "7", "[7]", "[{}]", "[[]]", "null"])
    def test_other_json_is_refused(self, text: str) -> None:
        with pytest.raises(ValueError, match=r"\S"):
            results_of(text)

    def test_a_row_without_one_of_the_modes_is_refused(self) -> None:
        with pytest.raises(ValueError, match="not what was to be written"):
            results_of(json.dumps(as_json([good_result(FIRST)])[1:]))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(trees, "prepare", lambda _row: BOOT_FILES)
    return tmp_path


def saying(report: Path, text: str, status: int = 0) -> list[str]:
    """A stand-in that writes that report and ends with that status."""
    code = f"import sys; open({str(report)!r}, 'w').write({text!r}); sys.exit({status})"
    return [sys.executable, "-c", code]


class TestRows:
    def test_they_run_side_by_side_no_more_than_asked_for_and_are_told_in_their_order(
        self, cache: Path
    ) -> None:
        """The first ends by the third's word, the third starts when the second has ended."""
        word, mark = cache / "word", cache / "mark"
        os.mkfifo(word)
        begins = {
            FIRST: f"open({str(word)!r}).read()",
            SECOND: "pass",
            THIRD: f"open({str(mark)!r}, 'w').close(); open({str(word)!r}, 'w').close()",
        }

        def words(row: Row, boot: BootFiles, report: Path) -> list[str]:
            assert boot == BOOT_FILES
            *start, code = saying(report, written(good_result(row)))
            return [*start, f"{begins[row]}\n{code}"]

        told: list[tuple[Row, bool]] = []
        results = matrix_rows.run_rows(
            [FIRST, SECOND, THIRD],
            2,
            words,
            MODES,
            lambda result: told.append((result.row, mark.exists())),
        )
        assert results == [good_result(row) for row in (FIRST, SECOND, THIRD)]
        assert told[0] == (SECOND, False)
        assert {row for row, _ in told[1:]} == {FIRST, THIRD}

    @pytest.mark.parametrize(
        ("end", "status"),
        [
            ("sys.exit('no such thing')", 1),
            ("print('no such thing', file=sys.stderr, flush=True); sys.exit(0)", 0),
            ("raise RuntimeError('no such thing')", 1),
            (
                "print('no such thing', flush=True); os.kill(os.getpid(), signal.SIGKILL)",
                128 + signal.SIGKILL,
            ),
        ],
    )
    def test_one_that_dies_is_a_result_and_what_it_said_is_kept(
        self, cache: Path, end: str, status: int
    ) -> None:
        code = f"import os, signal, sys; {end}"
        (result,) = matrix_rows.run_rows(
            [FIRST], 2, lambda *_: [sys.executable, "-c", code], (), lambda _: None
        )
        assert cache in log_of(FIRST).parents
        assert "no such thing" in log_of(FIRST).read_text()
        trouble = f"its process ended with status {status} and wrote no report"
        assert result == empty_result(FIRST, (), trouble)
        assert not result.good

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "[]",
            "\udcff",
            written(good_result(FIRST))[:-1],
            written(good_result(SECOND)),
            written(good_result(FIRST), good_result(SECOND)),
            written(good_result(FIRST, demanded=())),
        ],
    )
    def test_a_report_that_is_damaged_or_of_something_else_is_trouble(
        self, tmp_path: Path, text: str
    ) -> None:
        report = tmp_path / "report"
        report.write_text(text, errors="surrogateescape")
        result = matrix_rows.brought_back(FIRST, MODES, report, 0)
        assert "status 0; its report is damaged" in str(result.trouble)
        assert not result.good

    @pytest.mark.parametrize("trouble", [None, "cut off"])
    @pytest.mark.parametrize("status", [0, 1, 3, 137])
    def test_a_status_that_the_report_does_not_go_with_is_trouble(
        self, tmp_path: Path, trouble: str | None, status: int
    ) -> None:
        report = tmp_path / "report"
        report.write_text(written(good_result(THIRD, trouble=trouble)))
        result = matrix_rows.brought_back(THIRD, MODES, report, status)
        assert result.good == (trouble is None and status == 0)
        assert (f"status {status}" in str(result.trouble)) == (status != (1 if trouble else 0))
        assert str(trouble) in str(result.trouble) or trouble is None

    @pytest.mark.usefixtures("cache")
    def test_all_is_made_before_the_first_starts_and_what_cannot_be_is_a_result(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        steps: list[tuple[str, Row]] = []

        def prepare(row: Row) -> BootFiles:
            steps.append(("made", row))
            if row == FIRST:
                raise CacheError("no tree", "no archive", "look")
            return BOOT_FILES

        def words(row: Row, _place: BootFiles, report: Path) -> list[str]:
            steps.append(("started", row))
            return saying(report, written(good_result(row)))

        monkeypatch.setattr(trees, "prepare", prepare)
        rows = [FIRST, SECOND, THIRD]
        results = matrix_rows.run_rows(rows, 2, words, MODES, lambda _: None)
        assert steps == [*(("made", row) for row in rows), ("started", SECOND), ("started", THIRD)]
        assert results[0] == empty_result(FIRST, MODES, "no tree: no archive")
        assert [result.good for result in results] == [False, True, True]


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    matrix.add_parser(parser.add_subparsers())
    return parser.parse_args(["matrix", *words])


def run(*words: str) -> int:
    arguments = parsed(*words)
    return int(arguments.run(arguments))


class TestCommand:
    @pytest.mark.parametrize("row", ROWS)
    @pytest.mark.parametrize(
        ("selection", "core", "select"),
        [([], False, None), (["--core"], True, None), (["--select=-a b"], False, "-a b")],
    )
    def test_a_rows_process_is_asked_for_that_row_over_that_place(
        self, row: Row, selection: list[str], core: bool, select: str | None
    ) -> None:
        words = matrix_rows.row_words(row, BOOT_FILES, Path("/a b"), selection)
        module = words.index("-m")
        assert words[module - 1 : module + 3] == [sys.executable, "-m", "lab", "matrix"]
        arguments = parsed(*words[module + 3 :])
        assert (arguments.rows, arguments.guests) == ([row], 1)
        assert arguments.place == [BOOT_FILES.kernel, BOOT_FILES.root]
        assert (arguments.core, arguments.select) == (core, select)
        assert (arguments.json, arguments.all) == (Path("/a b"), True)

    def test_a_place_is_what_the_guest_boots(
        self, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        places = []

        def test_in_guest(*arguments: object) -> None:
            places.append(arguments[-1])

        monkeypatch.setattr(matrix, "_test_in_guest", test_in_guest)
        words = matrix_rows.row_words(ROWS[0], BOOT_FILES, cache / "report", [])
        assert run(*words[words.index("matrix") + 1 :]) == 1
        assert places == [BOOT_FILES]

    @pytest.mark.parametrize(
        "words",
        [
            ["--guests", "2", "--verbose"],
            ["--place", "/kernel", "/tree"],
            ["--place", "/kernel", "/tree", "--rows", "sid", "--guests", "2"],
            *(["--guests", number] for number in ("0", "-1", "x", "1.5", "")),
        ],
    )
    def test_a_senseless_choice_is_wrong_use(
        self, words: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit) as ended:
            run(*words)
        assert ended.value.code == 2
        assert words[0] in capsys.readouterr().err

    @pytest.mark.parametrize(("options", "status"), [([], 0), (["--all"], 1)])
    def test_several_guests_make_one_table_one_file_and_one_verdict(
        self,
        cache: Path,
        monkeypatch: pytest.MonkeyPatch,
        capfd: pytest.CaptureFixture[str],
        options: list[str],
        status: int,
    ) -> None:
        def words(row: Row, _place: BootFiles, report: Path, selection: Sequence[str]) -> list[str]:
            assert selection == ["--select=a or b"]
            result = empty_result(row, ()) if row.suite == "sid" else good_result(row, demanded=())
            *start, code = saying(report, written(result), int(row.suite == "sid"))
            return [*start, f"print('its own table'); {code}"]

        monkeypatch.setattr(matrix, "row_words", words)
        file = cache / "made" / "file.json"
        rows = ["sid", "trixie", "bullseye"]
        what = ("--guests", "3", "--select", "a or b", "--json", str(file))
        assert run(*what, "--rows", *rows, *options) == status
        said = capfd.readouterr().out.splitlines()
        assert sorted(said[:3]) == [
            "bullseye: good, 0 s in its guest",
            f"sid: BAD, see {log_of(trees.row_named('sid'))}, 0 s in its guest",
            "trixie: good, 0 s in its guest",
        ]
        headed, table = said[3], [line.split()[0] for line in said[5:]]
        assert headed.split()[0] == "row"
        assert table == ["bullseye"] * 2 + ["trixie"] * 2 + ["sid"] * 2 + ["sid"]
        assert [one.row.suite for one in results_of(file.read_text())] == rows[::-1]
        assert log_of(trees.row_named("sid")).read_text() == "its own table\n"


PARENT = """
import sys
from pathlib import Path
from lab import __main__
from lab.guests import matrix, trees

def row_words(*_):
    return [*{mortal!r}, sys.executable, "-c", {child!r}]

matrix.row_words = row_words
trees.prepare = lambda row: trees.BootFiles(Path("/kernel"), Path("/tree"), fresh=False)
sys.argv = ["lab", "matrix", "--guests", "2", "--rows", "bullseye", "bookworm", "trixie"]
sys.exit(__main__.main())
"""
CHILD = """
import os, signal, sys
held = os.open({pipe!r}, os.O_WRONLY)
def end(*_):
    os.write(held, b"cleaned\\n")
    sys.exit(1)
signal.signal(signal.SIGTERM, end)
signal.signal(signal.SIGINT, lambda *_: os.write(held, b"interrupted\\n"))
os.write(held, b"started\\n")
while True:
    signal.pause()
"""
STUBBORN = CHILD.replace("    sys.exit(1)\n", "")


class TestEnd:
    MORTAL = matrix_rows.row_words(FIRST, BOOT_FILES, Path("/report"), [])[:3]

    @pytest.mark.parametrize(
        ("number", "child", "patience", "status"),
        [
            (signal.SIGINT, CHILD, "1", 130),
            (signal.SIGTERM, CHILD, "1", 128 + signal.SIGTERM),
            (signal.SIGKILL, CHILD, "1", -signal.SIGKILL),
            (signal.SIGTERM, STUBBORN, "0.01", 128 + signal.SIGTERM),
        ],
    )
    def test_who_ends_it_ends_the_rows_too(
        self,
        tmp_path: Path,
        number: signal.Signals,
        child: str,
        patience: str,
        status: int,
    ) -> None:
        path = tmp_path / "held"
        os.mkfifo(path)
        reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        # Held open here until the children are there, lest the pipe should end before it begins.
        writer = os.open(path, os.O_WRONLY)
        os.set_blocking(reader, True)
        code = PARENT.format(mortal=self.MORTAL, child=child.format(pipe=str(path)))
        places = {"XDG_CACHE_HOME": str(tmp_path), "TMPDIR": str(tmp_path)}
        with (
            open(reader) as said,  # noqa: PTH123
            subprocess.Popen(
                [sys.executable, "-c", code],
                env={**os.environ, **places, PATIENCE_VARIABLE: patience},
                cwd=REPOSITORY,
                start_new_session=True,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            ) as process,
        ):
            assert [said.readline() for _ in range(2)] == ["started\n"] * 2
            os.close(writer)
            # As by Ctrl-C: to all of its process group.
            os.killpg(process.pid, number)
            assert process.wait(60) == status
            assert said.read() == "cleaned\n" * 2
            assert process.stderr is not None
            assert b"Traceback" not in process.stderr.read()
