"""The history of one flow, line by line: its events, and facts that only its table entry shows.

Times are CLOCK_MONOTONIC nanoseconds. Sequence numbers are printed as on the wire and relative to
the ISN, as in a packet capture.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from tcpstuck_bpf.handshake.flow import Segment, TimelineEntry
from tcpstuck_bpf.model import ATTEMPT_NOT_SENT, Attempt, Ending, EventKind, Handshake, Moved

MAX_ENTRIES = 24

SAME_SEGMENT_NS = 1_000_000
"""Times that are less than this apart are of one segment: the entry's time and the event's time
come from one program run, but from two clock reads."""

_KIND_TEXT: dict[int, str] = {
    EventKind.SYN_REPEATED: "SYN repeated",
    EventKind.SYN_DROPPED: "SYN dropped",
    EventKind.ACK_DROPPED: "ACK dropped",
    EventKind.ACK_FILTERED: "ACK filtered",
    EventKind.ACK_REJECTED: "ACK rejected",
    EventKind.RESET: "RST from client",
    EventKind.COMPLETED: "connected",
    EventKind.TAKEN_OVER: "SYN taken over",
    EventKind.REPLACED: "SYN of a new handshake",
    EventKind.NO_LISTENER: "found no listener",
}
KIND_OF_ENDING: dict[int, EventKind] = {
    Ending.COMPLETED: EventKind.COMPLETED,
    Ending.REJECTED: EventKind.ACK_REJECTED,
    Ending.RESET: EventKind.RESET,
    Ending.TAKEN_OVER: EventKind.TAKEN_OVER,
    Ending.REPLACED: EventKind.REPLACED,
    Ending.NO_LISTENER: EventKind.NO_LISTENER,
}
_ANY_SYN = frozenset({EventKind.SYN_REPEATED, EventKind.SYN_DROPPED})
_FLAG_NAMES = ((0x02, "SYN"), (0x01, "FIN"), (0x04, "RST"), (0x08, "PSH"), (0x10, "ACK"))
_COUNTER_NAMES = (
    (Moved.SYNCOOKIES_RECV, "SyncookiesRecv"),
    (Moved.SYNCOOKIES_FAILED, "SyncookiesFailed"),
    (Moved.LISTEN_OVERFLOWS, "ListenOverflows"),
    (Moved.LISTEN_DROPS, "ListenDrops"),
)


def counters_text(counters: int) -> str:
    """Names of the counters that moved; `none`, or a remark that they are not readable.

    `counters` is an enum counter_moved of bpf/tcpstuck.h.
    """
    if counters & Moved.UNKNOWN:
        return "not readable on this kernel"
    return ", ".join(name for bit, name in _COUNTER_NAMES if counters & bit) or "none"


def mss_text(entry: Handshake) -> str:
    """The MSS in bytes that the cookie encodes, or a remark that it is unknown."""
    return f"MSS {entry.mss}" if entry.mss else "MSS unknown"


def flags_text(tcp_flags: int) -> str:
    """Names of the TCP flags that are set."""
    return ",".join(name for bit, name in _FLAG_NAMES if tcp_flags & bit) or "no flags"


def relative_sequence(sequence: int, initial: int) -> int:
    """A sequence number relative to an initial one, between -2**31 and 2**31 - 1 (RFC 1982)."""
    return (sequence - initial + 2**31) % 2**32 - 2**31


def isn_text(sequence: int, client_isn: int) -> str:
    """A client's sequence number relative to its ISN: `ISN+1`."""
    return f"ISN{relative_sequence(sequence, client_isn):+d}"


def attempt_text(attempt: Attempt) -> str:
    """An attempt to rescue a stuck client, as text: `SYN-ACK repeated by us, try 1`."""
    if attempt.sent:
        return f"SYN-ACK repeated by us, try {attempt.number}"
    if attempt.outcome == ATTEMPT_NOT_SENT:
        return f"SYN-ACK would be repeated, try {attempt.number} (dry run)"
    return f"SYN-ACK to be repeated, try {attempt.number}: {attempt.outcome}"


