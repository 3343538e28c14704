"""Unpacks a compressed kernel image from any source, within limits of size, time and attempts.

An image begins with its own loader, and the magic numbers of compressed streams are short. So every
possible start of a stream is tried, and only a stream that unpacks to a kernel counts. A few
kilobytes can unpack to gigabytes, and can hold thousands of possible starts.
"""

from __future__ import annotations

import bz2
import contextlib
import lzma
import mmap
import os
import re
import selectors
import subprocess
import time
import zlib
from collections.abc import Callable, Generator, Iterator
from typing import IO, NamedTuple, Protocol, Union

from tcpstuck_bpf.errors import CannotTraceError, UsageError
from tcpstuck_bpf.host.programs import ENVIRONMENT, find_program

LARGEST_UNPACKED = 1 << 28
"""Bytes. A distribution's kernel unpacks to 40 to 70 MB."""
UNPACKING_LIMIT_S = 300.0
"""Seconds for all attempts in one file; a distribution's kernel takes one."""
MOST_PROGRAM_RUNS = 64
"""Program runs for one file. A magic number of 4 bytes rarely has even one false hit."""
LZMA_MEMORY_LIMIT = 1 << 29
_FED_BYTES = 1 << 16
_PIECE_BYTES = 1 << 20

Data = Union[bytes, mmap.mmap]


class _Unpacker(Protocol):
    @property
    def eof(self) -> bool:
        """Whether the stream has ended."""

    @property
    def needs_input(self) -> bool:
        """Whether all output for the input so far has been returned."""

    def decompress(self, data: bytes, max_length: int) -> bytes:
        """Feed `data`, and return at most `max_length` unpacked bytes."""


class _Gzip:
    """zlib's decompressor, with the methods of Python's other ones."""

    def __init__(self) -> None:
        self._stream = zlib.decompressobj(wbits=31)
        self._left = b""
        self.needs_input = True

    @property
    def eof(self) -> bool:
        return self._stream.eof

    def decompress(self, data: bytes, max_length: int) -> bytes:
        found = self._stream.decompress(self._left + data, max_length)
        self._left = self._stream.unconsumed_tail
        self.needs_input = not self._left and len(found) < max_length
        return found


class _Packing(NamedTuple):
    """A way to compress a kernel (the kernel's scripts/extract-vmlinux knows the same)."""

    name: str
    magic: bytes
    unpacker: Callable[[], _Unpacker] | None
    """Python's decompressor; None if `program` has to do it."""
    program: str = ""


def _xz() -> _Unpacker:
    return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=LZMA_MEMORY_LIMIT)


def _lzma() -> _Unpacker:
    return lzma.LZMADecompressor(lzma.FORMAT_ALONE, memlimit=LZMA_MEMORY_LIMIT)


_PACKINGS = (
    _Packing("gzip", b"\x1f\x8b\x08", _Gzip),
    _Packing("xz", b"\xfd7zXZ\0", _xz),
    _Packing("zstd", b"\x28\xb5\x2f\xfd", None, "zstd"),
    _Packing("bzip2", b"BZh", bz2.BZ2Decompressor),
    _Packing("lzma", b"\x5d\0\0", _lzma),
    _Packing("lz4", b"\x02\x21\x4c\x18", None, "lz4"),
    _Packing("lzo", b"\x89LZO\0\r\n\x1a\n", None, "lzop"),
)
_BROKEN = (zlib.error, lzma.LZMAError, OSError, EOFError, ValueError)
"""Exceptions that Python's own unpackers raise."""


class Recognizer(NamedTuple):
    """Recognizes a kernel by its first bytes."""

    is_kernel: Callable[[bytes], bool]
    bytes_needed: int


class _Search:
    """The search in one file, and the time and program runs it has left."""

    def __init__(self, path: str, recognizer: Recognizer) -> None:
        self.path = path
        self.recognizer = recognizer
        self.ends_at = time.monotonic() + UNPACKING_LIMIT_S
        self.runs_left = MOST_PROGRAM_RUNS

    def refusal(self, why: str) -> UsageError:
        return UsageError(
            f"{self.path} cannot be unpacked",
            why,
            "name another file, or the vmlinux, if you know where this one comes from",
        )

    def seconds_left(self) -> float:
        """Seconds until the time limit. Raises UsageError if there are none."""
        left = self.ends_at - time.monotonic()
        if left <= 0:
            raise self.refusal(f"it takes longer than {UNPACKING_LIMIT_S:.0f} s")
        return left

    def gather(self, pieces: Iterator[bytes]) -> bytes | None:
        """Join the pieces of a kernel; None as soon as they turn out not to be one.

        Raises UsageError where they grow too large.
        """
        found = bytearray()
        recognized = False
        for piece in pieces:
            found += piece
            if not recognized and len(found) >= self.recognizer.bytes_needed:
                recognized = self._recognizes(found)
                if not recognized:
                    return None
            if len(found) > LARGEST_UNPACKED:
                size = f"{LARGEST_UNPACKED >> 20} MiB"
                raise self.refusal(f"it unpacks to more than {size}, more than any kernel")
            self.seconds_left()
        return bytes(found) if self._recognizes(found) else None

    def _recognizes(self, found: bytearray) -> bool:
        return self.recognizer.is_kernel(bytes(found[: self.recognizer.bytes_needed]))


