"""Whoever waits for the compiler is told so, and nobody else."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tcpstuck_bpf import console
from tcpstuck_bpf.errors import CannotTraceError
from tcpstuck_bpf.kernel import artifact, open_source
from tcpstuck_bpf.kernel.compilation import CompilerError
from tcpstuck_bpf.kernel.kept_files import KeptFiles
from tcpstuck_bpf.kernel.open_source import Start
from tcpstuck_bpf.terminal import CLEAR_LINE
from tests.unit.kernel.test_artifact_store import WANTED, made

FIRST = "tcpstuck-trace: compiling the programs (first start on this kernel) ..."


def unstarted(kept: KeptFiles | None) -> Start:
    """One that has come so far that it needs programs."""
    found = object.__new__(Start)
    found._built, found._kept = None, kept
    return found


@pytest.fixture(autouse=True)
def bcc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_source, "require_bcc", lambda: "0.26.0")


@pytest.fixture
def told_meanwhile(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> list[str]:
    """What stands on standard error while the compiler works."""
    seen: list[str] = []

    def compiler(_wanted: object) -> bytes:
        seen.append(capsys.readouterr().err)
        return artifact.encode(made(WANTED))

    monkeypatch.setattr(open_source, "compile_in_child", compiler)
    return seen


def test_only_a_start_that_compiles_says_so(
    tmp_path: Path, told_meanwhile: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        unstarted(KeptFiles(tmp_path / "cache"))._artifact(WANTED)
    assert told_meanwhile == [f"{FIRST}\n"]
    assert capsys.readouterr() == ("", "")


def test_where_nothing_is_kept_it_is_not_said_to_be_the_first(told_meanwhile: list[str]) -> None:
    unstarted(None)._artifact(WANTED)
    assert told_meanwhile == ["tcpstuck-trace: compiling the programs ...\n"]


@pytest.mark.parametrize("kind", ["xterm", "dumb"])
def test_on_a_terminal_the_line_is_taken_back(
    kind: str,
    told_meanwhile: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("TERM", kind)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    unstarted(KeptFiles(Path("/proc/no/such")))._artifact(WANTED)
    left = capsys.readouterr().err
    if kind == "xterm":
        assert (told_meanwhile, left) == ([FIRST], CLEAR_LINE)
    else:
        assert (told_meanwhile, left) == ([f"{FIRST}\n"], "")


def test_where_there_is_no_compiler_nothing_is_said_to_compile(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse() -> None:
        raise CannotTraceError("no BCC", "none", "none")

    monkeypatch.setattr(open_source, "require_bcc", refuse)
    with pytest.raises(CannotTraceError):
        unstarted(None)._artifact(WANTED)
    assert capsys.readouterr().err == ""


def test_it_is_taken_back_where_the_compiler_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_wanted: object) -> bytes:
        raise CompilerError("no")

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(open_source, "compile_in_child", fail)
    with pytest.raises(CompilerError):
        unstarted(None)._artifact(WANTED)
    assert capsys.readouterr().err.endswith(CLEAR_LINE)


def test_nobody_who_reads_it_is_no_reason_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    with Path("/dev/full").open("w", buffering=1) as full:
        monkeypatch.setattr(full, "isatty", lambda: True, raising=False)
        monkeypatch.setattr(sys, "stderr", full)
        done = []
        with console.under_way("waiting"):
            done.append(True)
    assert done
