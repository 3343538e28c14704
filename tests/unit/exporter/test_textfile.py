"""The file for a node_exporter: whole or not at all, and never in the way of the run."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tcpstuck_bpf.cli import main
from tcpstuck_bpf.errors import EXIT_STUCK, EXIT_USAGE, UsageError
from tcpstuck_bpf.output.metric_families import STUCK, Sample, Samples, Snapshot
from tests.exported import needs_prometheus_client, snapshot_of
from tests.replay.test_replay import recorded
from tests.unit.exporter.test_exposition import text_of

LIMIT_S = 30.0
OFTEN_S = 0.01


@pytest.fixture(autouse=True)
def _library() -> None:
    needs_prometheus_client()


def snapshot(number: int) -> Snapshot:
    return (Samples(STUCK, (Sample((), number),)),)


class Told:
    """What was noted, and a way to wait for it."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.came = threading.Event()

    def __call__(self, text: str) -> None:
        self.notes.append(text)
        self.came.set()


def wait_until(holds: Callable[[], bool]) -> None:
    waiting = threading.Event()
    for _ in range(int(LIMIT_S / OFTEN_S)):
        if holds():
            return
        waiting.wait(OFTEN_S)
    raise AssertionError("it did not come true in time")


def test_a_replay_writes_the_end_state(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, target = recorded(tmp_path / "run"), tmp_path / "m.prom"
    for words in (["--json"], ["--summary"], []):
        target.unlink(missing_ok=True)
        assert main(["--replay", str(path), "--metrics-file", str(target), *words]) == EXIT_STUCK
        assert target.read_text() == text_of(snapshot_of(path))
    assert stat.S_IMODE(target.stat().st_mode) == 0o644
    assert capsys.readouterr().err == ""


def test_metrics_change_nothing_of_what_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(recorded(tmp_path / "run"))
    for words in (["--json"], ["-v"]):
        main(["--replay", path, *words])
        without = capsys.readouterr()
        main(["--replay", path, *words, "--metrics-file", str(tmp_path / "m.prom")])
        assert capsys.readouterr() == without


def test_what_cannot_be_written_is_said_before_anything_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(recorded(tmp_path / "run"))
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "elsewhere")
    for target in (tmp_path, tmp_path / "no" / "such", link):
        assert main(["--replay", path, "--metrics-file", str(target)]) == EXIT_USAGE
        out, err = capsys.readouterr()
        assert out == ""
        assert "cannot write metrics" in err
        assert len(err.splitlines()) == 3
    assert not (tmp_path / "elsewhere").exists()


def test_a_replay_serves_nobody(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--replay", str(recorded(tmp_path / "run")), "--metrics", ":0"]) == EXIT_USAGE
    assert "--metrics cannot be combined with --replay" in capsys.readouterr().err


def test_it_is_written_again_and_again_and_at_the_end(tmp_path: Path) -> None:
    from tcpstuck_bpf.exporter.exposition import Exposition
    from tcpstuck_bpf.exporter.textfile import MetricsFile

    target, exposition, told = tmp_path / "m.prom", Exposition(), Told()
    file = MetricsFile(str(target), exposition, told, OFTEN_S)
    assert not target.exists()
    file.start()
    for number in (1, 2):
        exposition.replace(snapshot(number))
        whole = text_of(snapshot(number))
        wait_until(lambda whole=whole: target.exists() and target.read_text() == whole)  # type: ignore[misc]
    exposition.replace(snapshot(3))
    file.close()
    assert target.read_text() == text_of(snapshot(3))
    assert os.listdir(tmp_path) == ["m.prom"]  # noqa: PTH208
    assert told.notes == []


def test_a_file_that_can_no_longer_be_written_is_told_once_and_at_the_end(tmp_path: Path) -> None:
    from tcpstuck_bpf.exporter.exposition import Exposition
    from tcpstuck_bpf.exporter.textfile import MetricsFile

    directory = tmp_path / "d"
    directory.mkdir()
    exposition, told = Exposition(), Told()
    file = MetricsFile(str(directory / "m.prom"), exposition, told, OFTEN_S)
    directory.rmdir()
    exposition.replace(snapshot(1))
    file.start()
    assert told.came.wait(LIMIT_S)
    exposition.replace(snapshot(2))
    with pytest.raises(FileNotFoundError):
        file.close()
    assert len(told.notes) == 1
    assert "m.prom" in told.notes[0]


def test_the_end_does_not_wait_for_a_disk_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tcpstuck_bpf.exporter import textfile
    from tcpstuck_bpf.exporter.exposition import Exposition

    stalled, released = threading.Event(), threading.Event()

    def stall(*_words: object) -> None:
        stalled.set()
        released.wait(LIMIT_S)

    monkeypatch.setattr(textfile, "write_whole", stall)
    monkeypatch.setattr(textfile, "LAST_WRITE_S", 0.05)
    exposition = Exposition()
    file = textfile.MetricsFile(str(tmp_path / "m.prom"), exposition, Told(), OFTEN_S)
    exposition.replace(snapshot(1))
    file.start()
    assert stalled.wait(LIMIT_S)
    with pytest.raises(TimeoutError):
        file.close()
    released.set()


def test_a_file_that_may_not_be_there_is_a_usage_error(tmp_path: Path) -> None:
    from tcpstuck_bpf.exporter.exposition import Exposition
    from tcpstuck_bpf.exporter.textfile import MetricsFile

    with pytest.raises(UsageError):
        MetricsFile(str(tmp_path / "no" / "m.prom"), Exposition(), Told())
