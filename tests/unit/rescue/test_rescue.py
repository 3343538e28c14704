"""Who gets a SYN-ACK once more, who does not and by what name."""

from __future__ import annotations

import ipaddress
from collections import Counter
from collections.abc import Callable

import pytest

from tcpstuck_bpf.handshake.flood import FLOOD_SILENT
from tcpstuck_bpf.handshake.flow import FlowReport
from tcpstuck_bpf.model import (
    ATTEMPT_NOT_SENT,
    ATTEMPT_SENT,
    Ending,
    EventKind,
    FourTuple,
    Handshake,
    HandshakeId,
)
from tcpstuck_bpf.rescue.candidate import COOKIE_LIFE_S, MAX_TRIES, SYN_NOT_SEEN
from tcpstuck_bpf.rescue.planner import LOOK_AGAIN_NS, MAX_UNKNOWN_ADDRESSES, Rescuer
from tcpstuck_bpf.rescue.policy import RescuePolicy
from tests.builders import (
    CLIENT_ISN,
    SECOND_NS,
    START_NS,
    TIMEOUT_NS,
    at,
    ended,
    event,
    four_tuple,
    handshake,
    reports,
    sweep,
)
from tests.rescue_world import (
    BACKLOG,
    OF_MEMORY,
    OUT_OF_MEMORY,
    OVERFLOWS,
    SILENT,
    Queue,
    QueueAnswers,
    RescueWorld,
    Room,
    always,
    client,
    sent_to,
    silent_world,
)

WHO = client(0)


def test_an_unknown_address_gets_nothing_unless_asked_for() -> None:
    for policy, packets in ((RescuePolicy(), 0), (RescuePolicy(include_unknown=True), MAX_TRIES)):
        world = silent_world(policy, known=False)
        world.table.syn(WHO, CLIENT_ISN, START_NS)
        world.run_until(START_NS + 10 * TIMEOUT_NS)
        assert len(world.plans) == packets
        assert world.rescuer.left_alone == {"no answer" if packets else "not known": 1}


def test_one_whose_syn_was_not_seen_gets_nothing() -> None:
    """How old its cookie is cannot be known, nor what its SYN-ACK was."""
    world = RescueWorld(RescuePolicy(include_unknown=True), answer=Room(), is_known=always)
    world.table.syn(WHO, CLIENT_ISN, START_NS)
    world.table.entries[WHO] = world.table.entries[WHO]._replace(syn_count=0)
    world.table.ack_dropped(WHO, START_NS)
    world.run_until(START_NS + 10 * TIMEOUT_NS)
    assert world.plans == []
    assert world.rescuer.left_alone == {SYN_NOT_SEEN: 1}


@pytest.mark.parametrize(("known_after_s", "is_mended"), [(10, True), (50, True), (70, False)])
def test_an_address_that_becomes_known_while_the_cookie_lives(
    known_after_s: int, is_mended: bool
) -> None:
    """Others of its pool get through later than it got stuck."""
    known_ns = START_NS + known_after_s * SECOND_NS
    world = RescueWorld(
        RescuePolicy(), answer=Room(), is_known=lambda _: bool(world.now_ns >= known_ns)
    )
    world.table.syn(WHO, CLIENT_ISN, START_NS)
    world.run_until(known_ns - 1)
    assert world.rescuer.left_alone == {"not known": 1}
    world.run_until(known_ns + LOOK_AGAIN_NS + SECOND_NS)
    assert (WHO in world.completed) == is_mended
    assert world.rescuer.left_alone == ({} if is_mended else {"not known": 1})
    assert len(world.plans) == is_mended


def test_one_that_sent_data_before_its_address_became_known_gets_nothing() -> None:
    known = False
    world = RescueWorld(RescuePolicy(), answer=Room(), is_known=lambda _: known)
    world.table.syn(WHO, CLIENT_ISN, START_NS)
    world.run_until(START_NS + 10 * SECOND_NS)
    world.filter(WHO, data=7)
    world.sweep()
    known = True
    world.run_until(START_NS + 50 * SECOND_NS)
    assert world.plans == []
    assert world.rescuer.left_alone == {"sent data": 1}


def test_unknown_addresses_are_asked_about_and_not_their_clients_and_not_too_many() -> None:
    asked: Counter[bytes] = Counter()

    def is_known(who: FourTuple) -> bool:
        asked[who.client_address] += 1
        return False

    world = RescueWorld(RescuePolicy(), answer=always(SILENT), is_known=is_known)
    pool, strangers = 50, MAX_UNKNOWN_ADDRESSES + 10
    for n in range(pool):
        world.table.syn(client(n), CLIENT_ISN, START_NS)
    for n in range(1, strangers):
        world.table.syn(four_tuple(n), CLIENT_ISN, START_NS)
    world.run_until(START_NS + 40 * SECOND_NS)
    at_once = sum(asked.values())
    assert len(asked) == strangers
    world.run_until(START_NS + 40 * SECOND_NS + 2 * LOOK_AGAIN_NS)
    assert sum(asked.values()) - at_once == 2 * MAX_UNKNOWN_ADDRESSES
    world.run_until(START_NS + 60 * SECOND_NS)
    in_time = sum(asked.values())
    world.run_until(START_NS + 300 * SECOND_NS)
    assert sum(asked.values()) == in_time
    assert world.rescuer.due_ns is None


