"""Programs that are compiled for a guest's kernel before it boots."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from lab.errors import LabError
from lab.guests import kernel_tests, programs
from lab.guests.in_tree import run_in_tree
from lab.guests.kernel_tests import GuestRun
from lab.guests.selection import Selection
from lab.guests.shares import Share
from tcpstuck_bpf.kernel import artifact, compilation
from tcpstuck_bpf.kernel.artifact import Artifact
from tcpstuck_bpf.kernel.artifact_store import find_kept
from tcpstuck_bpf.kernel.attach_plan import AttachRequest
from tcpstuck_bpf.kernel.compilation import Compilation, CompilerError
from tcpstuck_bpf.kernel.kept_files import KeptFiles


def wanted(request: AttachRequest, mode: str) -> Compilation:
    return Compilation("", [f"rescue={request.rescue}", f"why={request.why}"], mode, {}, "6.1")


class Compiler:
    """Compiles to empty programs, and counts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, refusal: str | None = None) -> None:
        self.compiled: list[tuple[str, ...]] = []
        self._refusal = refusal
        monkeypatch.setattr(compilation, "bcc_version", lambda: "1.0")
        monkeypatch.setattr(programs, "read_image", lambda path: SimpleNamespace(path=path))
        monkeypatch.setattr(programs, "compile_in_child", self._compile)
        monkeypatch.setattr(programs.builder, "compilations", self._compilations)

    @staticmethod
    def _compilations(_image: object, request: AttachRequest) -> Iterator[Compilation]:
        yield from (wanted(request, mode) for mode in ("fentry", "kprobe"))

    def _compile(self, one: Compilation) -> bytes:
        if self._refusal is not None:
            raise CompilerError(self._refusal)
        self.compiled.append((*one.flags, one.mode))
        made = (one.identity(), one.made_for, "1.0", one.mode, one.architecture)
        return artifact.encode(Artifact(*made, programs=(), maps=()))


def test_each_request_is_compiled_in_both_modes_and_only_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler = Compiler(monkeypatch)
    for _ in range(2):
        assert programs.compile_programs(Path("vmlinuz"), tmp_path / "programs") == []
    assert len(compiler.compiled) == len(set(compiler.compiled)) == 8
    assert {flags[:2] for flags in compiler.compiled} == {
        (f"rescue={rescue}", f"why={why}") for rescue in (False, True) for why in (False, True)
    }


def test_the_guest_s_tool_finds_what_was_compiled_here(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    Compiler(monkeypatch)
    programs.compile_programs(Path("vmlinuz"), tmp_path / "here")
    programs.hand_over(tmp_path / "here", tmp_path / "guest")
    assert stat.S_IMODE((tmp_path / "guest").stat().st_mode) == 0o700
    files = KeptFiles(tmp_path / "guest")
    request = AttachRequest(rescue=True)
    assert find_kept(files, wanted(request, "kprobe")) is not None
    assert find_kept(files, replace(wanted(request, "kprobe"), header="another kernel")) is None
    assert files.notes == []


def test_what_cannot_be_compiled_is_named_and_left_to_the_guests(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    Compiler(monkeypatch, "BCC cannot create maps here")
    (why,) = programs.compile_programs(Path("vmlinuz"), tmp_path / "programs")
    assert why == "BCC cannot create maps here"
    # Nothing is there to hand over, and that is no error.
    programs.hand_over(tmp_path / "programs", tmp_path / "guest")


def test_a_cache_of_anybody_else_is_not_filled(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "x.programs").touch()
    (tmp_path / "guest").mkdir(mode=0o777)
    (tmp_path / "guest").chmod(0o777)
    with pytest.raises(LabError, match="its mode is 0777"):
        programs.hand_over(tmp_path / "here", tmp_path / "guest")
    assert list((tmp_path / "guest").iterdir()) == []


def test_a_guest_sees_the_directory_and_cannot_change_it(tmp_path: Path) -> None:
    run = GuestRun(1, Share(1.0, ["a"]), tmp_path, None, tmp_path / "programs")
    options = kernel_tests.options_for(Selection(), run)
    assert options.views == (tmp_path / "programs",)
    assert options.environment[programs.PROGRAMS_VARIABLE] == str(tmp_path / "programs")


class TestInTree:
    """The tree is this machine's root, so that real programs run."""

    def test_a_command_sees_the_tree_and_the_directories_it_is_given(self, tmp_path: Path) -> None:
        given, taken, hidden = (tmp_path / name for name in ("given", "taken", "hidden"))
        for directory in (given, taken, hidden):
            directory.mkdir()
            (directory / "file").write_text(directory.name)
        script = (
            "cat given/file; echo new >taken/file; test ! -e hidden; test -x /usr/bin/env;"
            "for file in given/file /usr/bin/new; do if touch $file; then exit 1; fi; done"
        )
        places = {"readable": (given,), "writable": (taken,), "cwd": tmp_path}
        assert run_in_tree(Path("/"), ["sh", "-euc", script], **places) == "given"
        assert (taken / "file").read_text() == "new\n"

    def test_nothing_of_our_environment_and_network_is_there(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setenv("TCPSTUCK_TEST", "here")
        script = "tail -n +3 /proc/net/dev; env"
        said = run_in_tree(Path("/"), ["sh", "-c", script], readable=(tmp_path,), cwd=tmp_path)
        first, *others = said.splitlines()
        assert first.split(":")[0].strip() == "lo"
        names = {line.partition("=")[0] for line in others}
        assert {"PATH", "HOME"} < names
        assert "TCPSTUCK_TEST" not in names

    def test_programs_of_a_tree_are_compiled_there_and_why_not_is_told(
        self, tmp_path: Path
    ) -> None:
        # The image does not exist, which the program in the tree finds.
        image, repository = tmp_path / "vmlinuz", kernel_tests.REPOSITORY
        (why,) = programs.compile_in_tree(Path("/"), image, tmp_path / "kept", repository)
        assert "vmlinuz" in why
        assert stat.S_IMODE((tmp_path / "kept").stat().st_mode) == 0o700

    def test_a_tree_without_a_python_is_no_error(self, tmp_path: Path) -> None:
        (why,) = programs.compile_in_tree(
            tmp_path, tmp_path / "vmlinuz", tmp_path / "kept", kernel_tests.REPOSITORY
        )
        assert "python3" in why
