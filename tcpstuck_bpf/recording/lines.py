"""The lines of a recording, of either side: a header, then JSON objects, one on each line.

The last line says that the run ended; it is missing if the run was killed. The recording of the
client's side has `side` in its header; that of the server's side, which is older, lacks it.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Generic, TypeVar

from tcpstuck_bpf import __version__
from tcpstuck_bpf.errors import RecordingError
from tcpstuck_bpf.files import OutputFile
from tcpstuck_bpf.json_text import json_text

FORMAT = "tcpstuck-recording"
VERSION = 1
SERVER, CLIENT = "server", "client"
"""The sides."""
STANDARD_INPUT = "-"
"""In place of a file's name."""
_GZIP = b"\x1f\x8b"
_LONGEST_HEADER_BYTES = 1 << 20
_LONGEST_LINE_BYTES = 1 << 28
"""Limit for a line, which holds a batch of the table (1 MB), the rules of one firewall, or a poll
of 100 000 sockets (20 MB)."""
_ENDLESS_NUMBER = re.compile(rb"\d{1000}")
"""A number that is too long. Parsing takes quadratic time; Python refuses it from 3.10.7 on."""
_TOO_LARGE = "does not fit into memory"
DAMAGES = (KeyError, TypeError, ValueError, AttributeError, OverflowError)
"""What a decoder raises for damaged values."""

Values = dict[str, Any]
"""A line of a recording, as a JSON object."""
Step = TypeVar("Step")


class LineWriter:
    """Writes a recording. A full disk ends the recording, not the run.

    The file appears together with its header, replaces an older one, and grows by whole lines, each
    written at once. So the name always leads to the older file or to a recording that can be
    replayed up to its last line. The file does not wait for the end of the run to appear, because a
    killed run could not make it appear. It holds clients' addresses, so only its owner may read it
    (0600).

    `header`: what the first line has besides format and version. Raises RecordingError where the
    file cannot be created.
    """

    def __init__(self, path: str, header: Mapping[str, Any]) -> None:
        self.failure: str | None = None
        """Why the recording is incomplete; None while it is complete."""
        try:
            self._file = OutputFile(path, 0o600)
        except OSError as error:
            raise _cannot_record(path, error) from error
        self.write_line({"format": FORMAT, "version": VERSION, "tool": __version__, **header})
        try:
            if self.failure is None:
                self._file.appear()
        except OSError as error:
            self._file.close()
            raise _cannot_record(path, error) from error

    def write_line(self, values: Mapping[str, Any]) -> None:
        """Add a line. A failure is kept, and not raised; nothing may be written after it."""
        try:
            self._file.write(f"{json_text(values, (',', ':'))}\n".encode("ascii"))
        except OSError as error:
            self.failure = str(error.strerror)

    def close(self) -> None:
        """Close the file. Raises OSError if this fails and no write has failed before."""
        try:
            self._file.close()
        except OSError as error:
            if self.failure is None:
                self.failure = str(error.strerror)
                raise


def _cannot_record(path: str, error: OSError) -> RecordingError:
    return RecordingError(
        f"cannot record to {path}",
        str(error.strerror),
        "name a file in a directory that you may write to",
    )


def _opened(path: str) -> BinaryIO:
    """The file, or standard input for `-`. Raises OSError, and RecordingError for a terminal."""
    if path != STANDARD_INPUT:
        return Path(path).open("rb")
    if sys.stdin is None or sys.stdin.isatty():
        raise RecordingError(
            "standard input is a terminal, not a recording",
            f"--replay {STANDARD_INPUT} reads what a pipe brings",
            "name the file, or write: zcat FILE | tcpstuck-trace --replay -",
        )
    return os.fdopen(os.dup(sys.stdin.fileno()), "rb")


@dataclass(frozen=True)
class Decoding(Generic[Step]):
    """How one side's lines become steps."""

    decode: Callable[[Values], Step]
    """Step of a line. Raises one of DAMAGES for a damaged one."""
    time_ns: Callable[[Step], int | None]
    """Latest time that a step shows; None if it shows none."""
    ends: Callable[[Step], bool]
    """Whether a step is the last one of a run."""
    broken_off: Callable[[int], Step]
    """The step that ends a recording without an end, whose last time is given."""


