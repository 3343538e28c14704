"""What is wrong with an option's file is told before the machine is looked at."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tcpstuck_bpf import files
from tcpstuck_bpf.cli import main
from tcpstuck_bpf.errors import EXIT_CANNOT_TRACE, EXIT_USAGE
from tcpstuck_bpf.kernel.kept_files import PROGRAMS


@pytest.fixture(autouse=True)
def no_privileges(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that refuses to trace, whoever asks."""
    monkeypatch.setattr("tcpstuck_bpf.kernel.features._effective_capabilities", lambda: 0)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory with what may be in the way."""
    (tmp_path / "file").write_text("no kernel")
    (tmp_path / "directory").mkdir()
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "dangling").symlink_to("nothing")
    return tmp_path


@pytest.mark.parametrize("option", ["--record", "--ready-file"])
@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("missing/file", "there is no directory"),
        ("file/below", "is no directory"),
        ("directory", "Is a directory"),
        ("link", "symbolic link"),
        ("dangling", "symbolic link"),
    ],
)
def test_a_file_that_cannot_be_written_is_wrong_use(
    option: str, name: str, why: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([option, str(place / name)]) == EXIT_USAGE
    err = capsys.readouterr().err
    assert err.startswith(f"tcpstuck-trace: {option} {place / name}")
    assert why in err.splitlines()[1]


@pytest.mark.parametrize("option", ["--record", "--ready-file"])
def test_standard_output_is_not_what_a_file_is_written_to(
    option: str, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """--replay - reads standard input, so people try it."""
    monkeypatch.chdir(place)
    assert main([option, "-"]) == EXIT_USAGE
    assert "standard output is for the verdicts" in capsys.readouterr().err.splitlines()[1]
    assert not (place / "-").exists()


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--programs", "missing"], "No such file"),
        (["--programs", "file"], "Not a directory"),
        (["--programs", "directory"], f"no file there ends with {PROGRAMS}"),
        (["--vmlinux", "missing"], "No such file"),
        (["--vmlinux", "directory"], "no regular file"),
        (["--build", "file"], "is no directory"),
        (["--build", "file/below"], "is no directory"),
        (["--build", "new", "--vmlinux", "missing"], "No such file"),
        (["--build", "new", "--vmlinux", "file", "--vmlinux", "missing"], "No such file"),
        (["--doctor", "--vmlinux", "file", "--against", "missing"], "No such file"),
    ],
)
def test_what_is_to_be_read_or_made_and_cannot_be_is_wrong_use(
    words: list[str],
    why: str,
    place: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(place)
    assert main(words) == EXIT_USAGE
    assert why in capsys.readouterr().err.splitlines()[1]
    assert not (place / "new").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["--record", "new"],
        ["--record", "file"],
        ["--record", "/dev/null"],
        ["--record", "/dev/stdout"],
        ["--ready-file", "directory/new"],
        ["--build", "new/below"],
        ["--build", "directory"],
    ],
)
def test_what_may_be_written_is_not_touched_and_the_machine_is_told(
    words: list[str],
    place: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(place)
    before = sorted(path.name for path in place.rglob("*"))
    assert main(words) == EXIT_CANNOT_TRACE
    assert "root" in capsys.readouterr().err
    assert sorted(path.name for path in place.rglob("*")) == before
    assert (place / "file").read_text() == "no kernel"


@pytest.mark.parametrize("name", ["new", "file", "directory", "link", "missing/file", "file/below"])
def test_a_look_says_what_writing_would(name: str, place: Path) -> None:
    """The same answer as the one that decides."""
    path = str(place / name)
    told = files.obstacle(path)
    failed = False
    try:
        files.write_whole(path, b"")
    except OSError:
        failed = True
    assert (told is not None) == failed


def test_a_directory_that_may_not_be_written_is_told(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may write anywhere, so what the kernel would say of others is played."""

    def refuse(path: object, mode: int, **_how: object) -> bool:
        return not (str(path) == str(place) and mode & os.W_OK)

    monkeypatch.setattr(os, "access", refuse)
    assert files.obstacle(str(place / "new")) == f"{place} may not be written to"
