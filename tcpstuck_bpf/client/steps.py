"""The steps of a run on the client's side, which are recorded, replayed and analysed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Union

from tcpstuck_bpf.client.actions import Attempt, Totals
from tcpstuck_bpf.client.facts import Owners, Poll
from tcpstuck_bpf.model import TraceFilter
from tcpstuck_bpf.steps import WallClock


@dataclass(frozen=True)
class ClientHeader:
    """The facts about a run that its steps do not contain."""

    wanted: TraceFilter
    """Which connections are asked for; the listener is the server."""
    timeout_ns: int
    clock: WallClock
    """Both readings at the start of the run."""
    watched: str
    """What is watched, as text."""
    pid: int | None = None
    """Only sockets that this process has open; None: all."""
    own_netns: int | None = None
    """The network namespace of the run itself; None if not known."""
    netns_names: Mapping[int, str] = field(default_factory=dict)
    """Names of the machine's network namespaces, by inode number."""
    selection: str = ""
    """What a replay was narrowed to, as text; empty if it is the whole recording."""


class Polled(NamedTuple):
    """The sockets were read."""

    poll: Poll
    """With steady ages (`client.steady`)."""
    beyond: int = 0
    """Number of network namespaces that are too many to be read."""


class Owned(NamedTuple):
    """The owners of the sockets that the poll before led to a first verdict on, by inode number."""

    owners: Mapping[int, Owners]


class Attempted(NamedTuple):
    """Actions were taken, or their results came, by this time."""

    now_ns: int
    attempts: tuple[Attempt, ...]


class WatchEnded(NamedTuple):
    """The run ended."""

    now_ns: int
    notes: tuple[str, ...]
    longest_poll_ns: int | None
    """Longest time that a poll took, with its judging and printing; None if not known."""
    pause_ns: int | None
    """The longest pause between two polls; None if not known."""
    mending: Totals | None = None
    """What --rescue did; None without it, or if not known."""
    cut_off: bool = False
    """Whether the recording has no end, and `now_ns` is the last time in it."""


ClientStep = Union[Polled, Owned, Attempted, WatchEnded]
