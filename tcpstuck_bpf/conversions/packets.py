"""The packets of one handshake, as far as they are known, and how many are not. Pure.

A packet is known if its time, sequence and acknowledgement numbers are. Events show them. The
table's entry shows a SYN or a cookie's SYN-ACK whose event is missing, because a SYN's numbers are
the handshake's own. Of any other segment the entry has times and counts only; such a segment is
counted here, and never made up.

Times are CLOCK_MONOTONIC nanoseconds.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from tcpstuck_bpf.handshake.entry import bytes_missed
from tcpstuck_bpf.handshake.flow import Segment
from tcpstuck_bpf.handshake.timeline import (
    KIND_OF_ENDING,
    SAME_SEGMENT_NS,
    attempt_text,
    counters_text,
    mss_text,
)
from tcpstuck_bpf.judge.evidence import rejection_cause
from tcpstuck_bpf.model import Attempt, EventKind, FourTuple, Handshake, Moved
from tcpstuck_bpf.synack import addresses_of, ip_packet

SYN, ACK = 0x02, 0x10
WINDOW = 65_535
"""Stands for the window of a packet, which is not known."""
_TCP = struct.Struct("!HHIIBBHHH")
_MSS = struct.Struct("!BBH")
_MSS_OPTION = 2
SYNS, SYN_ACKS, OTHERS = "SYNs", "SYN-ACKs", "ACKs and other segments"
"""What is counted if it is not known well enough."""

_OF_A_SYN = frozenset({EventKind.SYN_REPEATED, EventKind.SYN_DROPPED})


class Cookie(NamedTuple):
    """A SYN-ACK with a cookie."""

    isn: int
    mss: int
    """The MSS that the cookie encodes; 0 if unknown."""


class Packet(NamedTuple):
    """One packet of a handshake. Payload bytes are never known, only their number."""

    time_ns: int
    from_client: bool
    sequence: int
    acknowledgement: int
    tcp_flags: int
    payload_length: int
    mss: int
    """The MSS option; 0 for none."""
    words: str
    """What the tool knows of the packet."""
    is_own: bool = True
    """False for the SYN with which the client begins another handshake."""


class Known(NamedTuple):
    """What is known of one handshake's packets."""

    entry: Handshake
    segments: Sequence[Segment]
    attempts: Sequence[Attempt] = ()
    cookies: Mapping[int, Cookie] = {}
    """Cookies by the time of the SYN that drew them. The entry has the last one besides."""
    causes: Mapping[int, str] = {}
    """What dropped an ACK, by its time."""


def first_syn_is_known(entry: Handshake) -> bool:
    """Whether an entry's first time is that of its first SYN, not of the ACK that made the entry.

    The count of SYNs does not show it: after an ACK, a SYN counts as the second one.
    """
    by_ack = entry.acks_dropped > 0 and entry.first_ack_dropped_ns == entry.first_syn_ns
    return entry.syn_count > 0 and not by_ack


def first_cookie(entry: Handshake) -> Cookie | None:
    """The cookie for the first SYN, if an entry shows it: no later SYN has been answered."""
    if first_syn_is_known(entry) and entry.syn_count - entry.syns_dropped == 1:
        return Cookie(entry.cookie_isn, entry.mss)
    return None


def packets_of(known: Known) -> tuple[list[Packet], Counter[str]]:
    """The known packets, oldest first, and the number of unknown ones by kind."""
    syns = list(_syns(known))
    cookies = _cookies(known, [syn.packet.time_ns for syn in syns])
    packets = []
    for syn in syns:
        cookie = cookies.get(syn.packet.time_ns)
        packets.append(_with_answer(syn, cookie))
        if cookie is not None:
            packets.append(_synack(known.entry, syn.packet.time_ns, cookie))
    packets += _later_segments(known)
    rescues = list(_rescues(known, cookies))
    packets += rescues
    # A SYN-ACK has its SYN's time, and stays behind it.
    packets.sort(key=lambda packet: packet.time_ns)
    return packets, _unknown(known, len(syns), len(cookies), len(rescues))


class _Syn(NamedTuple):
    packet: Packet
    answered: bool | None
    """Whether a cookie's SYN-ACK answered it; None if unknown."""


