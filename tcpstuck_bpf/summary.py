"""What the output side is given: wall-clock anchor, live status, and the summary at the end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from tcpstuck_bpf.judge.backlog import ListenerReport
from tcpstuck_bpf.judge.reconcile import Reconciled
from tcpstuck_bpf.judge.stuck_now import StuckGroup
from tcpstuck_bpf.model import CoverageGap


class Status(NamedTuple):
    """What the line says that is shown while nothing is wrong."""

    watched: str
    """For example `port 3311`."""
    cookies_sent: int
    completed: int
    waiting: int
    """Handshakes too young for a verdict."""
    still_stuck: int
    running_ns: int
    now_ns: int
    """CLOCK_MONOTONIC."""
    flood_suspected: int = 0
    """Silent clients that look like a SYN flood's, none of them in `still_stuck`."""


class RescueTotals(NamedTuple):
    """What --rescue did in a run, or would have done."""

    sent: int
    """SYN-ACKs repeated, all tries together."""
    not_sent: int
    """SYN-ACKs that a dry run would have repeated."""
    failed: Mapping[str, int]
    """Those that could not be sent, by what the kernel said."""
    rescued: int
    left_alone: Mapping[str, int]
    """Stuck clients that were not to be rescued, by reason."""


class Summary(NamedTuple):
    """The end of a run."""

    watched: str
    mode: str
    duration_ns: int
    verdicts: Mapping[str, int]
    """Flows by the verdict they have at the end; `completed` counts every healthy handshake."""
    ever_stuck: int
    still_stuck: int
    recovered: int
    data_lost: int
    """Connections whose server missed the client's first bytes."""
    pending: int
    """Handshakes too young for a verdict when the run ended."""
    superseded: int
    cookies_sent: int
    lost_events: int
    untracked: int
    """Cookie handshakes without an entry: the table was full, or as `losses` has it busy."""
    unseen_syn: int
    """ACKs whose SYN came before tracing began, or whose entry was let go."""
    losses: Mapping[str, int]
    """Every other loss by name; zero ones are left out by the output."""
    gaps: tuple[CoverageGap, ...]
    reconciliation: tuple[Reconciled, ...]
    filtered: bool
    """Whether a filter was set, so that the kernel's counters cover more than was traced."""
    notes: tuple[str, ...] = ()
    cut_off_ns: int | None = None
    """The last time in a recording that has no end, of CLOCK_MONOTONIC; None where it has one."""
    rescue: RescueTotals | None = None
    """None where nothing was to be rescued."""
    listeners: tuple[ListenerReport, ...] = ()
    namespace_gone: int = 0
    """Told as stuck once, in network namespaces that nothing leads to any more."""
    flood_suspected: int = 0
    """Silent clients that look like a SYN flood's: in `verdicts`, and not in the stuck ones."""
    stuck: tuple[tuple[StuckGroup, int], ...] = ()
    """Number of clients that are stuck at the end, by listener, verdict and cause, the largest
    group first."""

    @property
    def unwatched(self) -> int:
        """Cookie handshakes of which nobody knows what became of them, at the least.

        Those there was no room for, and those that the kernel counted and no program saw.
        """
        unseen = sum(
            row.kernel[0] - row.traced - row.outside
            for row in self.reconciliation
            if row.counter == "SyncookiesSent"
            and row.agrees is False
            and row.kernel is not None
            and row.kernel[0] > row.traced + row.outside
        )
        return self.untracked + self.losses.get("cookies_unmatched", 0) + unseen
