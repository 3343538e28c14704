"""What happens in a run, in order: what is recorded, replayed and analysed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import NamedTuple, Union

from tcpstuck_bpf.model import (
    Coverage,
    Event,
    KernelNames,
    KernelWarning,
    ListenerSeen,
    Rescue,
    Sweep,
    Tally,
    TraceSettings,
)


def utc_text(realtime_ns: int) -> str:
    """RFC 3339, UTC, microseconds. Integers only: a float cannot hold today's nanoseconds."""
    seconds, nanoseconds = divmod(realtime_ns, 1_000_000_000)
    moment = datetime.fromtimestamp(seconds, timezone.utc).replace(tzinfo=None)
    return f"{moment.isoformat(timespec='seconds')}.{nanoseconds // 1000:06}Z"


@dataclass(frozen=True)
class WallClock:
    """One pair of clock readings taken at the same moment, in ns.

    It turns CLOCK_MONOTONIC times into UTC; a recording keeps it, so that a replay prints the
    times of the recorded run.
    """

    monotonic_ns: int
    realtime_ns: int

    def realtime(self, monotonic_ns: int) -> int:
        """Nanoseconds since the epoch (UTC) at a CLOCK_MONOTONIC time."""
        return self.realtime_ns + monotonic_ns - self.monotonic_ns


@dataclass(frozen=True)
class Header:
    """What has to be known of a run besides its steps."""

    settings: TraceSettings
    coverage: Coverage
    clock: WallClock
    watched: str
    table_capacity: int
    own_netns: int | None = None
    """The network namespace it was run in; None where that is not recorded."""
    netns_names: Mapping[int, str] = field(default_factory=dict)
    """Names that those of that machine had, by inode number."""
    selection: str = ""
    """What a replay was narrowed to, in words; empty where it is all of the recording."""


class Observed(NamedTuple):
    """Events came."""

    events: tuple[Event, ...]


class Swept(NamedTuple):
    """The table was read."""

    sweep: Sweep


class Advanced(NamedTuple):
    """The flows were brought up to this time, in ns."""

    now_ns: int


class TallyTaken(NamedTuple):
    """Both sides' counters were read."""

    tally: Tally


class Named(NamedTuple):
    """It became known what numbers of the kernel mean, of facts that come next."""

    names: KernelNames


class Rescued(NamedTuple):
    """SYN-ACKs were repeated, or it became known who is not to be rescued."""

    rescue: Rescue


class Listened(NamedTuple):
    """The listeners were looked at; those that had changed."""

    listeners: tuple[ListenerSeen, ...]


class Logged(NamedTuple):
    """The kernel warned of full SYN queues."""

    warnings: tuple[KernelWarning, ...]


class Vanished(NamedTuple):
    """Network namespaces that are gone, in which clients were stuck."""

    now_ns: int
    netns: tuple[int, ...]
    until_ns: int | None = None
    """Where another namespace has the number: when it still was that of the one that is gone. None:
    nothing leads to one with that number any more."""


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
