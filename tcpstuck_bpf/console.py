"""The command's standard output and standard error, even if their reader is gone."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TextIO

from tcpstuck_bpf import terminal
from tcpstuck_bpf.errors import (
    CannotTraceError,
    TcpstuckError,
    words_of,
)

WIDTH_OF_A_PIPE = 200
"""Width in columns if standard output is not a terminal."""
MOST_HELD = 100
"""Largest number of lines that wait for standard error while a view has the terminal."""
_FRAMES_PRINTED = 3
"""Number of callers printed with an unexpected error."""


def open_standard_streams() -> None:
    """Make sure that the standard streams exist and can write any character.

    If the caller has closed one, the next opened file would get its descriptor.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)
    terminal.never_fail(sys.stdout)
    terminal.never_fail(sys.stderr)


def discard(stream: TextIO) -> None:
    """Redirect a stream to /dev/null, so that the flush at exit does not fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def say(error: TcpstuckError) -> int:
    """Print an error's three lines. Returns its exit status."""
    complain(error.lines())
    return error.exit_status


def remark(text: str) -> None:
    """Print a remark to standard error."""
    complain([f"tcpstuck-trace: {text}"])


@contextlib.contextmanager
def under_way(what: str) -> Iterator[None]:
    """Print on standard error that a slow task is running.

    A terminal shows it until the task ends; elsewhere it is a line.
    """
    if not terminal.understands_escapes(sys.stderr):
        remark(f"{what} ...")
        yield
        return
    _write(terminal.printable(f"tcpstuck-trace: {what} ..."))
    try:
        yield
    finally:
        _write(terminal.CLEAR_LINE)


def print_lines(lines: Iterable[str]) -> None:
    """Print lines as they come, for answers that are neither the table nor JSON verdicts."""
    for line in lines:
        sys.stdout.write(terminal.line(line))
        sys.stdout.flush()


def print_source(lines: Iterable[str]) -> None:
    """Print lines of a source text, whose tabs stay."""
    for line in lines:
        sys.stdout.write("\t".join(map(terminal.printable, line.split("\t"))) + "\n")


def complain(lines: Iterable[str]) -> None:
    """Write lines to standard error. A failure does not change the exit status."""
    _write("".join(map(terminal.line, lines)))


class Held:
    """Lines for standard error that wait while a view has the whole terminal."""

    def __init__(self) -> None:
        self.lines: tuple[str, ...] = ()
        """The latest lines, at most MOST_HELD."""

    def add(self, text: str) -> None:
        """Add the lines of a text."""
        self.lines = (*self.lines, *text.splitlines())[-MOST_HELD:]


_held: Held | None = None


def hold() -> Held:
    """Keep everything for standard error until `release`, if it leads to the terminal.

    The lines can be read meanwhile, wherever they lead to.
    """
    global _held
    _held = _held or Held()
    return _held


def release() -> None:
    """Write what was held; from now on, lines are written at once again."""
    global _held
    held, _held = _held, None
    if held is not None and sys.stderr.isatty():
        _write("".join(map(terminal.line, held.lines)))


def _write(text: str) -> None:
    if _held is not None:
        _held.add(text)
        if sys.stderr.isatty():
            return
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except OSError:  # most often the full disk that the lines are about
        discard(sys.stderr)


def unforeseen(error: Exception, what: str = "internal error") -> TcpstuckError:
    """Any exception as three lines. A traceback's exit status 1 would mean a stuck client."""
    if isinstance(error, TcpstuckError):
        return error
    # Imported only where it is used: it would delay every start.
    import traceback

    frames = reversed(traceback.extract_tb(error.__traceback__)[-_FRAMES_PRINTED:])
    where = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames)
    return CannotTraceError(
        what,
        f"{type(error).__name__}: {words_of(error)} (at {where})",
        "report these lines, with the output of --version and --doctor",
    )
