"""The evidence of a verdict: sentences with facts and figures, in the order of the events.

Times in sentences are relative to the first SYN. No sentence concludes more than its fact shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from tcpstuck_bpf.handshake.entry import bytes_missed, ending_of
from tcpstuck_bpf.handshake.flow import STUCK_STATES, FlowFlags, FlowReport, Segment, State
from tcpstuck_bpf.handshake.timeline import (
    counters_text,
    flags_text,
    isn_text,
    mss_text,
    relative_sequence,
)
from tcpstuck_bpf.judge.drop_cause import Drop
from tcpstuck_bpf.judge.netfilter import rule_text
from tcpstuck_bpf.model import SECOND_NS, Ending, EventKind, Handshake, Moved

MILLISECOND_NS = 1_000_000
_SUSPECTS_NAMED = 4

# A cookie encodes the minute in which it was made, and is valid in that minute and the next
# (MAX_SYNCOOKIE_AGE in the kernel's include/net/tcp.h).
COOKIE_SURELY_VALID_NS = 60 * SECOND_NS


def duration_text(nanoseconds: int) -> str:
    """A length of time as a person writes it: 3.6 s, 5 min, 12 min 05 s, 8 h 05 min."""
    # By what is printed, so that nothing is rounded up to 1000.0 ms or 60.0 s.
    if round(nanoseconds / MILLISECOND_NS, 1) < 1000:
        return f"{nanoseconds / MILLISECOND_NS:.1f} ms"
    if round(nanoseconds / SECOND_NS, 1) < 60:
        return f"{nanoseconds / SECOND_NS:.1f} s"
    minutes, seconds = divmod(max(60, nanoseconds // SECOND_NS), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d" + f" {hours:02} h" * bool(hours)
    if hours:
        return f"{hours} h" + f" {minutes:02} min" * bool(minutes)
    return f"{minutes} min" + f" {seconds:02} s" * bool(seconds)


def _bytes_text(number: int) -> str:
    return "the byte" if number == 1 else f"the {number} bytes"


def _times(number: int) -> str:
    return "once" if number == 1 else f"{number} times"


def _offset(report: FlowReport, time_ns: int) -> str:
    return f"{(time_ns - report.handshake.first_syn_ns) / MILLISECOND_NS:+.1f} ms"


def _segments(report: FlowReport, kind: EventKind) -> list[Segment]:
    return [segment for segment in report.segments if segment.kind == kind]


def _queue_text(seen: Segment | Handshake) -> str:
    return f"accept queue {seen.accept_queue} of {seen.accept_queue_limit}"


def _syn_sentences(report: FlowReport) -> Iterator[str]:
    entry = report.handshake
    cookie = f"cookie SYN-ACK {entry.cookie_isn:#010x}"
    if not entry.syn_count:
        yield (
            f"the SYN was not seen: it came before tracing began, the table had no room, or the "
            f"cookie was made elsewhere; the ACK is for {cookie}"
        )
    elif entry.syn_count == 1:
        yield f"1 SYN, {cookie} sent at +0.0 ms ({mss_text(entry)})"
    else:
        last = _offset(report, entry.last_syn_ns)
        yield f"{entry.syn_count} SYNs, the last at {last}; last {cookie} ({mss_text(entry)})"
    if entry.syns_dropped:
        drops = _segments(report, EventKind.SYN_DROPPED)
        queue = f": {_queue_text(drops[-1])}" if drops else ""
        yield f"SYN dropped {_times(entry.syns_dropped)} by this host, without a SYN-ACK{queue}"


def _sent_data_sentence(report: FlowReport) -> Iterator[str]:
    if report.flags & FlowFlags.CLIENT_SENT_FIN:
        yield "a segment carried a FIN: the client has closed its side meanwhile"
    elif report.flags & FlowFlags.CLIENT_SENT_DATA:
        yield (
            "a segment carried data: the client keeps retransmitting it, and the first copy that "
            "gets through connects it"
        )


def _drop_sentences(report: FlowReport) -> Iterator[str]:
    entry = report.handshake
    drops = _segments(report, EventKind.ACK_DROPPED)
    first = _offset(report, entry.first_ack_dropped_ns)
    when = f"once at {first}"
    if entry.acks_dropped > 1:
        last = _offset(report, entry.last_ack_dropped_ns)
        when = f"{entry.acks_dropped} times, first at {first}, last at {last}"
    queue = _queue_text(drops[-1]) if drops else f"{_queue_text(entry)} when the SYN came"
    yield f"ACK dropped {when}: {queue}"
    if entry.drop_counters & Moved.UNKNOWN:
        yield "the kernel's counters could not be read: judged by the accept queue's length"
    else:
        yield f"kernel counters that moved: {counters_text(entry.drop_counters)}"
    for taken in _segments(report, EventKind.TAKEN_OVER)[:1]:
        yield (
            f"a repeated SYN got a place in the SYN queue at {_offset(report, taken.time_ns)}: "
            "until that request expires (63 s by default, net.ipv4.tcp_synack_retries) the kernel "
            "will not create a second socket for the same connection (found_dup_sk in "
            "tcp_v4_syn_recv_sock)"
        )
    yield from _sent_data_sentence(report)


def _refusal_sentences(drop: Drop) -> Iterator[str]:
    if drop.place is not None:
        yield f"dropped {_kernel_words(drop)}"
    if drop.refusal is not None:
        yield f"what dropped it: {drop.refusal.words}"
    elif drop.counter is not None:
        yield (
            "the cookie was valid and the accept queue had room; memory for the request, a "
            "security module, the route back, MPTCP or the client's own request in the SYN queue "
            "refused it, and this kernel does not say which"
        )


def _acked_handshake(report: FlowReport) -> Iterator[str]:
    yield from _syn_sentences(report)
    yield from _drop_sentences(report)


def _filter_sentences(report: FlowReport, drop: Drop) -> Iterator[str]:
    entry = report.handshake
    first = _offset(report, entry.first_ack_filtered_ns)
    when = f"once at {first}"
    if entry.acks_filtered > 1:
        last = _offset(report, entry.last_ack_filtered_ns)
        when = f"{entry.acks_filtered} times, first at {first}, last at {last}"
    yield f"ACK dropped on this host before TCP {when}, {_kernel_words(drop)}"
    if drop.cause is None:
        return
    hook = f", at its hook {drop.hook}" if drop.hook else ""
    yield f"what dropped it: {drop.cause.words}{hook}"
    suspects, rule = drop.netfilter.suspects, drop.netfilter.rule
    if rule is not None:
        after = duration_text(drop.netfilter.read_after_ns or 0)
        yield f"by {rule_text(rule)}: the only match among the rules read {after} later"
    elif len(suspects) == 1:
        yield f"{rule_text(suspects[0])} matches; whether it dropped the ACK is unknown"
    elif suspects:
        named = "; ".join(map(rule_text, suspects[:_SUSPECTS_NAMED]))
        yield f"{len(suspects)} rules match; which one dropped the ACK is unknown: {named}"
    yield from drop.netfilter.notes
    if drop.netfilter.may_reset:
        yield (
            f"{'that rule' if rule is not None else 'a rule named here'} may have answered with an "
            "RST (reject with tcp reset); a client that gets the RST is not stuck"
        )
    elif drop.netfilter.may_be_unseen:
        yield "it is unknown, too, whether a rule answered with an RST"
    if not drop.sure:
        yield "this kernel gives no reason: judged by the drop site alone"


def _kernel_words(drop: Drop) -> str:
    reason = f"reason {drop.reason}" if drop.reason else "no reason"
    return f"by the kernel's own account: {reason}, at {drop.place}"


def _filtered(report: FlowReport) -> Iterator[str]:
    yield from _syn_sentences(report)
    yield from _sent_data_sentence(report)


def _silence(report: FlowReport) -> Iterator[str]:
    entry = report.handshake
    yield from _syn_sentences(report)
    if entry.syn_count <= 1:
        yield f"no ACK, no RST and no repeated SYN seen within {duration_text(report.age_ns)}"
        return
    gap_ns = entry.last_syn_ns - entry.first_syn_ns
    silence_ns = report.decided_ns - entry.last_syn_ns
    yield (
        f"the client repeated its SYN once after {duration_text(gap_ns)}, then stopped: no ACK, "
        f"no RST and no further SYN seen for {duration_text(silence_ns)}"
    )


def _attempt_sentences(report: FlowReport) -> Iterator[str]:
    sent = [attempt for attempt in report.attempts if attempt.sent]
    if not sent:
        return
    repeated = (
        f"our SYN-ACK repeated {_times(len(sent))}, last at {_offset(report, sent[-1].time_ns)}"
    )
    if report.state is State.UNANSWERED:
        yield f"{repeated}: no answer; a live client would have sent a challenge ACK"
    else:
        yield repeated


def _repeats(report: FlowReport) -> Iterator[str]:
    entry = report.handshake
    yield from _syn_sentences(report)
    answered = max(0, entry.syn_count - entry.syns_dropped)
    age = duration_text(report.age_ns)
    yield f"no ACK and no RST seen in answer to {answered} SYN-ACKs in {age}"
    if report.previous in STUCK_STATES:
        yield "the client still repeats its SYN, so it knows that it is not connected"


def _connection(report: FlowReport) -> Iterator[str]:
    entry = report.handshake
    yield from _syn_sentences(report)
    if entry.acks_dropped:
        yield from _drop_sentences(report)
    when = _offset(report, entry.ended_ns)
    if ending_of(entry) == Ending.TAKEN_OVER:
        yield f"a repeated SYN was answered by a normal handshake at {when}"
        return
    segments = _segments(report, EventKind.COMPLETED)
    by_what = "an ACK"
    if segments:
        last = segments[-1]
        by_what = f"{flags_text(last.tcp_flags)} with {last.payload_length} bytes of data"
    yield f"connected at {when} by {by_what}, {duration_text(report.delay_ns or 0)} after the SYN"
    missed = bytes_missed(entry)
    if missed > 0:
        yield (
            f"that segment has seq ISN{missed + 1:+d}: the server's socket begins there, and never "
            f"sees {_bytes_text(missed)} before it"
        )
    elif missed < 0:
        yield (
            f"that segment has seq ISN{missed + 1:+d}, like a keep-alive probe: the server's "
            f"socket waits for {_bytes_text(-missed)} before ISN+1, which the client never sends, "
            "and does not deliver what the client does send"
        )


def _rejected_segment(report: FlowReport, segment: Segment) -> Iterator[str]:
    entry = report.handshake
    wanted = (entry.cookie_isn + 1) % 2**32
    sequence = relative_sequence(segment.sequence, entry.client_isn)
    yield (
        f"rejected: {flags_text(segment.tcp_flags)}, "
        f"seq {isn_text(segment.sequence, entry.client_isn)}, "
        f"ack {segment.acknowledgement:#010x}, {segment.payload_length} bytes of data"
    )
    if segment.acknowledgement != wanted:
        earlier = "; it may be for an earlier SYN-ACK" if entry.syn_count > 1 else ""
        yield f"its acknowledgement is not the cookie's {wanted:#010x}{earlier}"
    elif sequence == 0:
        yield (
            "it acknowledges the cookie with seq ISN+0: a keep-alive probe of a client that "
            "thought it was connected"
        )
    elif sequence > 1:
        yield f"it acknowledges the cookie, but the {sequence - 1} bytes before it never arrived"
    elif segment.time_ns - entry.last_syn_ns > COOKIE_SURELY_VALID_NS:
        yield "it acknowledges the cookie, more than 60 s after it was made"


def rejection_cause(counters: int) -> str:
    """Why the kernel refused an ACK for a cookie, by the counters that moved."""
    moved = f"kernel counters that moved: {counters_text(counters)}"
    if counters & Moved.UNKNOWN:
        return "the kernel's counters could not be read: the cause is unknown"
    if counters & Moved.SYNCOOKIES_FAILED:
        return f"{moved}; the cookie is bad or has expired"
    if counters & Moved.SYNCOOKIES_RECV:
        return (
            f"{moved}; the cookie is valid, but the timestamp option asks for a feature (SACK, "
            "window scaling, timestamps) that this host has switched off since"
        )
    return (
        f"{moved}; the kernel did not check the cookie: this listener sent none in the last 120 s, "
        "or net.ipv4.tcp_syncookies is 0"
    )


def _rejection(report: FlowReport) -> Iterator[str]:
    entry = report.handshake
    yield from _syn_sentences(report)
    when = _offset(report, entry.ended_ns)
    yield f"ACK returned to the listener at {when}; the listener answers with an RST"
    yield rejection_cause(entry.end_counters)
    segments = _segments(report, EventKind.ACK_REJECTED)
    if segments:
        yield from _rejected_segment(report, segments[-1])


def _no_listener(report: FlowReport) -> Iterator[str]:
    entry = report.handshake
    yield from _syn_sentences(report)
    if entry.acks_dropped:
        yield from _drop_sentences(report)
    when = _offset(report, entry.ended_ns)
    yield f"a segment of the client found no socket at {when}; the kernel answers with an RST"


def _reset(report: FlowReport) -> Iterator[str]:
    entry = report.handshake
    yield from _syn_sentences(report)
    if entry.acks_dropped:
        yield from _drop_sentences(report)
    after = duration_text(max(0, entry.ended_ns - entry.last_syn_ns))
    when = _offset(report, entry.ended_ns)
    yield f"RST from the client's address at {when}, {after} after its SYN"


def _namespace_gone(report: FlowReport) -> Iterator[str]:
    yield from _syn_sentences(report)
    if report.handshake.acks_dropped:
        yield from _drop_sentences(report)
    yield (
        f"at {_offset(report, report.decided_ns)} no process, name or mount led to network "
        f"namespace {report.four_tuple.netns}, or another namespace had its number"
    )


_SENTENCES: Mapping[State, Callable[[FlowReport], Iterator[str]]] = {
    State.COMPLETED: _connection,
    State.RECOVERED: _connection,
    State.ACK_DROPPED: _acked_handshake,
    State.RESCUED: _connection,
    State.DATA_LOST: _connection,
    State.SILENT: _silence,
    State.UNANSWERED: _silence,
    State.ACK_FILTERED: _filtered,
    State.REPEATING: _repeats,
    State.REJECTED: _rejection,
    State.RESET: _reset,
    State.NO_LISTENER: _no_listener,
    State.NAMESPACE_GONE: _namespace_gone,
}


def evidence(report: FlowReport, drop: Drop | None = None) -> tuple[str, ...]:
    """The facts behind a flow's verdict, as complete sentences.

    Raises KeyError for a state without a verdict (taken over, superseded).
    """
    sentences = [*_SENTENCES[report.state](report)]
    if drop is not None and drop.cause is not None:
        sentences += _filter_sentences(report, drop)
    elif drop is not None:
        sentences += _refusal_sentences(drop)
    return (*sentences, *_attempt_sentences(report))
