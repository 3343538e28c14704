"""Errors for the user, each with one line of what, why and remedy.

Only `cli.main` catches them. The exit status belongs to the class, so that a new error cannot lack
one.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import ClassVar

from tcpstuck_bpf.terminal import printable

EXIT_NOTHING_STUCK = 0
EXIT_STUCK = 1
EXIT_USAGE = 2
EXIT_CANNOT_TRACE = 3
EXIT_NOT_KNOWN = 4
"""Nothing was seen stuck, but not every handshake was seen."""
EXIT_INTERRUPTED = 130

_COMMAND = "tcpstuck-trace"
_SUDO_LOOKS_IN = frozenset(
    f"{prefix}/{name}" for prefix in ("/usr/local", "/usr", "") for name in ("sbin", "bin")
)
"""The directories of secure_path in distributions' sudoers(5)."""


class TcpstuckError(Exception):
    """An error for the user: what happened, why, and the remedy, each in one line."""

    exit_status: ClassVar[int] = EXIT_CANNOT_TRACE

    def __init__(self, what: str, why: str, remedy: str) -> None:
        super().__init__(what)
        self.what = what
        self.why = why
        self.remedy = remedy

    def lines(self) -> list[str]:
        """The printed message, with one line each for what, why and remedy."""
        lines = (f"tcpstuck-trace: {self.what}", f"  why: {self.why}", f"  remedy: {self.remedy}")
        return [*map(printable, lines)]


class CannotTraceError(TcpstuckError):
    """This machine cannot trace in its current state."""

    exit_status = EXIT_CANNOT_TRACE


class UsageError(TcpstuckError):
    """The command line, or a file that it names, is wrong."""

    exit_status = EXIT_USAGE


class RecordingError(UsageError):
    """A recording cannot be written or read."""


def as_root_remedy() -> str:
    """The command for who lacks the privileges, with its path where sudo does not look for it."""
    command = Path(sys.argv[0])
    found = command.name == _COMMAND and str(command.parent.absolute()) not in _SUDO_LOOKS_IN
    return f"run it as root: sudo {shlex.quote(str(command.absolute())) if found else _COMMAND}"


def words_of(error: BaseException) -> str:
    """The text of any exception; its class name if it has no text."""
    if isinstance(error, TcpstuckError):
        return f"{error.what}: {error.why}"
    text = error.strerror if isinstance(error, OSError) else None
    return text or str(error) or type(error).__name__
