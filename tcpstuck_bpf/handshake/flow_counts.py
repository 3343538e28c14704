"""How many flows are in each state, and how many flows and observations were lost. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from tcpstuck_bpf.handshake.flow import CONNECTED_STATES, STUCK_STATES, Flow, State
from tcpstuck_bpf.model import Ending


class CorrelatorStats(NamedTuple):
    """The counts at one moment, for the summary and the status line."""

    reported_now: Mapping[State, int]
    """The current states of all flows ever reported, evicted and forgotten ones included."""
    ever_stuck: int
    """Flows reported as stuck at any time, without those that look like a SYN flood's."""
    still_stuck: int
    """Flows of `ever_stuck` that are still in a stuck state."""
    flood_suspected: int
    """Silent flows that look like a SYN flood's."""
    taken_over: int
    """Flows reported as connected that an ordinary handshake connected, and no cookie's ACK."""
    unreported: Mapping[State, int]
    """Flows that ended unreported: healthy ones that user space happened to see."""
    pending: int
    """Handshakes of the latest sweep that are too young for a verdict."""
    flows: int
    """Flows held in memory."""
    superseded: int
    """Flows reported as stuck whose client gave up: it uses the 4-tuple for a new handshake."""
    evicted: int
    """Flows forgotten before their end for lack of room: later facts of them look new."""
    let_go: int
    """Open entries deleted from the kernel's table for their age or for lack of room there."""
    unresolved: int
    """Flows forgotten undecided: seen open before their deadline, then not again or replaced."""
    late: int
    """Observations of a handshake older than the one known for their 4-tuple."""
    duplicate: int
    """Events without news."""
    torn: int
    """Rows read while the kernel was writing them; the next sweep reads them again."""


class FlowCounts:
    """Counts that change with the flows; `CorrelatorStats` says what each one means."""

    def __init__(self) -> None:
        self.evicted = self.let_go = self.unresolved = 0
        self.late = self.duplicate = self.torn = 0
        self._reported_now: Counter[State] = Counter()
        self._unreported: Counter[State] = Counter()
        self._ever_stuck = self._flood_suspected = self._taken_over = 0

    def move(self, flow: Flow, state: State, *, reported: bool) -> None:
        """Count that a flow leaves its state for this one, which is reported or not."""
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
        """Count a flow once as long as it is reported as connected by the SYN queue alone.

        An ACK that undoes such a connection (`ending_of`) does so here only when it is reported.
        """
        was = flow.reported_taken_over
        taken_over = flow.handshake.ending == Ending.TAKEN_OVER
        flow.reported_taken_over = taken_over and flow.reported in CONNECTED_STATES
        self._taken_over += flow.reported_taken_over - was

    def suspect(self, flow: Flow, why: str) -> None:
        """Mark a silent flow as a SYN flood's, which was never stuck."""
        flow.flood = why
        self._flood_suspected += 1
        self._ever_stuck -= 1

    def acquit(self, flow: Flow, *, is_real: bool) -> None:
        """Remove the mark of a SYN flood; a real client was stuck all the time."""
        if flow.flood:
            flow.flood = ""
            self._flood_suspected -= 1
            self._ever_stuck += is_real

    def stats(self, *, pending: int, flows: int) -> CorrelatorStats:
        """The counts as they are now."""
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
            torn=self.torn,
        )
