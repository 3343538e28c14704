"""Marks reports of silent flows that look like part of a SYN flood, and corrects marks. Pure.

`flood` detects floods. Later handshakes may change its answer after a report.
"""

from __future__ import annotations

from tcpstuck_bpf.handshake.flood import FloodWatch
from tcpstuck_bpf.handshake.flow import (
    CONNECTED_STATES,
    SILENT_STATES,
    FlowReport,
    State,
    decide,
)
from tcpstuck_bpf.handshake.flow_counts import FlowCounts
from tcpstuck_bpf.handshake.flow_report import by_time, report_of
from tcpstuck_bpf.handshake.flow_table import FlowTable
from tcpstuck_bpf.model import HandshakeId

REAL_STATES = CONNECTED_STATES | {State.ACK_DROPPED, State.ACK_FILTERED, State.NO_LISTENER}
"""States that a spoofed source cannot cause: they need an ACK for the cookie."""


class FloodMarks:
    """Marks reports as a `FloodWatch` decides."""

    def __init__(
        self, watch: FloodWatch, flows: FlowTable, counts: FlowCounts, timeout_ns: int
    ) -> None:
        self._watch = watch
        self._flows = flows
        self._counts = counts
        self._timeout_ns = timeout_ns

    def mark(self, reports: list[FlowReport]) -> list[FlowReport]:
        """Mark the reports of a SYN flood, and put corrections of earlier reports before them.

        All reports are noted before the first is marked, because a flood shows only after its first
        SYNs.
        """
        fresh = [r.state in SILENT_STATES and r.previous not in SILENT_STATES for r in reports]
        for report, is_fresh in zip(reports, fresh):
            entry = report.handshake
            if report.state in REAL_STATES or entry.syn_count > 1:
                self._watch.note_real(report.four_tuple)
            elif is_fresh:
                self._watch.note(report.four_tuple, entry)
        revised = self._watch.settle()
        marked = [
            self._marked(report) if is_fresh else report for report, is_fresh in zip(reports, fresh)
        ]
        corrections = filter(None, map(self._correction, revised))
        return [*sorted(corrections, key=by_time), *marked]

    def _marked(self, report: FlowReport) -> FlowReport:
        """The report of a flow that has just fallen silent, marked if it looks like a flood."""
        handshake = HandshakeId(report.four_tuple, report.handshake.first_syn_ns)
        flow = self._flows.named(handshake)
        if flow is None or report.handshake.syn_count > 1:
            return report
        why = self._watch.why(handshake)
        if why:
            self._counts.suspect(flow, why)
        return report._replace(flood=why)

    def _correction(self, handshake: HandshakeId) -> FlowReport | None:
        """A new report of a silent flow whose mark has changed; None if it has not."""
        flow = self._flows.named(handshake)
        if flow is None or flow.state not in SILENT_STATES:
            return None
        why = self._watch.why(handshake)
        if bool(why) == bool(flow.flood):
            return None
        if why:
            self._counts.suspect(flow, why)
        else:
            self._counts.acquit(flow, is_real=True)
        decided_ns = decide(flow.handshake, flow.reported, self._timeout_ns).decided_ns
        return report_of(handshake.four_tuple, flow, flow.state, decided_ns)