def test_a_dropped_ack_proves_an_unknown_address_reachable() -> None:
    world = RescueWorld(RescuePolicy(), answer=Room(), is_known=lambda _: False)
    world.table.syn(WHO, CLIENT_ISN, START_NS)
    world.run_until(START_NS + 2 * TIMEOUT_NS)
    assert not world.plans
    world.drop(WHO)
    world.run_until(world.now_ns + 2 * SECOND_NS)
    assert WHO in world.completed
    assert world.rescuer.left_alone == {}


def test_many_unknown_silent_clients_look_like_a_flood_and_known_ones_do_not() -> None:
    policy = RescuePolicy(include_unknown=True)
    for known, reason in ((False, "flood suspected"), (True, "no answer")):
        world = silent_world(policy, known)
        number = FLOOD_SILENT + 1
        for n in range(number):
            world.table.syn(four_tuple(n), CLIENT_ISN, START_NS)
        world.run_until(START_NS + 10 * TIMEOUT_NS)
        assert world.rescuer.left_alone == {reason: number}
        assert len(world.plans) == (MAX_TRIES * number if known else 0)


def test_as_many_unknown_silent_clients_as_are_no_flood_are_tried() -> None:
    world = silent_world(RescuePolicy(include_unknown=True), known=False)
    for n in range(FLOOD_SILENT):
        world.table.syn(four_tuple(n), CLIENT_ISN, START_NS)
    world.run_until(START_NS + 10 * TIMEOUT_NS)
    assert world.rescuer.left_alone == {"no answer": FLOOD_SILENT}


def stuck_reports(*entries: Handshake) -> list[FlowReport]:
    """Silent clients of as many addresses, told as stuck."""
    return reports([sweep(at(200), *entries)], at(200))


def unknown_tried(rescuer: Rescuer, now_ns: int) -> set[FourTuple]:
    return {plan.handshake_id.four_tuple for plan in rescuer.plan(now_ns, lambda _: False)}


def known_tried(rescuer: Rescuer, now_ns: int) -> list[HandshakeId]:
    return [plan.handshake_id for plan in rescuer.plan(now_ns, lambda _: True)]


def test_a_try_made_in_time_is_waited_for_beyond_it() -> None:
    rescuer = Rescuer(RescuePolicy())
    rescuer.report(stuck_reports(handshake())[0])
    assert len(known_tried(rescuer, at(57.9))) == 1
    assert known_tried(rescuer, at(58.5)) == []
    assert (rescuer.pending, rescuer.left_alone) == (1, {})
    assert known_tried(rescuer, at(59)) == []
    assert (rescuer.pending, rescuer.left_alone) == (0, {"too late": 1})


def test_what_is_told_late_of_an_older_handshake_does_not_replace_the_newer() -> None:
    rescuer = Rescuer(RescuePolicy())
    (newer,) = stuck_reports(handshake(at(2)))
    (older,) = stuck_reports(handshake(at(1)))
    rescuer.report(newer)
    rescuer.report(older)
    assert rescuer.pending == 1
    assert known_tried(rescuer, at(6)) == [HandshakeId(newer.four_tuple, at(2))]


def test_who_leaves_makes_room_for_one_and_not_for_two() -> None:
    rescuer = Rescuer(RescuePolicy(), max_candidates=3)
    told = stuck_reports(*[handshake()] * 8)
    for report in told[:3]:
        rescuer.report(report)
    gone = ended(handshake(), Ending.RESET, at(4))
    for report in told[:2]:
        rescuer.observe(event(EventKind.RESET, gone, at(4), report.four_tuple))
    for report in told[3:]:
        rescuer.report(report)
    assert rescuer.pending == 3
    assert rescuer.left_alone == {"no room": 3}


def test_one_that_is_not_stuck_any_more_counts_as_nothing_when_it_ends() -> None:
    """A SYN repeated twice shows a client without a SYN-ACK, which goes on by itself."""
    world = silent_world()
    world.table.syn(WHO, CLIENT_ISN, START_NS)
    world.run_until(START_NS + TIMEOUT_NS + SECOND_NS)
    for _ in range(2):
        _repeat_syn(world)
        world.run_until(world.now_ns + 2 * TIMEOUT_NS)
    assert world.rescuer.left_alone == {}
    world.table.reset(WHO, world.now_ns)
    world.take_in()
    assert world.rescuer.left_alone == {}


