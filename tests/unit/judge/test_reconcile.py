"""The referee: what the two sides' readings allow to be said."""

from __future__ import annotations

import pytest

from tcpstuck_bpf.judge.reconcile import (
    Reconciled,
    missed_runs_note,
    reconcile,
    total_counted,
    unseen_acks,
)
from tcpstuck_bpf.model import (
    CROWDED_NETNS,
    GONE_NETNS,
    NETNS_COOKIE,
    Coverage,
    CoverageGap,
    NetnsCount,
    Tally,
)

NETNS = 7
COMPLETE = Coverage("fentry")


def reading(before: int | None, traced: int, after: int | None, outside: int = 0) -> Tally:
    """SyncookiesSent as read before and after our own count; None: no such namespace then."""
    counts = {NetnsCount.COOKIES_SENT: traced, NetnsCount.COOKIES_SENT_OUTSIDE: outside}
    return Tally(
        0,
        {} if before is None else {NETNS: {"SyncookiesSent": before}},
        {NETNS: counts},
        {} if after is None else {NETNS: {"SyncookiesSent": after}},
    )


def sent(start: Tally, end: Tally, coverage: Coverage = COMPLETE) -> Reconciled:
    (row,) = (r for r in reconcile(start, end, coverage) if r.counter == "SyncookiesSent")
    return row


@pytest.mark.parametrize(
    ("start", "end", "kernel", "agrees"),
    [
        (reading(10, 0, 10), reading(15, 5, 15), (5, 5), True),
        (reading(10, 2, 10), reading(15, 7, 15), (5, 5), True),
        (reading(10, 0, 10), reading(15, 4, 15), (5, 5), False),
        (reading(10, 0, 11), reading(15, 5, 17), (4, 7), True),
        (reading(10, 0, 11), reading(15, 8, 17), (4, 7), False),
        (reading(10, 0, 10), reading(15, 3, 15, outside=2), (5, 5), True),
        (reading(None, 0, None), reading(5, 5, 5), (5, 5), True),
        (reading(10, 0, 10), reading(None, 5, None), None, None),
        (reading(10, 0, 10), reading(3, 5, 3), None, None),
        (reading(10, 0, 10), reading(15, 5, 12), None, None),
        (reading(10, 0, 3), reading(15, 5, 15), None, None),
        (reading(10, 0, 11), reading(10, 1, 12), None, None),
        (reading(10, 0, 11), reading(11, 1, 12), (0, 2), True),
        (reading(10, 0, 12), reading(12, 1, 13), (0, 3), True),
        (reading(10, 0, 12), reading(12, 0, 13), (0, 3), True),
        (reading(10, 0, 10), reading(15, 0, 15), (5, 5), False),
        (reading(10, 0, 10), reading(None, 0, None, outside=5), None, None),
        (reading(10, 0, 10), reading(15, 5, None), None, None),
        (reading(10, 0, 10), reading(None, 5, 15), None, None),
    ],
)
def test_the_comparison(
    start: Tally, end: Tally, kernel: tuple[int, int] | None, agrees: bool | None
) -> None:
    row = sent(start, end)
    assert row.kernel == kernel
    assert row.agrees is agrees
    assert bool(row.note) == (agrees is not True)


def test_the_difference_is_named() -> None:
    assert sent(reading(0, 0, 0), reading(5, 4, 5)).note == "differs by -1"
    assert sent(reading(0, 0, 0), reading(5, 7, 5)).note == "differs by +2"


def test_the_difference_counts_from_the_nearer_end_and_with_what_was_left_out() -> None:
    start, before, after = reading(10, 0, 11), 15, 17
    assert sent(start, reading(before, 1, after)).note == "differs by -3"
    assert sent(start, reading(before, 1, after, outside=2)).note == "differs by -1"
    assert sent(start, reading(before, 9, after)).note == "differs by +2"
    assert sent(start, reading(before, 5, after, outside=5)).note == "differs by +3"


def test_a_counter_that_a_reading_does_not_have_began_at_zero() -> None:
    """Its protocol's statistics appear with the first use."""
    empty: Tally = Tally(0, {NETNS: {}}, {}, {NETNS: {}})
    end = reading(5, 5, 5)
    assert sent(empty, end).kernel == (5, 5)
    assert sent(empty, end._replace(kernel_before={NETNS: {}})).kernel == (0, 5)


