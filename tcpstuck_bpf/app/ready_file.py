"""The ready file: it is there while a run traces."""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

from tcpstuck_bpf.errors import UsageError
from tcpstuck_bpf.files import write_whole


def remove_ready_file(path: str | None) -> None:
    """It stands for a run that traces: that of one that has ended must not be taken for another's.

    A named pipe stays, for somebody waits at its other end. Raises OSError where it cannot be
    removed.
    """
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        if path is not None and stat.S_ISREG(Path(path).lstat().st_mode):
            Path(path).unlink()


def write_ready_file(path: str) -> None:
    """Say that every probe is attached: a file with our process number appears, whole.

    A named pipe is written to; see `files` for what else may be there.

    Raises UsageError where it cannot be written.
    """
    try:
        write_whole(path, f"{os.getpid()}\n".encode("ascii"))
    except OSError as error:
        raise UsageError(
            f"cannot write the ready file {path}",
            str(error.strerror),
            "name a file in a directory that you may write to, or a named pipe",
        ) from error
