"""A directory of files that one start keeps for the next.

What is found there decides what root loads into the kernel, so a directory or a file that anybody
else could have written is not used. Everything is opened relative to the directory that was looked
at.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from tcpstuck_bpf.kernel import artifact
from tcpstuck_bpf.kernel.artifact import DamagedError

Content = TypeVar("Content")

ROOT_S_CACHE = Path("/var/cache/tcpstuck-trace")
MOST_KEPT = 64
MOST_KEPT_BYTES = 16 << 20
"""Where more are kept, those that were used least recently are removed."""
PROGRAMS = ".programs"
FACTS = ".kernel"
_UNFINISHED = ".unfinished"
OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH


class UnsafeError(Exception):
    """Others than we could have written it; the text says how."""


def cache_directory() -> Path:
    """Where files are kept: root's own directory, of others the one that XDG names."""
    if os.geteuid() == 0:
        return ROOT_S_CACHE
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base.startswith("/") else Path.home() / ".cache") / "tcpstuck-trace"


def _trusted(state: os.stat_result, forbidden: int) -> None:
    """Raises UnsafeError for what belongs to somebody else, or has a mode bit that is forbidden."""
    if state.st_uid not in (os.geteuid(), 0):
        raise UnsafeError(f"it belongs to user {state.st_uid}")
    if state.st_mode & forbidden:
        raise UnsafeError(f"its mode is {stat.S_IMODE(state.st_mode):04o}")


def open_directory(path: Path, forbidden: int) -> int:
    """Raises OSError, and UnsafeError."""
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        _trusted(os.fstat(directory), forbidden)
    except UnsafeError:
        os.close(directory)
        raise
    return directory


def read_file(directory: int, name: str) -> bytes:
    """A file of the directory. Raises OSError, UnsafeError, and DamagedError where it is none."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with os.fdopen(os.open(name, flags, dir_fd=directory), "rb") as file:
        state = os.fstat(file.fileno())
        if not stat.S_ISREG(state.st_mode):
            raise DamagedError("it is no file")
        _trusted(state, OTHERS_MAY_WRITE)
        return file.read(artifact.MOST_BYTES + 1)


class KeptFiles:
    """The directory. Whatever is wrong with it is a note, and no obstacle."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.notes: list[str] = []

    @contextlib.contextmanager
    def _opened(self) -> Iterator[int]:
        directory = open_directory(self.path, 0o077)
        try:
            yield directory
        finally:
            os.close(directory)

    def find(self, name: str, decode: Callable[[bytes], Content]) -> Content | None:
        """What was kept under a name; None where nothing was, or nothing that can be used.

        `decode` raises DamagedError where the bytes are not what they should be.
        """
        try:
            with self._opened() as directory:
                found = decode(read_file(directory, name))
                # The time says when it was used last.
                os.utime(name, dir_fd=directory, follow_symlinks=False)
                return found
        except FileNotFoundError:
            return None
        except DamagedError as error:
            self.notes.append(f"{self.path / name} is not used, and made anew: {error}")
        except (OSError, UnsafeError) as error:
            self._note(error)
        return None

    def keep(self, name: str, data: bytes) -> None:
        """Keep a file for the next start: whole or not at all."""
        unfinished = f"{name}.{os.getpid()}{_UNFINISHED}"
        try:
            with contextlib.suppress(FileExistsError):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.path.mkdir(mode=0o700)
            with self._opened() as directory:
                _make_room(directory, len(data))
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
                try:
                    opened = os.open(unfinished, flags, 0o600, dir_fd=directory)
                    with os.fdopen(opened, "wb") as file:
                        file.write(data)
                    os.rename(unfinished, name, src_dir_fd=directory, dst_dir_fd=directory)
                except BaseException:
                    _remove(directory, unfinished)
                    raise
        except (OSError, UnsafeError) as error:
            self._note(error)

    def _note(self, error: OSError | UnsafeError) -> None:
        why = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
        note = f"nothing is kept for the next start: {self.path}: {why}"
        if isinstance(error, UnsafeError):
            note += "; it must be ours alone (chmod 0700), or removed"
        if note not in self.notes:
            self.notes.append(note)

    def state(self) -> tuple[bool, str]:
        """Whether it can be used, and what it holds, in words."""
        try:
            with self._opened() as directory:
                sizes = [size for _, size, _ in _kept(directory)]
        except FileNotFoundError:
            return True, f"{self.path} does not exist yet"
        except (OSError, UnsafeError) as error:
            why = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
            return False, f"{self.path}: {why}"
        return True, f"{self.path} holds {len(sizes)}, {sum(sizes) >> 10} KiB"


def names(directory: int) -> list[str]:
    """All names in a directory that is open."""
    with os.scandir(directory) as entries:
        return [entry.name for entry in entries]


def _kept(directory: int) -> list[tuple[float, int, str]]:
    """Time of the last use, bytes and name of each file there; the oldest first."""
    found = []
    for name in names(directory):
        with contextlib.suppress(OSError):
            state = os.stat(name, dir_fd=directory, follow_symlinks=False)
            if stat.S_ISREG(state.st_mode):
                found.append((state.st_mtime, state.st_size, name))
    return sorted(found)


def _make_room(directory: int, size: int) -> None:
    """Remove what was used least recently, and what writers that are dead have left."""
    kept = []
    for time, length, name in _kept(directory):
        if name.endswith(_UNFINISHED) and not _writer_lives(name):
            _remove(directory, name)
        elif name.endswith((PROGRAMS, FACTS)):
            kept.append((time, length, name))
    total = size + sum(length for _, length, _ in kept)
    for position, (_, length, name) in enumerate(kept):
        if total <= MOST_KEPT_BYTES and len(kept) - position < MOST_KEPT:
            return
        _remove(directory, name)
        total -= length


def _remove(directory: int, name: str) -> None:
    """Another process may have done so."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=directory)


def _writer_lives(name: str) -> bool:
    process = name[: -len(_UNFINISHED)].rsplit(".", 1)[-1]
    return Path("/proc", process).exists()
