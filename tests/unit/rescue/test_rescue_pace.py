"""When stuck clients get their SYN-ACK once more, and how many at once."""

from __future__ import annotations

import pytest

from tcpstuck_bpf.model import FourTuple
from tcpstuck_bpf.rescue.candidate import MAX_TRIES
from tcpstuck_bpf.rescue.policy import RescuePolicy
from tests.builders import (
    CLIENT_ISN,
    SECOND_NS,
    START_NS,
    TIMEOUT_NS,
    four_tuple,
    seconds,
)
from tests.rescue_world import (
    BACKLOG,
    COMPLETES,
    OF_MEMORY,
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


def test_who_completes_at_one_socket_of_a_port_makes_no_room_at_a_paused_one() -> None:
    """SO_REUSEPORT: the paused one gets its one packet a second, whatever room the other has."""
    at_paused = {client(number) for number in range(0, 80, 2)}
    at_other = {client(number) for number in range(1, 80, 2)}
    world = RescueWorld(
        RescuePolicy(), answer=lambda who, _now_ns: OVERFLOWS if who in at_paused else COMPLETES
    )
    for who in sorted(at_paused | at_other):
        world.stuck(who, socket=9016 if who in at_paused else 9500)
    world.run_until(START_NS + TIMEOUT_NS + 10 * SECOND_NS)
    assert world.completed.keys() == at_other
    assert 5 <= len([who for who in sent_to(world) if who in at_paused]) <= 14


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


def test_a_silent_client_is_asked_three_times_and_told_once() -> None:
    """The last time when a fault that was short has passed."""
    world = silent_world()
    world.table.syn(WHO, CLIENT_ISN, START_NS)
    world.run_until(START_NS + 10 * TIMEOUT_NS)
    times = [time_ns for time_ns, _ in world.plans]
    assert len(times) == MAX_TRIES
    gaps = [later - earlier for earlier, later in zip(times, times[1:])]
    assert gaps == [SECOND_NS, 20 * SECOND_NS]
    assert [plan.number for _, plan in world.plans] == [1, 2, 3]
    assert [identity.four_tuple for identity in world.unanswered] == [WHO]
    assert world.rescuer.left_alone == {"no answer": 1}


def test_a_fault_of_many_seconds_is_outlasted() -> None:
    heals_ns = START_NS + TIMEOUT_NS + 15 * SECOND_NS
    world = RescueWorld(
        RescuePolicy(), answer=lambda _who, now_ns: COMPLETES if now_ns > heals_ns else SILENT
    )
    world.table.syn(WHO, CLIENT_ISN, START_NS)
    world.run_until(START_NS + 10 * TIMEOUT_NS)
    assert WHO in world.completed
    assert not world.unanswered


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


def test_listeners_take_turns_also_from_one_second_to_the_next() -> None:
    """Each port gets as many packets as the others, at one packet per second."""
    world = silent_world(RescuePolicy(rate=1))
    ports = (3311, 3312, 3313)
    for number in range(12):
        world.table.syn(client(number, ports[number % 3]), CLIENT_ISN, START_NS)
    world.run_until(START_NS + TIMEOUT_NS + 8 * SECOND_NS)
    sent = [who.server_port for who in sent_to(world)]
    assert len(sent) >= 7
    assert all(len(set(sent[first : first + 3])) == 3 for first in range(len(sent) - 2))


@pytest.mark.parametrize(("number", "most_per_s"), [(100, 10), (10_000, 5)])
def test_however_many_events_come_the_clients_are_looked_through_rarely(
    number: int, most_per_s: int
) -> None:
    """The more of them wait, the rarer: a look costs a few microseconds for each."""
    world = RescueWorld(RescuePolicy(rate=number), answer=always(OVERFLOWS))
    for n in range(number):
        world.stuck(client(n))
    world.run_until(START_NS + TIMEOUT_NS)
    assert world.rescuer.pending == number
    begun_ns = world.now_ns
    next_looks = set()
    for step in range(200):
        world.now_ns = begun_ns + step * SECOND_NS // 100
        world.drop(client(step % number))
        world.take_in()
        next_looks.add(world.rescuer.due_ns)
    assert 1 < len(next_looks) <= 2 * most_per_s + 1


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
    world.run_until(START_NS + 10 * TIMEOUT_NS)
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


def test_an_ack_from_before_the_try_is_not_its_answer() -> None:
    world = _many_silent()
    tried_ns, plan = world.plans[0]
    who = plan.handshake_id.four_tuple
    world.table.ack_dropped(who, tried_ns - 1, OF_MEMORY)
    world.run_until(START_NS + 10 * TIMEOUT_NS)
    tries = [plan for _, plan in world.plans if plan.handshake_id.four_tuple == who]
    assert len(tries) == MAX_TRIES
    assert plan.handshake_id in world.unanswered
    assert "ACK dropped again" not in world.rescuer.left_alone
