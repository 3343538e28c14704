"""The backlog that would have been enough: the working, the knob, and what is not counted."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcpstuck_bpf.judge.backlog import (
    FORCED,
    QUEUE_FULL,
    SOMAXCONN,
    SYNCOOKIES,
    ListenerReport,
    SynNeed,
    cookie_reason,
    merged,
    report,
)
from tcpstuck_bpf.judge.backlog_history import KEPT_HEIGHTS, ListenerHistory
from tcpstuck_bpf.kernel.probes import KERNEL_COUNTERS
from tcpstuck_bpf.model import (
    CoverageGap,
    Ending,
    HandshakeId,
    ListenerFacts,
    ListenerSeen,
    Row,
    Sweep,
    SweepPart,
    address_bytes,
)
from tests.builders import ack_dropped, ack_filtered, at, ended, four_tuple, handshake

SERVER = four_tuple()
SETTINGS = {SYNCOOKIES: 1, SOMAXCONN: 4096}


def facts(**changes: Any) -> ListenerFacts:
    """Facts of the server of `four_tuple()` before any segment, with a backlog of 50."""
    values = dict.fromkeys(ListenerFacts._fields, 0)
    values |= {"netns": SERVER.netns, "server_port": SERVER.server_port, "limit": 50}
    return ListenerFacts(
        **{**values, "server_address": SERVER.server_address, **changes}  # type: ignore[arg-type]
    )


def overflown(**changes: Any) -> ListenerFacts:
    """51 accepted by nobody, 148 turned away, 149 under cookies besides 50 in the SYN queue."""
    return facts(
        **{
            "syns": 199,
            "cookies_sent": 149,
            "acks_refused": 148,
            "lowest_cookie_syn_queue": 50,
            "peak_accept_queue": 51,
            "peak_syn_queue": 50,
            "syn_need_ns": at(1),
            "syn_need_syn_queue": 50,
            "syn_need_owed": 149,
            "accept_need_accept_queue": 51,
            "accept_need_turned_away": 148,
            **changes,
        }
    )


def seen(one: ListenerFacts, owner: str = "greeter (pid 7)", **settings: int) -> ListenerSeen:
    return ListenerSeen(one, (owner,), (7001,), {**SETTINGS, **settings})


def judged(one: ListenerFacts, silent: int = 0, **words: Any) -> ListenerReport:
    need = SynNeed(one.syn_need_syn_queue, one.syn_need_owed - silent, silent)
    return report([seen(one, **words)], need)


def gap(probe: str) -> CoverageGap:
    return CoverageGap(probe, "left out", f"what {probe} shows is not seen")


@pytest.mark.parametrize("probe", ["tcp_check_req", "cookie_v6_check", KERNEL_COUNTERS])
def test_what_is_not_seen_is_said_where_the_backlog_is_advised(probe: str) -> None:
    reached = overflown(server_address=address_bytes("2001:db8::25"))
    gaps = (gap("kfree_skb"), gap(probe), gap("tcp_child_process"))
    told = report([seen(reached)], SynNeed(50, 149, 0), gaps)
    missing = f"Without {probe} what {probe} shows is not seen: treat the need as a minimum."
    assert told.working == (*report([seen(reached)], SynNeed(50, 149, 0)).working, missing)
    nothing_seen = report([seen(facts())], SynNeed(0, 0, 0), (gap("tcp_check_req"),))
    assert len(nothing_seen.working) == 1


def test_what_is_not_seen_of_ipv6_concerns_no_listener_for_ipv4() -> None:
    history = ListenerHistory()
    history.take_listeners([seen(overflown())])
    gaps = (gap("cookie_v6_check"), gap("cookie_v6_init_sequence"))
    assert history.reports(gaps) == history.reports()
    also_ipv6 = overflown(server_address=address_bytes("::1"))
    history.take_listeners([seen(also_ipv6)])
    (told,) = history.reports(gaps)
    assert len(told.working) == len(history.reports()[0].working) + len(gaps)


def test_the_working_is_shown() -> None:
    told = judged(overflown())
    assert told.working == (
        "51 in the accept queue + 148 turned away while it was full = 199 at once -> "
        "backlog 198 or more (a backlog of N allows N + 1 queued connections).",
        "50 in the SYN queue + 149 cookie handshakes still awaiting an ACK = 199 at once -> "
        "backlog 199 or more (on this kernel a backlog of N allows N in the SYN queue).",
    )
    assert told.advised_backlog == 199
    assert told.cookie_reason == QUEUE_FULL


def test_a_kernel_whose_syn_queue_holds_one_more() -> None:
    """`>` instead of `>=` in inet_csk_reqsk_queue_is_full: it was longer when it was full."""
    told = judged(overflown(lowest_cookie_syn_queue=51, syn_need_syn_queue=51, syn_need_owed=148))
    assert told.advised_backlog == 198


@pytest.mark.parametrize(
    ("syncookies", "lowest", "reason"),
    [
        (2, 50, FORCED),
        (2, 3, FORCED),
        (1, 50, QUEUE_FULL),
        (1, 49, QUEUE_FULL),
        (None, 50, QUEUE_FULL),
        (None, 49, FORCED),
    ],
)
def test_why_cookies_were_sent(syncookies: int | None, lowest: int, reason: str) -> None:
    settings = {} if syncookies is None else {SYNCOOKIES: syncookies}
    assert cookie_reason(overflown(lowest_cookie_syn_queue=lowest), settings) == reason


@pytest.mark.parametrize("syncookies", [0, 1, 2])
def test_where_no_cookie_was_sent_there_is_no_reason_for_one(syncookies: int) -> None:
    assert cookie_reason(facts(syns=9), {SYNCOOKIES: syncookies}) is None


@pytest.mark.parametrize("what", ["cookies_sent", "syns_refused", "acks_refused"])
def test_whoever_was_not_served_at_once_makes_a_listener_suffer(what: str) -> None:
    assert judged(facts(**{what: 1})).suffered


def test_syns_that_were_refused_are_said_not_to_be_in_the_need() -> None:
    (told,) = judged(facts(syns_refused=17)).working
    assert "17 SYNs" in told
    assert judged(facts(syns_refused=0)).working == ()


def test_the_facts_of_several_addresses_add_up_and_their_queues_are_the_longest_seen() -> None:
    def counts(factor: int) -> dict[str, int]:
        names = ("syns", "cookies_sent", "syns_refused", "acks_refused", "accept_need_turned_away")
        return {name: factor * (1 + place) for place, name in enumerate(names)}

    def lengths(*values: int) -> dict[str, int]:
        names = ("peak_accept_queue", "peak_syn_queue", "lowest_cookie_syn_queue")
        needs = ("accept_need_accept_queue", "accept_need_syn_queue")
        return dict(zip((*names, *needs), values))

    first = facts(**counts(1), **lengths(6, 9, 8, 7, 9))
    second = facts(**counts(10), **lengths(9, 6, 7, 9, 7))
    both = facts(**counts(11), **lengths(9, 9, 7, 9, 9))
    no_cookie = facts(lowest_cookie_syn_queue=0)
    several = [first, second, no_cookie]
    assert merged(several) == merged(several[::-1]) == both
    assert merged([no_cookie, no_cookie]).lowest_cookie_syn_queue == 0


def test_forced_cookies_ask_for_no_longer_syn_queue() -> None:
    one = overflown(accept_need_accept_queue=0, accept_need_turned_away=0)
    told = judged(one, **{SYNCOOKIES: 2})
    assert told.advised_backlog is None
    assert "tcp_syncookies is 2" in told.advice[0]


def test_a_flood_is_not_cured_by_a_backlog() -> None:
    told = judged(overflown(syn_need_owed=100_149), silent=100_000)
    assert told.advised_backlog == 199
    assert told.silent == 100_000
    assert any("100000 cookie handshakes without an answer" in line for line in told.working)


@pytest.mark.parametrize(
    ("owner", "knob"),
    [
        ("mariadbd (pid 1)", "back_log of MariaDB"),
        ("nginx (pid 1)", "listen directive"),
        ("x (pid 1)", "listen()"),
    ],
)
def test_the_knob_is_the_applications(owner: str, knob: str) -> None:
    (told,) = judged(overflown(), owner=owner).advice
    assert knob in told
    assert "199 or more" in told
    assert "restart" in told


@pytest.mark.parametrize(("somaxconn", "is_named"), [(198, True), (199, False)])
def test_somaxconn_is_named_where_it_is_less_than_the_advice(
    somaxconn: int, is_named: bool
) -> None:
    told = judged(overflown(), **{SOMAXCONN: somaxconn}).advice[0]
    assert ("net.core.somaxconn" in told) == is_named


def test_a_limit_that_may_be_capped() -> None:
    told = judged(overflown(), **{SOMAXCONN: 50})
    assert told.is_capped
    assert any("the kernel does not keep that" in line for line in told.advice)
    assert judged(overflown()).is_capped is False
    assert report([ListenerSeen(overflown(), (), (), {})], SynNeed(0, 0, 0)).is_capped is None


def test_a_healthy_listener_gets_no_advice() -> None:
    told = judged(facts(syns=9, peak_accept_queue=51, peak_syn_queue=49))
    assert (told.advised_backlog, told.working, told.advice) == (None, (), ())
    assert not told.suffered


@pytest.mark.parametrize(("at_once", "advised"), [(50, None), (51, None), (52, 51)])
def test_a_backlog_that_was_enough_for_the_accept_queue_is_not_advised_again(
    at_once: int, advised: int | None
) -> None:
    """A backlog of 50 allows 51 queued connections (sk_acceptq_is_full)."""
    one = facts(syns=at_once, accept_need_accept_queue=at_once)
    told = judged(one)
    assert told.advised_backlog == advised
    assert bool(told.working) == (advised is not None)
    turned_away = facts(accept_need_accept_queue=at_once - 5, accept_need_turned_away=5)
    assert judged(turned_away).advised_backlog == advised


@pytest.mark.parametrize(
    ("lowest", "at_once", "advised"),
    [(50, 50, None), (50, 51, 51), (51, 51, None), (51, 52, 51)],
)
def test_a_backlog_that_was_enough_for_the_syn_queue_is_not_advised_again(
    lowest: int, at_once: int, advised: int | None
) -> None:
    """Which of the two a kernel has, the shortest SYN queue at which it sent a cookie tells."""
    one = facts(
        cookies_sent=1,
        lowest_cookie_syn_queue=lowest,
        syn_need_syn_queue=lowest,
        syn_need_owed=at_once - lowest,
    )
    assert judged(one).advised_backlog == advised


lengths = st.integers(0, 1 << 20)
some_facts = st.builds(
    overflown,
    cookies_sent=lengths,
    limit=lengths,
    lowest_cookie_syn_queue=lengths,
    syns_refused=lengths,
    syn_need_syn_queue=lengths,
    syn_need_owed=lengths,
    accept_need_accept_queue=lengths,
    accept_need_turned_away=lengths,
    accept_need_syn_queue=lengths,
)
NEEDS = (
    *("syn_need_syn_queue", "syn_need_owed"),
    *("accept_need_accept_queue", "accept_need_turned_away", "accept_need_syn_queue"),
)


@given(some_facts, st.sampled_from(NEEDS), lengths)
def test_more_demand_never_lowers_the_advice(one: ListenerFacts, what: str, more: int) -> None:
    before = judged(one).advised_backlog or 0
    larger = one._replace(**{what: getattr(one, what) + more})
    assert (judged(larger).advised_backlog or 0) >= before


@given(some_facts)
def test_the_advice_is_more_than_there_was_and_the_same_each_time(one: ListenerFacts) -> None:
    told = judged(one)
    assert told == judged(one)
    assert told.advised_backlog is None or told.advised_backlog > one.limit
    assert bool(told.advised_backlog) == any("->" in line for line in told.working)


def silent_rows(count: int) -> tuple[Row, ...]:
    """Clients that sent their SYN in the first second and nothing since."""
    return tuple(
        Row(four_tuple(number), handshake(at(0) + number)) for number in range(1, count + 1)
    )


def test_who_never_answered_is_taken_off() -> None:
    history = ListenerHistory()
    history.take_listeners([seen(overflown())])
    answered = Row(four_tuple(900), ack_dropped(handshake(at(0.5)), at(0.6)))
    gone = Row(four_tuple(901), ended(handshake(at(0.5)), Ending.RESET, at(0.6)))
    later = Row(four_tuple(902), handshake(at(2)))
    elsewhere = Row(four_tuple(903)._replace(server_port=1), handshake(at(0.5)))
    rows = (*silent_rows(40), answered, gone, later, elsewhere)
    history.take_sweep(Sweep(at(4), rows[:20], SweepPart.MORE))
    history.take_sweep(Sweep(at(4), rows[20:]))
    (told,) = history.reports()
    assert told.silent == 40
    assert told.syn_queue_needed == 50 + 149 - 40


def test_an_ack_that_was_dropped_before_tcp_is_an_answer() -> None:
    history = ListenerHistory()
    history.take_listeners([seen(overflown())])
    filtered = Row(four_tuple(900), ack_filtered(handshake(at(0.5)), at(0.6)))
    history.take_sweep(Sweep(at(4), (*silent_rows(3), filtered)))
    assert history.reports()[0].silent == 3


def test_who_answered_after_all_is_counted_again() -> None:
    history = ListenerHistory()
    history.take_listeners([seen(overflown())])
    history.take_sweep(Sweep(at(4), silent_rows(40)))
    history.take_sweep(Sweep(at(5), ()))
    assert history.reports()[0].silent == 0


def test_who_was_let_go_without_an_answer_stays_silent() -> None:
    history = ListenerHistory()
    history.take_listeners([seen(overflown())])
    rows = silent_rows(40)
    history.take_sweep(Sweep(at(4), rows))
    history.take_leaving(
        HandshakeId(row.four_tuple, row.handshake.first_syn_ns) for row in rows[:10]
    )
    assert history.reports()[0].silent == 40
    history.take_sweep(Sweep(at(5), rows[10:]))
    assert history.reports()[0].silent == 40


def test_who_was_let_go_is_not_taken_off_a_need_from_before_its_syn() -> None:
    history = ListenerHistory()
    for height_s, owed in ((-2, 149), (-1, 249)):
        history.take_listeners([seen(overflown(syn_need_ns=at(height_s), syn_need_owed=owed))])
    rows = silent_rows(40)
    history.take_sweep(Sweep(at(4), rows))
    history.take_leaving(HandshakeId(row.four_tuple, row.handshake.first_syn_ns) for row in rows)
    assert history.reports()[0].silent == 0


def test_who_was_let_go_is_taken_off_later_heights_too() -> None:
    history = ListenerHistory()
    history.take_listeners([seen(overflown(syn_need_ns=at(-1)))])
    rows = silent_rows(40)
    history.take_sweep(Sweep(at(4), rows))
    history.take_leaving(HandshakeId(row.four_tuple, row.handshake.first_syn_ns) for row in rows)
    history.take_sweep(Sweep(at(5), ()))
    assert history.reports()[0].silent == 0
    history.take_listeners([seen(overflown(syn_need_ns=at(6), syn_need_owed=149 + 50))])
    told = history.reports()[0]
    assert (told.silent, told.syn_queue_needed) == (40, 50 + 149 + 10)


def test_a_flood_does_not_hide_the_need_before_it() -> None:
    history = ListenerHistory()
    history.take_listeners([seen(overflown(syn_need_ns=at(-1)))])
    crowd = silent_rows(10 * KEPT_HEIGHTS)
    for number, row in enumerate(crowd, 1):
        syn_ns = row.handshake.first_syn_ns
        history.take_listeners([seen(overflown(syn_need_ns=syn_ns, syn_need_owed=149 + number))])
        if number % KEPT_HEIGHTS == 0:
            history.take_sweep(Sweep(syn_ns, crowd[:number]))
    history.take_sweep(Sweep(at(4), crowd))
    (told,) = history.reports()
    assert told.advised_backlog == 199


def test_the_highest_need_is_kept_however_many_lower_ones_follow() -> None:
    """Two silent clients for each that the programs count: the true need only falls."""
    history = ListenerHistory()
    history.take_listeners([seen(overflown(syn_need_ns=at(-1)))])
    history.take_sweep(Sweep(at(4), silent_rows(4 * KEPT_HEIGHTS)))
    for number in range(1, 2 * KEPT_HEIGHTS):
        reading = overflown(syn_need_ns=at(0) + 2 * number, syn_need_owed=149 + number)
        history.take_listeners([seen(reading)])
    assert history.reports()[0].advised_backlog == 199


def test_of_older_needs_that_were_lower_some_are_kept() -> None:
    """Only later does the table show that the higher ones were a flood's."""
    history = ListenerHistory()
    for number in range(KEPT_HEIGHTS + 1):
        reading = overflown(syn_need_ns=at(0) + 2 * number, syn_need_owed=149 + number)
        history.take_listeners([seen(reading)])
    flood = silent_rows(4 * KEPT_HEIGHTS)
    history.take_sweep(Sweep(at(4), flood[2:]))
    assert history.reports()[0].syn_queue_needed == 50 + 149 + 1


