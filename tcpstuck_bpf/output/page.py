"""Helpers for lines of text: width, colour, times, numbers, names. Prints nothing.

Foreign strings enter lines here, so this module escapes them (`terminal`).
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping
from datetime import datetime

from tcpstuck_bpf.model import CROWDED_NETNS, GONE_NETNS, SECOND_NS
from tcpstuck_bpf.steps import WallClock
from tcpstuck_bpf.terminal import BOLD, PLAIN, RED, printable

INDENT = "    "
NARROWEST = 40

_GROUP = re.compile(r"(?<=\d) (?=\d{3}(?!\d))")
"""The space inside a number formatted by `grouped`."""
_UNBREAKABLE = "\xa0"
_NO_NAMESPACE = {GONE_NETNS: "(gone)", CROWDED_NETNS: "(no entry)"}
"""Names for the figures of removed namespaces, and of those without an entry in the table."""


def endpoint(ip: str, port: int) -> str:
    """Address and port, IPv6 in brackets (RFC 3986)."""
    return f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}"


def grouped(number: int) -> str:
    """A number with a space between its thousands."""
    return f"{number:,}".replace(",", " ")


def counted(number: int, one: str, several: str | None = None) -> str:
    """A number and its noun."""
    return f"{grouped(number)} {one if number == 1 else several or one + 's'}"


class Page:
    """A terminal or a pipe of a given width in columns."""

    def __init__(
        self,
        *,
        clock: WallClock,
        width: int,
        colour: bool,
        own_netns: int | None,
        netns_names: Mapping[int, str],
    ) -> None:
        self.width = max(NARROWEST, width)
        self.own_netns = own_netns
        self._clock = clock
        self._colour = colour
        self._names = netns_names

    def time(self, monotonic_ns: int) -> str:
        """The time of day at a CLOCK_MONOTONIC time."""
        moment = self._clock.realtime(monotonic_ns) // SECOND_NS
        return datetime.fromtimestamp(moment).strftime("%H:%M:%S")

    def netns(self, inode: int) -> str:
        """A network namespace's name; its inode number if it has no name."""
        return _NO_NAMESPACE.get(inode) or printable(self._names.get(inode, str(inode)))

    def in_netns(self, inode: int) -> str:
        """A phrase that names the network namespace; empty for our own namespace."""
        return "" if inode == self.own_netns else f" in network namespace {self.netns(inode)}"

    def red(self, line: str, wanted: bool = True) -> str:
        """The line in red, if wanted and if the page has colours."""
        return f"{RED}{line}{PLAIN}" if self._colour and wanted else line

    def bold(self, line: str) -> str:
        """The line in bold, if the page has colours."""
        return f"{BOLD}{line}{PLAIN}" if self._colour else line

    def wrapped(self, text: str, first: str = INDENT) -> Iterator[str]:
        """Lines no wider than the page; words and numbers stay whole.

        The first line begins with `first`, the others with as many spaces.
        """
        lines = textwrap.wrap(
            _GROUP.sub(_UNBREAKABLE, printable(text)),
            self.width,
            initial_indent=first,
            subsequent_indent=" " * len(first),
            break_long_words=False,
            break_on_hyphens=False,
        )
        yield from (line.replace(_UNBREAKABLE, " ") for line in lines)
