"""Writes files, mostly as root: whole or not at all, and never through a symbolic link.

Anybody who can write to a directory such as /tmp can put a symbolic link, a file or a named pipe
where root will write next. So a new file is made under an unpredictable name (O_EXCL, O_NOFOLLOW)
in the opened target directory, and then renamed. An existing file is replaced, never written into,
so hard links to it are not touched. A symbolic link is refused, because whoever made it expects it
to be followed.

An existing device or named pipe is written to directly, and so is a descriptor of our own, such as
the shell's >( ). A named pipe that a stranger could have made is refused.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
from pathlib import Path

_OWN_DESCRIPTOR = re.compile(r"/dev/(?:(std(?:out|err))|fd/(\d{1,9}))|/proc/self/fd/(\d{1,9})")
_STANDARD = {"stdout": 1, "stderr": 2}


class OutputFile:
    """A file for writing; `appear` gives it its name.

    `mode` is the mode of a new file. Raises OSError if it cannot be created.
    """

    def __init__(self, path: str, mode: int) -> None:
        place = Path(path)
        self._name = place.name
        self._unfinished: str | None = None
        self._directory: int | None = None
        existing = _existing(path)
        if existing is not None:
            self.descriptor = existing
            return
        self._directory = os.open(place.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self._unfinished = f".tcpstuck-{os.getpid()}-{os.urandom(8).hex()}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            self.descriptor = os.open(self._unfinished, flags, mode, dir_fd=self._directory)
        except OSError:
            os.close(self._directory)
            raise
        if mode & ~stat.S_IRWXU:
            # A mode with bits for others holds despite the umask; some file systems have no modes.
            with contextlib.suppress(PermissionError):
                os.fchmod(self.descriptor, mode)

    @property
    def is_new(self) -> bool:
        """Whether this is a new file that has not got its name yet."""
        return self._unfinished is not None

    def write(self, data: bytes | bytearray) -> None:
        """Write all of `data`. Raises OSError, possibly after a part was written."""
        view = memoryview(data)
        while view:
            view = view[os.write(self.descriptor, view) :]

    def appear(self) -> None:
        """Rename the file to its name, replacing an existing file. Raises OSError."""
        if self._unfinished is None or self._directory is None:
            return
        os.rename(
            self._unfinished,
            self._name,
            src_dir_fd=self._directory,
            dst_dir_fd=self._directory,
        )
        self._unfinished = None

    def close(self) -> None:
        """Close the file, and remove it if it has not appeared. Raises OSError."""
        if self._directory is not None:
            if self._unfinished is not None:
                with contextlib.suppress(OSError):
                    os.unlink(self._unfinished, dir_fd=self._directory)
            os.close(self._directory)
            self._directory = self._unfinished = None
        os.close(self.descriptor)


def write_whole(path: str, data: bytes, mode: int = 0o644) -> None:
    """Write a file with this content, whole or not at all. Raises OSError."""
    file = OutputFile(path, mode)
    try:
        file.write(data)
        file.appear()
    finally:
        file.close()


def _existing(path: str) -> int | None:
    """A descriptor of an existing device or pipe, or of our own; None for a regular or new file."""
    own = _OWN_DESCRIPTOR.fullmatch(path)
    if own is not None:
        name, *numbers = own.groups()
        return os.dup(int(numbers[0] or numbers[1] or _STANDARD[name or "stdout"]))
    try:
        state = Path(path).lstat()
    except FileNotFoundError:
        return None
    refused = _refusal(path, state)
    if refused is not None:
        raise refused
    if stat.S_ISREG(state.st_mode):
        return None
    flags = os.O_WRONLY | os.O_NOFOLLOW | os.O_NOCTTY | os.O_CLOEXEC
    opened = os.open(path, flags)
    now = os.fstat(opened)
    if (now.st_dev, now.st_ino) != (state.st_dev, state.st_ino):
        os.close(opened)
        raise OSError(errno.ESTALE, "it was replaced while it was opened")
    return opened


def _refusal(path: str, state: os.stat_result) -> OSError | None:
    kind = stat.S_IFMT(state.st_mode)
    if kind == stat.S_IFLNK:
        return OSError(errno.ELOOP, "it is a symbolic link, which is not followed")
    if kind == stat.S_IFDIR:
        return IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if kind == stat.S_IFBLK:
        return OSError(errno.EINVAL, "it is a disk, not a file")
    if kind == stat.S_IFIFO and state.st_uid not in _own_users():
        # The rule of fs.protected_fifos (Documentation/admin-guide/sysctl/fs.rst) for O_CREAT.
        around = Path(path).parent.stat()
        shared = stat.S_ISVTX | stat.S_IWOTH
        if around.st_mode & shared == shared and state.st_uid != around.st_uid:
            return PermissionError(errno.EACCES, "another user's pipe in a shared directory")
    return None


def _own_users() -> set[int]:
    """Root, ourselves, and the user who ran sudo."""
    by_sudo = os.environ.get("SUDO_UID", "")
    return {0, os.geteuid(), *([int(by_sudo)] if by_sudo.isdecimal() else [])}


def obstacle(path: str) -> str | None:
    """Why no file can be written there, as far as a look tells; None where nothing is in the way.

    Nothing is made or opened: whether it can be written is known once it is.
    """
    own = _OWN_DESCRIPTOR.fullmatch(path)
    if own is not None:
        return None
    place = Path(path)
    try:
        state = place.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return _no_room_in(place.parent)
    except OSError as error:
        return str(error.strerror)
    refused = _refusal(path, state)
    if refused is not None:
        return str(refused.strerror)
    return _no_room_in(place.parent) if stat.S_ISREG(state.st_mode) else None


def directory_obstacle(path: str) -> str | None:
    """Why nothing can be written below a directory, which may be one that is still to be made."""
    place = Path(path).absolute()
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    return _no_room_in(place)


def _no_room_in(directory: Path) -> str | None:
    if not directory.is_dir():
        there = os.path.lexists(directory)
        return f"{directory} is no directory" if there else f"there is no directory {directory}"
    if not os.access(directory, os.W_OK | os.X_OK, effective_ids=True):
        return f"{directory} may not be written to"
    return None
