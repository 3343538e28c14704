"""One handshake in user space: its merged facts, and the state that follows from them.

The facts are the join of all views of the table's entry (`entry.merge`). The state is a function of
that join (`decide`).

Times are CLOCK_MONOTONIC nanoseconds.
"""

from __future__ import annotations

import bisect
import enum
import functools
from typing import NamedTuple, TypeVar

from tcpstuck_bpf.handshake.entry import ending_of, merge
from tcpstuck_bpf.model import (
    SECOND_NS,
    Attempt,
    Ending,
    Event,
    EventKind,
    FourTuple,
    Handshake,
    Moved,
)

Shared = TypeVar("Shared", bytes, int)

SEGMENTS_KEPT_AT_EACH_END = 8
SYNS_OF_A_REPEATING_CLIENT = 3
DROP_SETTLES_NS = SECOND_NS // 10
"""How long after an ACK's drop the table may lack its place. Before 6.9 the caller of
cookie_vX_check drops the packet right after the event has gone out; a hypervisor may stop the
processor in between."""

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
        explained = entry.drop_place or entry.drop_counters & Moved.LISTEN_OVERFLOWS
        if state is State.ACK_DROPPED and not explained:
            return Decision(state, False, since_ns + DROP_SETTLES_NS, since_ns)
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
