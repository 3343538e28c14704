"""What is said of a connection that waits: meaning, evidence, owners. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from tcpstuck_bpf.client.actions import Action, Attempt, Outcome
from tcpstuck_bpf.client.facts import ClientSocket, Owners
from tcpstuck_bpf.client.waits import (
    CLIENT_SPOKE,
    GREETING_MISSING,
    RECOVERED,
    RESCUED,
    SERVER_FORGOT,
    SERVER_SLOW,
    Change,
    Group,
)
from tcpstuck_bpf.judge.evidence import duration_text
from tcpstuck_bpf.judge.rules import ALL_RULES, Certainty
from tcpstuck_bpf.model import SECOND_NS

COOKIE_LIFE_NS = 120 * SECOND_NS
"""The longest life of a SYN cookie (MAX_SYNCOOKIE_AGE of include/net/tcp.h, in minutes)."""
KNOWN_NS = SECOND_NS
"""An ACK so much later than the handshake's is another one: jiffies count both times apart."""
SOON_NS = 5 * SECOND_NS
"""Data that comes so soon after our challenge is likely its effect; a poll may take seconds."""
NAMED = 2
"""Most owners of one connection that a line names."""
_RULES = {rule.name: rule for rule in ALL_RULES}


class Told(NamedTuple):
    """A verdict in words."""

    verdict: str
    stuck: bool
    certainty: Certainty
    updates: str | None
    """The verdict that this one replaces."""
    meaning: str
    evidence: tuple[str, ...]
    cannot_prove: str
    advice: str


def server_answered_ns(socket: ClientSocket) -> int | None:
    """How long ago the server sent an ACK after the handshake; None if it sent none.

    A server without a record of the connection answers with an RST, so such an ACK shows that it
    has one. Known only while no data came.
    """
    return socket.last_ack_ns if socket.age_ns - socket.last_ack_ns >= KNOWN_NS else None


def told(change: Change) -> Told:
    """A verdict with what it rests on."""
    rule = _RULES[change.verdict]
    words = Told(
        rule.name,
        rule.stuck,
        rule.certainty,
        change.was,
        rule.meaning,
        tuple(_seen(change)),
        rule.cannot_prove,
        rule.advice,
    )
    if change.verdict == GREETING_MISSING and server_answered_ns(change.socket) is not None:
        return words._replace(certainty="possible", meaning=SLOW_MEANING)
    if change.verdict == RECOVERED:
        return words._replace(
            meaning="was reported; then the server's data came",
            cannot_prove="whether the server was slow, or the connection was mended",
        )
    if change.verdict == RESCUED:
        soon = change.time_ns - (change.challenged_ns or 0) <= SOON_NS
        return words._replace(
            certainty="likely" if soon else "possible",
            meaning="was reported; data came after our challenge",
            cannot_prove=(
                "that the challenge did it: a slow server may have spoken by itself at that time"
            ),
        )
    return words


def _seen(change: Change) -> Iterator[str]:
    """What a verdict rests on, in sentences."""
    socket, waited = change.socket, duration_text(change.waited_ns)
    if change.verdict == GREETING_MISSING:
        yield from _evidence(change)
    elif change.verdict == CLIENT_SPOKE:
        yield (
            f"the client's kernel has sent {socket.data_segs_out} segments with data, {waited} "
            "after the connection was established"
        )
    elif change.verdict in (RECOVERED, RESCUED):
        yield (
            f"{max(socket.bytes_received, socket.unread)} bytes of the server came, at most "
            f"{waited} after the connection was established"
        )
        if change.challenged_ns is not None:
            since = duration_text(change.time_ns - change.challenged_ns)
            yield f"our last challenge was sent {since} before this was seen"
    elif change.verdict == SERVER_FORGOT:
        yield f"asked {waited} after the connection was established: {change.reason}"
        yield "the RST ended it: the application gets ECONNRESET"
    elif change.verdict == SERVER_SLOW:
        yield f"asked {waited} after the connection was established: {change.reason}"
    else:
        yield f"ended by us (SOCK_DESTROY), {waited} after the connection was established"


SLOW_MEANING = "no byte either way, but the server has sent an ACK: likely slow"


def _evidence(change: Change) -> Iterator[str]:
    socket = change.socket
    yield (
        f"ESTABLISHED for {duration_text(change.waited_ns)}, no data received and none sent "
        f"(tcp_info: bytes_acked {socket.bytes_acked}, which is the SYN; bytes_received "
        f"{socket.bytes_received}; data_segs_out {socket.data_segs_out}; segs_in {socket.segs_in})"
    )
    answered_ns = server_answered_ns(socket)
    if answered_ns is not None:
        yield (
            f"the server sent an ACK {duration_text(answered_ns)} ago: it has this connection, and "
            "is slow or paused"
        )
    if socket.keepalive_ns is not None:
        idle_ns = socket.keepalive_ns + min(socket.age_ns, socket.last_ack_ns)
        yield f"TCP keep-alive is on: its next probe is in {duration_text(socket.keepalive_ns)}"
        if answered_ns is None and idle_ns < COOKIE_LIFE_NS:
            yield (
                f"that is {duration_text(idle_ns)} after the last segment, within a SYN cookie's "
                "life: the probe may connect the client one byte early (docs/client.md)"
            )
    if not socket.inode:
        yield "no process has this socket open"


_ACTIONS = {
    Action.CHALLENGE: "challenge",
    Action.QUESTION: "question to the server",
    Action.RESET: "reset",
}
_OUTCOMES = {
    Outcome.SENT: "sent",
    Outcome.WOULD: "would be done (dry run)",
    Outcome.CHANGED: "not done",
    Outcome.FAILED: "failed",
    Outcome.FORGOT: "it has forgotten the connection",
    Outcome.KNOWS: "it has the connection",
    Outcome.NO_ANSWER: "no answer",
    Outcome.NOT_OURS: "not asked, not ours to borrow",
    Outcome.GONE: "not asked, the socket is gone",
    Outcome.REFUSED: "not asked",
    Outcome.ENDED: "done",
}


def attempt_text(attempt: Attempt) -> str:
    """An action and what came of it: `challenge 1: sent`."""
    plan = attempt.plan
    number = f" {plan.number}" * (plan.action is not Action.RESET)
    reason = f" ({attempt.reason})" * bool(attempt.reason)
    return f"{_ACTIONS[plan.action]}{number}: {_OUTCOMES[attempt.outcome]}{reason}"


def owners_text(owners: Owners, uid: int) -> str:
    """The owners of one connection, in words."""
    named = [(one.name, one.pid, one.container) for one in owners.processes]
    return _owners(named, owners.more, uid)


def group_owners_text(group: Group) -> str:
    """The owners of a group's connections, in words."""
    return _owners(group.owners, group.more_owners, group.uid)


def _owners(named: Sequence[tuple[str, int, str]], more: int, uid: int) -> str:
    if not named:
        return f"an unknown process of user {uid}"
    words = []
    for name, pid, container in named[:NAMED]:
        words.append(f"{name} (pid {pid})" + f" in {container}" * bool(container))
    others = len(named) + more - len(words)
    if others:
        words.append(f"{others} more")
    return ", ".join(words)


def why_unknown(owners: Owners, socket: ClientSocket) -> str:
    """Why no owner is known; empty if one is."""
    if owners.processes:
        return ""
    if not socket.inode:
        return "no process has the socket open"
    if not owners.sought:
        return "nobody looked for its owner"
    if owners.hidden:
        return "the files of some processes may not be listed: as root, the tool finds the owner"
    return "no process that is visible here has the socket open"
