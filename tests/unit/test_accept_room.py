"""How many SYN-ACKs may be under way to a listener: as many as its accept queue takes."""

from __future__ import annotations

import pytest

from tcpstuck_bpf import accept_room
from tcpstuck_bpf.accept_room import ANSWER_NS, Listeners
from tcpstuck_bpf.model import Event, EventKind, FourTuple
from tests.builders import at, event, handshake
from tests.rescue_world import BACKLOG, client

HELD = BACKLOG + 1
"""An accept queue is full when it is longer than the backlog (sk_acceptq_is_full)."""
PLENTY = 3 * BACKLOG


def overflow(time_ns: int, who: FourTuple | None = None) -> Event:
    return event(EventKind.ACK_DROPPED, handshake(), time_ns, who or client(0))


def completion(time_ns: int, before: int, who: FourTuple | None = None) -> Event:
    """A handshake completes; so many connections were in the accept queue before it."""
    queue = {"accept_queue": before, "accept_queue_limit": BACKLOG}
    return event(EventKind.COMPLETED, handshake(), time_ns, who or client(0), **queue)


def waiting(number: int = PLENTY) -> Listeners:
    """So many clients of one listener wait for their turn."""
    listeners = Listeners()
    for n in range(number):
        listeners.add_ready(client(n), n)
    return listeners


def send(listeners: Listeners, now_ns: int) -> int:
    """Send to all whose turn it is; to how many."""
    listeners.wake(now_ns)
    sent = 0
    while (who := listeners.pop_ready(now_ns)) is not None:
        listeners.begin_wait(who)
        sent += 1
    return sent


@pytest.mark.parametrize("before", [0, 1, BACKLOG - 1])
def test_all_who_are_written_to_find_a_place_and_no_place_stays_empty(before: int) -> None:
    listeners = waiting()
    listeners.note_overflow(overflow(at(1)), is_answer=False)
    listeners.note_completion(completion(at(2), before))
    in_queue = before + 1
    assert in_queue + send(listeners, at(2)) == HELD


def test_one_whose_answer_may_fill_the_last_place_is_the_next_pathfinder() -> None:
    """It completed into the last place, and the server may have accepted one since."""
    listeners = waiting()
    listeners.note_overflow(overflow(at(1)), is_answer=False)
    listeners.note_completion(completion(at(2), HELD - 1))
    assert send(listeners, at(2)) == 1


def test_a_listener_that_never_overflowed_has_no_limit_whoever_completes() -> None:
    listeners = waiting()
    listeners.note_completion(completion(at(1), BACKLOG - 1))
    assert send(listeners, at(2)) == PLENTY


def test_what_completed_before_the_overflow_tells_of_no_room_after_it() -> None:
    """Events of several CPUs come in any order."""
    listeners = waiting()
    listeners.note_overflow(overflow(at(2)), is_answer=False)
    listeners.note_completion(completion(at(1), 0))
    assert send(listeners, at(4)) == 1


def test_an_overflow_from_before_a_completion_takes_no_room() -> None:
    listeners = waiting()
    listeners.note_overflow(overflow(at(1)), is_answer=False)
    listeners.note_completion(completion(at(3), 0))
    listeners.note_overflow(overflow(at(2)), is_answer=True)
    assert send(listeners, at(3)) == BACKLOG


def test_a_completion_at_a_listener_that_nobody_waits_for_is_nothing() -> None:
    listeners = Listeners()
    listeners.note_completion(completion(at(1), BACKLOG))
    assert listeners.pop_ready(at(2)) is None


def test_a_full_queue_gets_its_pathfinder_when_an_answer_may_take_no_longer() -> None:
    listeners = waiting()
    listeners.note_overflow(overflow(at(1)), is_answer=False)
    assert send(listeners, at(1) + ANSWER_NS - 1) == 0
    assert send(listeners, at(1) + ANSWER_NS) == 1
    assert send(listeners, at(9)) == 0


def test_listeners_take_turns() -> None:
    listeners = Listeners()
    for n in range(4):
        for port in (1, 2):
            listeners.add_ready(client(n, port), n)
    first = [listeners.pop_ready(at(1)) for _ in range(4)]
    assert [who.server_port for who in first if who is not None] in ([1, 2] * 2, [2, 1] * 2)


def test_of_more_listeners_than_are_kept_those_with_clients_are_not_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A full one that is forgotten counts as one that never overflowed: all are written to."""
    monkeypatch.setattr(accept_room, "MAX_LISTENERS", 8)
    listeners = waiting()
    busy = client(0, server_port=1)
    listeners.begin_wait(busy)
    for who in (client(0), busy):
        listeners.note_overflow(overflow(at(1), who), is_answer=False)
    for port in range(2, 1000):
        listeners.note_overflow(overflow(at(1), client(0, port)), is_answer=False)
    assert len(listeners._listeners) <= 8 + 2
    listeners.add_ready(busy._replace(client_port=7), 1)
    who = listeners.pop_ready(at(2))
    assert who == client(0)
    listeners.begin_wait(who)
    assert listeners.pop_ready(at(2)) is None
