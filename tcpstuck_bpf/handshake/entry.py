"""One entry of the awaiting-ACK table: merging its views, and what it says by itself.

Events and sweeps show an entry many times, in no reliable order. The facts of a handshake are
therefore the join of all views (`merge`).
"""

from __future__ import annotations

from tcpstuck_bpf.model import Ending, Handshake

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
