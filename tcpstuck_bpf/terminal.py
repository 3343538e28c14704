r"""Text on its way to a terminal: what strangers wrote must not command it, nor end the run.

The names of processes, namespaces, tables and chains, comments, lines of the kernel's log, file
names, and what the kernel, the verifier and BCC say are chosen by others, or by nobody. So is all
that is read back from a recording.

`printable` is the one function that they pass, and it is applied where they become part of a line:
there our own line breaks, widths and colours can still be told from theirs, and a cell is as wide
as it will be shown. `line` is the door through which each line leaves; it escapes what somebody
forgot. A stream alone could not do it: it cannot tell whose a line break or a colour is.

What the locale cannot say is left to the stream, which alone knows its encoding: `never_fail` has
it write \xNN or \uNNNN instead of raising. JSON does not come this way (`json_text`).
"""

from __future__ import annotations

import contextlib
import os
import re
from typing import TextIO

CLEAR_LINE = "\r\x1b[K"
RED, BOLD, PLAIN = "\x1b[31;1m", "\x1b[1m", "\x1b[0m"
_COLOURS = re.compile("(" + "|".join(map(re.escape, (RED, BOLD, PLAIN))) + ")")
_BYTES = range(0xDC80, 0xDD00)
"""What os.fsdecode makes of bytes that are no UTF-8 (PEP 383)."""


def printable(text: str) -> str:
    r"""Foreign text as part of one of our lines, what has no shape as \xNN, \uNNNN or \UNNNNNNNN.

    That is every character that Unicode does not call printable: control characters (C0, C1, DEL),
    those that turn the direction of writing or have no width, separators of lines, any space but
    the plain one, surrogates. A byte that was no UTF-8 is \xNN. A backslash stays one: this is
    for people to read, and cannot be turned back.
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
    """One line with its end, on which nothing but our own colours is no plain text."""
    if text.isprintable():
        return f"{text}\n"
    parts = _COLOURS.split(text)
    parts[::2] = map(printable, parts[::2])
    return f"{''.join(parts)}\n"


def understands_escapes(stream: TextIO) -> bool:
    """Whether a stream leads to a terminal that lines can be rewritten and painted on.

    TERM says so; `dumb`, as in an editor's window, and no name at all mean that it does not.
    """
    return stream.isatty() and os.environ.get("TERM", "") not in ("", "dumb")


def never_fail(stream: TextIO) -> None:
    """Have a stream escape what its encoding cannot say, where it would raise UnicodeEncodeError.

    In the C locale Python's own would pass bytes through that are no UTF-8 (PEP 538, PEP 540).
    """
    _reconfigure(stream, errors="backslashreplace")


def in_utf8(stream: TextIO) -> None:
    """Have a stream write UTF-8, whatever the locale says: JSON is nothing else (RFC 8259)."""
    _reconfigure(stream, encoding="utf-8")


def _reconfigure(stream: TextIO, **how: str) -> None:
    with contextlib.suppress(AttributeError):  # one that is no text file has no encoding either
        stream.reconfigure(**how)  # type: ignore[attr-defined]
