"""One handshake in user space: its merged facts, and the state that follows from them.

Events and sweeps show an entry of the awaiting-ACK table many times, in no reliable order. The
facts of a handshake are therefore the join of all views (`merge`), and its state is a function of
that join (`decide`).

Times are CLOCK_MONOTONIC nanoseconds.
"""

from __future__ import annotations

import bisect
import enum
import functools
from typing import NamedTuple, TypeVar

from tcpstuck_bpf.model import SECOND_NS, Attempt, Ending, Event, EventKind, FourTuple, Handshake

Shared = TypeVar("Shared", bytes, int)

SEGMENTS_KEPT_AT_EACH_END = 8
SYNS_OF_A_REPEATING_CLIENT = 3

TCP_FLAG_FIN = 0x01
TCP_FLAG_ACK = 0x10


class State(enum.Enum):
    """The state of a handshake, as far as the facts show it."""

    COMPLETED = "completed"
    """The ACK was valid, and cookie_vX_check made the child socket."""
    RECOVERED = "recovered"
    """The client was reported stuck and has connected since."""
    DATA_LOST = "data lost"
    """The ACK was valid but had a later sequence number, so the first bytes are lost."""
    REJECTED = "rejected"
    """cookie_vX_check returned the ACK to the listener, which answers with an RST."""
    RESET = "reset"
    """The client's address answered with an RST."""
    NO_LISTENER = "no listener"
    """A segment of the client found no listening socket any more and drew an RST."""
    RESCUED = "rescued"
    """The client was reported stuck and then connected by the ACK to our repeated SYN-ACK."""
    TAKEN_OVER = "taken over"
    """A repeated SYN got a place in the SYN queue, and no ACK for a cookie's SYN-ACK was seen."""
    ACK_DROPPED = "ACK dropped"
    """The ACK was dropped (cookie_vX_check returned NULL), and no later one got through."""
    ACK_FILTERED = "ACK filtered"
    """The ACK was dropped on this host before TCP, and no later one got through."""
    REPEATING = "repeating"
    """The client repeats its SYN and never sends an ACK."""
    SILENT = "silent"
    """Nothing came after the SYN-ACK."""
    UNANSWERED = "unanswered"
    """Nothing came after the SYN-ACK, nor after our repeated SYN-ACKs."""
    NAMESPACE_GONE = "namespace gone"
    """The client was reported stuck, and its server's network namespace has been removed."""
    SUPERSEDED = "superseded"
    """The client gave up and uses the 4-tuple for a new handshake."""


SILENT_STATES = frozenset({State.SILENT, State.UNANSWERED})
STUCK_STATES = SILENT_STATES | {State.ACK_DROPPED, State.ACK_FILTERED}
CONNECTED_STATES = frozenset({State.COMPLETED, State.RECOVERED, State.RESCUED, State.DATA_LOST})
ENDED_STATES = frozenset(
    {
        State.COMPLETED,
        State.RECOVERED,
        State.RESCUED,
        State.DATA_LOST,
        State.REJECTED,
        State.RESET,
        State.NO_LISTENER,
        State.TAKEN_OVER,
        State.SUPERSEDED,
    }
)

_STATE_OF_ENDING: dict[int, State] = {
    Ending.COMPLETED: State.COMPLETED,
    Ending.REJECTED: State.REJECTED,
    Ending.RESET: State.RESET,
    Ending.TAKEN_OVER: State.TAKEN_OVER,
    Ending.REPLACED: State.SUPERSEDED,
    Ending.NO_LISTENER: State.NO_LISTENER,
}
# If a handshake shows two endings, an existing connection wins: a stray RST or a rejected
# keep-alive probe does not undo it. TAKEN_OVER loses against any other ending: only TAKEN_OVER can
# be wrong, and the other ending was seen later.
_RANK_OF_ENDING: dict[int, int] = {
    Ending.TAKEN_OVER: 1,
    Ending.RESET: 2,
    Ending.NO_LISTENER: 3,
    Ending.REJECTED: 4,
    Ending.REPLACED: 5,
    Ending.COMPLETED: 6,
}


class Segment(NamedTuple):
    """The part of an event that describes the segment, not the table's entry."""

    time_ns: int
    kind: int
    sequence: int
    acknowledgement: int
    payload_length: int
    """Payload in bytes."""
    tcp_flags: int
    counters: int
    accept_queue: int
    accept_queue_limit: int


class FlowFlags(enum.IntFlag):
    """What a flow's segments show about the client. A lost event may leave a flag unset."""

    NOTHING = 0
    CLIENT_SENT_DATA = 1 << 0
    CLIENT_SENT_FIN = 1 << 1


