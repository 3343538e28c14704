"""The steps of a run in order, which are recorded, replayed and analysed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import NamedTuple, Union

from tcpstuck_bpf.model import (
    Coverage,
    Event,
    KernelWarning,
    ListenerSeen,
    Rescue,
    Sweep,
    Tally,
    TraceSettings,
)
from tcpstuck_bpf.rulesets import KernelNames


def utc_text(realtime_ns: int) -> str:
    """RFC 3339 in UTC, with microseconds. A float could not hold today's nanoseconds."""
    seconds, nanoseconds = divmod(realtime_ns, 1_000_000_000)
    moment = datetime.fromtimestamp(seconds, timezone.utc).replace(tzinfo=None)
    return f"{moment.isoformat(timespec='seconds')}.{nanoseconds // 1000:06}Z"


@dataclass(frozen=True)
class WallClock:
    """One pair of clock readings taken at the same moment, in ns.

    It converts CLOCK_MONOTONIC times to UTC. A recording keeps it, so that a replay prints the
    times of the recorded run.
    """

    monotonic_ns: int
    realtime_ns: int

    def realtime(self, monotonic_ns: int) -> int:
        """Nanoseconds since the epoch (UTC) at a CLOCK_MONOTONIC time."""
        return self.realtime_ns + monotonic_ns - self.monotonic_ns


@dataclass(frozen=True)
class Header:
    """The facts about a run that its steps do not contain."""

    settings: TraceSettings
    coverage: Coverage
    clock: WallClock
    watched: str
    table_capacity: int
    own_netns: int | None = None
    """The network namespace of the run itself; None if not recorded."""
    netns_names: Mapping[int, str] = field(default_factory=dict)
    """Names of the machine's network namespaces, by inode number."""
    selection: str = ""
    """What a replay was narrowed to, as text; empty if it is the whole recording."""


class Observed(NamedTuple):
    """Events came."""

    events: tuple[Event, ...]


class Swept(NamedTuple):
    """The table was read."""

    sweep: Sweep


class Advanced(NamedTuple):
    """The correlator advanced its flows to this time, in ns."""

    now_ns: int


class TallyTaken(NamedTuple):
    """Both sides' counters were read."""

    tally: Tally


class Named(NamedTuple):
    """Names of the kernel's numbers became known, for facts in the next steps."""

    names: KernelNames


class Rescued(NamedTuple):
    """SYN-ACKs were repeated, or clients were left alone."""

    rescue: Rescue


class Listened(NamedTuple):
    """The table of listeners was read; only those that changed are here."""

    listeners: tuple[ListenerSeen, ...]


class Logged(NamedTuple):
    """The kernel warned of full SYN queues."""

    warnings: tuple[KernelWarning, ...]


class Vanished(NamedTuple):
    """Network namespaces with stuck clients were removed."""

    now_ns: int
    netns: tuple[int, ...]
    until_ns: int | None = None
    """Last time at which the removed namespace still had its number, if another namespace has it
    now. None if nothing leads to a namespace with this number any more."""


class Ended(NamedTuple):
    """The run ended."""

    now_ns: int
    losses: Mapping[str, int]
    notes: tuple[str, ...]
    cut_off: bool = False
    """Whether the recording has no end, and `now_ns` is the last time in it."""


Step = Union[
    Observed, Swept, Advanced, TallyTaken, Rescued, Named, Listened, Logged, Vanished, Ended
]