def _syns(known: Known) -> Iterator[_Syn]:
    """The SYNs of this handshake, answered or dropped."""
    entry = known.entry
    told = [segment for segment in known.segments if segment.kind in _OF_A_SYN]
    if first_syn_is_known(entry):
        queue = f"; {_queue_text(entry)}" if entry.syn_count == 1 else ""
        yield _Syn(_client_syn(entry, entry.first_syn_ns, f"SYN{queue}"), True)
    for segment in told:
        answered = segment.kind == EventKind.SYN_REPEATED
        yield _Syn(_segment(segment, _syn_words(segment)), answered)
    last_ns = entry.last_syn_ns
    is_told = any(abs(segment.time_ns - last_ns) < SAME_SEGMENT_NS for segment in told)
    if entry.syn_count > 1 and last_ns > entry.first_syn_ns and not is_told:
        packet = _client_syn(entry, last_ns, f"SYN repeated, the last of {entry.syn_count}")
        yield _Syn(packet, True if _every_drop_is_told(known) else None)


def _every_drop_is_told(known: Known) -> bool:
    drops = sum(segment.kind == EventKind.SYN_DROPPED for segment in known.segments)
    return drops == known.entry.syns_dropped


def _client_syn(entry: Handshake, time_ns: int, words: str) -> Packet:
    return Packet(time_ns, True, entry.client_isn, 0, SYN, 0, 0, words)


def _segment(segment: Segment, words: str, *, is_own: bool = True) -> Packet:
    return Packet(
        segment.time_ns,
        True,
        segment.sequence,
        segment.acknowledgement,
        segment.tcp_flags,
        segment.payload_length,
        0,
        words,
        is_own,
    )


def _cookies(known: Known, syns: Sequence[int]) -> dict[int, Cookie]:
    """The known cookies for the SYNs of these times."""
    entry = known.entry
    found = {time_ns: known.cookies[time_ns] for time_ns in syns if time_ns in known.cookies}
    first = first_cookie(entry)
    last_ns = entry.last_syn_ns
    dropped = {s.time_ns for s in known.segments if s.kind == EventKind.SYN_DROPPED}
    if first is not None:
        found.setdefault(entry.first_syn_ns, first)
    elif last_ns in syns and last_ns not in dropped and _every_drop_is_told(known):
        found.setdefault(last_ns, Cookie(entry.cookie_isn, entry.mss))
    return found


def _with_answer(syn: _Syn, cookie: Cookie | None) -> Packet:
    """A SYN with the MSS option that its cookie encodes, or with words on the missing answer."""
    packet = syn.packet
    if cookie is not None:
        return packet._replace(mss=cookie.mss)
    if syn.answered is None:
        return packet._replace(words=f"{packet.words}; not known whether it was answered")
    if syn.answered:
        return packet._replace(words=f"{packet.words}; the number of its SYN-ACK is not known")
    return packet


def _synack(entry: Handshake, time_ns: int, cookie: Cookie) -> Packet:
    words = f"SYN-ACK with a SYN cookie, which encodes {mss_text(entry._replace(mss=cookie.mss))}"
    return Packet(time_ns, False, cookie.isn, entry.client_isn + 1, SYN | ACK, 0, 0, words)


def _rescues(known: Known, cookies: Mapping[int, Cookie]) -> Iterator[Packet]:
    """The SYN-ACKs that the tool repeated: each is the last one before it."""
    entry = known.entry
    for attempt in known.attempts:
        if not attempt.sent:
            continue
        before = [time_ns for time_ns in cookies if time_ns <= attempt.time_ns]
        isn = cookies[max(before)].isn if before else None
        if entry.last_syn_ns <= attempt.time_ns:
            isn = entry.cookie_isn
        if isn is None:
            continue
        numbers = (isn, entry.client_isn + 1, SYN | ACK)
        yield Packet(attempt.time_ns, False, *numbers, 0, 0, attempt_text(attempt))


def _later_segments(known: Known) -> Iterator[Packet]:
    for segment in known.segments:
        if segment.kind not in _OF_A_SYN:
            words = _words(segment, known)
            yield _segment(segment, words, is_own=segment.kind != EventKind.REPLACED)


