"""States and their deadlines, one by one; updates; counts and timelines."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tcpstuck_bpf.handshake.entry import merge
from tcpstuck_bpf.handshake.flow import SEGMENTS_KEPT_AT_EACH_END, FlowFlags, FlowReport, State
from tcpstuck_bpf.handshake.timeline import MAX_ENTRIES
from tcpstuck_bpf.model import (
    Ending,
    EventKind,
    Handshake,
    HandshakeId,
    Moved,
    Row,
    Sweep,
    SweepPart,
)
from tests.builders import (
    FIN,
    PSH,
    START_NS,
    TIMEOUT_NS,
    ack_dropped,
    ack_filtered,
    at,
    correlator,
    ended,
    event,
    four_tuple,
    handshake,
    repeated,
    reports,
    seconds,
    sweep,
)

SYN_ONCE = handshake()
TIMEOUT_S = TIMEOUT_NS / seconds(1)


def first_told(entry: Handshake, *, until_s: float = 600, step_s: float = 0.25) -> FlowReport:
    """The first report of an entry that never changes, swept every `step_s`."""
    watching = correlator()
    for step in range(round(until_s / step_s)):
        now_ns = max(entry.last_syn_ns, START_NS) + seconds(step * step_s)
        told = reports([sweep(now_ns, entry)], now_ns, watching)
        if told:
            assert told[0].decided_ns <= now_ns
            assert now_ns - told[0].decided_ns <= seconds(step_s)
            return told[0]
    raise AssertionError(f"nothing told of {entry} in {until_s} s")


@pytest.mark.parametrize("just_before", [True, False])
def test_silence_after_one_syn_is_told_at_the_timeout(just_before: bool) -> None:
    now_ns = at(TIMEOUT_S) - just_before
    told = reports([sweep(now_ns, SYN_ONCE)], now_ns)
    assert [(r.state, r.decided_ns, r.age_ns, r.delay_ns) for r in told] == (
        [] if just_before else [(State.SILENT, at(TIMEOUT_S), TIMEOUT_NS, None)]
    )


def test_a_late_ack_that_is_refused_is_told_with_the_place_that_only_the_table_has() -> None:
    """Before 6.9 the packet is dropped after the event has gone out."""
    watching = correlator()
    silent = reports([sweep(at(TIMEOUT_S), SYN_ONCE)], at(TIMEOUT_S), watching)
    assert [report.state for report in silent] == [State.SILENT]
    refused = ack_dropped(SYN_ONCE, at(5), Moved.SYNCOOKIES_RECV)
    told = reports([event(EventKind.ACK_DROPPED, refused, at(5))], at(5.001), watching)
    place = 0xFFFFFFFF81234567
    told += reports([sweep(at(5.5), refused._replace(drop_place=place))], at(5.5), watching)
    assert [(r.state, r.handshake.drop_place, r.decided_ns) for r in told] == [
        (State.ACK_DROPPED, place, at(5))
    ]


def test_silence_is_not_concluded_from_the_clock_alone() -> None:
    """The completion of a remarkable handshake may be on its way, or lost and in the table."""
    entry = repeated(SYN_ONCE, at(1))
    watching = correlator()
    assert reports([event(EventKind.SYN_REPEATED, entry, at(1))], at(500), watching) == []
    done = ended(entry, Ending.COMPLETED, at(1.1))
    assert reports([sweep(at(500), done)], at(500), watching) == []
    assert watching.stats().unreported == {State.COMPLETED: 1}


@pytest.mark.parametrize("third", [2, 3])
def test_a_client_without_a_syn_ack_is_repeating(third: float) -> None:
    """Linux from 6.5 repeats at 1, 2, 3 s; before, and RFC 6298, at 1, 3, 7 s."""
    watching = correlator()
    second = repeated(SYN_ONCE, at(1))
    assert reports([event(EventKind.SYN_REPEATED, second, at(1))], at(1), watching) == []
    assert reports([sweep(at(2.9), second)], at(2.9), watching) == []
    entry = repeated(second, at(third))
    seen_ns = at(max(third, TIMEOUT_S))
    told = reports([event(EventKind.SYN_REPEATED, entry, at(third))], at(third), watching)
    told += reports([sweep(seen_ns, entry)], seen_ns, watching)
    assert [(r.state, r.previous, r.decided_ns) for r in told] == [(State.REPEATING, None, seen_ns)]
    later = at(400)
    assert reports([sweep(later, entry)], later, watching) == []


@pytest.mark.parametrize(
    ("gap_s", "deadline_s"),
    [(0.00005, TIMEOUT_S), (0.2, TIMEOUT_S), (1, TIMEOUT_S), (1.5, 4), (10, 21)],
)
def test_a_client_that_repeats_once_and_stops_is_silent_after_its_next_repeat(
    gap_s: float, deadline_s: float
) -> None:
    report = first_told(repeated(SYN_ONCE, at(gap_s)))
    assert report.state is State.SILENT
    assert report.decided_ns == at(gap_s) + seconds(deadline_s)


def test_a_repeat_after_the_verdict_corrects_it() -> None:
    watching = correlator()
    assert reports([sweep(at(3), SYN_ONCE)], at(3), watching)[0].state is State.SILENT
    second = repeated(SYN_ONCE, at(3.5))
    assert reports([event(EventKind.SYN_REPEATED, second, at(3.5))], at(3.5), watching) == []
    third = repeated(second, at(7))
    told = reports([event(EventKind.SYN_REPEATED, third, at(7))], at(7), watching)
    assert [(r.state, r.previous, r.decided_ns) for r in told] == [
        (State.REPEATING, State.SILENT, at(7))
    ]
    stats = watching.stats()
    assert (stats.ever_stuck, stats.still_stuck, stats.reported_now) == (1, 0, {State.REPEATING: 1})


@pytest.mark.parametrize("event_is_lost", [False, True])
def test_a_dropped_ack_is_told_after_the_timeout(event_is_lost: bool) -> None:
    entry = ack_dropped(SYN_ONCE, at(0.5))
    seen = [] if event_is_lost else [event(EventKind.ACK_DROPPED, entry, at(0.5))]
    watching = correlator()
    early = at(0.5 + TIMEOUT_S) - 1
    assert reports([*seen, sweep(early, entry)], early, watching) == []
    told = reports([sweep(early + 1, entry)], early + 1, watching)
    assert [(r.state, r.decided_ns) for r in told] == [(State.ACK_DROPPED, early + 1)]
    again = ack_dropped(entry, at(9))
    assert reports([event(EventKind.ACK_DROPPED, again, at(9))], at(9), watching) == []


def test_a_syn_repeated_after_the_dropped_ack_gives_the_client_its_time_again() -> None:
    entry = repeated(ack_dropped(SYN_ONCE, at(0.5)), at(2))
    assert first_told(entry).decided_ns == at(2 + TIMEOUT_S)


def test_a_repeating_client_whose_ack_comes_and_is_dropped_gets_the_timeout() -> None:
    """The client may soon send data that connects it; only silence counted as stuck before."""
    watching = correlator()
    entry = repeated(SYN_ONCE, at(1), at(3))
    reports([sweep(at(4), entry)], at(4), watching)
    entry = ack_dropped(entry, at(5))
    assert reports([event(EventKind.ACK_DROPPED, entry, at(5))], at(5), watching) == []
    told = reports([sweep(at(9), entry)], at(9), watching)
    assert [(r.state, r.previous, r.decided_ns) for r in told] == [
        (State.ACK_DROPPED, State.REPEATING, at(5 + TIMEOUT_S))
    ]


def test_an_ack_dropped_after_the_verdict_of_silence_is_told_at_once() -> None:
    watching = correlator()
    reports([sweep(at(3), SYN_ONCE)], at(3), watching)
    entry = ack_dropped(SYN_ONCE, at(60))
    told = reports([event(EventKind.ACK_DROPPED, entry, at(60))], at(60), watching)
    assert [(r.state, r.previous, r.decided_ns) for r in told] == [
        (State.ACK_DROPPED, State.SILENT, at(60))
    ]
    assert watching.stats().reported_now == {State.ACK_DROPPED: 1}


@pytest.mark.parametrize(
    ("ending", "kind", "state"),
    [
        (Ending.REJECTED, EventKind.ACK_REJECTED, State.REJECTED),
        (Ending.RESET, EventKind.RESET, State.RESET),
        (Ending.NO_LISTENER, EventKind.NO_LISTENER, State.NO_LISTENER),
    ],
)
@pytest.mark.parametrize("stuck_before", [False, True])
@pytest.mark.parametrize("event_is_lost", [False, True])
def test_refusals_are_told_at_once(
    ending: Ending, kind: EventKind, state: State, stuck_before: bool, event_is_lost: bool
) -> None:
    watching = correlator()
    if stuck_before:
        reports([sweep(at(3), SYN_ONCE)], at(3), watching)
    entry = ended(SYN_ONCE, ending, at(4))
    seen = sweep(at(4), entry) if event_is_lost else event(kind, entry, at(4))
    told = reports([seen], at(4), watching)
    assert [(r.state, r.decided_ns) for r in told] == [(state, at(4))]
    assert told[0].previous is (State.SILENT if stuck_before else None)
    assert (watching.stats().ever_stuck, watching.stats().still_stuck) == (stuck_before, 0)


@pytest.mark.parametrize(
    ("ending", "kind"),
    [(Ending.COMPLETED, EventKind.COMPLETED), (Ending.TAKEN_OVER, EventKind.TAKEN_OVER)],
)
@pytest.mark.parametrize("event_is_lost", [False, True])
def test_a_stuck_client_that_gets_connected_has_recovered(
    ending: Ending, kind: EventKind, event_is_lost: bool
) -> None:
    watching = correlator()
    reports([sweep(at(3), SYN_ONCE)], at(3), watching)
    entry = ended(SYN_ONCE, ending, at(42))
    seen = sweep(at(43), entry) if event_is_lost else event(kind, entry, at(42))
    told = reports([seen], at(43), watching)
    assert [(r.state, r.previous, r.delay_ns) for r in told] == [
        (State.RECOVERED, State.SILENT, seconds(42))
    ]
    assert (watching.stats().ever_stuck, watching.stats().still_stuck) == (1, 0)


@pytest.mark.parametrize(
    ("ending", "kind"),
    [(Ending.COMPLETED, EventKind.COMPLETED), (Ending.TAKEN_OVER, EventKind.TAKEN_OVER)],
)
def test_a_connection_is_told_where_something_else_was_told_before(
    ending: Ending, kind: EventKind
) -> None:
    watching = correlator()
    repeating = repeated(SYN_ONCE, at(1), at(3))
    told = reports([sweep(at(4), repeating)], at(4), watching)
    assert [r.state for r in told] == [State.REPEATING]
    done = ended(repeating, ending, at(5))
    told = reports([event(kind, done, at(5))], at(5), watching)
    assert [(r.state, r.previous) for r in told] == [(State.COMPLETED, State.REPEATING)]
    assert watching.stats().reported_now == {State.COMPLETED: 1}


@pytest.mark.parametrize(
    ("lose_ack", "kind", "state"),
    [
        (ack_dropped, EventKind.ACK_DROPPED, State.ACK_DROPPED),
        (ack_filtered, EventKind.ACK_FILTERED, State.ACK_FILTERED),
    ],
)
@pytest.mark.parametrize("told_before", [False, True])
@pytest.mark.parametrize("late_event", [False, True])
def test_a_client_that_holds_the_cookie_is_stuck_whatever_the_syn_queue_holds(
    lose_ack: Callable[[Handshake, int], Handshake],
    kind: EventKind,
    state: State,
    told_before: bool,
    late_event: bool,
) -> None:
    """The request of its repeated SYN waits for an ACK that an established client never sends."""
    watching = correlator()
    silent = [sweep(at(3), SYN_ONCE)] if told_before else []
    taken = event(EventKind.TAKEN_OVER, ended(SYN_ONCE, Ending.TAKEN_OVER, at(4)), at(4))
    entry = lose_ack(SYN_ONCE, at(5))
    lost = event(kind, entry, at(5))
    told = reports(silent, at(3), watching)
    for seen in (lost, taken) if late_event else (taken, lost):
        told += reports([seen], at(5), watching)
    told += reports([sweep(at(9), entry)], at(9), watching)
    assert told[-1].state is state
    assert watching.stats().reported_now == {state: 1}
    assert (watching.stats().ever_stuck, watching.stats().still_stuck) == (1, 1)


@pytest.mark.parametrize("tell_healthy", [False, True])
def test_a_connection_is_told_only_where_asked_for(tell_healthy: bool) -> None:
    watching = correlator(tell_healthy=tell_healthy)
    done = ended(SYN_ONCE, Ending.COMPLETED, at(0.1))
    taken = ended(SYN_ONCE, Ending.TAKEN_OVER, at(0.1))
    told = reports([sweep(at(1), done, taken)], at(1), watching)
    assert [(r.state, r.delay_ns) for r in told] == (
        [(State.COMPLETED, seconds(0.1))] if tell_healthy else []
    )
    unreported = (
        {State.TAKEN_OVER: 1} if tell_healthy else {State.TAKEN_OVER: 1, State.COMPLETED: 1}
    )
    assert watching.stats().unreported == unreported


def test_a_connection_outweighs_a_stray_reset_whatever_comes_first() -> None:
    reset = ended(SYN_ONCE, Ending.RESET, at(1))
    done = ended(SYN_ONCE, Ending.COMPLETED, at(0.5))
    for views in ((reset, done), (done, reset)):
        watching = correlator()
        for view in views:
            watching.observe(sweep(at(1), view))
        assert watching.advance(at(1)) == []
        assert watching.stats().unreported == {State.COMPLETED: 1}


ENDINGS = (
    *(Ending.TAKEN_OVER, Ending.RESET, Ending.NO_LISTENER, Ending.REJECTED, Ending.REPLACED),
    Ending.COMPLETED,
)
"""The later in this order has the last word."""


@pytest.mark.parametrize(("weaker", "stronger"), list(zip(ENDINGS, ENDINGS[1:])))
def test_which_of_two_endings_has_the_last_word(weaker: Ending, stronger: Ending) -> None:
    """Whichever was written later, and whichever is seen first."""
    for weaker_s, stronger_s in ((1, 2), (2, 1), (1, 1)):
        one, other = (
            ended(SYN_ONCE, weaker, at(weaker_s)),
            ended(SYN_ONCE, stronger, at(stronger_s)),
        )
        assert merge(one, other) == merge(other, one) == other


@pytest.mark.parametrize("before_first", [True, False])
def test_the_cause_of_a_drop_is_kept_whatever_else_is_seen_of_the_handshake(
    before_first: bool,
) -> None:
    """A view from before the drop, and one of a later drop for another cause."""
    dropped = ack_dropped(SYN_ONCE, at(1), Moved.LISTEN_OVERFLOWS)
    for other, counters in (
        (SYN_ONCE, Moved.LISTEN_OVERFLOWS),
        (
            dropped._replace(drop_counters=Moved.SYNCOOKIES_RECV),
            Moved.LISTEN_OVERFLOWS | Moved.SYNCOOKIES_RECV,
        ),
    ):
        merged = merge(other, dropped) if before_first else merge(dropped, other)
        assert merged.drop_counters == counters


@pytest.mark.parametrize(
    "entry",
    [
        ended(SYN_ONCE, Ending.RESET, at(0.1)),
        repeated(SYN_ONCE, at(0.1)),
        ack_dropped(SYN_ONCE, at(0.1)),
        ack_filtered(SYN_ONCE, at(0.1)),
        SYN_ONCE._replace(syns_dropped=1),
    ],
)
def test_of_the_young_those_with_more_than_a_syn_are_held(entry: Handshake) -> None:
    watching = correlator()
    reports([sweep(at(0.2), SYN_ONCE, entry)], at(0.2), watching)
    assert watching.stats().flows == 1


def test_what_is_seen_ahead_of_the_clock_is_told_when_its_time_has_come() -> None:
    watching = correlator()
    assert reports([sweep(at(TIMEOUT_S), SYN_ONCE)], at(TIMEOUT_S) - 1, watching) == []
    (told,) = watching.advance(at(TIMEOUT_S))
    assert told.state is State.SILENT


def test_when_a_sweep_would_decide_is_known_until_one_has() -> None:
    watching = correlator()
    assert watching.deadlines.next_ns is None
    early, late = repeated(SYN_ONCE, at(0.5)), repeated(handshake(at(1)), at(1.5))
    for number, entry in ((0, late), (1, early)):
        reports(
            [event(EventKind.SYN_REPEATED, entry, at(1.5), four_tuple(number))], at(2), watching
        )
    due_ns = watching.deadlines.next_ns
    assert due_ns == at(0.5 + TIMEOUT_S)
    (told,) = reports([sweep(due_ns, late, early)], due_ns, watching)
    assert told.four_tuple == four_tuple(1)
    assert watching.deadlines.next_ns == at(1.5 + TIMEOUT_S)


@pytest.mark.parametrize("part", list(SweepPart))
def test_of_the_young_only_a_choice_of_rows_asks_for_another_sweep(part: SweepPart) -> None:
    """Whole sweeps come by themselves."""
    watching = correlator()
    watching.observe(Sweep(at(1), (Row(four_tuple(), SYN_ONCE),), part))
    expected = at(TIMEOUT_S) if part is SweepPart.CHOSEN else None
    assert watching.deadlines.next_ns == expected


def test_the_namespaces_of_the_silent_are_those_of_whom_a_verdict_is_due() -> None:
    """Only there does it matter whether ACKs passed unseen."""
    silent, connected, young, dropped = (four_tuple(n)._replace(netns=n) for n in range(4))
    done = ended(repeated(SYN_ONCE, at(1)), Ending.COMPLETED, at(2))
    recent = repeated(handshake(at(2)), at(2.5))
    rows = (
        *(Row(silent, SYN_ONCE), Row(connected, done), Row(young, recent)),
        Row(dropped, ack_dropped(SYN_ONCE, at(0.1))),
    )
    watching = correlator()
    watching.observe(Sweep(at(4), rows))
    assert watching.netns_of_silent(at(4)) == {0, 3}
    watching.advance(at(4))
    assert watching.netns_of_silent(at(4)) == set()


@pytest.mark.parametrize("event_is_lost", [False, True])
def test_a_new_handshake_without_a_cookie_supersedes_too(event_is_lost: bool) -> None:
    watching = correlator()
    reports([sweep(at(3), SYN_ONCE)], at(3), watching)
    entry = ended(SYN_ONCE, Ending.REPLACED, at(10))
    seen = sweep(at(10), entry) if event_is_lost else event(EventKind.REPLACED, entry, at(10))
    assert reports([seen], at(10), watching) == []
    stats = watching.stats()
    assert (stats.superseded, stats.ever_stuck, stats.still_stuck) == (1, 1, 0)
    gone = HandshakeId(four_tuple(), SYN_ONCE.first_syn_ns)
    assert watching.flows.expired(at(11), 1, 1024) == [gone]


def test_a_new_handshake_supersedes_a_stuck_one_without_a_line() -> None:
    watching = correlator()
    reports([sweep(at(3), SYN_ONCE)], at(3), watching)
    anew = handshake(at(10), client_isn=SYN_ONCE.client_isn + 1)
    assert reports([sweep(at(10.5), anew)], at(10.5), watching) == []
    stats = watching.stats()
    assert (stats.superseded, stats.ever_stuck, stats.still_stuck) == (1, 1, 0)
    told = reports([sweep(at(13), anew)], at(13), watching)
    assert correlator().stats().superseded == 0
    assert [(r.state, r.previous, r.handshake.first_syn_ns) for r in told] == [
        (State.SILENT, None, at(10))
    ]
    late = ack_dropped(SYN_ONCE, at(9))
    assert reports([event(EventKind.ACK_DROPPED, late, at(9))], at(14), watching) == []
    assert watching.stats().late == 1


def test_a_reset_is_told_though_its_port_is_used_again_before_anybody_asks() -> None:
    reset = ended(SYN_ONCE, Ending.RESET, at(0.1))
    anew = handshake(at(0.2), client_isn=SYN_ONCE.client_isn + 1)
    told = reports([event(EventKind.RESET, reset, at(0.1)), sweep(at(0.3), anew)], at(0.3))
    assert [r.state for r in told] == [State.RESET]


def test_reports_come_in_the_order_of_their_deciding_facts() -> None:
    entries = [handshake(at(age)) for age in (0.3, 0.1, 0.2, 0.1)]
    told = reports([sweep(at(9), *entries)], at(9))
    assert [(r.decided_ns, r.four_tuple) for r in told] == sorted(
        (entry.first_syn_ns + TIMEOUT_NS, four_tuple(n)) for n, entry in enumerate(entries)
    )


@pytest.mark.parametrize(
    "torn",
    [
        pytest.param(SYN_ONCE._replace(last_syn_ns=at(5)), id="old first SYN, new last one"),
        pytest.param(SYN_ONCE._replace(last_syn_ns=at(-5)), id="new first SYN, old last one"),
        pytest.param(SYN_ONCE._replace(syn_count=4), id="new SYN, old count"),
        pytest.param(ack_dropped(SYN_ONCE, at(-1)), id="old dropped ACK"),
        pytest.param(SYN_ONCE._replace(acks_dropped=1), id="count without its time"),
        pytest.param(ended(SYN_ONCE, Ending.RESET, at(-1)), id="old end"),
        pytest.param(SYN_ONCE._replace(ending=Ending.RESET), id="end without its time"),
    ],
)
def test_a_row_of_two_handshakes_is_left_to_the_next_sweep(torn: Handshake) -> None:
    watching = correlator()
    assert reports([sweep(at(9), torn)], at(9), watching) == []
    assert watching.stats().torn == 1
    told = reports([sweep(at(10), SYN_ONCE)], at(10), watching)
    assert [(r.state, r.handshake) for r in told] == [(State.SILENT, SYN_ONCE)]


def test_pending_counts_every_handshake_too_young_for_a_verdict_once() -> None:
    watching = correlator()
    remarkable = repeated(SYN_ONCE, at(1))
    rows = [Row(four_tuple(n), e) for n, e in enumerate([SYN_ONCE, SYN_ONCE, remarkable])]
    for time_ns in (at(1.1), at(1.2)):
        for row in rows:
            watching.observe(Sweep(time_ns, (row,)))
        assert watching.advance(time_ns) == []
        assert watching.stats().pending == len(rows)
        assert watching.stats().flows == 1
    watching.observe(Sweep(at(1.3), ()))
    assert watching.stats().pending == 0


def test_a_duplicate_event_is_counted() -> None:
    watching = correlator()
    twice = event(EventKind.SYN_REPEATED, repeated(SYN_ONCE, at(1)), at(1))
    reports([twice, twice], at(1), watching)
    assert watching.stats().duplicate == 1


def test_flags_tell_what_the_client_sent() -> None:
    entry = ack_dropped(SYN_ONCE, at(0.1))
    plain = event(EventKind.ACK_DROPPED, entry, at(0.1))
    data = plain._replace(payload_length=1, tcp_flags=plain.tcp_flags | PSH)
    fin = plain._replace(tcp_flags=plain.tcp_flags | FIN)
    for seen, flags in (
        (plain, FlowFlags.NOTHING),
        (data, FlowFlags.CLIENT_SENT_DATA),
        (fin, FlowFlags.CLIENT_SENT_FIN),
    ):
        told = reports([seen, sweep(at(9), entry)], at(9))
        assert [r.flags for r in told] == [flags]


def test_a_long_timeline_keeps_both_ends_and_says_how_much_is_missing() -> None:
    entry, drops = SYN_ONCE, 4 * SEGMENTS_KEPT_AT_EACH_END
    seen = []
    for n in range(drops):
        entry = ack_dropped(entry, at(0.1 + n / 100))
        seen.append(event(EventKind.ACK_DROPPED, entry, entry.last_ack_dropped_ns))
    report = reports([*seen, sweep(at(9), entry)], at(9))[0]
    assert len(report.timeline) <= MAX_ENTRIES
    assert len(report.timeline) + report.timeline_omitted == drops + len(["the SYN"])
    assert report.timeline[0].time_ns == entry.first_syn_ns
    assert report.timeline[-1].time_ns == entry.last_ack_dropped_ns
    times = [line.time_ns for line in report.timeline]
    assert times == sorted(times)


def test_a_timeline_without_events_is_made_from_the_entry() -> None:
    entry = repeated(SYN_ONCE, at(1))
    entry = ack_dropped(ack_dropped(entry, at(1.1)), at(2))
    entry = ended(entry, Ending.RESET, at(5), Moved.NOTHING)
    report = reports([sweep(at(6), entry)], at(6))[0]
    assert [(line.time_ns, line.what) for line in report.timeline] == [
        (at(0), "SYN"),
        (at(1), "SYN repeated"),
        (at(1.1), "ACK dropped"),
        (at(2), "ACK dropped"),
        (at(5), "RST from client"),
    ]


def test_a_fact_with_an_event_has_one_line() -> None:
    entry = ended(SYN_ONCE, Ending.RESET, at(1))
    report = reports([event(EventKind.RESET, entry, at(1) + 900), sweep(at(2), entry)], at(2))[0]
    assert [line.what for line in report.timeline] == ["SYN", "RST from client"]
