"""A listener's queue figures, and the backlog that would have been enough for it.

Pure. The backlog limits both queues. The accept queue is full when it holds more than the backlog
(sk_acceptq_is_full), so a backlog of N allows N + 1 connections. The SYN queue's limit is N or
N + 1, even within one major version (inet_csk_reqsk_queue_is_full, 3479c7549fb1). The shortest SYN
queue at which a cookie was sent shows which.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from tcpstuck_bpf.judge.backlog_knobs import steps
from tcpstuck_bpf.model import (
    IPV4_MAPPED_PREFIX,
    CoverageGap,
    ListenerFacts,
    ListenerSeen,
    address_text,
)

SOMAXCONN = "core.somaxconn"
SYNCOOKIES = "ipv4.tcp_syncookies"
MAX_SYN_BACKLOG = "ipv4.tcp_max_syn_backlog"

FORCED = "forced"
QUEUE_FULL = "SYN queue full"

_FIGURES_NEED = frozenset(
    {"cookie_v6_init_sequence", "cookie_v6_check", "tcp_check_req", "kernel counters"}
)
"""Probes and counters without which some clients' need is not counted."""


class SynNeed(NamedTuple):
    """The need of SYN queue at one moment, in entries."""

    in_queue: int
    owed: int
    """Cookie handshakes whose clients answered later; each would have taken an entry."""
    silent: int
    """Cookie handshakes whose clients had not answered by the end; not part of the need."""

    @property
    def together(self) -> int:
        """Entries that a long enough SYN queue would have held at that moment."""
        return self.in_queue + self.owed


class ListenerReport(NamedTuple):
    """One listener at the end of a run. Queue lengths and limits are entries."""

    netns: int
    addresses: tuple[str, ...]
    port: int
    owners: tuple[str, ...]
    socket: int
    """Inode number of the socket; 0 if unknown."""
    sockets: int
    """Number of sockets that share the address and port, this one included; 0 if unknown."""
    settings: Mapping[str, int]
    facts: ListenerFacts
    """Figures of all addresses of the listener."""
    cookie_reason: str | None
    """QUEUE_FULL, FORCED (by tcp_syncookies=2), or None if no cookie was sent."""
    accept_queue_needed: int
    syn_queue_needed: int
    silent: int
    advised_backlog: int | None
    """Backlog that would have been enough; None if the current one was."""
    working: tuple[str, ...]
    """How the figures were computed, in complete sentences."""
    advice: tuple[str, ...]
    """What to set, in complete sentences."""

    @property
    def is_capped(self) -> bool | None:
        """Whether the limit equals net.core.somaxconn; None if unknown."""
        somaxconn = self.settings.get(SOMAXCONN)
        return None if somaxconn is None else self.facts.limit == somaxconn

    @property
    def suffered(self) -> bool:
        """Whether the listener sent a cookie or dropped something, so that it is printed."""
        return self.facts.suffered


def merged(several: Sequence[ListenerFacts]) -> ListenerFacts:
    """Merge the facts of a listener that serves several addresses, if its socket is unknown.

    The listener has one pair of queues, so lengths are the longest seen. Counts add up. So do the
    clients of a need, as if all had come at the same time; the sum may be too high, but never too
    low. The need of SYN queue is left out, because it depends on who stayed silent (`SynNeed`).
    """
    cookies = [facts.lowest_cookie_syn_queue for facts in several if facts.cookies_sent]
    return several[0]._replace(
        syns=sum(facts.syns for facts in several),
        cookies_sent=sum(facts.cookies_sent for facts in several),
        syns_refused=sum(facts.syns_refused for facts in several),
        acks_refused=sum(facts.acks_refused for facts in several),
        limit=max(facts.limit for facts in several),
        peak_accept_queue=max(facts.peak_accept_queue for facts in several),
        peak_syn_queue=max(facts.peak_syn_queue for facts in several),
        lowest_cookie_syn_queue=min(cookies, default=0),
        accept_need_accept_queue=max(facts.accept_need_accept_queue for facts in several),
        accept_need_turned_away=sum(facts.accept_need_turned_away for facts in several),
        accept_need_syn_queue=max(facts.accept_need_syn_queue for facts in several),
    )


def cookie_reason(facts: ListenerFacts, settings: Mapping[str, int]) -> str | None:
    """Why cookies were sent, by the sysctl; if that is unknown, by the SYN queue's length.

    A SYN queue shorter than its limit was not full. The length is weaker evidence: another CPU may
    add to the queue between our read and the kernel's, and a restarted server has another limit.
    """
    if not facts.cookies_sent:
        return None
    by_sysctl = {1: QUEUE_FULL, 2: FORCED}.get(settings.get(SYNCOOKIES, 0))
    by_queue = FORCED if facts.lowest_cookie_syn_queue < facts.limit else QUEUE_FULL
    return by_sysctl or by_queue


