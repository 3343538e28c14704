"""Encodes findings and summaries as JSON Lines, a public interface with stable keys.

`format` is the version of the interface; it changes if a key changes its meaning or disappears.
"""

from __future__ import annotations

from typing import Any

from tcpstuck_bpf.json_text import json_text
from tcpstuck_bpf.judge.backlog import MAX_SYN_BACKLOG, SOMAXCONN, SYNCOOKIES, ListenerReport
from tcpstuck_bpf.judge.drop_cause import Drop
from tcpstuck_bpf.judge.netfilter import OTHER_CODE, Suspicion
from tcpstuck_bpf.judge.reconcile import Reconciled
from tcpstuck_bpf.judge.stuck_now import StuckGroup
from tcpstuck_bpf.judge.verdict import Finding
from tcpstuck_bpf.model import Attempt
from tcpstuck_bpf.rulesets import DropRule
from tcpstuck_bpf.steps import WallClock, utc_text
from tcpstuck_bpf.summary import RescueTotals, Summary

FORMAT = 1


def _milliseconds(nanoseconds: int | None) -> float | None:
    return None if nanoseconds is None else round(nanoseconds / 1_000_000, 3)


def _drop(drop: Drop) -> dict[str, Any]:
    values: dict[str, Any] = {"reason": drop.reason, "place": drop.place}
    if drop.cause is None:
        what = None if drop.refusal is None else drop.refusal.what
        return {**values, "what": what, "counter": drop.counter}
    return {**values, "what": drop.cause.what, "hook": drop.hook, **_suspicion(drop.netfilter)}


def _suspicion(netfilter: Suspicion) -> dict[str, Any]:
    one = netfilter.rule
    several = netfilter.suspects if one is None else ()
    where = [_chain(suspect) for suspect in netfilter.suspects]
    same = {
        key: where[0][key]
        if not netfilter.notes and len({one[key] for one in where}) == 1
        else None
        for key in ("family", "table", "chain")
    }
    return {
        "rules_read_ms": _milliseconds(netfilter.read_after_ns),
        **same,
        "rule": None if one is None else _rule(one),
        "rule_candidates": [{**_chain(suspect), "rule": _rule(suspect)} for suspect in several],
    }


def _chain(rule: DropRule) -> dict[str, str | None]:
    """Family, table and chain of a rule. A function or BPF program has no table and no chain."""
    if rule.kind in OTHER_CODE:
        return {"family": rule.family, "table": None, "chain": None}
    return {"family": rule.family, "table": rule.table, "chain": rule.chain}


def _rule(rule: DropRule) -> dict[str, Any]:
    """The key that identifies a rule within its chain."""
    if rule.kind == "policy":
        return {"policy": True}
    return {rule.kind: rule.chain if rule.kind == "function" else rule.number}


def verdict_line(finding: Finding, clock: WallClock) -> str:
    """One finding as a JSON object on one line, without the newline."""
    who = finding.four_tuple
    return json_text(
        {
            "type": "verdict",
            "format": FORMAT,
            "verdict": finding.verdict,
            "stuck": finding.stuck,
            "certainty": finding.certainty,
            "flood_suspected": finding.flood_suspected,
            "updates": finding.updates,
            "to_be_updated": finding.to_be_updated,
            "client_ip": who.client_ip,
            "client_port": who.client_port,
            "server_ip": who.server_ip,
            "server_port": who.server_port,
            "family": who.family,
            "netns": who.netns,
            "listener_socket": finding.listener_socket or None,
            "syn_count": finding.syn_count,
            "cookie_isn": finding.cookie_isn,
            "client_isn": finding.client_isn,
            "syn_time": utc_text(clock.realtime(finding.first_syn_ns)),
            "verdict_time": utc_text(clock.realtime(finding.verdict_ns)),
            "age_ms": _milliseconds(finding.age_ns),
            "delay_ms": _milliseconds(finding.delay_ns),
            "bytes_missed": finding.bytes_missed,
            "meaning": finding.meaning,
            "evidence": list(finding.evidence),
            "cannot_prove": finding.cannot_prove,
            "advice": finding.advice,
            "drop": None if finding.drop is None else _drop(finding.drop),
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
    return json_text(
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
            "syn_time": utc_text(clock.realtime(attempt.handshake.first_syn_ns)),
            "time": utc_text(clock.realtime(attempt.time_ns)),
        }
    )


def listener_line(listener: ListenerReport) -> str:
    """One listener as a JSON object on one line, without the newline. Queues are in entries."""
    facts, settings = listener.facts, listener.settings
    return json_text(
        {
            "type": "listener",
            "format": FORMAT,
            "netns": listener.netns,
            "addresses": list(listener.addresses),
            "port": listener.port,
            "owners": list(listener.owners),
            "socket": listener.socket or None,
            "sockets": listener.sockets or None,
            "limit": facts.limit,
            "limit_is_somaxconn": listener.is_capped,
            "somaxconn": settings.get(SOMAXCONN),
            "tcp_syncookies": settings.get(SYNCOOKIES),
            "tcp_max_syn_backlog": settings.get(MAX_SYN_BACKLOG),
            "syns": facts.syns,
            "cookies_sent": facts.cookies_sent,
            "cookie_reason": listener.cookie_reason,
            "syns_refused": facts.syns_refused,
            "acks_refused": facts.acks_refused,
            "peak_accept_queue": facts.peak_accept_queue,
            "peak_syn_queue": facts.peak_syn_queue,
            "accept_queue_needed": listener.accept_queue_needed,
            "syn_queue_needed": listener.syn_queue_needed,
            "silent_clients": listener.silent,
            "advised_backlog": listener.advised_backlog,
            "working": list(listener.working),
            "advice": list(listener.advice),
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


def _stuck_group(group: StuckGroup, clients: int) -> dict[str, Any]:
    return {
        "clients": clients,
        "netns": group.netns,
        "server_ip": group.server_ip,
        "server_port": group.server_port,
        "listener_socket": group.socket or None,
        "verdict": group.verdict,
        "certainty": group.certainty,
        "cause": group.cause or None,
    }


def summary_line(summary: Summary, clock: WallClock) -> str:
    """The summary as a JSON object on one line, without the newline."""
    return json_text(
        {
            "type": "summary",
            "format": FORMAT,
            "watched": summary.watched,
            "mode": summary.mode,
            "start_time": utc_text(clock.realtime_ns),
            "duration_ms": _milliseconds(summary.duration_ns),
            "cut_off_time": (
                None if summary.cut_off_ns is None else utc_text(clock.realtime(summary.cut_off_ns))
            ),
            "verdicts": dict(summary.verdicts),
            "stuck": summary.still_stuck,
            "saw_nothing": summary.saw_nothing,
            "stuck_groups": [_stuck_group(*one) for one in summary.stuck],
            "ever_stuck": summary.ever_stuck,
            "flood_suspected": summary.flood_suspected,
            "data_lost": summary.data_lost,
            "recovered": summary.recovered,
            "namespace_gone": summary.namespace_gone,
            "pending": summary.pending,
            "superseded": summary.superseded,
            "cookies_sent": summary.cookies_sent,
            "lost_events": summary.lost_events,
            "untracked": summary.untracked,
            "unwatched": summary.unwatched,
            "unseen_syn": summary.unseen_syn,
            "losses": dict(summary.losses),
            "rescue": _rescue(summary.rescue),
            "coverage_gaps": [gap.__dict__ for gap in summary.gaps],
            "reconciliation": [_reconciled(row) for row in summary.reconciliation],
            "notes": list(summary.notes),
        }
    )