class TimelineEntry(NamedTuple):
    """One line of a flow's history."""

    time_ns: int
    what: str
    detail: str


class FlowReport(NamedTuple):
    """A flow in a new state that is worth reporting, with all facts known by then."""

    four_tuple: FourTuple
    state: State
    previous: State | None
    """State of the previous report; None in the first report."""
    previous_facts: tuple[Handshake, tuple[Segment, ...]] | None
    """`handshake` and `segments` of the previous report."""
    handshake: Handshake
    decided_ns: int
    """Time of the fact or the deadline that led to the state, not of its arrival here."""
    delay_ns: int | None
    """Time from the first SYN to the connection; None if there is no connection."""
    segments: tuple[Segment, ...]
    """The segments that events showed, oldest first. The middle of a long list is missing."""
    timeline: tuple[TimelineEntry, ...]
    timeline_omitted: int
    """Number of entries left out of the timeline's middle."""
    flags: FlowFlags
    segments_omitted: int = 0
    """Number of segments missing from the middle of `segments`. `flags` includes them."""
    attempts: tuple[Attempt, ...] = ()
    """Our repeated SYN-ACKs, oldest first."""
    flood: str = ""
    """Why a silent handshake looks like part of a SYN flood, as text; empty if it does not."""

    @property
    def age_ns(self) -> int:
        """Time from the first SYN to the decision."""
        return self.decided_ns - self.handshake.first_syn_ns


class Decision(NamedTuple):
    """The state that follows from a handshake's facts."""

    state: State
    at_once: bool
    """Whether a fact decided the state. If a deadline did, the handshake must have been seen open
    at `due_ns` or later."""
    due_ns: int
    decided_ns: int


@functools.lru_cache(maxsize=1024)
def _shared(value: Shared) -> Shared:
    """The cached object equal to this value, among the last 1024 values."""
    return value


def sharing(who: FourTuple) -> FourTuple:
    """An equal 4-tuple whose values are shared with other 4-tuples, to save memory.

    Each decoded 4-tuple has its own copies, and a flood causes many.
    """
    return who._replace(
        server_address=_shared(who.server_address),
        server_port=_shared(who.server_port),
        netns=_shared(who.netns),
    )


def _sharing(entry: Handshake) -> Handshake:
    """An equal entry whose values are shared with other entries, to save memory."""
    first_ns, last_ns = entry.first_syn_ns, entry.last_syn_ns
    return entry._replace(
        last_syn_ns=first_ns if last_ns == first_ns else last_ns,
        accept_queue=_shared(entry.accept_queue),
        accept_queue_limit=_shared(entry.accept_queue_limit),
        syn_queue=_shared(entry.syn_queue),
        mss=_shared(entry.mss),
    )


