"""Builds the report on a flow from its facts. Pure."""

from __future__ import annotations

from tcpstuck_bpf.handshake.flow import CONNECTED_STATES, Flow, FlowReport, State
from tcpstuck_bpf.handshake.timeline import build_timeline
from tcpstuck_bpf.model import FourTuple


def report_of(four_tuple: FourTuple, flow: Flow, state: State, decided_ns: int) -> FlowReport:
    """The report that a flow entered a state at this time (CLOCK_MONOTONIC)."""
    entry = flow.handshake
    timeline, omitted = build_timeline(entry, flow.segments, flow.segments_omitted, flow.attempts)
    connected = state in CONNECTED_STATES
    return FlowReport(
        four_tuple=four_tuple,
        state=state,
        previous=flow.reported,
        previous_facts=flow.reported_facts,
        handshake=entry,
        decided_ns=decided_ns,
        delay_ns=decided_ns - entry.first_syn_ns if connected else None,
        segments=flow.segments,
        timeline=timeline,
        timeline_omitted=omitted,
        flags=flow.flags,
        segments_omitted=flow.segments_omitted,
        attempts=flow.attempts,
        flood=flow.flood,
    )


def by_time(report: FlowReport) -> tuple[int, FourTuple, int]:
    """The order of reports: by the time of the deciding fact."""
    return (report.decided_ns, report.four_tuple, report.handshake.first_syn_ns)