def find_packed(path: str, data: Data, recognizer: Recognizer) -> tuple[str, bytes] | None:
    """Name of the compression in a file, and the kernel; None if the file holds no kernel.

    Raises UsageError where the kernel is damaged or exceeds a limit, and CannotTraceError where a
    program is missing.
    """
    search = _Search(path, recognizer)
    lacking: _Packing | None = None
    with memoryview(data) as view:
        for packing, place in _hits(data):
            search.seconds_left()
            with view[place:] as packed:
                if packing.unpacker is not None:
                    unpacked = _unpack(search, packing.unpacker(), packed)
                elif find_program(packing.program) is None:
                    lacking = lacking or packing
                    continue
                else:
                    unpacked = _unpack_by_program(search, packing.program, packed)
            if unpacked is not None:
                return packing.name, unpacked
    if lacking is not None:
        raise CannotTraceError(
            f"cannot unpack {path}",
            f"it seems to be compressed with {lacking.name}; `{lacking.program}` is not installed",
            f"install {lacking.program} (apt install {lacking.program}), or name the vmlinux",
        )
    return None


def _hits(data: Data) -> Iterator[tuple[_Packing, int]]:
    """Every offset at which a compressed stream may begin, in order."""
    magics = re.compile(b"|".join(re.escape(packing.magic) for packing in _PACKINGS))
    for found in magics.finditer(data):
        for packing in _PACKINGS:
            if packing.magic == found[0]:
                yield packing, found.start()


def _unpack(search: _Search, unpacker: _Unpacker, packed: memoryview) -> bytes | None:
    """The unpacked kernel; None for a false hit. Raises UsageError where the stream is damaged."""
    recognized = False

    def pieces() -> Iterator[bytes]:
        nonlocal recognized
        gathered = 0
        for start in range(0, len(packed), _FED_BYTES):
            fed = bytes(packed[start : start + _FED_BYTES])
            while True:
                piece = unpacker.decompress(fed, _PIECE_BYTES)
                yield piece
                # The caller asks for another piece only if the first ones are a kernel's.
                gathered += len(piece)
                recognized = gathered >= search.recognizer.bytes_needed
                if unpacker.eof:
                    return
                if unpacker.needs_input:
                    break
                fed = b""

    try:
        return search.gather(pieces())
    except _BROKEN as error:
        if not recognized:
            return None
        raise UsageError(
            f"{search.path} is not a readable kernel",
            f"damaged or truncated: {error}",
            "name another file",
        ) from error


def _unpack_by_program(search: _Search, program: str, packed: memoryview) -> bytes | None:
    """The unpacked kernel; None for a false hit.

    The bytes after the stream make the program fail, but only after its output.
    """
    if not search.runs_left:
        raise search.refusal(f"more than {MOST_PROGRAM_RUNS} places look like a compressed kernel")
    search.runs_left -= 1
    try:
        with contextlib.closing(_piped(search, program, packed)) as pieces:
            return search.gather(pieces)
    except OSError:
        return None


def _piped(search: _Search, program: str, packed: memoryview) -> Generator[bytes, None, None]:
    """A program's output, piece by piece; the program ends with the iterator."""
    process = subprocess.Popen(
        [find_program(program) or program, "-dc"],
        bufsize=0,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=ENVIRONMENT,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield from _pumped(search, process.stdin, process.stdout, packed)
    finally:
        process.kill()
        with contextlib.suppress(OSError):
            process.stdin.close()
        process.stdout.close()
        process.wait()


def _pumped(
    search: _Search, entry: IO[bytes], outlet: IO[bytes], packed: memoryview
) -> Iterator[bytes]:
    os.set_blocking(entry.fileno(), False)
    given = 0
    with selectors.DefaultSelector() as waiting:
        waiting.register(entry, selectors.EVENT_WRITE)
        waiting.register(outlet, selectors.EVENT_READ)
        while True:
            for key, _ in waiting.select(search.seconds_left()):
                if key.fileobj is outlet:
                    piece = os.read(outlet.fileno(), _PIECE_BYTES)
                    if not piece:
                        return
                    yield piece
                    continue
                try:
                    given += os.write(entry.fileno(), packed[given : given + _FED_BYTES])
                except BrokenPipeError:  # the program wants no more input
                    given = len(packed)
                if given >= len(packed):
                    waiting.unregister(entry)
                    entry.close()
