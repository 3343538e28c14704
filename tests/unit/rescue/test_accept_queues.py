"""How many SYN-ACKs may be under way to a listener: as many as its accept queue takes."""

from __future__ import annotations

import pytest

from tcpstuck_bpf.model import Event, EventKind, FourTuple, ListenerId, Moved, listener_of
from tcpstuck_bpf.rescue import accept_queues
from tcpstuck_bpf.rescue.accept_queues import ANSWER_NS, AcceptQueues
from tcpstuck_bpf.rescue.candidate import overflowed
from tests.builders import ack_dropped, at, event, handshake
from tests.rescue_world import BACKLOG, client

HELD = BACKLOG + 1
"""An accept queue is full when it is longer than the backlog (sk_acceptq_is_full)."""
PLENTY = 3 * BACKLOG


def overflow(time_ns: int, who: FourTuple | None = None, socket: int = 0) -> Event:
    return event(EventKind.ACK_DROPPED, handshake(socket=socket), time_ns, who or client(0))


def completion(time_ns: int, before: int, who: FourTuple | None = None, socket: int = 0) -> Event:
    """A handshake completes; so many connections were in the accept queue before it."""
    queue = {"accept_queue": before, "accept_queue_limit": BACKLOG}
    return event(EventKind.COMPLETED, handshake(socket=socket), time_ns, who or client(0), **queue)


def listener(who: FourTuple | None = None, socket: int = 0) -> ListenerId:
    return listener_of(who or client(0), handshake(socket=socket))


def room(queues: AcceptQueues, now_ns: int, under_way: int = 0, socket: int = 0) -> int:
    """To how many of plenty of clients one may write at this time."""
    queue = queues.get(listener(socket=socket))
    sent = 0
    while sent < PLENTY and (queue is None or queue.may_send(under_way + sent, now_ns)):
        sent += 1
    return sent


def overflowed_at(time_ns: int) -> AcceptQueues:
    queues = AcceptQueues()
    queues.note_overflow(overflow(time_ns), is_answer=False)
    return queues


@pytest.mark.parametrize("before", [0, 1, BACKLOG - 1])
def test_all_who_are_written_to_find_a_place_and_no_place_stays_empty(before: int) -> None:
    queues = overflowed_at(at(1))
    queues.note_completion(completion(at(2), before))
    in_queue = before + 1
    assert in_queue + room(queues, at(2)) == HELD


def test_those_under_way_take_their_places() -> None:
    queues = overflowed_at(at(1))
    queues.note_completion(completion(at(2), 0))
    assert room(queues, at(2), under_way=BACKLOG - 3) == 3


def test_one_whose_answer_may_fill_the_last_place_is_the_next_pathfinder() -> None:
    """It completed into the last place, and the server may have accepted one since."""
    queues = overflowed_at(at(1))
    queues.note_completion(completion(at(2), HELD - 1))
    assert room(queues, at(2)) == 1


def test_a_listener_that_never_overflowed_has_no_limit_whoever_completes() -> None:
    queues = AcceptQueues()
    queues.note_completion(completion(at(1), BACKLOG - 1))
    assert room(queues, at(2)) == PLENTY


def test_what_completed_before_the_overflow_shows_no_room_after_it() -> None:
    """Events of several CPUs come in any order."""
    queues = overflowed_at(at(2))
    queues.note_completion(completion(at(1), 0))
    assert room(queues, at(4)) == 1


def test_an_overflow_from_before_a_completion_takes_no_room() -> None:
    queues = overflowed_at(at(1))
    queues.note_completion(completion(at(3), 0))
    queues.note_overflow(overflow(at(2)), is_answer=True)
    assert room(queues, at(3)) == BACKLOG


def test_a_full_queue_gets_its_pathfinder_when_an_answer_may_take_no_longer() -> None:
    queues = overflowed_at(at(1))
    assert room(queues, at(1) + ANSWER_NS - 1) == 0
    assert room(queues, at(1) + ANSWER_NS) == 1
    assert room(queues, at(9), under_way=1) == 0


@pytest.mark.parametrize(("is_answer", "next_s"), [(True, 2.5), (False, 2)])
def test_only_an_answer_puts_off_the_next_pathfinder(is_answer: bool, next_s: float) -> None:
    queues = overflowed_at(at(1))
    queues.note_overflow(overflow(at(1.5)), is_answer)
    assert room(queues, at(next_s) - 1) == 0
    assert room(queues, at(next_s)) == 1


def test_an_overflow_after_there_was_room_counts_as_the_first() -> None:
    queues = overflowed_at(at(1))
    queues.note_completion(completion(at(2), 0))
    queues.note_overflow(overflow(at(3)), is_answer=False)
    assert room(queues, at(4) - 1) == 0


def test_of_more_listeners_than_are_kept_those_in_use_are_not_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A full one that is forgotten counts as one that never overflowed: all are written to."""
    monkeypatch.setattr(accept_queues, "MAX_LISTENERS", 8)
    queues = AcceptQueues()
    in_use = {listener(client(0, port)) for port in range(1, 4)}
    for port in range(1, 1000):
        queues.note_overflow(overflow(at(port), client(0, port)), is_answer=False)
        if queues.crowded:
            queues.forget_unused(in_use)
        assert len(queues) <= 8
    assert all(queues.get(one) is not None for one in in_use)
    assert queues.get(listener(client(0, 999))) is not None
    assert queues.get(listener(client(0, 4))) is None


def test_more_listeners_in_use_than_are_kept_are_not_looked_through_each_time() -> None:
    queues = AcceptQueues()
    crowded = 0
    in_use = set()
    for port in range(2 * accept_queues.MAX_LISTENERS):
        queues.note_overflow(overflow(at(1), client(0, port)), is_answer=False)
        in_use.add(listener(client(0, port)))
        if queues.crowded:
            crowded += 1
            queues.forget_unused(in_use)
    assert crowded == 1
    assert len(queues) == len(in_use)


PAUSED, HEALTHY = 9016, 9500


def test_what_completes_at_another_socket_of_the_port_opens_no_room() -> None:
    """SO_REUSEPORT: each socket has a queue of its own; a client always comes to the same one."""
    queues = AcceptQueues()
    for socket in (PAUSED, HEALTHY):
        queues.note_overflow(overflow(at(1), socket=socket), is_answer=False)
    queues.note_completion(completion(at(2), 0, client(99), HEALTHY))
    assert room(queues, at(2), socket=PAUSED) == 1
    queues.note_completion(completion(at(3), 0, client(0), PAUSED))
    assert room(queues, at(3), socket=PAUSED) == BACKLOG


@pytest.mark.parametrize(("length", "is_full"), [(49, False), (50, False), (51, True)])
def test_without_the_kernels_counters_a_queue_is_full_when_longer_than_its_limit(
    length: int, is_full: bool
) -> None:
    """sk_acceptq_is_full(): a queue of its limit's length has one more place."""
    entry = ack_dropped(handshake(), at(1), Moved.UNKNOWN)
    dropped = event(EventKind.ACK_DROPPED, entry, at(1), accept_queue=length, accept_queue_limit=50)
    assert overflowed(dropped) == is_full