def test_a_need_that_is_read_again_unchanged_pushes_no_other_out() -> None:
    history = ListenerHistory()
    for height_s in (1, *[2] * 1000):
        history.take_listeners([seen(overflown(syn_need_ns=at(height_s)))])
    (heights,) = history._heights.values()
    assert [facts.syn_need_ns for facts in heights] == [at(1), at(2)]


def test_no_more_are_silent_than_are_owed() -> None:
    """Clients of before the run are in the table, and not in what the programs counted."""
    history = ListenerHistory()
    history.take_listeners([seen(overflown(syn_need_owed=5))])
    history.take_sweep(Sweep(at(4), silent_rows(40)))
    (told,) = history.reports()
    assert (told.silent, told.syn_queue_needed) == (5, 50)


@pytest.mark.parametrize("highest", range(6))
def test_who_was_let_go_is_taken_off_the_needs_from_its_syn_on(highest: int) -> None:
    for after in range(8):
        history = ListenerHistory()
        for height in range(6):
            owed = 149 if height == highest else 0
            reading = overflown(syn_need_ns=at(height), syn_need_syn_queue=0, syn_need_owed=owed)
            history.take_listeners([seen(reading)])
        gone = Row(four_tuple(1), handshake(at(after - 0.5)))
        history.take_sweep(Sweep(at(9), (gone,)))
        history.take_leaving([HandshakeId(gone.four_tuple, gone.handshake.first_syn_ns)])
        assert history.reports()[0].silent == (after <= highest)