class RecordedLines:
    """An opened recording. Raises RecordingError where the file is not a recording.

    `first` is its header, without a check of what one side alone has.
    """

    def __init__(self, path: str) -> None:
        self.path = "on standard input" if path == STANDARD_INPUT else path
        self._lines_read = 0
        try:
            self._file = _opened(path)
            # A file that is not a recording may be larger than memory, or have no end.
            first = self._file.readline(_LONGEST_HEADER_BYTES)
        except OSError as error:
            raise RecordingError(
                f"cannot read the recording {self.path}",
                str(error.strerror),
                "name a file that --record has written",
            ) from error
        self._lines_read = 1
        try:
            self.first = self._checked(first)
        except BaseException:
            self._file.close()
            raise

    @property
    def side(self) -> str:
        """SERVER or CLIENT. Raises RecordingError for any other."""
        side = self.first.get("side", SERVER)
        if side not in (SERVER, CLIENT):
            raise self.damaged()
        return str(side)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    @property
    def what(self) -> str:
        """What is read, at the beginning of a sentence."""
        return self.path.replace("on standard input", "standard input")

    def _checked(self, line: bytes) -> Values:
        if line.startswith(_GZIP):
            raise RecordingError(
                f"{self.what} is compressed",
                "it begins like a file of gzip",
                "write: zcat FILE | tcpstuck-trace --replay -",
            )
        values = self._decoded(line) if line.startswith(b"{") else {}
        if values.get("format") != FORMAT:
            raise RecordingError(
                f"{self.what} is not a recording of tcpstuck-trace",
                f'it does not begin with {{"format":"{FORMAT}"',
                "name a file that --record has written",
            )
        version = values.get("version")
        if not isinstance(version, int) or version > VERSION:
            raise RecordingError(
                f"{self.what} was written by a newer tcpstuck-trace",
                f"its format is {version!r}, and this version reads formats up to {VERSION}",
                "replay it with that version, or a newer one",
            )
        return values

    def header(self, decode: Callable[[Values], Step]) -> Step:
        """The header by one side's decoder.

        Closes the file and raises RecordingError if it is damaged.
        """
        try:
            return decode(self.first)
        except DAMAGES as error:
            self._file.close()
            raise self.damaged() from error

    def damaged(self, why: str = "is not valid in a recording") -> RecordingError:
        """The error for the line that was read last."""
        return RecordingError(
            f"the recording {self.path} is damaged",
            f"line {self._lines_read} {why}",
            "record again",
        )

    def _decoded(self, line: bytes) -> Values:
        if _ENDLESS_NUMBER.search(line):
            raise self.damaged("has a number that is too long")
        try:
            values = json.loads(line.decode("ascii"))
        except (ValueError, RecursionError) as error:
            if self._lines_read == 1:
                return {}
            raise self.damaged() from error
        except MemoryError as error:
            raise self.damaged(_TOO_LARGE) from error
        if not isinstance(values, dict):
            raise self.damaged()
        return values

    def _lines(self) -> Iterator[bytes]:
        """All whole lines after the header. Only a line feed ends a line."""
        while True:
            try:
                line = self._file.readline(_LONGEST_LINE_BYTES)
            except OSError as error:
                raise self.damaged(f"cannot be read: {error.strerror}") from error
            except MemoryError as error:
                raise self.damaged(_TOO_LARGE) from error
            self._lines_read += 1
            if not line.endswith(b"\n"):
                if len(line) >= _LONGEST_LINE_BYTES:
                    raise self.damaged(f"has more than {_LONGEST_LINE_BYTES >> 20} MiB")
                # A killed run may leave part of a line, which does not count.
                return
            yield line

    def steps(self, decoding: Decoding[Step]) -> Iterator[Step]:
        """The steps in order; the last one ends the run, or stands for an end that is missing.

        Raises RecordingError at the first damaged line. This can be called only once.
        """
        step: Step | None = None
        reached_ns: int | None = None
        with self._file:
            for line in self._lines():
                values = self._decoded(line)
                try:
                    step = decoding.decode(values)
                    times = (reached_ns, decoding.time_ns(step))
                except DAMAGES as error:
                    raise self.damaged() from error
                except MemoryError as error:
                    raise self.damaged(_TOO_LARGE) from error
                reached_ns = max((one for one in times if one is not None), default=None)
                if decoding.ends(step) and self._file.read(1):
                    self._lines_read += 1
                    raise self.damaged("comes after the line that ends the run")
                yield step
        if step is not None and decoding.ends(step):
            return
        if reached_ns is None:
            raise RecordingError(
                f"the recording {self.path} is empty",
                "it ends before anything was traced: the run was killed, or its disk was full",
                "record again",
            )
        yield decoding.broken_off(reached_ns)


def cut_off_note(until: str) -> str:
    """The note on a recording without an end; `until`: its last time, as text."""
    return (
        f"the recording ends early, at {until}: the run was killed, its disk was full, or it "
        "is still running. Later events are unknown, and so are the losses, which are counted "
        "at the end"
    )
