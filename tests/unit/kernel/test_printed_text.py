"""`--print-bpf`: what is printed is what would be compiled, for any user and without BCC."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

import pytest

from tcpstuck_bpf import __version__
from tcpstuck_bpf.cli import main
from tcpstuck_bpf.errors import EXIT_NOTHING_STUCK, EXIT_USAGE, CannotTraceError
from tcpstuck_bpf.host import kallsyms
from tcpstuck_bpf.kernel import builder, compilation, features
from tcpstuck_bpf.kernel.attach_plan import AttachRequest
from tcpstuck_bpf.kernel.compilation import Compilation
from tcpstuck_bpf.kernel.layout import find_layout, header_text
from tcpstuck_bpf.kernel.printed_text import printed_text
from tcpstuck_bpf.kernel.probes import EVERY_PROBE
from tcpstuck_bpf.typeinfo import btf
from tests.btf_writer import kernel

TEXT = compilation.program_text(compilation.program_directory()).decode("ascii")
WITHOUT_BCC = """
import sys
sys.modules["bcc"] = None
from tcpstuck_bpf.cli import main
from tcpstuck_bpf.kernel.features import held_capabilities
sys.exit(main(["--print-bpf"]) or bool(held_capabilities()))
"""
LIMIT_S = 60


@pytest.fixture
def every_symbol(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that has every function."""

    def read_symbols(
        functions: Collection[str], _data_symbol: str
    ) -> tuple[frozenset[str], int | None]:
        return frozenset(functions), None

    monkeypatch.setattr(kallsyms, "read_symbols", read_symbols)


def printed(request: AttachRequest, mode: str = "kprobe") -> str:
    return "".join(f"{line}\n" for line in printed_text(request, mode))


def flags_in(text: str) -> set[str]:
    return {word for word in text.split() if word.startswith("-D")}


@pytest.mark.usefixtures("every_symbol")
def test_the_header_comes_first_and_then_the_whole_text() -> None:
    types = kernel().btf()
    text = printed(AttachRequest(types))
    header = header_text(find_layout(types, 1))
    assert 0 < text.index(header) < text.index(TEXT)
    assert text.endswith(TEXT)
    assert text.startswith(f"/* tcpstuck-trace {__version__}, for Linux ")
    between = text[text.index(header) + len(header) : text.index(TEXT)]
    defines = [line for line in between.splitlines() if line.startswith("#define REASON_")]
    assert between.splitlines()[-1] == "/* the program text: */"
    assert len(between.splitlines()) == len(defines) + 1


@pytest.mark.usefixtures("every_symbol")
@pytest.mark.parametrize("rescue", [False, True])
@pytest.mark.parametrize("why", [False, True])
@pytest.mark.parametrize("mode", ["fentry", "kprobe"])
def test_options_choose_the_flags(rescue: bool, why: bool, mode: str) -> None:
    request = AttachRequest(kernel().btf(), rescue=rescue, why=why)
    flags = flags_in(printed(request, mode))
    assert flags == {f"-DPROBE_{probe.function}" for probe in request.probes} | (
        {"-DTCPSTUCK_FENTRY"} if mode == "fentry" else set()
    )
    assert len(request.probes) == len(EVERY_PROBE) - 2 * (not rescue) - (not why)


@pytest.mark.usefixtures("every_symbol")
def test_a_kernel_without_types_has_no_header_and_the_comment_says_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(btf, "RUNNING_KERNEL", str(tmp_path / "*/vmlinux"))
    text = printed(AttachRequest())
    assert text.endswith(TEXT)
    assert "-D" not in text[: -len(TEXT)]
    told = " ".join(text[: -len(TEXT)].split())
    assert "KERNEL_LAYOUT_H is missing: this kernel provides no BTF: " in told
    # The path in it does not end the comment.
    assert told.count("*/") == 3


def test_a_kernel_without_readable_symbols_is_told_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_of: object) -> None:
        raise CannotTraceError("the kernel's symbol table cannot be read", "no /proc", "mount it")

    monkeypatch.setattr(kallsyms, "read_symbols", refuse)
    assert "symbol table cannot be read: no /proc */" in printed(AttachRequest(kernel().btf()))


def test_it_is_what_a_build_for_this_kernel_compiles(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The builder decides by itself, and what it hands to the compiler is the oracle."""
    if not os.access(btf.RUNNING_KERNEL, os.R_OK):
        pytest.skip(f"{btf.RUNNING_KERNEL} cannot be read")
    compiled: list[Compilation] = []

    def compile_in_child(wanted: Compilation) -> bytes:
        compiled.append(wanted)
        return b""

    monkeypatch.setattr(builder, "compile_in_child", compile_in_child)
    monkeypatch.setattr(features, "require_privileges", lambda: None)
    request = AttachRequest()
    try:
        list(builder.build(tmp_path, [], request))
    except CannotTraceError as error:
        pytest.skip(error.what)
    assert compiled
    for wanted in compiled:
        text = printed(request, wanted.mode)
        assert wanted.header in text
        assert flags_in(text) == set(wanted.all_flags)


def test_neither_privileges_nor_bcc_are_needed() -> None:
    # Root without capabilities may still read the tree that it owns.
    without = ["--securebits=+noroot", "--inh-caps=-all", "--bounding-set=-all"]
    setpriv = ["setpriv", *without] if os.geteuid() == 0 else []
    done = subprocess.run(
        [*setpriv, sys.executable, "-c", WITHOUT_BCC],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert (done.returncode, done.stderr) == (EXIT_NOTHING_STUCK, "")
    assert done.stdout.endswith(TEXT)


@pytest.mark.parametrize(
    "words",
    [
        ["-p", "25"],
        ["--json"],
        ["-v"],
        ["--all"],
        ["--record", "run"],
        ["--replay", "run"],
        ["--doctor"],
        ["--build", "built"],
        ["--programs", "built"],
        ["--explain"],
        ["--dry-run"],
        ["--no-cache"],
        ["--strict"],
        ["--netns", "web"],
    ],
)
def test_what_makes_no_sense_beside_it_is_refused(
    words: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["--print-bpf", *words]) == EXIT_USAGE
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 3)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_no_kernel_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = str(tmp_path / "vmlinux")
    assert main(["--print-bpf", "--vmlinux", missing]) == EXIT_USAGE
    assert f"cannot read {missing}" in capsys.readouterr().err