def test_with_a_probe_missing_what_agrees_still_agrees() -> None:
    gap = CoverageGap("cookie_v6_init_sequence", "no such function", "IPv6")
    row = sent(reading(0, 0, 0), reading(5, 5, 5), Coverage("fentry", gaps=(gap,)))
    assert row.agrees is True


def test_a_missing_probe_makes_ours_a_lower_bound() -> None:
    gap = CoverageGap("cookie_v6_init_sequence", "no such function", "IPv6")
    row = sent(reading(0, 0, 0), reading(5, 4, 5), Coverage("fentry", gaps=(gap,)))
    assert row.agrees is None
    assert "cookie_v6_init_sequence" in row.note


@pytest.mark.parametrize(
    ("kernel_before", "traced", "outside", "gap", "unseen"),
    [
        (5, 5, 0, None, {}),
        (5, 2, 3, None, {}),
        (5, 3, 0, None, {NETNS: 2}),
        (5, 1, 2, None, {NETNS: 2}),
        (5, 7, 0, None, {}),
        (5, 4, 4, None, {}),
        (5, 3, 0, "cookie_v6_check", {}),
        (5, 3, 0, "kfree_skb", {NETNS: 2}),
    ],
)
def test_acks_that_the_kernel_counted_and_nobody_saw(
    kernel_before: int, traced: int, outside: int, gap: str | None, unseen: dict[int, int]
) -> None:
    received, beside = NetnsCount.COOKIES_RECEIVED, NetnsCount.COOKIES_RECEIVED_OUTSIDE
    start = Tally(0, {}, {}, {})
    end = Tally(
        9,
        {NETNS: {"SyncookiesRecv": kernel_before}},
        {NETNS: {received: traced, beside: outside}},
        {NETNS: {"SyncookiesRecv": kernel_before + 1}},
    )
    gaps = () if gap is None else (CoverageGap(gap, "no such function", "something"),)
    assert unseen_acks(start, end, Coverage("kprobe", gaps=gaps)) == unseen


def test_other_counters_say_nothing_of_acks() -> None:
    start, end = reading(0, 0, 0), reading(5, 3, 5)
    assert sent(start, end).agrees is False
    assert unseen_acks(start, end, COMPLETE) == {}


def test_what_did_not_move_is_left_out() -> None:
    assert reconcile(reading(9, 3, 9), reading(9, 3, 9), COMPLETE) == ()


@pytest.mark.parametrize(
    ("start", "end", "told"),
    [
        (reading(0, 0, 0), reading(5, 5, 5), "agree exactly"),
        (reading(0, 0, 0), reading(0, 0, 0), "agree exactly"),
        (reading(0, 0, 0), reading(5, 4, 5), "may be why"),
        (reading(0, 0, 0), reading(5, 5, 6), "do not show"),
        (reading(0, 0, 0), reading(None, 5, None), "do not show"),
    ],
)
def test_what_it_means_that_programs_did_not_run(start: Tally, end: Tally, told: str) -> None:
    note = missed_runs_note(4, reconcile(start, end, COMPLETE))
    assert "4 times" in note
    assert told in note
    others = {"agree exactly", "may be why", "do not show"} - {told}
    assert not any(other in note for other in others)


def test_programs_that_saw_too_much_are_no_sign_of_one_that_did_not_run() -> None:
    note = missed_runs_note(4, reconcile(reading(0, 0, 0), reading(5, 7, 5), COMPLETE))
    assert "may be why" not in note
    assert "do not show" in note


def test_programs_that_always_ran_need_no_note() -> None:
    assert missed_runs_note(0, ()) == ""


def test_once_is_once() -> None:
    assert missed_runs_note(1, ()).startswith("the kernel skipped our programs once,")


def with_cookie(tally: Tally, cookie: int, after: int | None = None) -> Tally:
    """The same reading, of the namespace with that cookie; with another one `after`."""
    return tally._replace(
        kernel_before={n: {**c, NETNS_COOKIE: cookie} for n, c in tally.kernel_before.items()},
        kernel_after={
            n: {**c, NETNS_COOKIE: after or cookie} for n, c in tally.kernel_after.items()
        },
    )


