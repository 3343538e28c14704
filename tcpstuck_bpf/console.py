"""The command's standard output and standard error, also where nobody reads them any more."""

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
"""Columns, where standard output is no terminal."""
_FRAMES_TOLD = 3
"""How many callers an error that nobody expected is told with."""


def open_standard_streams() -> None:
    """Standard streams that are there, and write whatever they are given.

    Where the caller has closed one, the next file to be opened would take its place.
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
    """Let the stream lead nowhere: the interpreter must not complain when it flushes at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def say(error: TcpstuckError) -> int:
    """Print an error's three lines; returns its exit status."""
    complain(error.lines())
    return error.exit_status


def remark(text: str) -> None:
    """Something beside the answer, for whoever reads standard error."""
    complain([f"tcpstuck-trace: {text}"])


@contextlib.contextmanager
def under_way(what: str) -> Iterator[None]:
    """Say on standard error what takes its time, as long as it does.

    A terminal shows it meanwhile; elsewhere it is a line.
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
    """Lines of the answer as they come, where it is neither the table nor verdicts in JSON."""
    for line in lines:
        sys.stdout.write(terminal.line(line))
        sys.stdout.flush()


def complain(lines: Iterable[str]) -> None:
    """Nobody who reads it is no reason to end otherwise."""
    _write("".join(map(terminal.line, lines)))


def _write(text: str) -> None:
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except OSError:  # most often the same full disk that is to be told of
        discard(sys.stderr)


def unforeseen(
    error: Exception, what: str = "it failed in a way that nobody foresaw"
) -> TcpstuckError:
    """Any exception as three lines; the exit status of a traceback would mean a stuck client."""
    if isinstance(error, TcpstuckError):
        return error
    # Imported where it is used: it would delay every start.
    import traceback

    frames = reversed(traceback.extract_tb(error.__traceback__)[-_FRAMES_TOLD:])
    where = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames)
    return CannotTraceError(
        what,
        f"{type(error).__name__}: {words_of(error)} (at {where})",
        "report these lines, with what --version and --doctor say",
    )