class Flow:
    """One handshake, identified by (4-tuple, first_syn_ns). It is stored under its 4-tuple."""

    __slots__ = (
        "attempts",
        "ever_stuck",
        "flags",
        "flood",
        "handshake",
        "in_table",
        "open_as_of_ns",
        "reported",
        "reported_handshake",
        "reported_segments",
        "reported_taken_over",
        "seen_ns",
        "segments",
        "segments_omitted",
        "state",
        "unanswered",
        "unsettled",
    )

    def __init__(self, handshake: Handshake) -> None:
        self.handshake = _sharing(handshake)
        self.open_as_of_ns = 0
        self.seen_ns = 0
        # Tuples, because an empty one takes no memory, and most flows belong to a flood.
        self.segments: tuple[Segment, ...] = ()
        self.segments_omitted = 0
        self.flags = FlowFlags.NOTHING
        self.state: State | None = None
        self.reported: State | None = None
        self.reported_handshake: Handshake | None = None
        self.reported_segments: tuple[Segment, ...] = ()
        self.reported_taken_over = False
        self.ever_stuck = False
        self.in_table = False
        self.unsettled = True
        self.attempts: tuple[Attempt, ...] = ()
        self.unanswered = False
        self.flood = ""
        """Why the handshake is reported as part of a SYN flood; empty if it is not."""

    def note(self, handshake: Handshake, as_of_ns: int) -> bool:
        """Merge a view of the entry at `as_of_ns`. Returns whether it adds anything.

        The time matters too. An entry seen open at its deadline is silent. An entry last seen
        before its deadline may have ended since; the event of its end may be lost.
        """
        if as_of_ns > self.seen_ns:
            self.seen_ns = as_of_ns
        if handshake.ending == Ending.NONE and as_of_ns > self.open_as_of_ns:
            self.open_as_of_ns = as_of_ns
        if handshake == self.handshake:
            return False
        merged = merge(self.handshake, handshake)
        news = merged != self.handshake
        self.handshake = merged
        return news

    def note_segment(self, event: Event) -> bool:
        """Keep an event's segment. Returns whether it is new.

        If there are many segments, the first few and the last few are kept.
        """
        segment = Segment(
            time_ns=event.time_ns,
            kind=event.kind,
            sequence=event.sequence,
            acknowledgement=event.acknowledgement,
            payload_length=event.payload_length,
            tcp_flags=event.tcp_flags,
            counters=event.counters,
            accept_queue=event.accept_queue,
            accept_queue_limit=event.accept_queue_limit,
        )
        place = bisect.bisect_left(self.segments, segment)
        if place < len(self.segments) and self.segments[place] == segment:
            return False
        segments = [*self.segments[:place], segment, *self.segments[place:]]
        if len(segments) > 2 * SEGMENTS_KEPT_AT_EACH_END:
            del segments[SEGMENTS_KEPT_AT_EACH_END]
            self.segments_omitted += 1
        self.segments = tuple(segments)
        if segment.kind not in (EventKind.SYN_REPEATED, EventKind.SYN_DROPPED):
            if segment.payload_length > 0:
                self.flags |= FlowFlags.CLIENT_SENT_DATA
            if segment.tcp_flags & TCP_FLAG_FIN:
                self.flags |= FlowFlags.CLIENT_SENT_FIN
        return True

    @property
    def reported_facts(self) -> tuple[Handshake, tuple[Segment, ...]] | None:
        """Handshake and segments of the last report; None before the first."""
        return (
            None
            if self.reported_handshake is None
            else (self.reported_handshake, self.reported_segments)
        )

    def drawn_by_attempt(self) -> bool:
        """Whether the client was connected by a bare ACK after a repeated SYN-ACK.

        tcp_send_challenge_ack (RFC 5961 section 4) sends sequence number snd_nxt, which is ISN + 1
        if the client has sent nothing. A client that connects by itself sends data or a FIN.
        """
        first_ns = min((a.time_ns for a in self.attempts if a.sent), default=None)
        return first_ns is not None and any(
            segment.kind == EventKind.COMPLETED
            and segment.time_ns > first_ns
            and segment.tcp_flags == TCP_FLAG_ACK
            and segment.payload_length == 0
            and segment.sequence == (self.handshake.client_isn + 1) % 2**32
            for segment in self.segments
        )


def _last_syn(entry: Handshake) -> tuple[int, ...]:
    return (
        entry.syn_count,
        entry.last_syn_ns,
        entry.cookie_isn,
        entry.accept_queue,
        entry.accept_queue_limit,
        entry.syn_queue,
        entry.mss,
        entry.client_isn,
        entry.socket,
    )


def _last_drop(entry: Handshake) -> tuple[int, ...]:
    return (entry.last_ack_dropped_ns, entry.drop_place, entry.drop_reason)


def _filtered(entry: Handshake) -> tuple[int, ...]:
    return (
        entry.last_ack_filtered_ns,
        entry.filter_place,
        entry.filter_reason,
        entry.filter_stack,
        entry.filter_device,
    )


def _end(entry: Handshake) -> tuple[int, ...]:
    rank = _RANK_OF_ENDING.get(entry.ending, 0)
    return (rank, entry.ended_ns, entry.end_counters, entry.ending)


def merge(one: Handshake, other: Handshake) -> Handshake:
    """Merge two views of one handshake.

    The merge is commutative, associative and idempotent, so neither the order of views nor a
    repeated view matters. The last SYN's values come from the view with the later SYN.
    """
    syn = one if _last_syn(one) >= _last_syn(other) else other
    end = max(_end(one), _end(other))
    drop, filtered = max(_last_drop(one), _last_drop(other)), max(_filtered(one), _filtered(other))
    filters = [t for t in (one.first_ack_filtered_ns, other.first_ack_filtered_ns) if t]
    drops = [t for t in (one.first_ack_dropped_ns, other.first_ack_dropped_ns) if t]
    return syn._replace(
        first_syn_ns=one.first_syn_ns,
        first_ack_dropped_ns=min(drops, default=0),
        last_ack_dropped_ns=drop[0],
        drop_place=drop[1],
        drop_reason=drop[2],
        first_ack_filtered_ns=min(filters, default=0),
        last_ack_filtered_ns=filtered[0],
        filter_place=filtered[1],
        filter_reason=filtered[2],
        filter_stack=filtered[3],
        filter_device=filtered[4],
        acks_filtered=max(one.acks_filtered, other.acks_filtered),
        acks_dropped=max(one.acks_dropped, other.acks_dropped),
        drop_counters=one.drop_counters | other.drop_counters,
        syns_dropped=max(one.syns_dropped, other.syns_dropped),
        bytes_missed=max(one.bytes_missed, other.bytes_missed),
        ended_ns=end[1],
        end_counters=end[2],
        ending=end[3],
    )


