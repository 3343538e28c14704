"""What is written as root: whole or not at all, and nowhere that a stranger has led it."""

from __future__ import annotations

import contextlib
import errno
import os
import pty
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tcpstuck_bpf import files
from tcpstuck_bpf.analysis import Analysis
from tcpstuck_bpf.app.ready_file import write_ready_file
from tcpstuck_bpf.conversions.capture import Capture
from tcpstuck_bpf.errors import RecordingError, TcpstuckError, UsageError
from tcpstuck_bpf.files import OutputFile, write_whole
from tcpstuck_bpf.host import programs
from tcpstuck_bpf.host.ruleset_child import _output
from tcpstuck_bpf.kernel import builder
from tcpstuck_bpf.recording.replay import Recorder
from tcpstuck_bpf.steps import Ended, TallyTaken
from tcpstuck_bpf.typeinfo import vmlinux
from tests.builders import at, header, tally

Write = Callable[[str], object]


def record(path: str) -> None:
    recorder = Recorder(path, header())
    recorder.write(TallyTaken(tally(at(0))))
    recorder.write(Ended(at(9), {}, ()))
    recorder.close()


def build(path: str) -> None:
    builder._write(Path(path), object())  # type: ignore[arg-type]


def capture(path: str) -> None:
    analysis = Analysis(header())
    made = Capture(path, analysis, ())
    for step in (TallyTaken(tally(at(0))), Ended(at(9), {}, ())):
        made.take(step, analysis.take(step))
    made.close()


