"""A stuck client as the rescue tracks it, and the facts that forbid sending to it. Pure.

Times are CLOCK_MONOTONIC nanoseconds.
"""

from __future__ import annotations

from tcpstuck_bpf.handshake.entry import merge
from tcpstuck_bpf.handshake.flow import TCP_FLAG_FIN, FlowFlags, FlowReport, State
from tcpstuck_bpf.model import SECOND_NS, Event, EventKind, HandshakeId, Moved

MAX_TRIES = 3
"""Number of unanswered SYN-ACKs after which a client is left alone."""
SPACING_NS = SECOND_NS
"""Least time between two tries."""
LAST_TRY_AFTER_NS = 20 * SECOND_NS
"""Time between the last two tries of a silent client, so that a short fault may pass. A cookie is
valid for three times as long."""
COOKIE_LIFE_S = 60
"""Least lifetime of a cookie in seconds. It is valid in the minute it was made in and in the next
(MAX_SYNCOOKIE_AGE is 2 periods of TCP_SYNCOOKIE_PERIOD, 60 s)."""
EXPIRY_MARGIN_NS = 2 * SECOND_NS
"""Time for the answer to arrive before the cookie expires."""

EXCLUDED = "excluded"
SENT_DATA = "sent data"
CLOSED = "closed"
REPEATED_SYN = "repeated its SYN"
SYN_NOT_SEEN = "SYN not seen"
EVENTS_LOST = "events lost"
NOT_KNOWN = "not known"
TOO_LATE = "too late"
FLOOD_SUSPECTED = "flood suspected"
NO_ANSWER = "no answer"
NO_ROOM = "no room"
DROPPED_AGAIN = "ACK dropped again"
"""The client's answer was dropped for another reason than a full accept queue."""
NOT_SENT = "sending failed"
"""At least one try could not be sent."""
DRY_RUN = "dry run"
GONE = "its namespace is gone"

ACK_KINDS = frozenset({EventKind.ACK_DROPPED, EventKind.ACK_FILTERED})
"""Events of an ACK that this host dropped."""
_SYN_KINDS = frozenset({EventKind.SYN_REPEATED, EventKind.SYN_DROPPED})


def next_sequence(sequence: int) -> int:
    """The sequence number that follows."""
    return (sequence + 1) % 2**32


def overflowed(event: Event) -> bool:
    """Whether a dropped ACK met a full accept queue.

    If the kernel's counters are unknown, this uses the rule of sk_acceptq_is_full: the queue is
    longer than its limit.
    """
    if event.counters & Moved.UNKNOWN:
        return event.accept_queue > event.accept_queue_limit
    return bool(event.counters & Moved.LISTEN_OVERFLOWS)


