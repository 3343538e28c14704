"""What a plot shows, as values: lines of handshakes, packets on them, verdicts, queues. Pure.

Times are nanoseconds since the first SYN in the picture.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

MOST_LANES = 2000
"""Largest number of handshakes in a picture."""
MOST_LABELLED = 40
"""Largest number of handshakes that are labelled with their client."""
MOST_PANELS = 3
"""Largest number of listeners with a panel."""
FLOOD = "SYN flood suspected"
"""Stands in place of the verdict for silent clients that look like part of a SYN flood."""


class MarkKind(Enum):
    """A packet, by the words of the legend."""

    SYN = "SYN"
    SYN_DROPPED = "SYN, dropped"
    SYN_TAKEN = "SYN, put into the SYN queue"
    COOKIE = "SYN-ACK with a cookie"
    RESCUE = "SYN-ACK repeated by --rescue"
    ACK_DROPPED = "ACK, dropped by the listener"
    ACK_FILTERED = "ACK, dropped before TCP"
    ACK_REJECTED = "ACK, rejected with an RST"
    NO_LISTENER = "found no listener, drew an RST"
    RESET = "RST from the client"
    CONNECTED = "ACK that connected it"
    NEW_SYN = "SYN of a new handshake"


class Mark(NamedTuple):
    """A packet of a handshake."""

    time_ns: int
    kind: MarkKind


class Passed(NamedTuple):
    """A verdict on a handshake. `verdict` is its name, or FLOOD."""

    time_ns: int
    verdict: str


class Span(NamedTuple):
    """A part of a handshake's line."""

    begin_ns: int
    end_ns: int
    verdict: str
    """The verdict while the client is stuck; else empty."""


class Lane(NamedTuple):
    """The line of one handshake."""

    label: str
    """The client's address and port."""
    spans: tuple[Span, ...]
    """The parts of the line, in order of time and without gaps."""
    marks: tuple[Mark, ...]
    """In order of time."""
    verdicts: tuple[Passed, ...]
    """In the order in which they were passed."""
    goes_on: bool
    """Whether the client was still stuck when the recording ended."""


class Count(NamedTuple):
    """The number of handshakes with a verdict."""

    verdict: str
    """Empty: no verdict yet."""
    number: int
    """Those that had it at any time."""
    last: int
    """Those whose last verdict it is."""
    drawn: int
    """Those of `number` that are in the picture."""
    stuck: bool
    """Whether clients with this verdict are stuck."""


class Reading(NamedTuple):
    """A length or a limit at one moment, in entries."""

    time_ns: int
    entries: int


class Panel(NamedTuple):
    """The queues of one listener."""

    title: str
    accept_queue: tuple[Reading, ...]
    syn_queue: tuple[Reading, ...]
    limit: tuple[Reading, ...]
    """The limit of both queues: the first reading, and every one that differs from the last."""


class Picture(NamedTuple):
    """A whole plot."""

    title: str
    """The answer, as the summary gives it."""
    subtitle: tuple[str, ...]
    """What else the summary says first; then the time of day."""
    lanes: tuple[Lane, ...]
    """At most MOST_LANES, by the time of their first SYN."""
    counts: tuple[Count, ...]
    """All handshakes count, drawn or not; the most frequent verdict comes first."""
    panels: tuple[Panel, ...]
    """At most MOST_PANELS, most stuck clients first."""
    end_ns: int
    """Where the time axis ends. It begins at 0."""
    caption: tuple[str, ...]
    """Sentences on what the picture leaves out."""
