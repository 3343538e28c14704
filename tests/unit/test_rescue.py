"""Who gets a SYN-ACK once more, who does not and by what name, and how many at once."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable

import pytest

from tcpstuck_bpf.candidate import MAX_TRIES
from tcpstuck_bpf.model import ATTEMPT_NOT_SENT, FourTuple
from tcpstuck_bpf.rescue import FLOOD_SILENT, RescuePolicy
from tests.builders import (
    CLIENT_ISN,
    SECOND_NS,
    START_NS,
    TIMEOUT_NS,
    at,
    four_tuple,
    seconds,
)
from tests.rescue_world import (
    BACKLOG,
    COMPLETES,
    OF_MEMORY,
    OUT_OF_MEMORY,
    OVERFLOWS,
    SILENT,
    Queue,
    RescueWorld,
    client,
)

WHO = client(0)


class Room:
    """An accept queue with room that never changes."""

    length = 1

    def __call__(self, _who: FourTuple, _now_ns: int) -> str:
        return COMPLETES


class QueueAnswers:
    """Answers by an accept queue."""

    def __init__(self, queue: Queue) -> None:
        self._queue = queue

    @property
    def length(self) -> int:
        """Of the queue, the answer's own connection included."""
        return self._queue.length

    def __call__(self, _who: FourTuple, now_ns: int) -> str:
        return self._queue.answer(now_ns)


def always(answer: str) -> Callable[[FourTuple, int], str]:
    return lambda _who, _now_ns: answer


def sent_to(world: RescueWorld) -> list[FourTuple]:
    return [plan.handshake_id.four_tuple for _, plan in world.plans]


def silent_world(policy: RescuePolicy | None = None, known: bool = True) -> RescueWorld:
    return RescueWorld(
        RescuePolicy() if policy is None else policy,
        answer=always(SILENT),
        is_known=lambda _: known,
    )


def test_150_clients_of_a_small_queue_complete_within_2_s_of_their_verdict() -> None:
    world = RescueWorld(RescuePolicy(), answer=QueueAnswers(Queue(length=BACKLOG + 1)))
    everyone = {client(number) for number in range(150)}
    for who in everyone:
        world.stuck(who)
    world.run_until(START_NS + TIMEOUT_NS + 2 * SECOND_NS)
    assert world.completed.keys() == everyone
    assert not world.unanswered
    assert world.rescuer.pending == 0


@pytest.mark.parametrize(("accepts", "within_s"), [(2_000, 2.5), (200, 6)])
def test_a_paused_server_gets_one_packet_a_second_and_then_everyone_completes(
    accepts: int, within_s: float
) -> None:
    resumes_ns = START_NS + TIMEOUT_NS + 20 * SECOND_NS
    queue = Queue(BACKLOG + 1, accepts, resumes_ns)
    world = RescueWorld(RescuePolicy(), answer=QueueAnswers(queue))
    everyone = {client(number) for number in range(150)}
    for who in everyone:
        world.stuck(who)
    world.run_until(resumes_ns)
    assert 15 <= len(world.plans) <= 21
    assert not world.completed
    assert world.rescuer.pending == len(everyone)
    world.run_until(resumes_ns + seconds(within_s))
    assert world.completed.keys() == everyone


def test_a_pathfinder_that_is_gone_does_not_hold_up_the_others_for_long() -> None:
    room = Room()
    gone = client(0)

    def answer(who: FourTuple, now_ns: int) -> str:
        return SILENT if who == gone else room(who, now_ns)

    world = RescueWorld(RescuePolicy(), answer=answer)
    for number in range(40):
        world.now_ns = START_NS + number
        world.stuck(client(number))
    world.run_until(START_NS + TIMEOUT_NS + 2 * SECOND_NS)
    assert len(world.completed) == 39
    world.run_until(START_NS + 3 * TIMEOUT_NS)
    assert [identity.four_tuple for identity in world.unanswered] == [gone]
    assert world.rescuer.left_alone == {"no answer": 1}