def test_only_so_many_needs_are_kept_however_long_a_flood_lasts() -> None:
    history = ListenerHistory()
    for number in range(20 * KEPT_HEIGHTS):
        history.take_listeners([seen(overflown(syn_need_ns=at(0) + number))])
    (heights,) = history._heights.values()
    assert KEPT_HEIGHTS // 2 <= len(heights) <= KEPT_HEIGHTS


def test_listeners_come_by_namespace_port_and_address() -> None:
    places = [(7, 80, "192.0.2.9"), (7, 443, "192.0.2.1"), (7, 443, "192.0.2.5"), (9, 1, "::1")]
    history = ListenerHistory()
    history.take_listeners(
        seen(facts(netns=netns, server_port=port, server_address=address_bytes(address)))._replace(
            sockets=()
        )
        for netns, port, address in (places[i] for i in (2, 3, 0, 1))
    )
    told = [(one.netns, one.port, one.addresses[0]) for one in history.reports()]
    assert told == places


def test_the_addresses_of_one_socket_are_one_listener() -> None:
    other = address_bytes("192.0.2.2")
    several = [seen(overflown()), seen(overflown(server_address=other, peak_accept_queue=20))]
    history = ListenerHistory()
    history.take_listeners(several)
    (told,) = history.reports()
    assert told.addresses == ("192.0.2.1", "192.0.2.2")
    assert told.facts.syns == 2 * 199
    assert told.facts.peak_accept_queue == 51
    assert told.accept_queue_needed == 51 + 2 * 148


