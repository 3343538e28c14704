"""The sockets that a process has open: the links of /proc/PID/fd (proc_pid_fd(5))."""

from __future__ import annotations

import contextlib
import os

_SOCKET = "socket:["


def held_sockets(path: str, directory: int | None = None) -> dict[int, int]:
    """The lowest descriptor of each socket by inode number. `path`: the directory with the links.

    It is below the open directory `directory` if that is given. A descriptor may be closed
    meanwhile. Raises OSError: PermissionError for another user's process, FileNotFoundError or
    ProcessLookupError for one that has ended.
    """
    found: dict[int, int] = {}
    links = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=directory)
    try:
        with os.scandir(links) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    target = os.readlink(entry.name, dir_fd=links)
                    if target.startswith(_SOCKET):
                        inode, number = int(target[len(_SOCKET) : -1]), int(entry.name)
                        found[inode] = min(number, found.get(inode, number))
    finally:
        os.close(links)
    return found
