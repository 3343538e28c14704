"""Writes the blocks of a pcapng file (IETF draft-ietf-opsawg-pcapng). Pure.

scapy's PcapNgWriter is not used. Its time stamps are microseconds (it writes no if_tsresol), it
writes no comment for the section, and its first interface has no name; the scapy 2.5 of Debian 12
writes no interface names at all. Three kinds of block are all that is needed, and so an operator
needs no library.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence

from tcpstuck_bpf.terminal import printable

LINKTYPE_RAW = 101
"""Packets begin with their IPv4 or IPv6 header."""
TIMES = range(1 << 64)
"""Times that a packet can have, in nanoseconds since the epoch."""

_SECTION, _INTERFACE, _PACKET = 0x0A0D0D0A, 1, 6
_MAGIC, _MAJOR, _MINOR, _UNKNOWN_LENGTH = 0x1A2B3C4D, 1, 0, -1
_SNAP_LENGTH = 0
"""No limit."""
_END, _COMMENT, _APPLICATION = 0, 1, 4
_NAME, _DESCRIPTION, _RESOLUTION = 2, 3, 9
_NANOSECONDS = 9
"""if_tsresol: the negative power of 10."""
_FLAGS, _INBOUND, _OUTBOUND = 2, 1, 2
_MOST_TEXT_BYTES = 32_768
"""Limit for one text, well below what an option can hold."""


def section(application: str, comment: Iterable[str]) -> bytes:
    """The block that begins a file. `comment` has its lines."""
    body = struct.pack("<IHHq", _MAGIC, _MAJOR, _MINOR, _UNKNOWN_LENGTH)
    text = "\n".join(map(printable, comment))
    options = ((_COMMENT, _bytes(text)), (_APPLICATION, _bytes(printable(application))))
    return _block(_SECTION, body, options)


def interface(name: str, description: str) -> bytes:
    """The block of an interface. Interfaces are numbered from 0, in the order of their blocks."""
    body = struct.pack("<HHI", LINKTYPE_RAW, 0, _SNAP_LENGTH)
    options = (
        (_NAME, _bytes(printable(name))),
        (_DESCRIPTION, _bytes(printable(description))),
        (_RESOLUTION, bytes([_NANOSECONDS])),
    )
    return _block(_INTERFACE, body, options)


def packet(
    number: int,
    time_ns: int,
    data: bytes,
    length: int,
    comments: Sequence[str],
    *,
    inbound: bool,
) -> bytes:
    """The block of a packet at the interface `number`.

    `time_ns` is one of TIMES. `length` is the packet's length, of which `data` may be a part.
    """
    body = struct.pack("<IIIII", number, time_ns >> 32, time_ns & 0xFFFFFFFF, len(data), length)
    direction = struct.pack("<I", _INBOUND if inbound else _OUTBOUND)
    told = [(_COMMENT, _bytes(printable(comment))) for comment in comments]
    return _block(_PACKET, body + _padded(data), (*told, (_FLAGS, direction)))


def _bytes(text: str) -> bytes:
    """A text in UTF-8, cut between two characters if it is too long."""
    return text.encode()[:_MOST_TEXT_BYTES].decode("utf-8", "ignore").encode()


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def _block(kind: int, body: bytes, options: Sequence[tuple[int, bytes]]) -> bytes:
    told = b"".join(
        struct.pack("<HH", code, len(value)) + _padded(value) for code, value in options
    )
    body += told + struct.pack("<HH", _END, 0)
    length = struct.pack("<I", 12 + len(body))
    return struct.pack("<I", kind) + length + body + length