@pytest.mark.parametrize("sockets", [((), ()), ((7001, 7002), (7001, 7002)), ((7001,), (7002,))])
def test_addresses_are_kept_apart_where_they_may_have_queues_of_their_own(
    sockets: tuple[tuple[int, ...], ...],
) -> None:
    """A server that listens at two addresses has two sockets; what is not known is not merged."""
    one, other = seen(overflown()), seen(facts(server_address=address_bytes("192.0.2.2")))
    history = ListenerHistory()
    history.take_listeners(
        known._replace(sockets=inodes) for known, inodes in zip((one, other), sockets)
    )
    assert [told.addresses for told in history.reports()] == [("192.0.2.1",), ("192.0.2.2",)]


PAUSED, HEALTHY = 9016, 9500


def sharing(**settings: int) -> ListenerHistory:
    """Two sockets of one port: one that accepts nobody, with a backlog of 16, and a healthy one."""
    forced = settings.get(SYNCOOKIES) == 2
    paused = overflown(
        socket=PAUSED,
        limit=16,
        lowest_cookie_syn_queue=0 if forced else 16,
        syn_need_syn_queue=0 if forced else 16,
        syn_need_owed=49,
        accept_need_accept_queue=17,
        accept_need_turned_away=49,
    )
    healthy = facts(socket=HEALTHY, limit=500, syns=60, cookies_sent=60 if forced else 0)
    history = ListenerHistory()
    for one, owner in ((healthy, "greeter (pid 2)"), (paused, "greeter (pid 1)")):
        known = seen(one, owner, **settings)
        history.take_listeners([known._replace(sockets=(PAUSED, HEALTHY))])
    return history


