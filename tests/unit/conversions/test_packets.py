"""Which packets of a handshake are known, and which are only counted."""

from __future__ import annotations

import pytest
from scapy.layers.inet import IP

from tcpstuck_bpf.conversions.packets import (
    OTHERS,
    SYN_ACKS,
    SYNS,
    Cookie,
    Known,
    Packet,
    ip_bytes,
    packets_of,
)
from tcpstuck_bpf.handshake.flow import Segment
from tcpstuck_bpf.model import Attempt, Ending, Event, EventKind, Handshake, Moved
from tests.builders import (
    ACK,
    CLIENT_ISN,
    COOKIE_ISN,
    SYN,
    ack_dropped,
    ack_filtered,
    at,
    ended,
    event,
    four_tuple,
    handshake,
    identity,
    repeated,
)

DROPPED_SYN = handshake(syn_count=2, syns_dropped=1, last_syn_ns=at(1))
BY_ACK = handshake(at(1), syn_count=0, acks_dropped=1, first_ack_dropped_ns=at(1))


def segment(told: Event) -> Segment:
    return Segment(
        told.time_ns,
        told.kind,
        told.sequence,
        told.acknowledgement,
        told.payload_length,
        told.tcp_flags,
        told.counters,
        told.accept_queue,
        told.accept_queue_limit,
    )


def known(entry: Handshake, *events: Event, **more: object) -> Known:
    return Known(entry, tuple(map(segment, events)), **more)  # type: ignore[arg-type]


def shown(of: Known) -> list[tuple[float, int, int]]:
    """Seconds, sequence number and flags of each packet."""
    return [
        ((packet.time_ns - at(0)) / 10**9, packet.sequence, packet.tcp_flags)
        for packet in packets_of(of)[0]
    ]


FIRST = [(0, CLIENT_ISN, SYN), (0, COOKIE_ISN, SYN | ACK)]


def test_a_silent_client_has_a_syn_and_its_cookie() -> None:
    packets, unknown = packets_of(known(handshake()))
    assert shown(known(handshake())) == FIRST
    assert packets[0].mss == handshake().mss
    assert packets[1].acknowledgement == CLIENT_ISN + 1
    assert not unknown


def test_a_repeated_syn_has_its_own_cookie_and_the_first_is_not_guessed() -> None:
    entry = repeated(handshake(), at(1))
    told = event(EventKind.SYN_REPEATED, entry, at(1))
    again = [(1, CLIENT_ISN, SYN), (1, COOKIE_ISN + 1, SYN | ACK)]
    assert shown(known(entry, told)) == [FIRST[0], *again]
    packets, unknown = packets_of(known(entry, told))
    assert "the number of its SYN-ACK is not known" in packets[0].words
    assert (packets[0].mss, unknown) == (0, {SYN_ACKS: 1})
    cookies = {entry.first_syn_ns: Cookie(COOKIE_ISN, 536)}
    whole = known(entry, told, cookies=cookies)
    assert shown(whole) == [*FIRST, *again]
    assert not packets_of(whole)[1]


def test_a_syn_whose_event_was_lost_is_known_by_the_entry() -> None:
    entry = repeated(handshake(), at(1), at(3))
    assert shown(known(entry)) == [
        FIRST[0],
        (3, CLIENT_ISN, SYN),
        (3, COOKIE_ISN + 2, SYN | ACK),
    ]
    packets, unknown = packets_of(known(entry))
    assert "the last of 3" in packets[1].words
    assert unknown == {SYNS: 1, SYN_ACKS: 2}


def test_a_dropped_syn_got_no_answer() -> None:
    told = event(EventKind.SYN_DROPPED, DROPPED_SYN, at(1))
    full = told._replace(counters=Moved.LISTEN_OVERFLOWS | Moved.LISTEN_DROPS)
    assert shown(known(DROPPED_SYN, full)) == [*FIRST, (1, CLIENT_ISN, SYN)]
    packets, unknown = packets_of(known(DROPPED_SYN, full))
    assert packets[-1].words == "SYN dropped: accept queue full (51 of 50)"
    assert not unknown
    assert "counters moved: none" in packets_of(known(DROPPED_SYN, told))[0][-1].words


def test_it_is_not_said_that_a_syn_was_answered_if_it_may_have_been_dropped() -> None:
    entry = DROPPED_SYN._replace(syn_count=3)
    packets, unknown = packets_of(known(entry))
    assert [packet.from_client for packet in packets] == [True, True]
    assert "not known whether it was answered" in packets[-1].words
    assert unknown == {SYNS: 1, SYN_ACKS: 2}


