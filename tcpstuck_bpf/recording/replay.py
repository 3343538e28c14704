"""Writes the steps of a run as JSON Lines (`Recorder`), and reads them back (`Replay`).

The first line is a header. The last line says that the run ended; it is missing if the run was
killed. The lines between are the correlator's input in order, so a replay gives identical verdicts.
A sweep is written as its difference from the previous one (`recording.table`), so a quiet table
costs almost nothing. Numbers stay integers; keys and addresses are hexadecimal.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

from tcpstuck_bpf import __version__
from tcpstuck_bpf.errors import RecordingError
from tcpstuck_bpf.files import OutputFile
from tcpstuck_bpf.json_text import json_text
from tcpstuck_bpf.model import (
    Coverage,
    CoverageGap,
    TraceFilter,
    TraceSettings,
)
from tcpstuck_bpf.recording.codecs import step_of, time_of, values_of
from tcpstuck_bpf.recording.table import (
    RecordedTable,
    address_of,
    integer,
)
from tcpstuck_bpf.steps import (
    Ended,
    Header,
    Step,
    WallClock,
    utc_text,
)

FORMAT = "tcpstuck-recording"
VERSION = 1
STANDARD_INPUT = "-"
_GZIP = b"\x1f\x8b"
"""In place of a file's name."""
_LONGEST_HEADER_BYTES = 1 << 20
_LONGEST_LINE_BYTES = 1 << 28
"""Limit for a line, which holds a batch of the table (1 MB) or the rules of one firewall."""
_ENDLESS_NUMBER = re.compile(rb"\d{1000}")
"""A number that is too long. Parsing takes quadratic time; Python refuses it from 3.10.7 on."""
_TOO_LARGE = "does not fit into memory"
_MOST_ENTRIES = (1 << 32) - 1
"""Largest possible number of entries of a BPF map: max_entries of union bpf_attr."""


class Recorder:
    """Writes a recording. A full disk ends the recording, not the run.

    The file appears together with its header, replaces an older one, and grows by whole lines, each
    written at once. So the name always leads to the older file or to a recording that can be
    replayed up to its last line. The file does not wait for the end of the run to appear, because a
    killed run could not make it appear. It holds clients' addresses, so only its owner may read it
    (0600).

    Raises RecordingError where the file cannot be created.
    """

    def __init__(self, path: str, header: Header) -> None:
        self.failure: str | None = None
        """Why the recording is incomplete; None while it is complete."""
        self._table = RecordedTable()
        try:
            self._file = OutputFile(path, 0o600)
        except OSError as error:
            raise _cannot_record(path, error) from error
        self._write_line(_header_values(header))
        try:
            if self.failure is None:
                self._file.appear()
        except OSError as error:
            self._file.close()
            raise _cannot_record(path, error) from error

    def write(self, step: Step) -> None:
        """Add a step, unless a write has failed before."""
        if self.failure is None:
            self._write_line(values_of(step, self._table))

    def close(self) -> None:
        """Close the file. Raises OSError if this fails and no write has failed before."""
        try:
            self._file.close()
        except OSError as error:
            if self.failure is None:
                self.failure = str(error.strerror)
                raise

    def _write_line(self, values: Mapping[str, Any]) -> None:
        try:
            self._file.write(f"{json_text(values, (',', ':'))}\n".encode("ascii"))
        except OSError as error:
            self.failure = str(error.strerror)


def _cannot_record(path: str, error: OSError) -> RecordingError:
    return RecordingError(
        f"cannot record to {path}",
        str(error.strerror),
        "name a file in a directory that you may write to",
    )


def _header_values(header: Header) -> dict[str, Any]:
    settings = asdict(header.settings)
    address = header.settings.trace_filter.listener_address
    settings["trace_filter"]["listener_address"] = None if address is None else address.hex()
    coverage = asdict(header.coverage)
    coverage["probes"] = sorted(header.coverage.probes)
    return {
        "format": FORMAT,
        "version": VERSION,
        "tool": __version__,
        "settings": settings,
        "coverage": coverage,
        "clock": asdict(header.clock),
        "watched": header.watched,
        "table_capacity": header.table_capacity,
        "own_netns": header.own_netns,
        "netns_names": dict(header.netns_names),
    }


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