def _words(segment: Segment, known: Known) -> str:
    entry, kind = known.entry, segment.kind
    if kind == EventKind.ACK_DROPPED:
        return _refused(segment, known.causes.get(segment.time_ns))
    if kind == EventKind.ACK_FILTERED:
        cause = known.causes.get(segment.time_ns)
        return f"dropped before TCP: {cause}" if cause else "dropped before TCP"
    if kind == EventKind.ACK_REJECTED:
        return f"refused, an RST answers: {rejection_cause(segment.counters)}"
    if kind == EventKind.COMPLETED:
        return f"connected: its cookie is valid{_missed(bytes_missed(entry))}"
    return _FIXED_WORDS.get(kind, f"segment of kind {kind}")


_FIXED_WORDS: Mapping[int, str] = {
    EventKind.RESET: "RST from the client's address",
    EventKind.NO_LISTENER: "found no listening socket, an RST answers",
    EventKind.TAKEN_OVER: "SYN repeated: it got a place in the SYN queue, and no cookie",
    EventKind.REPLACED: "SYN of a new handshake: the client has given up the one before",
}


def _missed(number: int) -> str:
    if number > 0:
        return f"; the server missed the {number} bytes before it"
    return f"; the server waits for {-number} bytes before ISN+1" if number < 0 else ""


def _refused(segment: Segment, cause: str | None) -> str:
    """What became of an ACK that reached the cookie check and was dropped there."""
    if segment.counters & Moved.LISTEN_OVERFLOWS:
        return f"dropped: accept queue full ({_filling(segment)})"
    moved = f"counters moved: {counters_text(segment.counters)}"
    why = f"{cause}; {moved}" if cause else moved
    return f"dropped by the cookie check: {why}; {_queue_text(segment)}"


def _syn_words(segment: Segment) -> str:
    if segment.kind == EventKind.SYN_REPEATED:
        return f"SYN repeated; {_queue_text(segment)}"
    if segment.counters & Moved.LISTEN_OVERFLOWS:
        return f"SYN dropped: accept queue full ({_filling(segment)})"
    moved = counters_text(segment.counters)
    return f"SYN dropped by the listener: counters moved: {moved}; {_queue_text(segment)}"


def _filling(seen: Segment | Handshake) -> str:
    return f"{seen.accept_queue} of {seen.accept_queue_limit}"


def _queue_text(seen: Segment | Handshake) -> str:
    return f"accept queue {_filling(seen)}"


def _unknown(known: Known, syns: int, cookies: int, rescues: int) -> Counter[str]:
    """The number of packets that must have been and are not known well enough, by kind."""
    entry = known.entry
    told = Counter(segment.kind for segment in known.segments)
    ending = KIND_OF_ENDING.get(entry.ending)
    sent = sum(attempt.sent for attempt in known.attempts)
    # An ACK that made the entry answered a SYN-ACK, hence a SYN.
    least = max(1, entry.syn_count)
    answered = max(1, entry.syn_count - entry.syns_dropped)
    missing = {
        SYNS: least - syns,
        SYN_ACKS: max(0, answered - cookies) + sent - rescues,
        OTHERS: max(0, entry.acks_dropped - told[EventKind.ACK_DROPPED])
        + max(0, entry.acks_filtered - told[EventKind.ACK_FILTERED])
        + (ending is not None and not told[ending]),
    }
    return Counter({kind: number for kind, number in missing.items() if number > 0})


def ip_bytes(packet: Packet, who: FourTuple) -> bytes:
    """The headers of a packet: all of it but the payload. Numbers are cut to their fields."""
    option = _MSS.pack(_MSS_OPTION, _MSS.size, packet.mss & 0xFFFF) if packet.mss else b""
    ports = (who.client_port, who.server_port)
    source, destination = addresses_of(who)
    if not packet.from_client:
        ports, source, destination = ports[::-1], destination, source
    segment = _TCP.pack(
        *ports,
        packet.sequence % 2**32,
        packet.acknowledgement % 2**32,
        (_TCP.size + len(option)) // 4 << 4,
        packet.tcp_flags & 0xFF,
        WINDOW,
        0,
        0,
    )
    return ip_packet(source, destination, segment + option, packet.payload_length)
