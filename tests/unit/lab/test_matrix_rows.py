"""Rows of the matrix side by side, and the command line, with stand-ins that boot nothing."""

from __future__ import annotations

import argparse
import json
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lab.guests import matrix, trees
from lab.guests.matrix_report import MODES, Cell, RowResult, empty_result, log_of
from lab.guests.packages import CacheError, cache_directory
from lab.guests.trees import BootFiles, Row

FIRST, SECOND, THIRD = ROWS = (Row("potato"), Row("woody"), Row("sarge", counts=False))
BOOT_FILES = BootFiles(Path("/boot/vmlinuz-2.4"), Path("/tree"), fresh=False)
LIMIT_S = 60


def good_result(row: Row, **other: Any) -> RowResult:
    return RowResult(row, {mode: Cell(passed=1) for mode in MODES}, **other)


class TestRows:
    def test_as_many_run_side_by_side_as_asked_for(self) -> None:
        two = threading.Barrier(2)
        busy: set[Row] = set()

        def run(row: Row, _boot: BootFiles) -> RowResult:
            busy.add(row)
            two.wait(LIMIT_S)
            at_a_time.add(len(busy))
            two.wait(LIMIT_S)
            busy.remove(row)
            return good_result(row)

        at_a_time: set[int] = set()
        rows = [Row(f"suite {number}") for number in range(20)]
        results = matrix.run_rows(rows, 2, lambda _: BOOT_FILES, run, MODES, lambda _: None)
        assert results == [good_result(row) for row in rows]
        assert at_a_time == {2}

    def test_each_is_told_when_it_ends_and_all_in_their_order(self) -> None:
        second_is_told = threading.Event()
        told: list[Row] = []

        def run(row: Row, _boot: BootFiles) -> RowResult:
            assert row == SECOND or second_is_told.wait(LIMIT_S)
            return good_result(row)

        def tell(result: RowResult) -> None:
            told.append(result.row)
            second_is_told.set()

        results = matrix.run_rows(ROWS, 2, lambda _: BOOT_FILES, run, MODES, tell)
        assert results == [good_result(row) for row in ROWS]
        assert (told[0], set(told)) == (SECOND, set(ROWS))

    def test_all_is_made_before_the_first_starts_and_what_cannot_be_is_a_result(self) -> None:
        steps: list[tuple[str, Row]] = []

        def prepare(row: Row) -> BootFiles:
            steps.append(("made", row))
            if row == FIRST:
                raise CacheError("no tree", "no archive", "look")
            return BOOT_FILES

        def run(row: Row, _boot: BootFiles) -> RowResult:
            steps.append(("started", row))
            return good_result(row)

        results = matrix.run_rows(ROWS, 1, prepare, run, MODES, lambda _: None)
        assert steps == [*(("made", row) for row in ROWS), ("started", SECOND), ("started", THIRD)]
        assert results[0] == empty_result(FIRST, MODES, "no tree: no archive")
        assert [result.good for result in results] == [False, True, True]

    def test_what_goes_wrong_with_one_is_its_result_alone(self) -> None:
        def run(row: Row, _boot: BootFiles) -> RowResult:
            if row == FIRST:
                raise OSError("disk full")
            return good_result(row)

        results = matrix.run_rows(ROWS, 2, lambda _: BOOT_FILES, run, MODES, lambda _: None)
        assert [result.good for result in results] == [False, True, True]
        assert "disk full" in str(results[0].trouble)


def run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    matrix.add_parser(parser.add_subparsers())
    arguments = parser.parse_args(["matrix", *words])
    return int(arguments.run(arguments))


@pytest.fixture
def booted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[BootFiles]:
    """What guests boot; only sid's finds nothing."""
    places: list[BootFiles] = []

    def run_row(row: Row, boot: BootFiles, *rest: Any) -> RowResult:
        _, sink, demanded = rest
        places.append(boot)
        sink(f"{row.suite} prints".encode())
        return empty_result(row, ()) if row.suite == "sid" else good_result(row, demanded=demanded)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(matrix, "run_row", run_row)
    monkeypatch.setattr(trees, "prepare", lambda _row: BOOT_FILES)
    monkeypatch.setattr(matrix, "compile_in_tree", lambda *_: [])
    monkeypatch.setattr(matrix, "run_in_tree", lambda *_, **__: "")
    return places


class TestCommand:
    def test_a_place_is_what_the_guest_boots(self, booted: list[BootFiles]) -> None:
        assert run("--place", "/kernel", "/other", "--rows", "trixie") == 0
        programs = cache_directory() / "programs-trixie"
        assert booted == [BootFiles(Path("/kernel"), Path("/other"), False, programs)]

    @pytest.mark.parametrize(
        "words",
        [
            ["--guests", "2", "--verbose"],
            ["--place", "/kernel", "/tree"],
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

    @pytest.mark.usefixtures("booted")
    @pytest.mark.parametrize(("options", "status"), [([], 0), (["--all"], 1)])
    def test_several_guests_make_one_table_one_file_and_one_verdict(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], status: int
    ) -> None:
        file = tmp_path / "made" / "file.json"
        what = ("--guests", "3", "--select", "a or b", "--json", str(file))
        assert run(*what, "--rows", "bullseye", "trixie", "sid", *options) == status
        said = capsys.readouterr().out.splitlines()
        log = log_of(trees.row_named("sid"))
        assert sorted(said[:3]) == [
            "bullseye: good, 0 s in its guest",
            f"sid: BAD, see {log}, 0 s in its guest",
            "trixie: good, 0 s in its guest",
        ]
        rows = ["bullseye"] * 2 + ["trixie"] * 2 + ["sid"] * 2
        assert [line.split()[0] for line in said[5:]] == [*rows, "sid"]
        assert [line["row"] for line in json.loads(file.read_text())] == rows
        assert log.read_text() == "sid prints"

    @pytest.mark.usefixtures("booted")
    def test_verbosely_it_shows_what_the_guest_prints(
        self, capfdbinary: pytest.CaptureFixture[bytes]
    ) -> None:
        assert run("--verbose", "--rows", "trixie") == 0
        assert capfdbinary.readouterr().out.startswith(b"trixie prints")


class TestMadeReady:
    def test_what_fails_is_named_and_left_to_the_guest(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def refuse(*_: object, **__: object) -> str:
            raise CacheError("`bwrap` failed", "no user namespaces", "none")

        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setattr(matrix, "compile_in_tree", lambda *_: ["no BCC in the tree"])
        monkeypatch.setattr(matrix, "run_in_tree", refuse)
        ready = matrix.made_ready(FIRST, BOOT_FILES)
        assert ready == replace(BOOT_FILES, programs=cache_directory() / "programs-potato")
        first, *others = capsys.readouterr().out.splitlines()
        assert first == "potato: left to the guest: no BCC in the tree"
        assert len(others) == 2
        assert all("no user namespaces" in line for line in others)

    def test_bytecode_is_written_by_the_tree_s_programs_into_the_checkout(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        ran: list[tuple[Path, Sequence[str], Any]] = []

        def note(tree: Path, command: Sequence[str], **places: Any) -> str:
            ran.append((tree, command, places["writable"]))
            return ""

        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setattr(matrix, "compile_in_tree", lambda *_: [])
        monkeypatch.setattr(matrix, "run_in_tree", note)
        matrix.made_ready(FIRST, BOOT_FILES)
        assert {command[2] for _, command, _ in ran} == {"compileall", "pytest"}
        assert all(where == (matrix.REPOSITORY,) for _, _, where in ran)
        assert all(tree == BOOT_FILES.root for tree, _, _ in ran)
