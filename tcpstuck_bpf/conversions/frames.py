"""Sorts any number of frames by time in bounded memory.

Packets become known long after their time, and in no order: a silent client's SYN is known seconds
later, a verdict minutes later. So frames are sorted in runs, which wait in a scratch file without a
name, and the runs are merged.
"""

from __future__ import annotations

import heapq
import io
import os
import struct
import tempfile
from collections.abc import Iterator
from typing import IO, NamedTuple

from tcpstuck_bpf.model import FourTuple
from tcpstuck_bpf.wire import KEY, decode_key, encode_key

A_SYN, FROM_SERVER, FROM_CLIENT = range(3)
"""Ranks of frames."""
FRAMES_AT_ONCE = 32_768
"""Frames of one run, about 20 MB."""
_RUN_BUFFER = 65_536
"""Bytes of one run that are read at a time."""
_HEADER = struct.Struct("=QBIIII")
_BETWEEN = "\0"
"""Separates comments."""


class Frame(NamedTuple):
    """A packet as it is written. Frames are ordered by time, and packets of one time by `who`."""

    time_ns: int
    """Nanoseconds since the epoch."""
    who: FourTuple
    rank: int
    """A_SYN, FROM_SERVER or FROM_CLIENT: a SYN comes before the SYN-ACK of its time."""
    sequence: int
    length: int
    """The packet's length; `data` is a part of it."""
    data: bytes
    comments: tuple[str, ...]
    """Printable text."""

    def is_same_packet(self, other: Frame) -> bool:
        """Whether both are one packet, which belongs to two handshakes of a connection."""
        return self[:4] == other[:4]

    def joined(self, other: Frame) -> Frame:
        """This packet with the other's comments. The longer headers have the MSS option."""
        fuller = max(self, other, key=lambda frame: len(frame.data))
        return fuller._replace(comments=tuple(dict.fromkeys(self.comments + other.comments)))

    def encode(self) -> bytes:
        """The frame for the scratch file."""
        told = _BETWEEN.join(self.comments).encode()
        numbers = (self.rank, self.sequence, self.length, len(self.data), len(told))
        return _HEADER.pack(self.time_ns, *numbers) + encode_key(self.who) + self.data + told


def _frames(run: io.BufferedReader) -> Iterator[Frame]:
    """The frames of a run."""
    while True:
        header = run.read(_HEADER.size)
        if not header:
            return
        time_ns, rank, sequence, length, data_length, told_length = _HEADER.unpack(header)
        who = decode_key(run.read(KEY.size))
        data = run.read(data_length)
        comments = tuple(run.read(told_length).decode().split(_BETWEEN))
        yield Frame(time_ns, who, rank, sequence, length, data, comments)


class _Run(io.RawIOBase):
    """Reads one run of the scratch file. Its position is its own."""

    def __init__(self, descriptor: int, begin: int, end: int) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._at, self._end = begin, end

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        data = os.pread(self._descriptor, min(len(buffer), self._end - self._at), self._at)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def _joined(frames: Iterator[Frame]) -> Iterator[Frame]:
    """The frames, with those of one packet joined."""
    before: Frame | None = None
    for frame in frames:
        if before is not None and before.is_same_packet(frame):
            before = before.joined(frame)
            continue
        if before is not None:
            yield before
        before = frame
    if before is not None:
        yield before


class Frames:
    """Takes frames in any order, and yields them in order of their time.

    `directory` is where the scratch file is made, if there is more than one run; None for the
    system's directory.
    """

    def __init__(self, directory: str | None = None, at_once: int = FRAMES_AT_ONCE) -> None:
        self._directory = directory
        self._at_once = at_once
        self._waiting: list[Frame] = []
        self._scratch: IO[bytes] | None = None
        self._ends = [0]

    def add(self, frame: Frame) -> None:
        """Take a frame. Raises OSError where the scratch file cannot be written."""
        self._waiting.append(frame)
        if len(self._waiting) >= self._at_once:
            self._keep()

    def _keep(self) -> None:
        """Write a sorted run to the scratch file."""
        if self._scratch is None:
            self._scratch = tempfile.TemporaryFile(dir=self._directory)  # noqa: SIM115
        self._scratch.writelines(frame.encode() for frame in sorted(self._waiting))
        self._scratch.flush()
        self._ends.append(self._scratch.tell())
        self._waiting = []

    def __iter__(self) -> Iterator[Frame]:
        runs = [iter(sorted(self._waiting))]
        if self._scratch is not None:
            descriptor = self._scratch.fileno()
            for begin, end in zip(self._ends, self._ends[1:]):
                run = _Run(descriptor, begin, end)
                runs.append(_frames(io.BufferedReader(run, _RUN_BUFFER)))
        return _joined(heapq.merge(*runs))

    def close(self) -> None:
        """Remove the scratch file."""
        if self._scratch is not None:
            self._scratch.close()
