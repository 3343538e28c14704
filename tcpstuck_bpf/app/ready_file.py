"""The ready file: it exists while a run traces, and contains its process ID."""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

from tcpstuck_bpf.errors import UsageError
from tcpstuck_bpf.files import write_whole


def remove_ready_file(path: str | None) -> None:
    """Remove the ready file, so that an ended run does not look like one that traces.

    A named pipe stays, because a reader waits at its other end. Raises OSError if the file cannot
    be removed.
    """
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        if path is not None and stat.S_ISREG(Path(path).lstat().st_mode):
            Path(path).unlink()


def write_ready_file(path: str) -> None:
    """Write our process ID to the ready file once every probe is attached.

    The file is created atomically. A named pipe is written to; `files` lists other special files.
    Raises UsageError if the file cannot be written.
    """
    try:
        write_whole(path, f"{os.getpid()}\n".encode("ascii"))
    except OSError as error:
        raise UsageError(
            f"cannot write the ready file {path}",
            str(error.strerror),
            "name a file in a directory that you may write to, or a named pipe",
        ) from error
