"""How many SYN-ACKs may be under way to a listener: as many as its accept queue takes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcpstuck_bpf.model import Event, EventKind, FourTuple, listener_of
from tcpstuck_bpf.rescue import turns
from tcpstuck_bpf.rescue.turns import ANSWER_NS, Listeners
from tests.builders import at, event, handshake
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


def add_ready(listeners: Listeners, who: FourTuple, order: int, socket: int = 0) -> None:
    """A client waits for its turn at its address and port, or at a socket of these."""
    listeners.add_ready(who, listener_of(who, handshake(socket=socket)), order)


def waiting(number: int = PLENTY, socket: int = 0) -> Listeners:
    """So many clients of one listener wait for their turn."""
    listeners = Listeners()
    for n in range(number):
        add_ready(listeners, client(n), n, socket)
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
            add_ready(listeners, client(n, port), n)
    first = [listeners.pop_ready(at(1)) for _ in range(4)]
    assert [who.server_port for who in first if who is not None] in ([1, 2] * 2, [2, 1] * 2)


def test_of_more_listeners_than_are_kept_those_with_clients_are_not_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A full one that is forgotten counts as one that never overflowed: all are written to."""
    monkeypatch.setattr(turns, "MAX_LISTENERS", 8)
    listeners = Listeners()
    busy = client(0, server_port=1)
    add_ready(listeners, busy, 0)
    assert listeners.pop_ready(at(0)) == busy
    listeners.begin_wait(busy)
    for n in range(PLENTY):
        add_ready(listeners, client(n), n)
    for who in (client(0), busy):
        listeners.note_overflow(overflow(at(1), who), is_answer=False)
    for port in range(2, 1000):
        listeners.note_overflow(overflow(at(1), client(0, port)), is_answer=False)
    assert len(listeners._listeners) <= 8 + 2
    add_ready(listeners, busy._replace(client_port=7), 1)
    who = listeners.pop_ready(at(2))
    assert who == client(0)
    listeners.begin_wait(who)
    assert listeners.pop_ready(at(2)) is None


PAUSED, HEALTHY = 9016, 9500


def test_what_completes_at_another_socket_of_the_port_opens_no_room() -> None:
    """SO_REUSEPORT: each socket has a queue of its own; a client always comes to the same one."""
    listeners = waiting(socket=PAUSED)
    listeners.note_overflow(overflow(at(1), socket=PAUSED), is_answer=False)
    listeners.note_overflow(overflow(at(1), socket=HEALTHY), is_answer=False)
    listeners.note_completion(completion(at(2), 0, client(99), HEALTHY))
    assert send(listeners, at(2)) == 1
    listeners.note_completion(completion(at(3), 0, client(0), PAUSED))
    assert 1 + send(listeners, at(3)) == BACKLOG


steps = st.lists(
    st.tuples(
        st.sampled_from(("overflow", "answer", "completion", "send", "withdraw")),
        st.sampled_from((PAUSED, HEALTHY)),
        st.integers(0, BACKLOG + 1),
    ),
    max_size=30,
)


def played(seen: list[tuple[str, int, int]], of: int) -> list[list[FourTuple]]:
    """Whom of one socket's clients each step that sends writes to."""
    listeners = Listeners()
    for n in range(2 * BACKLOG):
        add_ready(listeners, client(n), n, (PAUSED, HEALTHY)[n % 2])
    told = []
    for second, (what, socket, number) in enumerate(seen):
        who = client(2 * number + (socket == HEALTHY))
        if what in ("overflow", "answer"):
            listeners.note_overflow(overflow(at(second), who, socket), what == "answer")
        elif what == "completion":
            listeners.note_completion(completion(at(second), number, who, socket))
        elif what == "withdraw":
            listeners.withdraw(who)
        else:
            written = []
            listeners.wake(at(second))
            while (who_next := listeners.pop_ready(at(second))) is not None:
                listeners.begin_wait(who_next)
                written.append(who_next)
            told.append([who for who in written if who.client_port % 2 == (of == HEALTHY)])
    return told


@given(steps)
def test_what_befalls_one_socket_changes_nothing_at_the_other(
    seen: list[tuple[str, int, int]],
) -> None:
    for of in (PAUSED, HEALTHY):
        alone = [step for step in seen if step[1] == of or step[0] == "send"]
        padded = [step if step in alone else ("withdraw", of, 10 * BACKLOG) for step in seen]
        assert played(seen, of) == played(padded, of)


def test_a_client_whose_next_cookie_another_socket_sent_waits_there_alone() -> None:
    listeners = waiting(1, socket=PAUSED)
    add_ready(listeners, client(0), 0, HEALTHY)
    assert send(listeners, at(1)) == 1
    listeners.withdraw(client(0))
    assert send(listeners, at(9)) == 0


def test_a_client_may_be_withdrawn_from_a_listener_that_was_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(turns, "MAX_LISTENERS", 1)
    listeners = waiting(1)
    assert listeners.pop_ready(at(1)) == client(0)
    for port in range(1, 9):
        listeners.note_overflow(overflow(at(1), client(0, port)), is_answer=False)
    listeners.withdraw(client(0))
    assert send(listeners, at(2)) == 0
