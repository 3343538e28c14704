"""The compiler's child process: what it says is understood, whatever it does."""

from __future__ import annotations

import importlib
import json
import os
import select
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tcpstuck_bpf.errors import CannotTraceError
from tcpstuck_bpf.kernel import compilation
from tcpstuck_bpf.kernel.compilation import Compilation, CompilerError, compile_in_child

LIMIT_S = 60.0
WANTED = Compilation("struct sock;", [], "kprobe", {}, "a test")
RAISING = "class BPF:\n    def __init__(self, **_): raise Exception('no such thing')"
EVIL = "raise SystemExit('what lies in the current directory was run')"


def test_every_file_of_the_program_text_is_compiled() -> None:
    files = {path.name for path in compilation.program_directory().glob("*.bpf.c")}
    assert set(compilation.PROGRAM_TEXTS) == files


def place_bcc(directory: Path, body: str, version: str | None = "0.99") -> None:
    package = directory / "bcc"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(body)
    if version is not None:
        (package / "version.py").write_text(f"__version__ = '{version}'\n")


@pytest.fixture(autouse=True)
def _forget_what_was_found(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    compilation._find_bcc.cache_clear()
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "bcc", raising=False)
    importlib.invalidate_caches()
    yield
    compilation._find_bcc.cache_clear()


@pytest.fixture
def bcc_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A directory that is looked through first for the module bcc."""
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_bcc_s_version_is_found_without_importing_it(bcc_first: Path) -> None:
    place_bcc(bcc_first, "raise AssertionError('imported')")
    assert compilation.bcc_version() == "0.99"
    assert compilation.require_bcc() == f"0.99 ({bcc_first / 'bcc'})"
    assert "bcc" not in sys.modules


def test_without_bcc_the_package_to_install_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bcc", None)
    assert compilation.bcc_version() == compilation.NO_BCC
    with pytest.raises(CannotTraceError) as raised:
        compile_in_child(WANTED)
    assert "python3-bpfcc" in raised.value.remedy


def test_the_package_of_that_name_on_pypi_is_recognized(bcc_first: Path) -> None:
    place_bcc(bcc_first, "", version=None)
    with pytest.raises(CannotTraceError) as raised:
        compile_in_child(WANTED)
    assert "BPF" in raised.value.why
    assert "PyPI" in raised.value.remedy


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (
            "class BPF:\n    def __init__(self, **_): raise Exception('no such thing')",
            "no such thing",
        ),
        ("import os; os.write(2, b'main.c:7: error: odd\\n'); os._exit(9)", "main.c:7: error: odd"),
        ("import os; os._exit(9)", "it printed nothing"),
        ("import os; os.kill(os.getpid(), 11)", "signal 11"),
        ("import os; os._exit(0)", "damaged"),
        ("raise RuntimeError('half installed')", "half installed"),
    ],
)
def test_however_the_compiler_ends_it_is_one_line(bcc_first: Path, body: str, told: str) -> None:
    place_bcc(bcc_first, body)
    with pytest.raises(CompilerError) as raised:
        compile_in_child(WANTED)
    assert told in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_compiler_that_hangs_is_ended(
    bcc_first: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    own = tmp_path / "process"
    place_bcc(
        bcc_first,
        f"import os, signal\nopen({str(own)!r}, 'w').write(str(os.getpid()))\nsignal.pause()",
    )
    monkeypatch.setattr(compilation, "COMPILE_LIMIT_S", 5.0)
    with pytest.raises(CompilerError, match="did not end"):
        compile_in_child(WANTED)
    assert not Path("/proc", own.read_text()).exists()


def test_the_compiler_does_not_outlive_who_started_it(bcc_first: Path, tmp_path: Path) -> None:
    """Killed, the tool can end nothing any more."""
    own = tmp_path / "process"
    os.mkfifo(own)
    place_bcc(
        bcc_first,
        f"import os, signal\nopen({str(own)!r}, 'w').write(str(os.getpid()))\nsignal.pause()",
    )
    starting = (
        "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
        "from tcpstuck_bpf.kernel.compilation import Compilation, compile_in_child; "
        "compile_in_child(Compilation('', [], 'kprobe', {}, 'a test'))"
    )
    starter = subprocess.Popen([sys.executable, "-c", starting, json.dumps(sys.path)])
    compiler = os.pidfd_open(int(own.read_text()))
    try:
        starter.kill()
        starter.wait(LIMIT_S)
        readable, _, _ = select.select([compiler], [], [], LIMIT_S)
    finally:
        os.close(compiler)
    assert readable


def test_nothing_of_the_current_directory_is_run(
    bcc_first: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Root may start the tool in a directory that belongs to another user."""
    place_bcc(bcc_first, "import os; os._exit(9)")
    elsewhere = tmp_path / "elsewhere"
    for name in ("json", "ctypes", "tcpstuck_bpf", "bcc", "sitecustomize"):
        (elsewhere / name).mkdir(parents=True)
        (elsewhere / name / "__init__.py").write_text(EVIL)
    root = str(Path(compilation.__file__).parents[2])
    monkeypatch.setattr(sys, "path", [root, *(path for path in sys.path if path)])
    monkeypatch.chdir(elsewhere)
    with pytest.raises(CompilerError, match="it printed nothing"):
        compile_in_child(WANTED)


def test_what_is_compiled_for_whom_is_in_the_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARCH", "s390")
    other = Compilation("struct sock;", [], "kprobe", {}, "another kernel of the same structs")
    assert other.identity() == WANTED.identity()
    assert other.architecture == os.uname().machine
    arm = Compilation("struct sock;", [], "kprobe", {}, "a test", "arm64")
    assert (arm.architecture, arm.identity() != WANTED.identity()) == ("aarch64", True)
