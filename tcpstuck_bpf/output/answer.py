"""One sentence on which clients are stuck and why, fit to be sent to a colleague. Pure."""

from __future__ import annotations

from tcpstuck_bpf.judge.backlog import ListenerReport
from tcpstuck_bpf.judge.stuck_now import StuckGroup
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


def stuck_sentence(summary: Summary, page: Page) -> str:
    """One sentence on the stuck clients. Needs at least one stuck client.

    For example: 137 clients of mariadbd (pid 288) at 10.9.0.1:3311 are stuck: accept queue full
    (backlog 50, needs 188).
    """
    groups = summary.stuck
    total = summary.still_stuck
    are = "is" if total == 1 else "are"
    if len(groups) == 1 and groups[0][1] == total:
        group = groups[0][0]
        listener = _listener(summary, group)
        clients = f"{counted(total, 'client')} of {_where(group, listener, page)}"
        return f"{clients} {are} stuck: {_why(group, listener)}"
    named = []
    for group, number in groups[:NAMED]:
        listener = _listener(summary, group)
        where = _where(group, listener, page)
        named.append(f"{grouped(number)} of {where}: {_why(group, listener)}")
    others = total - sum(number for _, number in groups[:NAMED])
    if named and others > 0:
        named.append(f"{grouped(others)} others")
    why = f": {'; '.join(named)}" if named else ""
    return f"{counted(total, 'client')} {are} stuck{why}"


def _listener(summary: Summary, group: StuckGroup) -> ListenerReport | None:
    """The listener of a group; None if it is not in the summary."""
    for listener in summary.listeners:
        if listener.netns != group.netns:
            continue
        if group.socket and listener.socket:
            if listener.socket == group.socket:
                return listener
        elif listener.port == group.server_port and group.server_ip in listener.addresses:
            return listener
    return None


def _where(group: StuckGroup, listener: ListenerReport | None, page: Page) -> str:
    where = endpoint(group.server_ip, group.server_port)
    if listener is not None and listener.owners:
        where = f"{', '.join(listener.owners)} at {where}"
    return where + page.in_netns(group.netns)


def _why(group: StuckGroup, listener: ListenerReport | None) -> str:
    words = [_WHY[group.verdict]]
    if group.cause:
        words.append(f"({group.cause})")
    if group.certainty != "certain":
        words.append(f"({group.certainty})")
    if group.verdict == "accept-queue-full" and listener is not None:
        needs = listener.advised_backlog
        needed = "" if needs is None else f", needs {grouped(needs)}"
        words.append(f"(backlog {grouped(listener.facts.limit)}{needed})")
    return " ".join(words)