@pytest.mark.parametrize("syncookies", [1, 2])
def test_of_sockets_that_share_a_port_the_paused_one_is_named(syncookies: int) -> None:
    paused, healthy = sharing(**{SYNCOOKIES: syncookies}).reports()
    assert (paused.socket, paused.owners) == (PAUSED, ("greeter (pid 1)",))
    assert (paused.facts.limit, paused.advised_backlog) == (16, 65)
    assert (healthy.socket, healthy.owners) == (HEALTHY, ("greeter (pid 2)",))
    assert (healthy.facts.limit, healthy.advised_backlog) == (500, None)
    assert healthy.addresses == paused.addresses == ("192.0.2.1",)
    assert healthy.sockets == paused.sockets == 2


def test_who_stays_silent_is_taken_off_the_need_of_the_socket_that_owes() -> None:
    history = sharing(**{SYNCOOKIES: 1})
    rows = [
        row._replace(handshake=row.handshake._replace(socket=HEALTHY if number < 4 else PAUSED))
        for number, row in enumerate(silent_rows(9))
    ]
    history.take_sweep(Sweep(at(4), tuple(rows)))
    for _ in range(2):
        assert [told.silent for told in history.reports()] == [5, 0]
        leaving = [HandshakeId(row.four_tuple, row.handshake.first_syn_ns) for row in rows]
        history.take_leaving(leaving)


