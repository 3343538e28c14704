"""Verdicts and the summary of the client's side as JSON Lines; docs/json.md has the keys. Pure."""

from __future__ import annotations

from typing import Any

from tcpstuck_bpf.client.actions import Action, Attempt, Totals
from tcpstuck_bpf.client.facts import Owner
from tcpstuck_bpf.client.summary import ClientSummary
from tcpstuck_bpf.client.waits import Change, Group, Waiting
from tcpstuck_bpf.client.words import told, why_unknown
from tcpstuck_bpf.json_text import json_text
from tcpstuck_bpf.model import address_text
from tcpstuck_bpf.output.export import FORMAT
from tcpstuck_bpf.steps import WallClock, utc_text

_SIDE = "client"


def _milliseconds(nanoseconds: int) -> float:
    return round(nanoseconds / 1_000_000, 3)


def _milliseconds_or_null(nanoseconds: int | None) -> float | None:
    return None if nanoseconds is None else _milliseconds(nanoseconds)


def owner_values(owner: Owner) -> dict[str, Any]:
    """A process that has a socket open, as JSON values."""
    return {
        "name": owner.name,
        "pid": owner.pid,
        "fd": owner.fd,
        "container": owner.container or None,
    }


def verdict_line(change: Change, clock: WallClock) -> str:
    """One verdict as a JSON object on one line, without the newline."""
    words, socket = told(change), change.socket
    who = socket.four_tuple
    return json_text(
        {
            "type": "verdict",
            "format": FORMAT,
            "side": _SIDE,
            "verdict": words.verdict,
            "stuck": words.stuck,
            "certainty": words.certainty,
            "updates": words.updates,
            "client_ip": who.client_ip,
            "client_port": who.client_port,
            "server_ip": who.server_ip,
            "server_port": who.server_port,
            "family": who.family,
            "netns": who.netns,
            "socket": socket.inode or None,
            "socket_cookie": socket.cookie,
            "uid": socket.uid,
            "owners": [owner_values(one) for one in change.owners.processes],
            "more_owners": change.owners.more,
            "owner_unknown": why_unknown(change.owners, socket) or None,
            "established_time": utc_text(clock.realtime(change.time_ns - change.waited_ns)),
            "verdict_time": utc_text(clock.realtime(change.time_ns)),
            "age_ms": _milliseconds(change.waited_ns),
            "last_ack_ms": _milliseconds(socket.last_ack_ns),
            "keepalive_ms": _milliseconds_or_null(socket.keepalive_ns),
            "segs_in": socket.segs_in,
            "bytes_received": socket.bytes_received,
            "data_segs_out": socket.data_segs_out,
            "meaning": words.meaning,
            "evidence": list(words.evidence),
            "cannot_prove": words.cannot_prove,
            "advice": words.advice,
        }
    )


def attempt_line(attempt: Attempt, clock: WallClock) -> str:
    """One action on a connection as a JSON object on one line, without the newline."""
    plan = attempt.plan
    who = plan.socket.four_tuple
    return json_text(
        {
            "type": "rescue",
            "format": FORMAT,
            "side": _SIDE,
            "action": plan.action.value,
            "outcome": attempt.outcome.value,
            "reason": attempt.reason or None,
            "try": plan.number,
            "client_ip": who.client_ip,
            "client_port": who.client_port,
            "server_ip": who.server_ip,
            "server_port": who.server_port,
            "family": who.family,
            "netns": who.netns,
            "socket_cookie": plan.socket.cookie,
            "time": utc_text(clock.realtime(attempt.time_ns)),
            "age_ms": _milliseconds(plan.socket.age_ns),
        }
    )


def _rescue(totals: Totals | None) -> dict[str, Any] | None:
    if totals is None:
        return None
    return {
        "dry_run": totals.dry_run,
        "challenged": totals.challenged,
        "asked": totals.asked,
        "outcomes": {
            action.value: {
                outcome.value: number
                for (kind, outcome), number in totals.done.items()
                if kind is action
            }
            for action in Action
        },
        "reasons": dict(totals.reasons),
        "left_alone": dict(totals.left_alone),
    }


def _group(group: Group, waiting: Waiting) -> dict[str, Any]:
    return {
        "connections": waiting.number,
        "oldest_ms": _milliseconds(waiting.oldest_ns),
        "netns": group.netns,
        "server_ip": address_text(group.server_address),
        "server_port": group.server_port,
        "uid": group.uid,
        "processes": [
            {"name": name, "pid": pid, "container": container or None}
            for name, pid, container in group.owners
        ],
        "more_processes": group.more_owners,
    }


def summary_line(summary: ClientSummary, clock: WallClock) -> str:
    """The summary as a JSON object on one line, without the newline."""
    return json_text(
        {
            "type": "summary",
            "format": FORMAT,
            "side": _SIDE,
            "watched": summary.watched,
            "start_time": utc_text(clock.realtime_ns),
            "duration_ms": _milliseconds(summary.duration_ns),
            "cut_off_time": (
                None if summary.cut_off_ns is None else utc_text(clock.realtime(summary.cut_off_ns))
            ),
            "verdicts": dict(summary.verdicts),
            "stuck": summary.stuck,
            "ever_stuck": summary.ever_stuck,
            "saw_nothing": not summary.seen_any,
            "slow": summary.slow,
            "stuck_groups": [_group(*one) for one in summary.groups],
            "closed": summary.closed,
            "pending": summary.young,
            "established": summary.established,
            "polls": summary.polls,
            "longest_poll_ms": _milliseconds_or_null(summary.longest_poll_ns),
            "longest_pause_ms": _milliseconds_or_null(summary.pause_ns),
            "rescue": _rescue(summary.mending),
            "losses": {name: number for name, number in summary.losses.items() if number},
            "unread_namespaces": [
                {"netns": inode, "why": why} for inode, why in summary.unread.items()
            ],
            "notes": list(summary.notes),
        }
    )