@pytest.mark.parametrize(("apart_s", "is_flood"), [(9, True), (10, False)])
def test_unknown_clients_are_a_flood_only_within_the_time(apart_s: int, is_flood: bool) -> None:
    """The first and the last of 101 clients are within ten whole seconds, or not."""
    rescuer = Rescuer(RescuePolicy(include_unknown=True))
    earlier, first, *others = stuck_reports(*[handshake()] * 102)
    for report, time_ns in ((earlier, at(4)), (first, at(5))):
        rescuer.report(report)
        assert unknown_tried(rescuer, time_ns) >= {report.four_tuple}
    for report in others:
        rescuer.report(report)
    sent = rescuer.plan(at(5 + apart_s), lambda _: False)
    assert bool(sent) is not is_flood
    assert ("flood suspected" in rescuer.left_alone) is is_flood


def _repeat_syn(world: RescueWorld) -> None:
    world.table.syn(WHO, CLIENT_ISN, world.now_ns)


def _send_data(world: RescueWorld) -> None:
    world.drop(WHO, data=3)


def _close(world: RescueWorld) -> None:
    world.drop(WHO, fin=True)


def _lose_an_event(world: RescueWorld) -> None:
    world.drop(WHO, data=3)
    world.table.ring.pop()
    world.drop(WHO)


FACTS = pytest.mark.parametrize(
    ("fact", "reason"),
    [
        (_repeat_syn, "repeated its SYN"),
        (_send_data, "sent data"),
        (_close, "closed"),
        (_lose_an_event, "events lost"),
    ],
)


@FACTS
@pytest.mark.parametrize("told_before", [True, False])
def test_a_client_that_may_mend_itself_is_left_alone(
    fact: Callable[[RescueWorld], None], reason: str, told_before: bool
) -> None:
    """Before its verdict, and while it waits for the full queue's pathfinder."""
    world = RescueWorld(RescuePolicy(), answer=always(OVERFLOWS))
    world.stuck(client(1))
    world.now_ns += 1
    world.stuck(WHO)
    world.run_until(START_NS + TIMEOUT_NS + SECOND_NS if told_before else world.now_ns + SECOND_NS)
    fact(world)
    world.run_until(world.now_ns + 2 * TIMEOUT_NS)
    assert WHO not in sent_to(world)
    assert world.rescuer.left_alone == {reason: 1}
    assert world.rescuer.pending == 1


def test_a_reason_ends_when_it_holds_no_more() -> None:
    world = RescueWorld(RescuePolicy(), answer=Room())
    world.stuck(WHO)
    world.now_ns += SECOND_NS
    _repeat_syn(world)
    world.run_until(START_NS + 2 * TIMEOUT_NS)
    assert world.rescuer.left_alone == {"repeated its SYN": 1}
    world.drop(WHO)
    world.run_until(world.now_ns + 2 * SECOND_NS)
    assert WHO in world.completed
    assert world.rescuer.left_alone == {}


@pytest.mark.parametrize(
    ("network", "left_alone"),
    [
        ("10.0.0.0/24", True),
        ("10.0.0.0/32", True),
        ("::ffff:10.0.0.0/120", True),
        ("10.0.1.0/24", False),
        ("::/0", False),
    ],
)
def test_an_excluded_address_gets_nothing(network: str, left_alone: bool) -> None:
    world = RescueWorld(RescuePolicy(excluded=(ipaddress.ip_network(network),)), answer=Room())
    world.stuck(WHO)
    world.run_until(START_NS + 2 * TIMEOUT_NS)
    assert bool(world.plans) is not left_alone
    assert world.rescuer.left_alone == ({"excluded": 1} if left_alone else {})


def test_ipv6_addresses_can_be_excluded() -> None:
    policy = RescuePolicy(excluded=(ipaddress.ip_network("2001:db8::/64"),))
    assert policy.excludes(four_tuple(7, family=6).client_address)
    assert not policy.excludes(four_tuple(7).client_address)


@pytest.mark.parametrize("after_expiry", [False, True])
def test_nothing_is_sent_when_the_cookie_may_have_expired(after_expiry: bool) -> None:
    queue = Queue(BACKLOG + 1, resumes_ns=at(65))
    world = RescueWorld(RescuePolicy(after_expiry=after_expiry), answer=QueueAnswers(queue))
    world.stuck(WHO)
    world.run_until(at(80))
    last_ns = world.plans[-1][0]
    assert (last_ns <= at(58)) is not after_expiry
    assert (WHO in world.completed) is after_expiry
    assert world.rescuer.left_alone == ({} if after_expiry else {"too late": 1})