class Candidate:
    """A handshake that was reported as stuck: its facts and the tries so far."""

    __slots__ = (
        "acknowledged",
        "acks_seen",
        "active",
        "answer_owed",
        "asked_ns",
        "budget",
        "closed",
        "dropped_again",
        "excluded",
        "failed",
        "four_tuple",
        "gone",
        "handshake",
        "known",
        "number",
        "reason",
        "sent_data",
        "stuck",
        "tried_ns",
        "tries",
        "unanswered_reported",
        "under_way",
        "would_send",
    )

    def __init__(self, report: FlowReport, excluded: bool) -> None:
        self.four_tuple = report.four_tuple
        self.handshake = report.handshake
        self.excluded = excluded
        self.stuck = True
        self.sent_data = False
        self.closed = False
        self.gone = False
        self.acks_seen = 0
        self.acknowledged: int | None = None
        self.known: bool | None = None
        """Whether the client's address is known to the listener; None if not looked up yet."""
        self.asked_ns = 0
        self.active = False
        """A try is in progress or may follow."""
        self.reason: str | None = None
        """Why a stuck client that is not active is left alone."""
        self.budget = False
        """Whether it counts against the limit for silent clients."""
        self.number = 0
        """Number of attempts."""
        self.tries = 0
        """Number of attempts, without those whose answer met a full accept queue."""
        self.tried_ns = 0
        self.under_way = False
        """The last SYN-ACK may still draw an answer."""
        self.answer_owed = False
        """The last SYN-ACK has drawn no answer yet."""
        self.dropped_again = False
        self.failed = 0
        self.would_send = False
        self.unanswered_reported = False
        self.absorb(report)

    @property
    def id(self) -> HandshakeId:
        """Identifies the handshake."""
        return HandshakeId(self.four_tuple, self.handshake.first_syn_ns)

    @property
    def silent(self) -> bool:
        """Whether no ACK of this client was validated: the client may be spoofed or dead.

        An ACK that was dropped before TCP proves nothing: its cookie was never checked.
        """
        return self.handshake.acks_dropped == 0

    @property
    def cookie_ns(self) -> int:
        """Earliest time at which its cookie may have been made.

        A repeated SYN may have been dropped. Then the client holds the SYN-ACK of an earlier SYN.
        The cookies of the two differ if the minute has changed in between.
        """
        entry = self.handshake
        holds_last = self.acknowledged == next_sequence(entry.cookie_isn)
        if entry.syn_count == 1 or (holds_last and not entry.syns_dropped):
            return entry.last_syn_ns
        return entry.first_syn_ns

    @property
    def last_ns(self) -> int:
        """Last time at which an answer to its cookie is certainly valid."""
        return self.cookie_ns + COOKIE_LIFE_S * SECOND_NS - EXPIRY_MARGIN_NS

    @property
    def next_try_ns(self) -> int:
        """Earliest time of the next try, as far as its own earlier tries decide."""
        if self.number == 0:
            return 0
        if self.silent and not self.under_way and self.tries == MAX_TRIES - 1:
            return self.tried_ns + LAST_TRY_AFTER_NS
        return self.tried_ns + SPACING_NS

    def absorb(self, report: FlowReport) -> None:
        """Merge a report of this handshake."""
        self.handshake = merge(self.handshake, report.handshake)
        self.gone = report.state is State.NAMESPACE_GONE
        self.sent_data |= bool(report.flags & FlowFlags.CLIENT_SENT_DATA)
        self.closed |= bool(report.flags & FlowFlags.CLIENT_SENT_FIN)
        dropped = [s for s in report.segments if s.kind in ACK_KINDS]
        self.acks_seen = max(self.acks_seen, len(dropped) + report.segments_omitted)
        for segment in dropped:
            self._note_ack(segment.sequence, segment.acknowledgement)

    def note(self, event: Event) -> None:
        """Merge an event of this handshake."""
        self.handshake = merge(self.handshake, event.handshake)
        if event.kind not in _SYN_KINDS:
            self.sent_data |= event.payload_length > 0
            self.closed |= bool(event.tcp_flags & TCP_FLAG_FIN)
        if event.kind in ACK_KINDS:
            self.acks_seen += 1
            self._note_ack(event.sequence, event.acknowledgement)

    def _note_ack(self, sequence: int, acknowledgement: int) -> None:
        self.acknowledged = acknowledgement
        # A valid cookie with another sequence number: its first bytes are in flight or lost.
        self.sent_data |= sequence != next_sequence(self.handshake.client_isn)

    def note_answer(self, event: Event) -> bool:
        """Note a dropped ACK; whether it may answer the last SYN-ACK."""
        if self.number == 0 or event.time_ns < self.tried_ns:
            return False
        self.under_way = False
        if self.answer_owed:
            self.answer_owed = False
            if overflowed(event):
                self.tries -= 1
            else:
                self.dropped_again = True
        return True

    def obstacle(self) -> str | None:
        """The fact that forbids sending to this client, whatever the time; None if none does."""
        entry = self.handshake
        repeated = entry.syn_count > 1 and (
            self.silent or entry.last_syn_ns > entry.last_ack_dropped_ns
        )
        obstacles = (
            (self.gone, GONE),
            (self.excluded, EXCLUDED),
            # The age of its cookie and the content of its SYN-ACK are unknown.
            (not entry.syn_count, SYN_NOT_SEEN),
            (self.sent_data, SENT_DATA),
            (self.closed, CLOSED),
            (repeated, REPEATED_SYN),
            (entry.acks_dropped + entry.acks_filtered > self.acks_seen, EVENTS_LOST),
            (self.would_send, DRY_RUN),
            (self.tries >= MAX_TRIES and not self.under_way, self._spent()),
        )
        return next((why for holds, why in obstacles if holds), None)

    def _spent(self) -> str:
        if self.dropped_again:
            return DROPPED_AGAIN
        return NOT_SENT if self.failed else NO_ANSWER
