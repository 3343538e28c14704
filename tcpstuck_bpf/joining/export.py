"""Joined connections as JSON Lines; docs/json.md has the keys. Pure."""

from __future__ import annotations

from typing import Any

from tcpstuck_bpf.client.export import owner_values
from tcpstuck_bpf.joining.match import Difference, Joined
from tcpstuck_bpf.joining.result import Result
from tcpstuck_bpf.joining.sides import ClientConnection, ServerHandshake
from tcpstuck_bpf.joining.words import answer
from tcpstuck_bpf.json_text import json_text
from tcpstuck_bpf.output.export import FORMAT
from tcpstuck_bpf.steps import utc_text


def _milliseconds(nanoseconds: int) -> float:
    return round(nanoseconds / 1_000_000, 3)


def _server(server: ServerHandshake | None) -> dict[str, Any] | None:
    if server is None:
        return None
    finding = server.finding
    return {
        "verdict": finding.verdict,
        "certainty": finding.certainty,
        "stuck": server.stuck,
        "cause": finding.cause or None,
        "meaning": finding.meaning,
        "netns": finding.four_tuple.netns,
        "listener_socket": finding.listener_socket or None,
        "syn_time": utc_text(server.first_syn_ns),
        "last_syn_time": utc_text(server.last_syn_ns),
    }


def _client(client: ClientConnection | None) -> dict[str, Any] | None:
    if client is None:
        return None
    socket = client.socket
    return {
        "verdict": client.verdict,
        "certainty": client.certainty,
        "waits": client.waits,
        "netns": socket.four_tuple.netns,
        "socket_cookie": socket.cookie,
        "uid": socket.uid,
        "owners": [owner_values(one) for one in client.owners.processes],
        "more_owners": client.owners.more,
        "established_time": utc_text(client.established_ns),
        "age_ms": _milliseconds(client.waited_ns),
    }


def joined_line(one: Joined) -> str:
    """One connection as a JSON object on one line, without the newline."""
    who = one.four_tuple
    return json_text(
        {
            "type": "joined",
            "format": FORMAT,
            "client_ip": who.client_ip,
            "client_port": who.client_port,
            "server_ip": who.server_ip,
            "server_port": who.server_port,
            "family": who.family,
            "server": _server(one.server),
            "client": _client(one.client),
            "difference_ms": (
                None if one.difference_ns is None else _milliseconds(one.difference_ns)
            ),
        }
    )


def _difference(difference: Difference | None) -> dict[str, float] | None:
    if difference is None:
        return None
    return {name: _milliseconds(value) for name, value in difference._asdict().items()}


def joined_summary_line(result: Result) -> str:
    """The last line, without the newline."""
    return json_text(
        {
            "type": "joined_summary",
            "format": FORMAT,
            "answer": answer(result),
            "waiting": len(result.waiting),
            "both": result.both,
            "server_only": result.server_only,
            "client_only": result.client_only,
            "difference": _difference(result.difference),
            "apart_ms": None if result.apart_ns is None else _milliseconds(result.apart_ns),
            "overlap_ms": _milliseconds(result.overlap_ns),
            "server_start_time": utc_text(result.server.begin_ns),
            "server_end_time": utc_text(result.server.end_ns),
            "client_start_time": utc_text(result.client.begin_ns),
            "client_end_time": utc_text(result.client.end_ns),
            "flood_suspected": result.flood_suspected,
            "notes": list(result.notes),
        }
    )