def _unseen(seen: Iterable[ListenerSeen], gaps: Iterable[CoverageGap]) -> Iterable[str]:
    """What the figures lack because probes are missing."""
    addresses = (one.bound or one.facts.server_address for one in seen)
    ipv4_only = all(address.startswith(IPV4_MAPPED_PREFIX) for address in addresses)
    for gap in gaps:
        if gap.probe in _FIGURES_NEED and not (ipv4_only and "_v6_" in gap.probe):
            yield f"Without {gap.probe} {gap.lost}: treat the need as a minimum."


def report(
    seen: Sequence[ListenerSeen], need: SynNeed, gaps: Sequence[CoverageGap] = ()
) -> ListenerReport:
    """Judge a listener by the facts of each of its addresses (at least one)."""
    facts = merged([one.facts for one in seen])
    owners = tuple(sorted({owner for one in seen for owner in one.owners}))
    settings = seen[0].settings
    reason = cookie_reason(facts, settings)
    accept_queue = (
        facts.accept_need_accept_queue + facts.accept_need_turned_away + facts.accept_need_syn_queue
    )
    wanted = []
    working = []
    if accept_queue > facts.limit + 1:
        wanted.append(accept_queue - 1)
        working.append(_accept_working(facts, accept_queue))
    # Whether this kernel sends a cookie at the limit of the SYN queue or one entry beyond.
    beyond = 1 if facts.lowest_cookie_syn_queue > facts.limit else 0
    if reason == QUEUE_FULL and need.together > facts.limit + beyond:
        wanted.append(need.together - beyond)
        working.append(_syn_working(need, beyond))
    if reason is not None and need.silent:
        working.append(
            f"Not counted: {need.silent} cookie handshakes without an answer. "
            "A longer backlog does not help against a flood."
        )
    if facts.syns_refused:
        working.append(
            f"Not counted: the clients of {facts.syns_refused} SYNs dropped for a full accept "
            "queue (a client tries again after 1, 3, 7 s): treat the need as a minimum."
        )
    working += _unseen(seen, gaps)
    advised = max(wanted, default=None)
    return ListenerReport(
        netns=facts.netns,
        addresses=tuple(address_text(one.bound or one.facts.server_address) for one in seen),
        port=facts.server_port,
        owners=owners,
        socket=facts.socket,
        sockets=max(len(one.sockets) for one in seen),
        settings=settings,
        facts=facts,
        cookie_reason=reason,
        accept_queue_needed=max(accept_queue, facts.peak_accept_queue),
        syn_queue_needed=max(need.together, facts.peak_syn_queue),
        silent=need.silent,
        advised_backlog=advised,
        working=tuple(working),
        advice=tuple(_advice(facts, owners, settings, reason, advised)),
    )


def _accept_working(facts: ListenerFacts, room: int) -> str:
    terms = [f"{facts.accept_need_accept_queue} in the accept queue"]
    if facts.accept_need_turned_away:
        terms.append(f"{facts.accept_need_turned_away} turned away while it was full")
    if facts.accept_need_syn_queue:
        terms.append(f"{facts.accept_need_syn_queue} kept waiting in the SYN queue")
    return (
        f"{' + '.join(terms)} = {room} at once -> backlog {room - 1} or more "
        "(a backlog of N allows N + 1 queued connections)."
    )


def _syn_working(need: SynNeed, beyond: int) -> str:
    return (
        f"{need.in_queue} in the SYN queue + {need.owed} cookie handshakes still awaiting an ACK = "
        f"{need.together} at once -> backlog {need.together - beyond} or more "
        f"(on this kernel a backlog of N allows {'N + 1' if beyond else 'N'} in the SYN queue)."
    )


def _advice(
    facts: ListenerFacts,
    owners: Iterable[str],
    settings: Mapping[str, int],
    reason: str | None,
    advised: int | None,
) -> Iterable[str]:
    somaxconn = settings.get(SOMAXCONN)
    if reason == FORCED:
        yield (
            "While net.ipv4.tcp_syncookies is 2, every SYN gets a cookie, whatever the backlog; "
            "with 1, only when the SYN queue is full."
        )
    if advised is None:
        return
    yield from steps(owners, advised, facts.limit, somaxconn)
    if somaxconn is not None and somaxconn == facts.limit:
        yield (
            f"The current limit, {facts.limit}, equals net.core.somaxconn: the server may have "
            "passed more to listen(); the kernel does not keep that."
        )
    if settings.get(SYNCOOKIES) == 0:
        yield (
            f"While net.ipv4.tcp_syncookies is 0, net.ipv4.tcp_max_syn_backlog "
            f"(now {settings.get(MAX_SYN_BACKLOG, 'unknown')}) limits the SYN queue as well."
        )
