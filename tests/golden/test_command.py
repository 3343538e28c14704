"""`python3 -m lab golden`: what it refuses to keep, and what it keeps of a guest that died."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lab import golden, golden_files
from lab.errors import LabError
from lab.golden import RECORDINGS, objections
from lab.golden_files import LINES, SUFFIXES, TRUTH, kept_file, kept_recording, kept_truth
from lab.guests.run import GuestDiedError
from lab.records import Outcome

NAME = "ack-dropped"
OTHER = "late-fin"
Lines = list[dict[str, Any]]


def kept_lines() -> Lines:
    text = kept_file(NAME, LINES).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def with_one_wrong(outcome: Outcome) -> Outcome:
    wrong = dict(outcome.expected)
    wrong[min(wrong)] = "client-reset"
    return replace(outcome, expected=wrong)


def first_verdict(lines: Lines) -> dict[str, Any]:
    return next(line for line in lines if line["type"] == "verdict")


def without_last_word(lines: Lines) -> None:
    """On one client nothing is told."""
    who = first_verdict(lines)["client_port"]
    lines[:] = [line for line in lines if line.get("client_port") != who]


def too_much(lines: Lines) -> None:
    lines.insert(0, {**first_verdict(lines), "client_port": 1})


def lost(lines: Lines) -> None:
    lines[-1]["lost_events"] = 3


def disagreeing(lines: Lines) -> None:
    netns = kept_truth(NAME).netns
    row = next(row for row in lines[-1]["reconciliation"] if row["netns"] == netns)
    row["agrees"] = False


def cut_short(lines: Lines) -> None:
    lines.pop()


def test_a_run_that_agrees_with_the_oracle_is_not_objected_to() -> None:
    assert objections(kept_truth(NAME), kept_lines()) == []


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (without_last_word, "missing: 10.9.0.2:"),
        (too_much, "extra: 10.9.0.2:1 ack-filtered"),
        (lost, "lost_events: 3"),
        (disagreeing, "by the kernel"),
        (cut_short, "no summary"),
    ],
)
def test_a_run_that_does_not_is_refused_by_name(spoil: Callable[[Lines], None], words: str) -> None:
    lines = kept_lines()
    spoil(lines)
    assert words in "; ".join(objections(kept_truth(NAME), lines))


def test_a_wrong_verdict_is_refused_by_name() -> None:
    against = objections(with_one_wrong(kept_truth(NAME)), kept_lines())
    assert "client-reset, reported as ack-filtered" in "; ".join(against)


def test_a_scenario_in_which_nothing_happened_is_refused() -> None:
    nobody = replace(kept_truth(NAME), expected={})
    lines = [line for line in kept_lines() if line["type"] == "summary"]
    assert "nothing happened" in "; ".join(objections(nobody, lines))
    healthy = replace(nobody, scenario=golden.NOBODY_IS_NAMED)
    assert objections(healthy, lines) == []


def test_a_recording_that_replays_to_a_wrong_verdict_is_not_written(tmp_path: Path) -> None:
    wrong = with_one_wrong(kept_truth(NAME))
    with pytest.raises(LabError, match="wrong verdicts"):
        golden_files.keep(NAME, kept_recording(NAME), wrong, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_is_expected_is_not_written_anew_against_the_truth(tmp_path: Path) -> None:
    golden_files.keep(NAME, kept_recording(NAME), kept_truth(NAME), tmp_path)
    wrong = golden_files.truth_text(with_one_wrong(kept_truth(NAME)))
    kept_file(NAME, TRUTH, tmp_path).write_text(wrong)
    kept_file(NAME, LINES, tmp_path).write_text("as before")
    with pytest.raises(LabError, match="wrong verdicts"):
        golden_files.expect_again(NAME, tmp_path)
    assert kept_file(NAME, LINES, tmp_path).read_text() == "as before"


def test_writing_anew_gives_all_that_is_committed(tmp_path: Path) -> None:
    golden_files.keep(NAME, kept_recording(NAME), kept_truth(NAME), tmp_path)
    for suffix in SUFFIXES[1:]:
        assert (
            kept_file(NAME, suffix, tmp_path).read_bytes() == kept_file(NAME, suffix).read_bytes()
        )
    assert kept_recording(NAME, tmp_path) == kept_recording(NAME)
    kept_file(NAME, LINES, tmp_path).unlink()
    golden_files.expect_again(NAME, tmp_path)
    assert kept_file(NAME, LINES, tmp_path).read_bytes() == kept_file(NAME, LINES).read_bytes()


@pytest.mark.parametrize(
    "content", [b"", b"{}\n", b'{"format":"tcpstuck-recording","version":1}\n']
)
def test_what_cannot_be_replayed_is_refused(content: bytes) -> None:
    with pytest.raises(LabError, match="cannot be replayed"):
        golden_files.replayed(NAME, content)


def test_a_name_that_no_recording_has_is_refused() -> None:
    with pytest.raises(LabError, match="no recording ack-droped"):
        golden.run(argparse.Namespace(names=[NAME, "ack-droped"], expect=False, here=None))


def test_what_a_dying_guest_has_recorded_is_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept: list[str] = []

    def die(command: list[str], **_options: Any) -> None:
        share = Path(command[command.index("--here") + 1])
        (share / NAME).write_bytes(kept_recording(NAME))
        kept_file(NAME, TRUTH, share).write_bytes(kept_file(NAME, TRUTH).read_bytes())
        (share / OTHER).write_bytes(kept_recording(OTHER)[:-1])
        kept_file(OTHER, TRUTH, share).write_bytes(kept_file(OTHER, TRUTH).read_bytes())
        raise GuestDiedError("the guest died", "a test wants it", "")

    def keep(name: str, recording: bytes, truth: Outcome) -> None:
        golden_files.keep(name, recording, truth, tmp_path)
        kept.append(name)

    monkeypatch.setattr(golden, "run_in_guest", die)
    monkeypatch.setattr(golden, "keep", keep)
    names = [NAME, OTHER, "healthy"]
    assert golden.run(argparse.Namespace(names=names, expect=False, here=None)) != 0
    assert kept == [NAME]
    assert f"golden {OTHER} healthy\n" in capsys.readouterr().out


def test_every_recording_is_of_a_scenario_that_can_be_played() -> None:
    played: Mapping[str, Any] = golden.PLAYED
    for one in RECORDINGS.values():
        assert one.family in played[one.scenario].families