def counted(tally: Tally, **traced: int) -> Tally:
    """The same reading, with cookies sent in namespaces of no number as well."""
    numbers = {"gone": GONE_NETNS, "crowded": CROWDED_NETNS}
    more = {numbers[name]: {NetnsCount.COOKIES_SENT: value} for name, value in traced.items()}
    return tally._replace(traced={**tally.traced, **more})


def test_a_number_used_again_compares_the_namespace_that_is_there() -> None:
    """Its counters began at zero, and the figures of the one before are not among its own."""
    start = with_cookie(reading(10, 3, 10), 71)
    end = counted(with_cookie(reading(12, 12, 12), 72), gone=8)
    rows = {row.netns: row for row in reconcile(start, end, COMPLETE)}
    assert (rows[NETNS].traced, rows[NETNS].kernel, rows[NETNS].agrees) == (12, (12, 12), True)
    gone = rows[GONE_NETNS]
    assert (gone.traced, gone.kernel, gone.agrees) == (5, None, None)


def test_what_was_lost_in_a_namespace_is_not_hidden_by_one_of_the_same_number_before() -> None:
    start = with_cookie(reading(0, 0, 0), 71)
    end = counted(with_cookie(reading(9, 4, 9), 72), gone=5)
    rows = {row.netns: row for row in reconcile(start, end, COMPLETE)}
    assert rows[NETNS].agrees is False
    assert rows[NETNS].note == "differs by -5"


def test_a_namespace_that_changed_between_the_two_readings_is_not_compared() -> None:
    end = with_cookie(reading(15, 5, 15), 71, after=72)
    row = sent(with_cookie(reading(10, 0, 10), 71), end)
    assert (row.kernel, row.agrees) == (None, None)
    assert "another namespace" in row.note


def test_one_whose_entry_was_freed_is_counted_among_those_that_are_gone() -> None:
    start = reading(10, 3, 10)
    end = counted(Tally(1, {}, {}, {}), gone=9)
    (row,) = reconcile(start, end, COMPLETE)
    assert (row.netns, row.traced, row.kernel, row.agrees) == (GONE_NETNS, 6, None, None)
    assert "gone" in row.note


@pytest.mark.parametrize(("crowded", "agrees"), [(0, False), (4, False), (5, None), (9, None)])
def test_what_was_counted_for_no_namespace_may_be_what_one_lacks(
    crowded: int, agrees: bool | None
) -> None:
    rows = reconcile(reading(10, 0, 10), counted(reading(15, 0, 15), crowded=crowded), COMPLETE)
    (row,) = (row for row in rows if row.netns == NETNS)
    assert row.agrees is agrees
    if agrees is None:
        assert "no entry in the full table" in row.note
    assert [row.traced for row in rows if row.netns == CROWDED_NETNS] == [crowded] * bool(crowded)


def test_it_makes_up_for_all_of_them_or_for_none() -> None:
    """Each may lack less than was counted elsewhere, and both together more."""
    end = counted(reading(15, 0, 15), crowded=7)
    other = {NETNS + 1: {"SyncookiesSent": 5}}
    end = end._replace(
        kernel_before={**end.kernel_before, **other}, kernel_after={**end.kernel_after, **other}
    )
    rows = reconcile(reading(10, 0, 10), end, COMPLETE)
    assert [row.agrees for row in rows if row.netns >= NETNS] == [False, False]


def test_what_more_was_traced_than_the_kernel_counted_is_not_made_up_for() -> None:
    end = counted(reading(15, 7, 15), crowded=9)
    rows = reconcile(reading(10, 0, 10), end, COMPLETE)
    assert [row.agrees for row in rows if row.netns == NETNS] == [False]


def test_what_is_counted_in_all_is_never_less_for_who_is_gone() -> None:
    start = with_cookie(reading(10, 3, 10), 71)
    freed = counted(Tally(1, {}, {}, {}), gone=9)
    anew = counted(with_cookie(reading(1, 1, 1), 72), gone=8)
    for end in (freed, anew):
        assert total_counted(start.traced, end.traced)[NetnsCount.COOKIES_SENT] == 6
