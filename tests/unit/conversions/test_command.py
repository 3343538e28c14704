"""`--plot` is refused in three lines, before the recording is read, if nothing can come of it."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest

from tcpstuck_bpf.cli import main
from tcpstuck_bpf.conversions import command
from tcpstuck_bpf.errors import EXIT_CANNOT_TRACE, EXIT_STUCK, EXIT_USAGE
from tests.exported import needs_matplotlib
from tests.unit.conversions.scene import crowd

REPOSITORY = Path(__file__).parents[3]
NOT_THERE = """
import sys
sys.modules["matplotlib"] = None
from tcpstuck_bpf.cli import main
sys.exit(main(sys.argv[1:]))
"""
LIMIT_S = 60


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[str, str, str]:
    """The lines of a usage error, which comes instead of any output."""
    assert main(words) == EXIT_USAGE
    out, err = capsys.readouterr()
    assert out == ""
    what, why, remedy = err.splitlines()
    return what, why, remedy


@pytest.mark.parametrize("name", ["run.jpg", "run", "svg", ".svg", "run.svg.gz", "run.svg/"])
def test_another_ending_is_refused_without_a_look_at_the_recording(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    what, why, remedy = refused(capsys, "--replay", "no such file", "--plot", name)
    assert what == f"tcpstuck-trace: --plot: {name} does not say in which form to draw"
    assert why == "  why: its name does not end with .svg, .png or .pdf"
    assert remedy == "  remedy: write for example --plot run.svg"


def test_an_empty_name_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    what, *_ = refused(capsys, "--replay", "no such file", "--plot", "")
    assert "the name of a file is missing" in what


@pytest.mark.parametrize(
    ("words", "why_not"),
    [
        ((), "--plot needs --replay"),
        (("--doctor",), "--plot cannot be combined with --doctor"),
        (("--build", "there"), "--plot cannot be combined with --build"),
        (("--explain",), "--plot cannot be combined with --explain"),
    ],
)
def test_only_a_replay_is_drawn(
    words: tuple[str, ...], why_not: str, capsys: pytest.CaptureFixture[str]
) -> None:
    what, _, remedy = refused(capsys, *words, "--plot", "run.svg")
    assert why_not in what
    if not words:
        assert "--record FILE" in remedy


def test_a_place_that_cannot_be_written_is_refused_before_anything_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(crowd(4).record(tmp_path / "run"))
    link, directory = tmp_path / "link.svg", tmp_path / "directory.svg"
    link.symlink_to(tmp_path / "elsewhere")
    directory.mkdir()
    for target in (link, directory, tmp_path / "no" / "such.svg"):
        what, _, remedy = refused(capsys, "--replay", path, "--plot", str(target))
        assert what == f"tcpstuck-trace: cannot write the plot to {target}"
        assert "directory that you may write to" in remedy
    assert not (tmp_path / "elsewhere").exists()


def test_a_failure_at_the_end_leaves_no_file_and_costs_no_output(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    needs_matplotlib()
    path, target = crowd(4).record(tmp_path / "run"), tmp_path / "run.svg"
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with patch.object(command, "write_whole", side_effect=full):
        assert main(["--replay", str(path), "--summary", "--plot", str(target)]) == EXIT_USAGE
    out, err = capsys.readouterr()
    assert out.startswith("\n3 clients of 192.0.2.1:3311")
    assert err.splitlines()[:2] == [
        f"tcpstuck-trace: cannot write the plot to {target}",
        "  why: No space left on device",
    ]
    assert not target.exists()


def test_without_matplotlib_the_remedy_is_named_and_a_replay_works(tmp_path: Path) -> None:
    path, target = crowd(4).record(tmp_path / "run"), tmp_path / "run.svg"
    words = ["--replay", str(path), "--summary"]

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", NOT_THERE, *words, *more],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )

    without = run("--plot", str(target))
    assert (without.returncode, without.stdout) == (EXIT_CANNOT_TRACE, "")
    what, why, remedy = without.stderr.splitlines()
    assert what == "tcpstuck-trace: --plot needs the Python module matplotlib"
    assert "cannot be imported" in why
    assert "apt install python3-matplotlib" in remedy
    assert "pip install matplotlib" in remedy
    assert not target.exists()
    plain = run()
    assert (plain.returncode, plain.stderr) == (EXIT_STUCK, "")