def test_an_entry_that_an_ack_made_has_no_syn() -> None:
    told = event(EventKind.ACK_DROPPED, BY_ACK, at(1))
    packets, unknown = packets_of(known(BY_ACK, told))
    assert [packet.tcp_flags for packet in packets] == [ACK]
    assert unknown == {SYNS: 1, SYN_ACKS: 1}
    later = BY_ACK._replace(syn_count=2, last_syn_ns=at(2))
    again = event(EventKind.SYN_REPEATED, later, at(2))
    packets, unknown = packets_of(known(later, told, again))
    assert [packet.tcp_flags for packet in packets] == [ACK, SYN, SYN | ACK]
    assert unknown == {SYNS: 1, SYN_ACKS: 1}


@pytest.mark.parametrize(
    ("entry", "number"),
    [
        (ack_dropped(ack_dropped(handshake(), at(1)), at(2)), 2),
        (ack_filtered(handshake(), at(1)), 1),
        (ended(handshake(), Ending.RESET, at(1)), 1),
        (ended(handshake(), Ending.COMPLETED, at(1)), 1),
    ],
)
def test_other_segments_without_an_event_are_counted_alone(entry: Handshake, number: int) -> None:
    """Their times are in the entry, but not their numbers."""
    assert shown(known(entry)) == FIRST
    assert packets_of(known(entry))[1] == {OTHERS: number}


def test_a_rescue_repeats_the_last_cookie_before_it() -> None:
    entry = repeated(handshake(), at(5))
    told = event(EventKind.SYN_REPEATED, entry, at(5))
    attempts = tuple(
        Attempt(identity(entry), at(second), number, outcome)
        for second, number, outcome in ((4, 1, "sent"), (6, 2, "sent"), (7, 3, "would send"))
    )
    whole = known(
        entry,
        told,
        attempts=attempts,
        cookies={at(0): Cookie(COOKIE_ISN, 0), at(5): Cookie(COOKIE_ISN + 1, 0)},
    )
    ours = [one for one in packets_of(whole)[0] if "by us" in one.words]
    assert [(one.time_ns, one.sequence) for one in ours] == [
        (at(4), COOKIE_ISN),
        (at(6), COOKIE_ISN + 1),
    ]
    # The cookie before the first attempt is not known.
    packets, unknown = packets_of(known(entry, told, attempts=attempts))
    assert sum("by us" in one.words for one in packets) == 1
    assert unknown == {SYN_ACKS: 2}


def test_the_syn_of_another_handshake_is_not_its_own() -> None:
    entry = ended(handshake(), Ending.REPLACED, at(9))
    told = event(EventKind.REPLACED, entry, at(9), sequence=77)
    packets, unknown = packets_of(known(entry, told))
    assert [packet.is_own for packet in packets] == [True, True, False]
    assert packets[-1].sequence == 77
    assert not unknown


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        (EventKind.ACK_DROPPED, {"counters": Moved.SYNCOOKIES_RECV}, "SyncookiesRecv; accept"),
        (EventKind.ACK_DROPPED, {"counters": Moved.UNKNOWN}, "not readable on this kernel"),
        (EventKind.ACK_REJECTED, {"counters": Moved.SYNCOOKIES_FAILED}, "bad or has expired"),
        (EventKind.NO_LISTENER, {}, "found no listening socket"),
        (EventKind.TAKEN_OVER, {}, "a place in the SYN queue"),
        (99, {}, "segment of kind 99"),
    ],
)
def test_words_say_what_became_of_a_segment(kind: int, changes: dict[str, int], words: str) -> None:
    told = event(EventKind.ACK_DROPPED, handshake(), at(1))._replace(kind=kind, **changes)
    assert words in packets_of(known(handshake(), told))[0][-1].words


@pytest.mark.parametrize(
    ("missed", "words"), [(3, "missed the 3 bytes"), (2**32 - 1, "waits for 1")]
)
def test_words_say_which_bytes_the_server_missed(missed: int, words: str) -> None:
    entry = ended(handshake(bytes_missed=missed), Ending.COMPLETED, at(1))
    told = event(EventKind.COMPLETED, entry, at(1))
    assert words in packets_of(known(entry, told))[0][-1].words


def test_the_cause_of_a_drop_is_that_of_its_time() -> None:
    entry = ack_filtered(ack_filtered(handshake(), at(1)), at(2))
    told = [event(EventKind.ACK_FILTERED, entry, at(second)) for second in (1, 2)]
    packets, _ = packets_of(known(entry, *told, causes={at(2): "a rule"}))
    assert [packet.words for packet in packets[2:]] == [
        "dropped before TCP",
        "dropped before TCP: a rule",
    ]


@pytest.mark.parametrize("family", [4, 6])
def test_nonsense_fits_into_its_fields(family: int) -> None:
    """A length that the header cannot hold is 0 there."""
    most = 2**64 - 1
    packet = Packet(0, True, most, most, most, 2**16 - 1, most, "")
    data = ip_bytes(packet, four_tuple(0, family))
    assert len(data) == (20 if family == 4 else 40) + 24
    if family == 4:
        assert IP(data).len == 0
