"""Files that are written, mostly as root: whole or not at all, and never where a link leads.

Whoever may write to a directory such as /tmp can put a symbolic link, a file of their own or a
named pipe where root will write next. So a new file is made under a name that nobody can foresee
(O_EXCL, O_NOFOLLOW), beside its place and through the directory that was opened, and renamed to its
own name: what was there is replaced, never written into, and no other file that it was linked to is
touched. A symbolic link in its place is refused, since who made it expects that it is followed.

What is there and is no file, a device or a named pipe, is written to as it is; so is a descriptor
of our own, which the shell's >( ) names. A named pipe that strangers could have put there is not.
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
    """A file that is written; once `appear` is called it has its name.

    `mode` is that of a new file. Raises OSError where there can be none.
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
            # What is for others is meant so, whatever the umask; some file systems have no modes.
            with contextlib.suppress(PermissionError):
                os.fchmod(self.descriptor, mode)

    def write(self, data: bytes) -> None:
        """All of it. Raises OSError; part of it may have been written then."""
        view = memoryview(data)
        while view:
            view = view[os.write(self.descriptor, view) :]

    def appear(self) -> None:
        """Give it its name, in place of what had it. Raises OSError."""
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
        """Nothing more is to be written; what has not appeared is removed. Raises OSError."""
        if self._directory is not None:
            if self._unfinished is not None:
                with contextlib.suppress(OSError):
                    os.unlink(self._unfinished, dir_fd=self._directory)
            os.close(self._directory)
            self._directory = self._unfinished = None
        os.close(self.descriptor)


def write_whole(path: str, data: bytes, mode: int = 0o644) -> None:
    """A file with this content appears; where it cannot be written, nothing does.

    Raises OSError.
    """
    file = OutputFile(path, mode)
    try:
        file.write(data)
        file.appear()
    finally:
        file.close()


def _existing(path: str) -> int | None:
    """A descriptor of what is there and is no file, or is ours already; None for a new file."""
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
        return OSError(errno.ELOOP, "it is a symbolic link, and none is followed")
    if kind == stat.S_IFDIR:
        return IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if kind == stat.S_IFBLK:
        return OSError(errno.EINVAL, "it is a disk, not a file")
    if kind == stat.S_IFIFO and state.st_uid not in _own_users():
        # As fs.protected_fifos has it (Documentation/admin-guide/sysctl/fs.rst) for O_CREAT.
        around = Path(path).parent.stat()
        shared = stat.S_ISVTX | stat.S_IWOTH
        if around.st_mode & shared == shared and state.st_uid != around.st_uid:
            return PermissionError(errno.EACCES, "it is somebody else's pipe, where anybody writes")
    return None


def _own_users() -> set[int]:
    """Root, ourselves, and who became root by sudo."""
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
