"""Findings and summaries as JSON Lines: a public interface, its keys are stable.

`format` is the version of this shape; it changes when a key changes its meaning or goes away.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

from tcpstuck_bpf.model import Attempt
from tcpstuck_bpf.report import Reconciled, RescueTotals, Summary, WallClock
from tcpstuck_bpf.verdict import Finding

FORMAT = 1


def _utc(realtime_ns: int) -> str:
    """RFC 3339, UTC, microseconds. Integers only: a float cannot hold today's nanoseconds."""
    seconds, nanoseconds = divmod(realtime_ns, 1_000_000_000)
    moment = datetime.fromtimestamp(seconds, timezone.utc).replace(tzinfo=None)
    return f"{moment.isoformat(timespec='seconds')}.{nanoseconds // 1000:06}Z"


def _milliseconds(nanoseconds: int | None) -> float | None:
    return None if nanoseconds is None else round(nanoseconds / 1_000_000, 3)


def _line(values: Mapping[str, Any]) -> str:
    return json.dumps(values, separators=(", ", ": "), ensure_ascii=True)


def verdict_line(finding: Finding, clock: WallClock) -> str:
    """One finding as a JSON object on one line, without the newline."""
    who = finding.four_tuple
    return _line(
        {
            "type": "verdict",
            "format": FORMAT,
            "verdict": finding.verdict,
            "stuck": finding.stuck,
            "certainty": finding.certainty,
            "updates": finding.updates,
            "client_ip": who.client_ip,
            "client_port": who.client_port,
            "server_ip": who.server_ip,
            "server_port": who.server_port,
            "family": who.family,
            "netns": who.netns,
            "syn_count": finding.syn_count,
            "cookie_isn": finding.cookie_isn,
            "client_isn": finding.client_isn,
            "syn_time": _utc(clock.realtime(finding.first_syn_ns)),
            "verdict_time": _utc(clock.realtime(finding.verdict_ns)),
            "age_ms": _milliseconds(finding.age_ns),
            "delay_ms": _milliseconds(finding.delay_ns),
            "meaning": finding.meaning,
            "evidence": list(finding.evidence),
            "cannot_prove": finding.cannot_prove,
            "advice": finding.advice,
            "rescue_tries": finding.rescue_tries,
            "timeline": [
                {
                    "time_ms": _milliseconds(entry.time_ns - finding.first_syn_ns),
                    "what": entry.what,
                    "detail": entry.detail,
                }
                for entry in finding.timeline
            ],
            "timeline_omitted": finding.timeline_omitted,
        }
    )


def attempt_line(attempt: Attempt, clock: WallClock) -> str:
    """One repeated SYN-ACK as a JSON object on one line, without the newline."""
    who = attempt.handshake.four_tuple
    return _line(
        {
            "type": "rescue",
            "format": FORMAT,
            "outcome": attempt.outcome,
            "try": attempt.number,
            "client_ip": who.client_ip,
            "client_port": who.client_port,
            "server_ip": who.server_ip,
            "server_port": who.server_port,
            "family": who.family,
            "netns": who.netns,
            "syn_time": _utc(clock.realtime(attempt.handshake.first_syn_ns)),
            "time": _utc(clock.realtime(attempt.time_ns)),
        }
    )


def _rescue(totals: RescueTotals | None) -> dict[str, Any] | None:
    if totals is None:
        return None
    return {
        "sent": totals.sent,
        "would_send": totals.not_sent,
        "failed": dict(totals.failed),
        "rescued": totals.rescued,
        "left_alone": dict(totals.left_alone),
    }


def _reconciled(row: Reconciled) -> dict[str, Any]:
    kernel: int | list[int] | None = None
    if row.kernel is not None:
        low, high = row.kernel
        kernel = low if low == high else [low, high]
    return {
        "netns": row.netns,
        "counter": row.counter,
        "traced": row.traced,
        "outside_filter": row.outside,
        "kernel": kernel,
        "agrees": row.agrees,
        "note": row.note,
    }


def summary_line(summary: Summary, clock: WallClock) -> str:
    """The summary as a JSON object on one line, without the newline."""
    return _line(
        {
            "type": "summary",
            "format": FORMAT,
            "watched": summary.watched,
            "mode": summary.mode,
            "start_time": _utc(clock.realtime_ns),
            "duration_ms": _milliseconds(summary.duration_ns),
            "verdicts": dict(summary.verdicts),
            "stuck": summary.still_stuck,
            "ever_stuck": summary.ever_stuck,
            "recovered": summary.recovered,
            "pending": summary.pending,
            "superseded": summary.superseded,
            "cookies_sent": summary.cookies_sent,
            "lost_events": summary.lost_events,
            "untracked": summary.untracked,
            "unseen_syn": summary.unseen_syn,
            "losses": dict(summary.losses),
            "rescue": _rescue(summary.rescue),
            "coverage_gaps": [gap.__dict__ for gap in summary.gaps],
            "reconciliation": [_reconciled(row) for row in summary.reconciliation],
            "notes": list(summary.notes),
        }
    )
