"""A directory of files that one start keeps for the next.

Its files decide what root loads into the kernel, so a directory or file that anybody else could
have written is not used. Every file is opened relative to the checked directory.
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
"""Limits of the cache; beyond them the least recently used files are removed."""
PROGRAMS = ".programs"
FACTS = ".kernel"
_UNFINISHED = ".unfinished"
OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH


class UnsafeError(Exception):
    """Another user could have written the file or directory; the text says how."""


def cache_directory() -> Path:
    """Directory of the kept files: root's own, or the XDG cache directory of another user."""
    if os.geteuid() == 0:
        return ROOT_S_CACHE
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base.startswith("/") else Path.home() / ".cache") / "tcpstuck-trace"


def _trusted(state: os.stat_result, forbidden: int) -> None:
    """Raises UnsafeError if the owner is not us or root, or a forbidden mode bit is set."""
    if state.st_uid not in (os.geteuid(), 0):
        raise UnsafeError(f"it belongs to user {state.st_uid}")
    if state.st_mode & forbidden:
        raise UnsafeError(f"its mode is {stat.S_IMODE(state.st_mode):04o}")


def open_directory(path: Path, forbidden: int) -> int:
    """Open a directory that nobody else could have written. Raises OSError and UnsafeError."""
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        _trusted(os.fstat(directory), forbidden)
    except UnsafeError:
        os.close(directory)
        raise
    return directory


def read_file(directory: int, name: str) -> bytes:
    """Read a file. Raises OSError, UnsafeError, and DamagedError if it is not a regular file."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with os.fdopen(os.open(name, flags, dir_fd=directory), "rb") as file:
        state = os.fstat(file.fileno())
        if not stat.S_ISREG(state.st_mode):
            raise DamagedError("it is not a regular file")
        _trusted(state, OTHERS_MAY_WRITE)
        return file.read(artifact.MOST_BYTES + 1)


class KeptFiles:
    """The cache directory. A problem with it becomes a note and stops nothing."""

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
        """The content kept under a name; None if there is no usable one.

        `decode` raises DamagedError for invalid bytes.
        """
        try:
            with self._opened() as directory:
                found = decode(read_file(directory, name))
                # The modification time is the time of the last use.
                os.utime(name, dir_fd=directory, follow_symlinks=False)
                return found
        except FileNotFoundError:
            return None
        except DamagedError as error:
            self.notes.append(f"{self.path / name} is not used, but made again: {error}")
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
            note += "; make it ours alone (chmod 0700), or remove it"
        if note not in self.notes:
            self.notes.append(note)

    def state(self) -> tuple[bool, str]:
        """Whether the cache can be used, and its state as text."""
        try:
            with self._opened() as directory:
                sizes = [size for _, size, _ in _kept(directory)]
        except FileNotFoundError:
            return True, f"{self.path} does not exist yet"
        except (OSError, UnsafeError) as error:
            why = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
            return False, f"{self.path}: {why}"
        return True, f"{self.path} holds {len(sizes)} files, {sum(sizes) >> 10} KiB"


def names(directory: int) -> list[str]:
    """All names in an open directory."""
    with os.scandir(directory) as entries:
        return [entry.name for entry in entries]


def _kept(directory: int) -> list[tuple[float, int, str]]:
    """Time of the last use, size in bytes and name of each file; the oldest first."""
    found = []
    for name in names(directory):
        with contextlib.suppress(OSError):
            state = os.stat(name, dir_fd=directory, follow_symlinks=False)
            if stat.S_ISREG(state.st_mode):
                found.append((state.st_mtime, state.st_size, name))
    return sorted(found)


def _make_room(directory: int, size: int) -> None:
    """Remove the least recently used files, and unfinished files of dead writers."""
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
    """Remove a file; another process may have done so."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=directory)


def _writer_lives(name: str) -> bool:
    process = name[: -len(_UNFINISHED)].rsplit(".", 1)[-1]
    return Path("/proc", process).exists()
