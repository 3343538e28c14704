"""docs/json.md against the lines that a run prints: every key is there, and no other."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tcpstuck_bpf.app.playback import run_replay
from tcpstuck_bpf.output.writers import JsonOutput, Selection
from tcpstuck_bpf.recording.replay import Replay
from tests.replay.test_replay import recorded

DOCS = Path(__file__).parents[2] / "docs"
IN_THE_SUMMARY = "rescue (of the summary)"


def sections(text: str) -> Iterator[tuple[str, set[str]]]:
    """Headings, and the keys in the first column of the table below each."""
    for part in re.split(r"^##+ ", text, flags=re.MULTILINE)[1:]:
        heading, _, body = part.partition("\n")
        firsts = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", body, flags=re.MULTILINE)
        yield heading, set(re.findall(r"\w+", " ".join(firsts)))


@pytest.fixture(scope="module")
def documented() -> Mapping[str, set[str]]:
    found = dict(sections((DOCS / "json.md").read_text("utf-8")))
    listener = dict(sections((DOCS / "listeners.md").read_text("utf-8")))["The keys"]
    return {**found, "listener": listener | {"type", "format"}}


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    path = recorded(tmp_path_factory.mktemp("run") / "run")
    stream = io.StringIO()
    replay = Replay(str(path))
    run_replay(replay, JsonOutput(stream, replay.header.clock, Selection([], nothing=False)))
    return [json.loads(line) for line in stream.getvalue().splitlines()]


@pytest.mark.parametrize("kind", ["verdict", "rescue", "listener", "summary"])
def test_every_key_of_a_line_is_documented(
    documented: Mapping[str, set[str]], lines: list[dict[str, Any]], kind: str
) -> None:
    printed = [set(line) for line in lines if line["type"] == kind]
    assert printed
    assert all(keys == documented[kind] for keys in printed)


def test_every_key_of_a_drop_is_documented(
    documented: Mapping[str, set[str]], lines: list[dict[str, Any]]
) -> None:
    drops = [line["drop"] for line in lines if line["type"] == "verdict" and line["drop"]]
    assert {"counter" in drop for drop in drops} == {True, False}
    assert {key for drop in drops for key in drop} == documented["drop"]


def test_every_key_within_the_summary_is_documented(
    documented: Mapping[str, set[str]], lines: list[dict[str, Any]]
) -> None:
    (summary,) = (line for line in lines if line["type"] == "summary")
    assert set(summary["rescue"]) == documented[IN_THE_SUMMARY]
    assert summary["reconciliation"]
    assert all(set(row) == documented["reconciliation"] for row in summary["reconciliation"])