def test_clients_of_every_address_of_a_socket_are_its_clients() -> None:
    """A proxy's, whose packets are for others (TPROXY), and one's that listens at any address."""
    history = ListenerHistory()
    known = seen(overflown(socket=PAUSED))._replace(bound=bytes(16))
    history.take_listeners([known])
    rows = [
        Row(
            row.four_tuple._replace(server_address=address_bytes("192.0.2.80"), server_port=port),
            row.handshake._replace(socket=PAUSED),
        )
        for port, row in enumerate(silent_rows(9), 80)
    ]
    history.take_sweep(Sweep(at(4), tuple(rows)))
    (told,) = history.reports()
    assert (told.silent, told.port, told.addresses) == (9, SERVER.server_port, ("::",))


def test_where_a_listener_listens_need_not_be_where_its_clients_packets_go() -> None:
    history = ListenerHistory()
    who = SERVER._replace(server_address=address_bytes("192.0.2.80"), server_port=80)
    assert history.endpoint(who, PAUSED) == who.server
    history.take_listeners([seen(facts(socket=PAUSED))])
    assert history.endpoint(who, PAUSED) == (who.server_address, SERVER.server_port)
    history.take_listeners([seen(facts(socket=PAUSED))._replace(bound=address_bytes("::1"))])
    assert history.endpoint(who, PAUSED) == (address_bytes("::1"), SERVER.server_port)
    assert history.endpoint(who, HEALTHY) == history.endpoint(who, 0) == who.server


def test_a_restarted_servers_sockets_are_two_listeners() -> None:
    history = ListenerHistory()
    history.take_listeners([seen(overflown(socket=1)), seen(overflown(socket=2, limit=400))])
    assert [told.facts.limit for told in history.reports()] == [50, 400]


def test_chosen_rows_say_nothing_of_the_others() -> None:
    history = ListenerHistory()
    history.take_listeners([seen(overflown())])
    history.take_sweep(Sweep(at(4), silent_rows(40)))
    history.take_sweep(Sweep(at(4.5), (), SweepPart.CHOSEN))
    assert history.reports()[0].silent == 40


def test_a_chosen_row_that_answers_before_the_next_sweep_is_not_silent() -> None:
    history = ListenerHistory()
    history.take_listeners([seen(overflown())])
    history.take_sweep(Sweep(at(4), silent_rows(1), SweepPart.CHOSEN))
    history.take_sweep(Sweep(at(5), ()))
    assert history.reports()[0].silent == 0