def _segment_detail(segment: Segment, entry: Handshake) -> str:
    parts = [flags_text(segment.tcp_flags)]
    if segment.kind not in _ANY_SYN:
        parts.append(f"seq {isn_text(segment.sequence, entry.client_isn)}")
        parts.append(f"ack {segment.acknowledgement:#010x}")
    if segment.payload_length:
        parts.append(f"{segment.payload_length} bytes of data")
    if segment.kind == EventKind.ACK_FILTERED:
        parts.append("dropped before TCP, see the evidence")
    else:
        parts.append(f"accept queue {segment.accept_queue} of {segment.accept_queue_limit}")
    if segment.kind in (EventKind.ACK_DROPPED, EventKind.ACK_REJECTED):
        parts.append(f"counters moved: {counters_text(segment.counters)}")
    return ", ".join(parts)


class Fact(NamedTuple):
    """A packet that the entry shows, in less detail than an event would."""

    time_ns: int
    kind: EventKind
    detail: str


def _remembered(entry: Handshake) -> Iterator[Fact]:
    """What the entry shows besides its first SYN."""
    cookie = f"cookie SYN-ACK {entry.cookie_isn:#010x}, {mss_text(entry)}"
    if entry.syn_count > 1:
        detail = f"the last of {entry.syn_count}; last {cookie}"
        yield Fact(entry.last_syn_ns, EventKind.SYN_REPEATED, detail)
    if entry.acks_dropped > 0:
        drops, counters = EventKind.ACK_DROPPED, counters_text(entry.drop_counters)
        yield Fact(entry.first_ack_dropped_ns, drops, f"the first; counters moved: {counters}")
        if entry.acks_dropped > 1:
            detail = f"the last of {entry.acks_dropped}; counters moved: {counters}"
            yield Fact(entry.last_ack_dropped_ns, drops, detail)
    if entry.acks_filtered > 0:
        filters = EventKind.ACK_FILTERED
        yield Fact(entry.first_ack_filtered_ns, filters, "the first, dropped before TCP")
        if entry.acks_filtered > 1:
            detail = f"the last of {entry.acks_filtered}, dropped before TCP"
            yield Fact(entry.last_ack_filtered_ns, filters, detail)
    kind = KIND_OF_ENDING.get(entry.ending)
    if kind is not None:
        yield Fact(entry.ended_ns, kind, "end of the table entry")


def facts_without_event(entry: Handshake, segments: Sequence[Segment]) -> Iterator[Fact]:
    """What only the entry shows, because no event did: no segment is of that kind and time."""
    for fact in _remembered(entry):
        kinds = _ANY_SYN if fact.kind in _ANY_SYN else {fact.kind}
        if not any(
            one.kind in kinds and abs(one.time_ns - fact.time_ns) < SAME_SEGMENT_NS
            for one in segments
        ):
            yield fact


def build_timeline(
    entry: Handshake,
    segments: Sequence[Segment],
    already_omitted: int,
    attempts: Sequence[Attempt] = (),
) -> tuple[tuple[TimelineEntry, ...], int]:
    """A flow's history, oldest first, and the number of entries missing from its middle.

    `already_omitted` is the number of segments that were not kept. At most MAX_ENTRIES entries are
    returned.
    """
    detail = f"ISN {entry.client_isn:#010x}"
    if entry.syn_count <= 1:
        detail += f"; cookie SYN-ACK {entry.cookie_isn:#010x}, {mss_text(entry)}"
    detail += f"; accept queue {entry.accept_queue} of {entry.accept_queue_limit}"
    entries = [
        TimelineEntry(fact.time_ns, _KIND_TEXT[fact.kind], fact.detail)
        for fact in facts_without_event(entry, segments)
    ]
    entries += [
        TimelineEntry(
            segment.time_ns,
            _KIND_TEXT.get(segment.kind, f"segment of kind {segment.kind}"),
            _segment_detail(segment, entry),
        )
        for segment in segments
    ]
    entries += [
        TimelineEntry(attempt.time_ns, "rescue", attempt_text(attempt)) for attempt in attempts
    ]
    entries.sort()
    if entry.syn_count:
        entries.insert(0, TimelineEntry(entry.first_syn_ns, "SYN", detail))
    whole = tuple(entries)
    if len(whole) <= MAX_ENTRIES:
        return whole, already_omitted
    head = MAX_ENTRIES // 2
    tail = MAX_ENTRIES - head
    return whole[:head] + whole[-tail:], already_omitted + len(whole) - MAX_ENTRIES