class Replay:
    """Reads a recording line by line. Raises RecordingError where the file is not a recording.

    A recording may lack its end: the run was killed, its disk was full, or it is still running. The
    replay then ends after the last whole line, with an Ended whose `cut_off` is true.
    """

    def __init__(self, path: str) -> None:
        self._path = "on standard input" if path == STANDARD_INPUT else path
        self._lines_read = 0
        self._table = RecordedTable()
        try:
            self._file = _opened(path)
            # A file that is not a recording may be larger than memory, or have no end.
            first = self._file.readline(_LONGEST_HEADER_BYTES)
        except OSError as error:
            raise RecordingError(
                f"cannot read the recording {self._path}",
                str(error.strerror),
                "name a file that --record has written",
            ) from error
        self._lines_read = 1
        try:
            self.header = self._header(first)
        except BaseException:
            self._file.close()
            raise

    @property
    def _what(self) -> str:
        """What is read, at the beginning of a sentence."""
        return self._path.replace("on standard input", "standard input")

    def _header(self, line: bytes) -> Header:
        if line.startswith(_GZIP):
            raise RecordingError(
                f"{self._what} is compressed",
                "it begins like a file of gzip",
                "write: zcat FILE | tcpstuck-trace --replay -",
            )
        values = self._decoded(line) if line.startswith(b"{") else {}
        if values.get("format") != FORMAT:
            raise RecordingError(
                f"{self._what} is not a recording of tcpstuck-trace",
                f'it does not begin with {{"format":"{FORMAT}"',
                "name a file that --record has written",
            )
        version = values.get("version")
        if not isinstance(version, int) or version > VERSION:
            raise RecordingError(
                f"{self._what} was written by a newer tcpstuck-trace",
                f"its format is {version!r}, and this version reads formats up to {VERSION}",
                "replay it with that version, or a newer one",
            )
        try:
            return _header(values)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise self._damaged() from error

    def _damaged(self, why: str = "is not valid in a recording") -> RecordingError:
        return RecordingError(
            f"the recording {self._path} is damaged",
            f"line {self._lines_read} {why}",
            "record again",
        )

    def _decoded(self, line: bytes) -> dict[str, Any]:
        if _ENDLESS_NUMBER.search(line):
            raise self._damaged("has a number that is too long")
        try:
            values = json.loads(line.decode("ascii"))
        except (ValueError, RecursionError) as error:
            if self._lines_read == 1:
                return {}
            raise self._damaged() from error
        except MemoryError as error:
            raise self._damaged(_TOO_LARGE) from error
        if not isinstance(values, dict):
            raise self._damaged()
        return values

    def _lines(self) -> Iterator[bytes]:
        """All whole lines after the header. Only a line feed ends a line."""
        while True:
            try:
                line = self._file.readline(_LONGEST_LINE_BYTES)
            except OSError as error:
                raise self._damaged(f"cannot be read: {error.strerror}") from error
            except MemoryError as error:
                raise self._damaged(_TOO_LARGE) from error
            self._lines_read += 1
            if not line.endswith(b"\n"):
                if len(line) >= _LONGEST_LINE_BYTES:
                    raise self._damaged(f"has more than {_LONGEST_LINE_BYTES >> 20} MiB")
                # A killed run may leave part of a line, which does not count.
                return
            yield line

    def steps(self) -> Iterator[Step]:
        """The steps in order, with an Ended last. Raises RecordingError at the first damaged line.

        This can be called only once.
        """
        step: Step | None = None
        reached_ns: int | None = None
        with self._file:
            for line in self._lines():
                values = self._decoded(line)
                try:
                    step = step_of(values, self._table)
                    times = (reached_ns, time_of(step))
                except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
                    raise self._damaged() from error
                except MemoryError as error:
                    raise self._damaged(_TOO_LARGE) from error
                reached_ns = max((one for one in times if one is not None), default=None)
                if isinstance(step, Ended) and self._file.read(1):
                    self._lines_read += 1
                    raise self._damaged("comes after the line that ends the run")
                yield step
        if not isinstance(step, Ended):
            yield self._broken_off(reached_ns)

    def _broken_off(self, reached_ns: int | None) -> Ended:
        if reached_ns is None:
            raise RecordingError(
                f"the recording {self._path} is empty",
                "it ends before anything was traced: the run was killed, or its disk was full",
                "record again",
            )
        until = utc_text(self.header.clock.realtime(reached_ns))
        note = (
            f"the recording ends early, at {until}: the run was killed, its disk was full, or it "
            "is still running. Later events are unknown, and so are the losses, which are counted "
            "at the end"
        )
        return Ended(reached_ns, {}, (note,), cut_off=True)


def _header(values: dict[str, Any]) -> Header:
    settings = dict(values["settings"])
    wanted = dict(settings.pop("trace_filter"))
    address = wanted.pop("listener_address")
    trace_filter = TraceFilter(
        ports=tuple(map(integer, wanted.pop("ports"))),
        listener_address=None if address is None else address_of(address),
        **wanted,
    )
    capacity = integer(values["table_capacity"])
    if capacity > _MOST_ENTRIES:
        raise ValueError(f"no table can have {capacity} entries")
    coverage = values["coverage"]
    clock = values["clock"]
    own_netns = values.get("own_netns")
    return Header(
        settings=TraceSettings(
            trace_filter=trace_filter,
            timeout_ns=integer(settings.pop("timeout_ns")),
            max_handshakes=integer(settings.pop("max_handshakes")),
            **settings,
        ),
        coverage=Coverage(
            mode=str(coverage["mode"]),
            probes=frozenset(map(str, coverage["probes"])),
            gaps=tuple(
                CoverageGap(str(gap["probe"]), str(gap["why"]), str(gap["lost"]))
                for gap in coverage["gaps"]
            ),
        ),
        clock=WallClock(integer(clock["monotonic_ns"]), integer(clock["realtime_ns"])),
        watched=str(values["watched"]),
        table_capacity=capacity,
        own_netns=None if own_netns is None else integer(own_netns),
        netns_names={
            int(number): str(name) for number, name in values.get("netns_names", {}).items()
        },
    )
