"""One sentence on which clients are stuck and why, fit to be sent to a colleague. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from tcpstuck_bpf.judge.stuck_now import StuckGroup
from tcpstuck_bpf.model import address_bytes, listener_id
from tcpstuck_bpf.output.page import Page, counted, endpoint, grouped
from tcpstuck_bpf.summary import Summary

NAMED = 3
"""Number of groups that the sentence lists."""

_WHY = {
    "ack-missing": "no ACK got to this host",
    "ack-filtered": "this host dropped their ACKs before TCP",
    "accept-queue-full": "accept queue full",
    "ack-failed": "this host dropped their ACKs",
}


class _Server(NamedTuple):
    """What is known of the listener that clients are stuck at."""

    owners: tuple[str, ...]
    limit: int
    needs: int | None
    """The backlog that would have been enough; None if unknown."""
    advice: tuple[str, ...] = ()


def stuck_sentence(summary: Summary, page: Page) -> str:
    """One sentence on the stuck clients. Needs at least one stuck client.

    For example: 137 clients of mariadbd (pid 288) at 10.9.0.1:3311 are stuck: accept queue full
    (backlog 50, needs 188).
    """
    groups = summary.stuck
    total = summary.still_stuck
    are = "is" if total == 1 else "are"
    places = {_where(group, _server(summary, group), page) for group, _ in groups}
    together = len(places) == 1 and sum(number for _, number in groups) == total
    of = f" of {places.pop()}" if together else ""
    named = []
    for group, number in groups[:NAMED]:
        server = _server(summary, group)
        why, details = _WHY[group.verdict], _details(group, server)
        if not together:
            why = f"{grouped(number)} of {_where(group, server, page)}{_listed(why, *details)}"
        elif len(groups) > 1:
            why += _listed(counted(number, "client"), *details)
        else:
            why += _listed(*details)
        named.append(why)
    others = total - sum(number for _, number in groups[:NAMED])
    if named and others > 0:
        named.append(f"{grouped(others)} others")
    why = f": {'; '.join(named)}" if named else ""
    return f"{counted(total, 'client')}{of} {are} stuck{why}"


def what_to_do(summary: Summary, advice: Mapping[StuckGroup, str]) -> Iterator[tuple[str, str]]:
    """For the groups of the sentence, a verdict and what to do about it; each advice once.

    `advice`: that of the findings.
    """
    said = set()
    for group, _ in summary.stuck[:NAMED]:
        text = advice_for(summary, group, advice.get(group, ""))
        if text and text not in said:
            said.add(text)
            yield group.verdict, text


def advice_for(summary: Summary, group: StuckGroup, advice: str) -> str:
    """What to do about a group. A known backlog of its listener goes before a finding's advice."""
    server = _server(summary, group)
    if group.verdict == "accept-queue-full" and server is not None and server.advice:
        return " ".join(server.advice)
    return advice


def _server(summary: Summary, group: StuckGroup) -> _Server | None:
    """The listener of a group; None if it is not in the summary."""
    for listener in summary.listeners:
        if listener.netns != group.netns:
            continue
        if group.socket and listener.socket:
            found = listener.socket == group.socket
        else:
            at_port = listener.port == group.server_port
            found = at_port and group.server_ip in listener.addresses
        if found:
            facts = listener.facts
            return _Server(
                listener.owners, facts.limit, listener.advised_backlog, tuple(listener.advice)
            )
    address = address_bytes(group.server_ip)
    wanted = listener_id(group.netns, group.socket, address, group.server_port)
    for one in summary.seen:
        if one.facts.listener == wanted:
            return _Server(one.owners, one.facts.limit, None)
    return None


def _where(group: StuckGroup, server: _Server | None, page: Page) -> str:
    where = endpoint(group.server_ip, group.server_port)
    if server is not None and server.owners:
        where = f"{', '.join(server.owners)} at {where}"
    return where + page.in_netns(group.netns)


def _details(group: StuckGroup, server: _Server | None) -> Iterator[str]:
    """What is known of a group's cause."""
    if group.cause:
        yield group.cause
    if group.certainty != "certain":
        yield group.certainty
    if group.verdict == "accept-queue-full" and server is not None:
        yield f"backlog {grouped(server.limit)}"
        if server.needs is not None:
            yield f"needs {grouped(server.needs)}"


def _listed(*details: str) -> str:
    return f" ({', '.join(details)})" if details else ""
