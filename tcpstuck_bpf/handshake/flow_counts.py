"""Counts flows by state, and lost flows and observations. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from tcpstuck_bpf.handshake.flow import CONNECTED_STATES, STUCK_STATES, Flow, State
from tcpstuck_bpf.model import Ending


class CorrelatorStats(NamedTuple):
    """The counts at one moment, for the summary and the status line."""

    reported_now: Mapping[State, int]
    """Number of flows ever reported, by current state; includes evicted and forgotten flows."""
    ever_stuck: int
    """Flows ever reported as stuck, without those that look like part of a SYN flood."""
    still_stuck: int
    """Flows of `ever_stuck` that are still in a stuck state."""
    flood_suspected: int
    """Silent flows that look like part of a SYN flood."""
    taken_over: int
    """Flows reported as connected by an ordinary handshake, without an ACK for a cookie."""
    unreported: Mapping[State, int]
    """Flows that ended unreported, by state: healthy ones that user space happened to see."""
    pending: int
    """Handshakes of the latest sweep that are too young for a verdict."""
    flows: int
    """Flows held in memory."""
    superseded: int
    """Flows reported as stuck whose client gave up and reused the 4-tuple for a new handshake."""
    evicted: int
    """Flows forgotten before their end to make room; later observations of them look new."""
    let_go: int
    """Open entries deleted from the kernel's table because of their age or to make room."""
    unresolved: int
    """Flows forgotten undecided: last seen open before the deadline, or replaced before it."""
    late: int
    """Observations of a handshake older than the one known for their 4-tuple."""
    duplicate: int
    """Events that added nothing."""
    begun_by_ack: int
    """Flows that began with a dropped ACK, because the SYN was not seen."""
    torn: int
    """Rows read while the kernel was writing them; the next sweep reads them again."""


class FlowCounts:
    """Counters that change with the flows; `CorrelatorStats` explains them."""

    def __init__(self) -> None:
        self.evicted = self.let_go = self.unresolved = 0
        self.late = self.duplicate = self.torn = self.begun_by_ack = 0
        self._reported_now: Counter[State] = Counter()
        self._unreported: Counter[State] = Counter()
        self._ever_stuck = self._flood_suspected = self._taken_over = 0

    def move(self, flow: Flow, state: State, *, reported: bool) -> None:
        """Count a flow's move into a new state. `reported`: whether the move is reported."""
        if flow.state is not None:
            (self._unreported if flow.reported is None else self._reported_now)[flow.state] -= 1
        (self._reported_now if reported or flow.reported is not None else self._unreported)[
            state
        ] += 1
        if state in STUCK_STATES and not flow.ever_stuck:
            flow.ever_stuck = True
            self._ever_stuck += 1

    def supersede(self, flow: Flow) -> None:
        """Count that the 4-tuple of a flow has a new handshake."""
        if flow.state is None:
            self.unresolved += 1
        elif flow.state in STUCK_STATES:
            self._reported_now[flow.state] -= 1
            self._reported_now[State.SUPERSEDED] += 1

    def review_taken_over(self, flow: Flow) -> None:
        """Keep `taken_over` equal to the number of flows reported as connected by the SYN queue.

        An ACK that cancels such a connection (`ending_of`) changes the count when it is reported.
        """
        was = flow.reported_taken_over
        taken_over = flow.handshake.ending == Ending.TAKEN_OVER
        flow.reported_taken_over = taken_over and flow.reported in CONNECTED_STATES
        self._taken_over += flow.reported_taken_over - was

    def suspect(self, flow: Flow, why: str) -> None:
        """Mark a silent flow as part of a SYN flood; it no longer counts as ever stuck."""
        flow.flood = why
        self._flood_suspected += 1
        self._ever_stuck -= 1

    def acquit(self, flow: Flow, *, is_real: bool) -> None:
        """Remove a flow's flood mark. A real client counts as ever stuck again."""
        if flow.flood:
            flow.flood = ""
            self._flood_suspected -= 1
            self._ever_stuck += is_real

    def stats(self, *, pending: int, flows: int) -> CorrelatorStats:
        """The current counts."""
        reported_now = {state: number for state, number in self._reported_now.items() if number}
        still_stuck = sum(reported_now.get(state, 0) for state in STUCK_STATES)
        return CorrelatorStats(
            reported_now=reported_now,
            ever_stuck=self._ever_stuck,
            still_stuck=still_stuck - self._flood_suspected,
            flood_suspected=self._flood_suspected,
            taken_over=self._taken_over,
            unreported={state: number for state, number in self._unreported.items() if number},
            pending=pending,
            flows=flows,
            superseded=reported_now.get(State.SUPERSEDED, 0),
            evicted=self.evicted,
            let_go=self.let_go,
            unresolved=self.unresolved,
            late=self.late,
            duplicate=self.duplicate,
            begun_by_ack=self.begun_by_ack,
            torn=self.torn,
        )
