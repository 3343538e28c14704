"""Counts that follow the flows: each flow is in one state, reported or not."""

from __future__ import annotations

from tcpstuck_bpf.handshake.flow import Flow, State
from tcpstuck_bpf.handshake.flow_counts import CorrelatorStats, FlowCounts
from tcpstuck_bpf.model import Ending
from tests.builders import at, ended, handshake


def stats(counts: FlowCounts) -> CorrelatorStats:
    return counts.stats(pending=0, flows=0)


def move(counts: FlowCounts, flow: Flow, state: State, *, told: bool) -> None:
    counts.move(flow, state, reported=told)
    flow.state = state
    if told:
        flow.reported = state


def test_a_flow_is_counted_in_one_state() -> None:
    counts, flow = FlowCounts(), Flow(handshake())
    move(counts, flow, State.SILENT, told=True)
    assert stats(counts).reported_now == {State.SILENT: 1}
    move(counts, flow, State.RECOVERED, told=True)
    assert stats(counts).reported_now == {State.RECOVERED: 1}
    assert (stats(counts).ever_stuck, stats(counts).still_stuck) == (1, 0)


def test_what_is_not_reported_is_counted_apart() -> None:
    counts, flow = FlowCounts(), Flow(handshake())
    move(counts, flow, State.COMPLETED, told=False)
    assert (stats(counts).reported_now, stats(counts).unreported) == ({}, {State.COMPLETED: 1})


def test_who_is_suspected_was_never_stuck_and_who_is_real_always_was() -> None:
    counts, flow = FlowCounts(), Flow(handshake())
    move(counts, flow, State.SILENT, told=True)
    counts.suspect(flow, "why")
    assert stats(counts)[1:4] == (0, 0, 1)
    counts.acquit(flow, is_real=True)
    counts.acquit(flow, is_real=True)
    assert stats(counts)[1:4] == (1, 1, 0)
    assert flow.flood == ""


def test_a_stuck_flow_that_is_superseded_is_stuck_no_more() -> None:
    counts, flow, undecided = FlowCounts(), Flow(handshake()), Flow(handshake())
    move(counts, flow, State.SILENT, told=True)
    counts.supersede(flow)
    counts.supersede(undecided)
    found = stats(counts)
    assert (found.superseded, found.still_stuck, found.unresolved) == (1, 0, 1)


def test_who_the_syn_queue_connected_is_counted_once_and_not_when_an_ack_undoes_it() -> None:
    counts, flow = FlowCounts(), Flow(ended(handshake(), Ending.TAKEN_OVER, at(1)))
    move(counts, flow, State.COMPLETED, told=True)
    counts.review_taken_over(flow)
    counts.review_taken_over(flow)
    assert stats(counts).taken_over == 1
    move(counts, flow, State.ACK_DROPPED, told=True)
    counts.review_taken_over(flow)
    assert stats(counts).taken_over == 0