def test_the_life_of_a_cookie_does_not_count_from_a_syn_that_was_dropped() -> None:
    world = RescueWorld(RescuePolicy(), answer=always(OVERFLOWS))
    world.table.syn(WHO, CLIENT_ISN, START_NS)
    world.now_ns = at(31)
    world.table.syn_dropped(WHO, CLIENT_ISN, world.now_ns)
    world.drop(WHO)
    world.run_until(at(100))
    assert world.plans
    assert max(time_ns for time_ns, _ in world.plans) <= at(58)


def test_an_answer_dropped_for_memory_counts_as_a_try_and_not_as_silence() -> None:
    world = RescueWorld(RescuePolicy(), answer=always(OUT_OF_MEMORY))
    world.stuck(WHO, OF_MEMORY)
    world.run_until(START_NS + 10 * TIMEOUT_NS)
    assert len(world.plans) == MAX_TRIES
    assert not world.unanswered
    assert world.rescuer.left_alone == {"ACK dropped again": 1}


@pytest.mark.parametrize(
    ("outcome", "packets", "reason"),
    [("failed: no route", MAX_TRIES, "sending failed"), (ATTEMPT_NOT_SENT, 1, "dry run")],
)
def test_what_was_not_sent_is_not_called_unanswered(
    outcome: str, packets: int, reason: str
) -> None:
    world = RescueWorld(RescuePolicy(), answer=always(SILENT), outcome=outcome)
    for number in range(10):
        world.stuck(client(number))
    world.run_until(START_NS + 10 * TIMEOUT_NS)
    assert len(world.plans) == packets * 10
    assert not world.unanswered
    assert world.rescuer.left_alone == {reason: 10}


def test_one_answer_that_did_not_come_is_not_called_three() -> None:
    """The first two tries never left this host."""
    world = RescueWorld(RescuePolicy(), answer=always(SILENT), outcome="failed: no buffer space")
    world.table.syn(WHO, CLIENT_ISN, START_NS)
    world.run_until(START_NS + TIMEOUT_NS + SECOND_NS)
    world.outcome = ATTEMPT_SENT
    world.run_until(START_NS + 10 * TIMEOUT_NS)
    assert [plan.number for _, plan in world.plans] == [1, 2, 3]
    assert not world.unanswered
    assert world.rescuer.left_alone == {"sending failed": 1}


def test_a_flood_of_silent_clients_takes_no_room_from_dropped_ones() -> None:
    world = RescueWorld(RescuePolicy(), answer=Room(), is_known=lambda _: False)
    world.rescuer = type(world.rescuer)(RescuePolicy(), max_candidates=20)
    for number in range(100):
        world.table.syn(client(number), CLIENT_ISN, START_NS)
    stuck = {client(1_000 + number) for number in range(20)}
    for who in stuck:
        world.stuck(who)
    world.run_until(START_NS + TIMEOUT_NS + 2 * SECOND_NS)
    assert world.completed.keys() == stuck
    left = world.rescuer.left_alone
    assert left.keys() == {"not known", "no room"}
    assert sum(left.values()) == 100


def test_more_clients_than_the_rate_can_serve_in_a_cookies_life_wait_for_a_place() -> None:
    """One goes, another comes in, though no event of its own says so."""
    world = silent_world(RescuePolicy(rate=1))
    for number in range(COOKIE_LIFE_S + 10):
        world.table.syn(four_tuple(number), CLIENT_ISN, START_NS)
    world.run_until(START_NS + TIMEOUT_NS)
    assert world.rescuer.pending == COOKIE_LIFE_S
    assert world.rescuer.left_alone == {"no room": 10}
    for number in range(4):
        world.table.reset(four_tuple(number), world.now_ns)
    world.run_until(world.now_ns + LOOK_AGAIN_NS)
    assert world.rescuer.pending == COOKIE_LIFE_S
    assert world.rescuer.left_alone == {"no room": 6}


def test_a_new_handshake_of_the_4_tuple_ends_the_old_one_though_nobody_told() -> None:
    world = silent_world()
    world.table.syn(WHO, CLIENT_ISN, START_NS)
    world.run_until(START_NS + 10 * TIMEOUT_NS)
    assert world.rescuer.left_alone == {"no answer": 1}
    world.table.syn(WHO, CLIENT_ISN + 1, world.now_ns)
    world.table.ring.clear()
    world.drop(WHO)
    world.take_in()
    assert world.rescuer.left_alone == {}


def test_a_valid_ack_beyond_the_first_byte_means_that_data_was_sent() -> None:
    """The cookie's MSS index may hide up to three lost bytes."""
    world = RescueWorld(RescuePolicy(), answer=Room())
    world.stuck(WHO)
    world.table.ring[-1] = world.table.ring[-1]._replace(sequence=CLIENT_ISN + 3)
    world.run_until(START_NS + 2 * TIMEOUT_NS)
    assert not world.plans
    assert world.rescuer.left_alone == {"sent data": 1}
