"""Directories of artifacts: kept, found again, and not used where others could have written."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from tcpstuck_bpf.errors import CannotTraceError
from tcpstuck_bpf.kernel import artifact, artifact_store, compilation, kept_files
from tcpstuck_bpf.kernel.artifact import Artifact, Program
from tcpstuck_bpf.kernel.artifact_store import BuiltPrograms, find_kept, keep
from tcpstuck_bpf.kernel.compilation import Compilation
from tcpstuck_bpf.kernel.kept_files import PROGRAMS, KeptFiles
from tests.unit.kernel.test_artifact import CODE, MAPS

WANTED = Compilation("struct sock;", ["-DPROBE_x"], "fentry", {}, "6.1.0-50-amd64")
SOMEBODY_ELSE = 12_345


def made(wanted: Compilation) -> Artifact:
    programs = (Program(artifact.FENTRY, "tcp_conn_request", CODE),)
    return Artifact(
        wanted.identity(),
        wanted.made_for,
        "BCC 0.26.0",
        wanted.mode,
        wanted.architecture,
        programs,
        MAPS,
    )


def kept(directory: Path, wanted: Compilation = WANTED) -> Path:
    """Keep one, and return its file."""
    before = set(directory.iterdir()) if directory.exists() else set()
    cache = KeptFiles(directory)
    keep(cache, wanted, artifact.encode(made(wanted)))
    assert cache.notes == []
    (path,) = set(directory.iterdir()) - before
    return path


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "tcpstuck-trace"


def test_what_was_kept_is_found_and_nothing_else(directory: Path) -> None:
    assert find_kept(KeptFiles(directory), WANTED) is None
    path = kept(directory)
    assert find_kept(KeptFiles(directory), WANTED) == made(WANTED)
    assert (directory.stat().st_mode & 0o777, path.stat().st_mode & 0o777) == (0o700, 0o600)


@pytest.mark.parametrize(
    "changed",
    [
        {"header": "struct sk_buff;"},
        {"flags": ["-DPROBE_y"]},
        {"mode": "kprobe"},
        {"kinds": {"packet_freed": "raw_tracepoint"}},
        {"compile_for": "arm64"},
    ],
)
def test_whatever_goes_into_the_programs_is_in_their_name(
    directory: Path, changed: dict[str, object]
) -> None:
    kept(directory)
    assert find_kept(KeptFiles(directory), replace(WANTED, **changed)) is None  # type: ignore[arg-type]


def test_another_text_or_compiler_finds_nothing(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept(directory)
    with monkeypatch.context() as other:
        other.setattr(compilation, "text_digest", lambda: b"another text")
        assert find_kept(KeptFiles(directory), WANTED) is None
    with monkeypatch.context() as other:
        other.setattr(compilation, "bcc_version", lambda: "0.99")
        assert find_kept(KeptFiles(directory), WANTED) is None
    assert find_kept(KeptFiles(directory), WANTED) is not None


def test_a_damaged_one_is_said_and_replaced(directory: Path) -> None:
    path = kept(directory)
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[:100], b"", whole.replace(b"6.1.0", b"6.1.1"), b"\0" * 9):
        path.write_bytes(damaged)
        cache = KeptFiles(directory)
        assert find_kept(cache, WANTED) is None
        assert [path.name in note for note in cache.notes] == [True]
        keep(cache, WANTED, whole)
        assert find_kept(KeptFiles(directory), WANTED) == made(WANTED)


def test_one_of_another_kind_under_this_name_is_not_used(directory: Path) -> None:
    path = kept(directory)
    path.write_bytes(artifact.encode(made(replace(WANTED, mode="kprobe"))))
    cache = KeptFiles(directory)
    assert find_kept(cache, WANTED) is None
    assert "other inputs" in cache.notes[0]


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o755, 0o701, 0o1777])
def test_a_directory_that_others_may_enter_is_not_used(directory: Path, mode: int) -> None:
    path = kept(directory)
    before = path.read_bytes()
    directory.chmod(mode)
    cache = KeptFiles(directory)
    assert find_kept(cache, WANTED) is None
    keep(cache, WANTED, b"other")
    assert len(cache.notes) == 1
    assert f"{mode:04o}" in cache.notes[0]
    assert path.read_bytes() == before
    assert cache.state()[0] is False


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_what_belongs_to_somebody_else_is_not_used(directory: Path) -> None:
    path = kept(directory)
    for one in (path, directory):
        os.chown(one, SOMEBODY_ELSE, -1)
        cache = KeptFiles(directory)
        assert find_kept(cache, WANTED) is None
        assert str(SOMEBODY_ELSE) in cache.notes[0]
        os.chown(one, 0, -1)
    assert find_kept(KeptFiles(directory), WANTED) is not None


def test_a_file_that_others_may_write_is_not_used(directory: Path) -> None:
    kept(directory).chmod(0o666)
    cache = KeptFiles(directory)
    assert find_kept(cache, WANTED) is None
    assert "0666" in cache.notes[0]


def test_links_and_pipes_are_not_followed(directory: Path, tmp_path: Path) -> None:
    path = kept(directory)
    elsewhere = tmp_path / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    assert find_kept(KeptFiles(directory), WANTED) is None
    path.unlink()
    os.mkfifo(path)
    assert find_kept(KeptFiles(directory), WANTED) is None
    path.unlink()
    directory.rmdir()
    directory.symlink_to(tmp_path)
    cache = KeptFiles(directory)
    assert find_kept(cache, WANTED) is None
    assert len(cache.notes) == 1


def test_where_nothing_can_be_written_nothing_is_kept_and_it_is_said(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    cache = KeptFiles(file / "tcpstuck-trace")
    keep(cache, WANTED, b"data")
    assert len(cache.notes) == 1
    assert cache.state()[0] is False


def test_the_ones_used_least_recently_make_room(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_files, "MOST_KEPT", 3)
    each = [replace(WANTED, header=f"struct s{number};") for number in range(5)]
    for age, one in enumerate(each[:3]):
        os.utime(kept(directory, one), (age, age))
    assert find_kept(KeptFiles(directory), each[0]) is not None  # used just now
    for one in each[3:]:
        keep(KeptFiles(directory), one, artifact.encode(made(one)))
    found = [find_kept(KeptFiles(directory), one) is not None for one in each]
    assert found == [True, False, False, True, True]


def test_the_bytes_have_a_bound_too(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = kept(directory).stat().st_size
    monkeypatch.setattr(kept_files, "MOST_KEPT_BYTES", 2 * size)
    for number in range(4):
        kept_bytes = sum(path.stat().st_size for path in directory.iterdir())
        assert kept_bytes <= 2 * size
        cache = KeptFiles(directory)
        wanted = replace(WANTED, header=f"struct s{number};")
        keep(cache, wanted, artifact.encode(made(wanted)))
        assert find_kept(cache, wanted) is not None


def test_what_a_killed_writer_left_is_removed(directory: Path) -> None:
    kept(directory)
    dead = directory / f"x{PROGRAMS}.{(1 << 22) + 1}.unfinished"
    alive = directory / f"y{PROGRAMS}.{os.getpid()}.unfinished"
    for path in (dead, alive):
        path.touch()
    keep(KeptFiles(directory), WANTED, artifact.encode(made(WANTED)))
    assert (dead.exists(), alive.exists()) == (False, True)


def test_root_has_a_directory_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert kept_files.cache_directory() == kept_files.ROOT_S_CACHE
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert kept_files.cache_directory() == Path("/somewhere/tcpstuck-trace")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert kept_files.cache_directory() == Path.home() / ".cache" / "tcpstuck-trace"


def built(directory: Path, *wanted: Compilation) -> None:
    directory.mkdir()
    for number, one in enumerate(wanted):
        (directory / f"{number}.programs").write_bytes(artifact.encode(made(one)))


def test_built_programs_are_found_whatever_built_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = replace(WANTED, header="struct other;", made_for="6.12.1")
    built(tmp_path / "built", other, WANTED)
    monkeypatch.setattr(compilation, "bcc_version", lambda: compilation.NO_BCC)
    assert BuiltPrograms(tmp_path / "built").find(WANTED) == made(WANTED)


def test_what_does_not_fit_is_refused_with_what_is_there(tmp_path: Path) -> None:
    other = replace(WANTED, header="struct other;", made_for="6.12.1")
    built(tmp_path / "built", other)
    (tmp_path / "built" / "broken.programs").write_bytes(b"broken")
    with pytest.raises(CannotTraceError) as raised:
        BuiltPrograms(tmp_path / "built").find(WANTED)
    assert "6.1.0-50-amd64" in raised.value.why
    assert "6.12.1, fentry" in raised.value.why
    assert "broken.programs" in raised.value.why
    assert "--build" in raised.value.remedy


def test_of_a_directory_without_end_a_part_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artifact_store, "MOST_BUILT", 2)
    others = [replace(WANTED, header=f"struct s{number};") for number in range(2)]
    built(tmp_path / "built", *others, WANTED)
    with pytest.raises(CannotTraceError) as raised:
        BuiltPrograms(tmp_path / "built").find(WANTED)
    assert "1 more were not read" in raised.value.why


def test_a_directory_of_built_programs_must_not_be_writable_by_others(tmp_path: Path) -> None:
    directory = tmp_path / "built"
    built(directory, WANTED)
    directory.chmod(0o755)
    assert BuiltPrograms(directory).find(WANTED) == made(WANTED)
    (directory / "0.programs").chmod(0o666)
    with pytest.raises(CannotTraceError, match="fit this kernel") as raised:
        BuiltPrograms(directory).find(WANTED)
    assert "0666" in raised.value.why
    directory.chmod(0o777)
    with pytest.raises(CannotTraceError, match="cannot be used"):
        BuiltPrograms(directory)
    with pytest.raises(CannotTraceError, match="cannot be used"):
        BuiltPrograms(tmp_path / "nowhere")
