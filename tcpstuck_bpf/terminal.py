r"""Escapes foreign text for the terminal, so that it can neither control it nor end the run.

Foreign are the names of processes, namespaces, tables, chains and files, comments, lines of the
kernel's log, messages of the kernel, the verifier and BCC, and everything in a recording.

All of it passes `printable` where it becomes part of a line. There our own line breaks, widths and
colours can still be distinguished from foreign ones, and a cell has its final width. Each line
leaves through `line`, which escapes what was forgotten before. A stream could not do this, because
it does not know whose a line break or colour is.

Only the stream knows its encoding, so `never_fail` makes it write \xNN or \uNNNN for characters
that the locale lacks. JSON does not pass through here (`json_text`).
"""

from __future__ import annotations

import contextlib
import re
from typing import TextIO

CLEAR_LINE = "\r\x1b[K"
RED, BOLD, PLAIN = "\x1b[31;1m", "\x1b[1m", "\x1b[0m"
_COLOURS = re.compile("(" + "|".join(map(re.escape, (RED, BOLD, PLAIN))) + ")")
_BYTES = range(0xDC80, 0xDD00)
"""The surrogates that os.fsdecode makes from bytes that are not UTF-8 (PEP 383)."""


def printable(text: str) -> str:
    r"""Foreign text for one of our lines, with unprintable characters as \xNN, \uNNNN, \UNNNNNNNN.

    Unprintable are control characters (C0, C1, DEL), those that change the writing direction or
    have no width, line separators, any space but the plain one, and surrogates, as in Unicode. A
    byte that was not UTF-8 becomes \xNN. A backslash is not escaped: the result is for people, and
    cannot be decoded.
    """
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else _escaped(ord(one)) for one in text)


def _escaped(number: int) -> str:
    if number in _BYTES:
        number -= _BYTES.start - 0x80
    if number < 0x100:
        return f"\\x{number:02x}"
    return f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


def line(text: str) -> str:
    """One line with its newline; everything unprintable except our own colours is escaped."""
    if text.isprintable():
        return f"{text}\n"
    parts = _COLOURS.split(text)
    parts[::2] = map(printable, parts[::2])
    return f"{''.join(parts)}\n"


def never_fail(stream: TextIO) -> None:
    """Make a stream escape characters that its encoding lacks, instead of UnicodeEncodeError.

    In the C locale Python's own handler would pass bytes that are not UTF-8 (PEP 538, PEP 540).
    """
    _reconfigure(stream, errors="backslashreplace")


def in_utf8(stream: TextIO) -> None:
    """Make a stream write UTF-8 in any locale, as JSON requires (RFC 8259)."""
    _reconfigure(stream, encoding="utf-8")


def _reconfigure(stream: TextIO, **how: str) -> None:
    with contextlib.suppress(AttributeError):  # a stream that is not a text file has no encoding
        stream.reconfigure(**how)  # type: ignore[attr-defined]
