"""The input of the output side: the live status, and the summary at the end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from tcpstuck_bpf.judge.backlog import ListenerReport
from tcpstuck_bpf.judge.reconcile import Reconciled
from tcpstuck_bpf.judge.stuck_now import StuckGroup
from tcpstuck_bpf.model import CoverageGap, ListenerSeen


class Status(NamedTuple):
    """The figures of the status line."""

    watched: str
    """What is watched, for example `port 3311`."""
    cookies_sent: int
    completed: int
    waiting: int
    """Handshakes too young for a verdict."""
    still_stuck: int
    running_ns: int
    now_ns: int
    """CLOCK_MONOTONIC."""
    flood_suspected: int = 0
    """Silent clients that look like part of a SYN flood; not in `still_stuck`."""
    data_lost: int = 0
    """Clients whose first bytes the server missed."""


class RescueTotals(NamedTuple):
    """Totals of --rescue in a run."""

    sent: int
    """SYN-ACKs repeated, over all tries."""
    not_sent: int
    """SYN-ACKs that a dry run would have repeated."""
    failed: Mapping[str, int]
    """SYN-ACKs that could not be sent, by the kernel's error."""
    rescued: int
    left_alone: Mapping[str, int]
    """Stuck clients that got no SYN-ACK, by reason."""


class Summary(NamedTuple):
    """The summary of a run."""

    watched: str
    mode: str
    duration_ns: int
    verdicts: Mapping[str, int]
    """Flows by their last verdict; `completed` counts every healthy handshake."""
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
    """Cookie handshakes without an entry: the table was full or busy (`table_busy` of `losses`)."""
    unseen_syn: int
    """ACKs whose SYN came before tracing began, or whose entry was removed."""
    losses: Mapping[str, int]
    """Every other loss by name; the output leaves out zeros."""
    gaps: tuple[CoverageGap, ...]
    reconciliation: tuple[Reconciled, ...]
    filtered: bool
    """Whether a filter was set, so that the kernel's counters cover more than was traced."""
    notes: tuple[str, ...] = ()
    cut_off_ns: int | None = None
    """Last CLOCK_MONOTONIC time in a recording without an end; None if it has one."""
    rescue: RescueTotals | None = None
    """Totals of --rescue; None without it."""
    listeners: tuple[ListenerReport, ...] = ()
    seen: tuple[ListenerSeen, ...] = ()
    """The latest readings behind the reports; the listener unchanged for longest comes first."""
    namespace_gone: int = 0
    """Clients reported stuck in network namespaces that have been removed since."""
    flood_suspected: int = 0
    """Silent clients that look like part of a SYN flood; in `verdicts`, but not stuck."""
    stuck: tuple[tuple[StuckGroup, int], ...] = ()
    """Number of clients that are stuck at the end, by listener, verdict and cause. The largest
    group comes first."""
    acks_unknown: int = 0
    """Valid ACKs that this host dropped and that belong to no reported handshake: the SYN was not
    seen, and the accept queue was not full."""
    selection: str = ""
    """The part of a recording that was judged, in words; empty for all of it. The figures of
    cookies, losses and counters still cover the whole recording."""

    @property
    def saw_nothing(self) -> bool:
        """Whether no cookie was seen, so that no client could get stuck under one."""
        if self.selection:
            sent = any(one.facts.suffered for one in self.seen)
            return not (sent or self.ever_stuck or self.pending or any(self.verdicts.values()))
        seen = (self.cookies_sent, self.unseen_syn, self.ever_stuck, self.unwatched)
        return not any(seen) and not any(self.verdicts.values())

    @property
    def nothing_judged(self) -> bool:
        """Whether every handshake was too young for a verdict when the run ended."""
        return bool(self.pending) and not (self.ever_stuck or any(self.verdicts.values()))

    @property
    def unwatched(self) -> int:
        """Smallest possible number of cookie handshakes with an unknown outcome.

        They had no room in the table, or the kernel counted them and no program saw them, or their
        SYN was not seen and their ACK was dropped.
        """
        unseen = sum(
            row.kernel[0] - row.traced - row.outside
            for row in self.reconciliation
            if row.counter == "SyncookiesSent"
            and row.agrees is False
            and row.kernel is not None
            and row.kernel[0] > row.traced + row.outside
        )
        lost = self.untracked + self.losses.get("cookies_unmatched", 0) + unseen
        return lost + self.acks_unknown