def bytes_missed(entry: Handshake) -> int:
    """Number of the client's first bytes that the server will never see.

    A negative number counts bytes before the client's first one. The server waits for them, and
    the client never sends them.
    """
    return (entry.bytes_missed + 2**31) % 2**32 - 2**31


def ending_of(entry: Handshake) -> int:
    """How a handshake ended. An ACK for a cookie's SYN-ACK cancels TAKEN_OVER.

    Such a client is established, so the request in the SYN queue never completes (tcp_check_req).
    """
    answered = entry.acks_dropped > 0 or entry.acks_filtered > 0
    return Ending.NONE if entry.ending == Ending.TAKEN_OVER and answered else entry.ending


def is_remarkable(entry: Handshake) -> bool:
    """Whether an entry shows more than one SYN and one cookie."""
    return (
        entry.ending != Ending.NONE
        or entry.syn_count > 1
        or entry.acks_dropped > 0
        or entry.acks_filtered > 0
        or entry.syns_dropped > 0
    )


def is_torn(entry: Handshake) -> bool:
    """Whether a sweep read an entry while a program was writing it.

    The programs change entries in place while a sweep copies them. A copy with parts of two
    handshakes, or with half of an update, has times that are impossible in one handshake.
    """
    first_syn_ns = entry.first_syn_ns
    return (
        entry.last_syn_ns < first_syn_ns
        or (entry.syn_count > 1) != (entry.last_syn_ns > first_syn_ns)
        or (entry.acks_dropped > 0 and entry.first_ack_dropped_ns < first_syn_ns)
        or (entry.acks_filtered > 0 and entry.first_ack_filtered_ns < first_syn_ns)
        or (entry.ending != Ending.NONE and entry.ended_ns < first_syn_ns)
    )


def _ack_lost_here(
    entry: Handshake, reported: State | None, last_syn_ns: int, timeout_ns: int
) -> Decision:
    """The state of a handshake with lost ACKs. One dropped by TCP outweighs a filtered one."""
    if entry.acks_dropped > 0:
        state, first_ns = State.ACK_DROPPED, entry.first_ack_dropped_ns
    else:
        state, first_ns = State.ACK_FILTERED, entry.first_ack_filtered_ns
    since_ns = max(last_syn_ns, first_ns)
    if reported in STUCK_STATES and reported is not state:
        return Decision(state, True, since_ns, since_ns)
    return Decision(state, False, since_ns + timeout_ns, since_ns + timeout_ns)


def decide(entry: Handshake, reported: State | None, timeout_ns: int) -> Decision:
    """The state of a handshake last reported in state `reported`, and the time from which it holds.

    A repeated SYN moves the deadline for silence. By RFC 6298 (5.5) the next SYN comes after at
    most twice the last interval, so a client still without a SYN-ACK would have sent it by then.
    (Linux from 6.5 repeats linearly first, so earlier; see tcp_syn_linear_timeouts.)
    """
    ended = _STATE_OF_ENDING.get(ending_of(entry))
    if ended is State.COMPLETED and entry.bytes_missed:
        ended = State.DATA_LOST
    if ended is not None:
        decided_ns = max(entry.ended_ns, entry.first_syn_ns)
        return Decision(ended, True, decided_ns, decided_ns)
    last_syn_ns = max(entry.last_syn_ns, entry.first_syn_ns)
    if entry.acks_dropped > 0 or entry.acks_filtered > 0:
        return _ack_lost_here(entry, reported, last_syn_ns, timeout_ns)
    if entry.syn_count >= SYNS_OF_A_REPEATING_CLIENT:
        due_ns = entry.first_syn_ns + timeout_ns
        return Decision(State.REPEATING, False, due_ns, max(due_ns, last_syn_ns))
    if entry.syn_count == SYNS_OF_A_REPEATING_CLIENT - 1:
        patience_ns = 2 * (last_syn_ns - entry.first_syn_ns) + SECOND_NS
        due_ns = last_syn_ns + max(timeout_ns, patience_ns)
    else:
        due_ns = entry.first_syn_ns + timeout_ns
    return Decision(State.SILENT, False, due_ns, due_ns)