def test_other_overflows_do_not_put_off_the_pathfinder() -> None:
    world = RescueWorld(RescuePolicy(), answer=Room())
    world.stuck(WHO)
    world.run_until(START_NS + TIMEOUT_NS - SECOND_NS // 2)
    for number in range(1, 100):
        world.now_ns = START_NS + TIMEOUT_NS - SECOND_NS // 2 + number * SECOND_NS // 50
        world.stuck(client(number))
        world.run_until(world.now_ns)
    assert WHO in world.completed


def test_a_silent_client_is_asked_three_times_a_second_apart_and_told_once() -> None:
    world = silent_world()
    world.table.syn(WHO, CLIENT_ISN, START_NS)
    world.run_until(START_NS + 10 * TIMEOUT_NS)
    times = [time_ns for time_ns, _ in world.plans]
    assert len(times) == MAX_TRIES
    assert [later - earlier for earlier, later in zip(times, times[1:])] == [SECOND_NS, SECOND_NS]
    assert [plan.number for _, plan in world.plans] == [1, 2, 3]
    assert [identity.four_tuple for identity in world.unanswered] == [WHO]
    assert world.rescuer.left_alone == {"no answer": 1}


def test_an_unknown_address_gets_nothing_unless_asked_for() -> None:
    for policy, packets in ((RescuePolicy(), 0), (RescuePolicy(include_unknown=True), MAX_TRIES)):
        world = silent_world(policy, known=False)
        world.table.syn(WHO, CLIENT_ISN, START_NS)
        world.run_until(START_NS + 5 * TIMEOUT_NS)
        assert len(world.plans) == packets
        assert world.rescuer.left_alone == {"no answer" if packets else "not known": 1}


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
        world.run_until(START_NS + 5 * TIMEOUT_NS)
        assert world.rescuer.left_alone == {reason: number}
        assert len(world.plans) == (MAX_TRIES * number if known else 0)


def test_as_many_unknown_silent_clients_as_are_no_flood_are_tried() -> None:
    world = silent_world(RescuePolicy(include_unknown=True), known=False)
    for n in range(FLOOD_SILENT):
        world.table.syn(four_tuple(n), CLIENT_ISN, START_NS)
    world.run_until(START_NS + 5 * TIMEOUT_NS)
    assert world.rescuer.left_alone == {"no answer": FLOOD_SILENT}


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
    world.run_until(START_NS + 5 * TIMEOUT_NS)
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
    policy = RescuePolicy(dry_run=outcome == ATTEMPT_NOT_SENT)
    world = RescueWorld(policy, answer=always(SILENT), outcome=outcome)
    for number in range(10):
        world.stuck(client(number))
    world.run_until(START_NS + 5 * TIMEOUT_NS)
    assert len(world.plans) == packets * 10
    assert not world.unanswered
    assert world.rescuer.left_alone == {reason: 10}


def test_silent_clients_of_one_address_share_its_rate_and_dropped_ones_do_not() -> None:
    policy = RescuePolicy(rate_per_address=5)
    world = silent_world(policy)
    for number in range(100):
        world.table.syn(client(number), CLIENT_ISN, START_NS)
    world.stuck(client(100), OF_MEMORY)
    world.stuck(four_tuple(9), OF_MEMORY)
    world.run_until(START_NS + TIMEOUT_NS)
    first = sent_to(world)
    assert len(first) == 7
    assert {client(100), four_tuple(9)} < set(first)
    world.run_until(START_NS + TIMEOUT_NS + 2 * SECOND_NS)
    silent = [who for who in sent_to(world) if who not in (client(100), four_tuple(9))]
    assert len(silent) == 15


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
    assert world.rescuer.left_alone == {"not known": 20, "no room": 80}


def test_a_listener_is_not_limited_by_another_ones_queue() -> None:
    full = client(0, server_port=3312)

    def answer(who: FourTuple, _now_ns: int) -> str:
        return OVERFLOWS if who == full else COMPLETES

    world = RescueWorld(RescuePolicy(), answer=answer)
    world.stuck(full)
    others = {client(number) for number in range(1, 60)}
    for who in others:
        world.stuck(who, OF_MEMORY)
    world.run_until(START_NS + TIMEOUT_NS)
    world.run_until(world.now_ns + SECOND_NS // 10)
    assert world.completed.keys() == others


@pytest.mark.parametrize(("rate", "rate_per_address"), [(0, 1), (1, 0)])
def test_a_rate_of_nothing_is_refused(rate: int, rate_per_address: int) -> None:
    with pytest.raises(ValueError, match="nothing through"):
        RescuePolicy(rate=rate, rate_per_address=rate_per_address)


def _many_silent(answer: str = SILENT) -> RescueWorld:
    """Ten known, silent clients of one address, one of them tried, all of them told."""
    policy = RescuePolicy(rate_per_address=1)
    world = RescueWorld(policy, answer=always(answer))
    for number in range(10):
        world.now_ns = START_NS + number
        world.table.syn(client(number), CLIENT_ISN, world.now_ns)
    world.run_until(START_NS + TIMEOUT_NS + SECOND_NS // 2)
    assert len(world.plans) == 1
    return world


def test_a_client_that_resets_while_it_waits_for_its_address_is_forgotten() -> None:
    world = _many_silent()
    for number in range(1, 10):
        world.table.reset(client(number), world.now_ns)
    world.run_until(START_NS + 5 * TIMEOUT_NS)
    assert set(sent_to(world)) == {client(0)}
    assert world.rescuer.left_alone == {"no answer": 1}


def test_a_dropped_ack_ends_the_wait_for_the_address() -> None:
    world = _many_silent()
    world.drop(client(9), OF_MEMORY)
    world.take_in()
    assert sent_to(world)[-1] == client(9)


def test_two_tries_are_a_second_apart_whatever_came_between() -> None:
    world = _many_silent()
    tried_ns, plan = world.plans[0]
    who = plan.handshake_id.four_tuple
    world.table.syn(who, CLIENT_ISN, world.now_ns)
    world.take_in()
    world.now_ns += 1
    world.drop(who, OF_MEMORY)
    world.take_in()
    world.run_until(START_NS + 2 * TIMEOUT_NS)
    times = [time_ns for time_ns, plan in world.plans if plan.handshake_id.four_tuple == who]
    assert times[:2] == [tried_ns, tried_ns + SECOND_NS]


def test_a_new_handshake_of_the_4_tuple_ends_the_old_one_though_nobody_told() -> None:
    world = silent_world()
    world.table.syn(WHO, CLIENT_ISN, START_NS)
    world.run_until(START_NS + 5 * TIMEOUT_NS)
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


def test_an_ack_from_before_the_try_is_not_its_answer() -> None:
    world = _many_silent()
    tried_ns, plan = world.plans[0]
    who = plan.handshake_id.four_tuple
    world.table.ack_dropped(who, tried_ns - 1, OF_MEMORY)
    world.run_until(START_NS + 5 * TIMEOUT_NS)
    tries = [plan for _, plan in world.plans if plan.handshake_id.four_tuple == who]
    assert len(tries) == MAX_TRIES
    assert plan.handshake_id in world.unanswered
    assert "ACK dropped again" not in world.rescuer.left_alone
