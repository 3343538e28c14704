"""The file that stands for a run that traces: it appears whole, and goes when the run ends."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest

from tcpstuck_bpf.analysis import Analysis
from tcpstuck_bpf.app import live
from tcpstuck_bpf.app.live import Live
from tcpstuck_bpf.app.printer import Printer
from tcpstuck_bpf.app.ready_file import remove_ready_file, write_ready_file
from tcpstuck_bpf.errors import UsageError
from tcpstuck_bpf.files import OutputFile
from tcpstuck_bpf.output.writers import JsonOutput, Selection
from tests.builders import SECOND_NS, header
from tests.scripted_run import FakeKernel, no_counters


def test_a_ready_file_of_an_earlier_run_is_none_of_this_one(tmp_path: Path) -> None:
    (tmp_path / "ready").write_text("7\n", encoding="ascii")
    for _ in range(2):
        remove_ready_file(str(tmp_path / "ready"))
        assert not (tmp_path / "ready").exists()


def test_a_ready_file_that_is_a_named_pipe_stays(tmp_path: Path) -> None:
    """Who waits at its other end has opened it before we begin."""
    os.mkfifo(tmp_path / "ready")
    remove_ready_file(str(tmp_path / "ready"))
    assert (tmp_path / "ready").is_fifo()


def test_the_ready_file_holds_our_process_number_or_is_refused(tmp_path: Path) -> None:
    kernel = FakeKernel()
    stream = io.StringIO()
    output = JsonOutput(stream, header().clock, Selection([], nothing=True))
    run = Live(
        kernel, Analysis(header()), Printer(output), None, no_counters, lambda: kernel.now_ns
    )
    run.run(SECOND_NS, str(tmp_path / "ready"))
    assert int((tmp_path / "ready").read_text("ascii")) > 0
    with pytest.raises(UsageError, match="ready file"):
        run.run(SECOND_NS, str(tmp_path / "missing" / "ready"))


def test_a_link_in_the_place_of_a_ready_file_is_not_taken_for_one(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    (tmp_path / "ready").symlink_to(victim)
    remove_ready_file(str(tmp_path / "ready"))
    assert (tmp_path / "ready").is_symlink()
    assert victim.exists()


def test_a_ready_file_is_whole_when_it_appears(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    appear = OutputFile.appear

    def watched(file: OutputFile) -> None:
        assert not (tmp_path / "ready").exists()
        appear(file)
        seen.append((tmp_path / "ready").read_text("ascii"))

    monkeypatch.setattr(OutputFile, "appear", watched)
    write_ready_file(str(tmp_path / "ready"))
    assert seen == [f"{os.getpid()}\n"]
    assert live.write_ready_file is write_ready_file