@pytest.fixture(
    params=[record, write_ready_file, build, capture], ids=["record", "ready", "build", "capture"]
)
def write(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Each way in which the tool writes a file that the user names."""
    monkeypatch.setattr(builder, "compile_in_child", lambda _wanted: b"programs")
    chosen: Write = request.param
    return chosen


def test_a_symbolic_link_is_refused_and_what_it_leads_to_is_left(
    write: Write, tmp_path: Path
) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    for target in (victim, tmp_path / "missing", tmp_path):
        link = tmp_path / "link"
        link.symlink_to(target)
        with pytest.raises(UsageError) as refused:
            write(str(link))
        assert "symbolic link" in refused.value.why
        assert link.is_symlink()
        link.unlink()
    assert victim.read_bytes() == b"precious"
    assert sorted(one.name for one in tmp_path.iterdir()) == ["victim"]


def test_what_was_there_is_replaced_and_never_written_into(write: Write, tmp_path: Path) -> None:
    """A stranger may hold it open, or have it under another name."""
    path = tmp_path / "out"
    path.write_bytes(b"old")
    other = tmp_path / "other"
    other.hardlink_to(path) if hasattr(Path, "hardlink_to") else os.link(path, other)
    path.chmod(0o666)
    with path.open("rb") as held:
        write(str(path))
        assert held.read() == b"old"
    assert other.read_bytes() == b"old"
    assert path.read_bytes() != b"old"
    assert stat.S_IMODE(path.stat().st_mode) in (0o600, 0o644)
    assert not [one for one in tmp_path.iterdir() if one.name.startswith(".")]


def test_a_recording_is_for_its_owner_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        record(str(tmp_path / "run"))
        write_whole(str(tmp_path / "programs"), b"")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "run").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "programs").stat().st_mode) == 0o644


@pytest.mark.parametrize("kept", [b"", b"old"])
def test_where_there_is_no_room_nothing_appears_and_the_old_stays(
    kept: bytes, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out"
    if kept:
        path.write_bytes(kept)

    def full(file: OutputFile, data: bytes) -> None:
        os.write(file.descriptor, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(OutputFile, "write", full)
    with contextlib.suppress(TcpstuckError):
        write(str(path))
    found = {one.name: one.read_bytes() for one in tmp_path.iterdir()}
    assert found == ({"out": kept} if kept else {})


def test_a_short_write_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda number, data: real(number, bytes(data)[:3]))
    write_whole(str(tmp_path / "out"), b"0123456789")
    assert (tmp_path / "out").read_bytes() == b"0123456789"


def test_a_recording_has_its_header_as_soon_as_it_has_its_name(tmp_path: Path) -> None:
    (tmp_path / "run").write_bytes(b"an older one")
    recorder = Recorder(str(tmp_path / "run"), header())
    lines = (tmp_path / "run").read_bytes().splitlines(keepends=True)
    assert len(lines) == 1
    recorder.write(TallyTaken(tally(at(0))))
    lines = (tmp_path / "run").read_bytes().splitlines(keepends=True)
    assert len(lines) == 2
    assert lines[-1].endswith(b"\n")
    recorder.close()


@pytest.fixture
def device() -> Iterator[str]:
    """A terminal of our own: where it is, no file can be made, were it taken for one."""
    ours, theirs = pty.openpty()
    yield os.ttyname(theirs)
    os.close(theirs)
    os.close(ours)


def test_a_device_is_written_to_and_stays(write: Write, device: str) -> None:
    before = Path(device).stat()
    write(device)
    after = Path(device).stat()
    assert stat.S_ISCHR(after.st_mode)
    assert (before.st_ino, before.st_mode) == (after.st_ino, after.st_mode)


def test_a_named_pipe_is_written_to_and_stays(write: Write, tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    came: list[bytes] = []
    reader = threading.Thread(target=lambda: came.append(path.read_bytes()))
    reader.start()
    write(str(path))
    reader.join(60)
    assert len(came[0]) > 1
    assert path.is_fifo()


def test_a_descriptor_of_our_own_is_no_link_of_a_strangers(tmp_path: Path) -> None:
    """`--record >(zstd > run.zst)` names one."""
    with (tmp_path / "run").open("wb") as file:
        for form in ("/dev/fd/{}", "/proc/self/fd/{}"):
            record(form.format(file.fileno()))
    assert (tmp_path / "run").read_bytes().count(b'"format"') == 2
    with pytest.raises(RecordingError, match="cannot record"):
        record("/dev/fd/999999")


def test_a_pipe_that_a_stranger_has_put_there_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    monkeypatch.setattr(files, "_own_users", lambda: {-1})
    real = Path.stat

    def elses(place: Path, **how: bool) -> os.stat_result:
        state = list(real(place, **how))
        if place == tmp_path:
            state[stat.ST_MODE] |= stat.S_ISVTX | stat.S_IWOTH
            state[stat.ST_UID] += 1
        return os.stat_result(state)

    monkeypatch.setattr(Path, "stat", elses)
    with pytest.raises(RecordingError) as refused:
        record(str(path))
    assert "another user's pipe" in refused.value.why


def test_who_became_root_by_sudo_may_have_made_the_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUDO_UID", "1234")
    assert 1234 in files._own_users()
    monkeypatch.setenv("SUDO_UID", "-1")
    assert files._own_users() == {0, os.geteuid()}


def test_a_disk_is_no_place_for_a_recording(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    state = list(Path(device).lstat())
    state[stat.ST_MODE] = stat.S_IFBLK | 0o600
    monkeypatch.setattr(Path, "lstat", lambda _: os.stat_result(state))
    with pytest.raises(RecordingError) as refused:
        record(device)
    assert "a disk" in refused.value.why


def hostile_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *names: str) -> Path:
    """A directory that comes first in PATH, with programs that leave a mark."""
    mark = tmp_path / "mark"
    for name in names:
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\ntouch {mark}\n")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return mark


def test_programs_come_from_fixed_places_whatever_path_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = hostile_path(tmp_path, monkeypatch, "nft", "true", "iptables-legacy-save", "zstd")
    for name in ("nft", "true", "iptables-legacy-save", "zstd"):
        found = programs.find_program(name)
        assert found is None or str(Path(found).parent) in programs.PLACES
    assert programs.find_program("no-such-program") is None
    assert _output(["true"]) == ""
    image = tmp_path / "vmlinuz"
    image.write_bytes(b"\x28\xb5\x2f\xfd" + bytes(100))
    with pytest.raises(TcpstuckError):
        vmlinux.read_image(str(image))
    assert not mark.exists()


def test_programs_see_nothing_of_our_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XTABLES_LIBDIR", str(tmp_path))
    monkeypatch.setenv("LD_PRELOAD", "")
    assert sorted(_output(["env"]).splitlines()) == [
        "LC_ALL=C",
        f"PATH={':'.join(programs.PLACES)}",
    ]


@pytest.mark.parametrize("text", ["shutil.which", "os.system", "shell=True", "os.popen", "execlp"])
def test_no_program_is_looked_for_by_path(text: str) -> None:
    for source in Path(files.__file__).parent.rglob("*.py"):
        assert text not in source.read_text("utf-8"), source
