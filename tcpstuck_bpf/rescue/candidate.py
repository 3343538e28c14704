"""A stuck client as the rescue knows it, and the facts that forbid to write to it. Pure.

Times are CLOCK_MONOTONIC nanoseconds.
"""

from __future__ import annotations

import enum

from tcpstuck_bpf.handshake.flow import TCP_FLAG_FIN, FlowFlags, FlowReport, State, merge
from tcpstuck_bpf.model import SECOND_NS, Event, EventKind, HandshakeId, Moved

MAX_TRIES = 3
"""SYN-ACKs without an answer, after which a client is left alone."""
COOKIE_LIFE_NS = 60 * SECOND_NS
"""A cookie is valid in the minute it was made in and the next (MAX_SYNCOOKIE_AGE is 2 periods of
TCP_SYNCOOKIE_PERIOD, 60 s): for 60 s at the least."""

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
"""Answered, and the answer dropped for another reason than a full accept queue."""
NOT_SENT = "sending failed"
"""Not all of the tries left this host."""
DRY_RUN = "dry run"
GONE = "its namespace is gone"

ACK_KINDS = frozenset({EventKind.ACK_DROPPED, EventKind.ACK_FILTERED})
"""Events of an ACK that this host dropped."""
_SYN_KINDS = frozenset({EventKind.SYN_REPEATED, EventKind.SYN_DROPPED})


class Stage(enum.Enum):
    """What the rescue does with a client; it is in one stage at a time."""

    NEW = "new"
    UNASKED = "unasked"
    """Silent, and it is not asked yet whether its address is known."""
    READY = "ready"
    """Waits for its listener's turn."""
    BLOCKED = "blocked"
    """Waits for its address's token bucket."""
    UNDER_WAY = "under way"
    """A SYN-ACK was sent; an answer may come."""
    RESTING = "resting"
    """Answered, or not sent; the least time between two tries has not passed."""
    LEFT_ALONE = "left alone"


def next_sequence(sequence: int) -> int:
    """The sequence number after this one."""
    return (sequence + 1) % 2**32


def overflowed(event: Event) -> bool:
    """Whether a dropped ACK met a full accept queue.

    Where the kernel's counters cannot be read, by sk_acceptq_is_full: longer than its limit.
    """
    if event.counters & Moved.UNKNOWN:
        return event.accept_queue > event.accept_queue_limit
    return bool(event.counters & Moved.LISTEN_OVERFLOWS)


class Candidate:
    """One handshake that was told as stuck: its facts, and what was tried."""

    __slots__ = (
        "acknowledged",
        "acks_seen",
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
        "stage",
        "stuck",
        "told_unanswered",
        "tried_ns",
        "tries",
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
        self.asked_ns = 0
        self.stage = Stage.NEW
        self.reason: str | None = None
        self.budget = False
        self.number = 0
        self.tries = 0
        """Those of the `number` attempts that a full accept queue did not answer."""
        self.tried_ns = 0
        self.answer_owed = False
        """The last try counts as one without an answer, so far."""
        self.dropped_again = False
        self.failed = 0
        self.would_send = False
        self.told_unanswered = False
        self.absorb(report)

    @property
    def id(self) -> HandshakeId:
        """The handshake."""
        return HandshakeId(self.four_tuple, self.handshake.first_syn_ns)

    @property
    def silent(self) -> bool:
        """Whether no ACK of it was validated: it may be spoofed, or gone.

        One that was dropped before TCP proves nothing here: nobody has looked at its cookie.
        """
        return self.handshake.acks_dropped == 0

    @property
    def cookie_ns(self) -> int:
        """When its cookie was made at the earliest.

        Of several SYNs the last may have been dropped, and the client may hold the SYN-ACK of an
        earlier one, whose cookie is another where the minute has changed since.
        """
        entry = self.handshake
        holds_last = self.acknowledged == next_sequence(entry.cookie_isn)
        if entry.syn_count == 1 or (holds_last and not entry.syns_dropped):
            return entry.last_syn_ns
        return entry.first_syn_ns

    def absorb(self, report: FlowReport) -> None:
        """Take in what a report tells."""
        self.handshake = merge(self.handshake, report.handshake)
        self.gone = report.state is State.NAMESPACE_GONE
        self.sent_data |= bool(report.flags & FlowFlags.CLIENT_SENT_DATA)
        self.closed |= bool(report.flags & FlowFlags.CLIENT_SENT_FIN)
        dropped = [s for s in report.segments if s.kind in ACK_KINDS]
        self.acks_seen = max(self.acks_seen, len(dropped) + report.segments_omitted)
        for segment in dropped:
            self._note_ack(segment.sequence, segment.acknowledgement)

    def note(self, event: Event) -> None:
        """Take in what an event of this handshake tells."""
        self.handshake = merge(self.handshake, event.handshake)
        if event.kind not in _SYN_KINDS:
            self.sent_data |= event.payload_length > 0
            self.closed |= bool(event.tcp_flags & TCP_FLAG_FIN)
        if event.kind in ACK_KINDS:
            self.acks_seen += 1
            self._note_ack(event.sequence, event.acknowledgement)

    def _note_ack(self, sequence: int, acknowledgement: int) -> None:
        self.acknowledged = acknowledgement
        # A valid cookie with another sequence number: the first bytes are on their way or lost.
        self.sent_data |= sequence != next_sequence(self.handshake.client_isn)

    def note_answer(self, event: Event) -> bool:
        """Take in a dropped ACK as the answer to the last try; whether it can be that."""
        if self.number == 0 or event.time_ns < self.tried_ns:
            return False
        if self.answer_owed:
            self.answer_owed = False
            if overflowed(event):
                self.tries -= 1
            else:
                self.dropped_again = True
        return True

    def obstacle(self) -> str | None:
        """Why it must be left alone by what is known of it, whatever the time."""
        entry = self.handshake
        repeated = entry.syn_count > 1 and (
            self.silent or entry.last_syn_ns > entry.last_ack_dropped_ns
        )
        obstacles = (
            (self.gone, GONE),
            (self.excluded, EXCLUDED),
            # How old its cookie is, and what its SYN-ACK was, is not known.
            (not entry.syn_count, SYN_NOT_SEEN),
            (self.sent_data, SENT_DATA),
            (self.closed, CLOSED),
            (repeated, REPEATED_SYN),
            (entry.acks_dropped + entry.acks_filtered > self.acks_seen, EVENTS_LOST),
            (self.would_send, DRY_RUN),
            (self.tries >= MAX_TRIES and self.stage is not Stage.UNDER_WAY, self._spent()),
        )
        return next((why for holds, why in obstacles if holds), None)

    def _spent(self) -> str:
        if self.dropped_again:
            return DROPPED_AGAIN
        return NOT_SENT if self.failed else NO_ANSWER
