"""Ages that count on evenly, however the kernel's readings jitter."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcpstuck_bpf.client.analysis import ClientAnalysis
from tcpstuck_bpf.client.export import verdict_line
from tcpstuck_bpf.client.facts import ClientSocket
from tcpstuck_bpf.client.steady import JITTER_NS, SteadyPolls
from tcpstuck_bpf.client.steps import Owned, Polled
from tcpstuck_bpf.model import SECOND_NS
from tests.unit.client.world import CLOCK, client_socket, header, owned, poll

MS = 1_000_000


def second(before: ClientSocket, after: ClientSocket, passed_s: float = 2.0) -> ClientSocket:
    """The later socket as a second poll shows it."""
    polls = SteadyPolls()
    polls.take(poll(0, before))
    (socket,) = polls.take(poll(passed_s, after)).sockets
    return socket


def aged(socket: ClientSocket, passed_ns: int, jitter_ns: int = 0) -> ClientSocket:
    """The socket after a time in which nothing happened, read a little earlier or later."""
    due_ns = socket.keepalive_ns
    return socket._replace(
        age_ns=socket.age_ns + passed_ns + jitter_ns,
        last_ack_ns=socket.last_ack_ns + passed_ns + jitter_ns,
        keepalive_ns=None if due_ns is None else due_ns - passed_ns - jitter_ns,
    )


@pytest.mark.parametrize("jitter_ns", [0, 7 * MS, -7 * MS, JITTER_NS, -JITTER_NS])
def test_a_socket_to_which_nothing_happened_ages_by_the_time_between_the_polls(
    jitter_ns: int,
) -> None:
    socket = client_socket(1, 60, keepalive_ns=30 * SECOND_NS)
    read = aged(socket, 2 * SECOND_NS, jitter_ns)
    assert second(socket, read) == aged(socket, 2 * SECOND_NS)


@pytest.mark.parametrize("jitter_ns", [JITTER_NS + 1, -JITTER_NS - 1])
def test_an_age_that_differs_more_is_another_one(jitter_ns: int) -> None:
    socket = client_socket(1, 60)
    read = aged(socket, 2 * SECOND_NS, jitter_ns)
    assert second(socket, read) == read


def test_a_new_acknowledgement_keeps_the_age_and_nothing_else() -> None:
    socket = client_socket(1, 60)
    read = aged(socket, 2 * SECOND_NS, 7 * MS)._replace(last_ack_ns=3 * MS, segs_in=2)
    assert second(socket, read) == read._replace(age_ns=62 * SECOND_NS)


@pytest.mark.parametrize(
    ("before_ns", "after_ns"),
    [
        (None, 30 * SECOND_NS),
        (30 * SECOND_NS, None),
        (30 * SECOND_NS, 75 * SECOND_NS),
        (SECOND_NS, 900 * MS),
    ],
    ids=["switched-on", "switched-off", "sent", "sent-right-now"],
)
def test_a_keep_alive_timer_that_does_not_count_down_is_taken_as_it_is(
    before_ns: int | None, after_ns: int | None
) -> None:
    socket = client_socket(1, 60, keepalive_ns=before_ns)
    read = aged(socket, 2 * SECOND_NS, 7 * MS)._replace(keepalive_ns=after_ns)
    assert second(socket, read) == read._replace(age_ns=62 * SECOND_NS)


def test_after_data_an_age_is_the_time_since_the_data() -> None:
    socket = client_socket(1, 0.5)
    read = socket._replace(age_ns=2_400 * MS, bytes_received=20)
    assert second(socket, read) == read


def test_the_order_is_that_of_the_keys_and_a_socket_is_there_once() -> None:
    one, two, three = (client_socket(number, 60) for number in (1, 2, 3))
    taken = SteadyPolls().take(poll(0, three, one, two, one))
    assert taken.sockets == (one, two, three)
    assert taken.established == 4


@pytest.mark.parametrize(("missed", "remembered"), [(1, True), (2, False)])
def test_one_that_a_single_poll_misses_keeps_its_age(missed: int, remembered: bool) -> None:
    polls, socket = SteadyPolls(), client_socket(1, 60)
    polls.take(poll(0, socket))
    for number in range(missed):
        polls.take(poll(1 + number))
    read = aged(socket, 9 * SECOND_NS, 7 * MS)
    (taken,) = polls.take(poll(9, read)).sockets
    assert taken == (aged(socket, 9 * SECOND_NS) if remembered else read)


READINGS = st.lists(
    st.lists(
        st.tuples(st.integers(1, 4), st.integers(-400, 400), st.integers(1, 3)),
        max_size=5,
    ),
    max_size=6,
)


@given(READINGS)
def test_steady_polls_stay_as_they_are(readings: list[list[tuple[int, int, int]]]) -> None:
    """What is steady does not change when it is taken again."""
    once, again = SteadyPolls(), SteadyPolls()
    for number, reading in enumerate(readings):
        sockets = [
            client_socket(
                who, 60 + number, keepalive_ns=(90 - number) * SECOND_NS + jitter * MS, segs_in=segs
            )._replace(age_ns=(60 + number) * SECOND_NS + jitter * MS)
            for who, jitter, segs in reading
        ]
        steady = once.take(poll(number, *sockets))
        assert again.take(steady) == steady


def test_every_verdict_on_a_connection_names_the_same_time_of_establishment() -> None:
    """Readings that are milliseconds apart, and the answer to a keep-alive probe between them."""
    analysis, polls = ClientAnalysis(header()), SteadyPolls()
    socket = client_socket(1, 0)
    readings = [
        (1.0, aged(socket, SECOND_NS, -3 * MS)),
        (4.0, aged(socket, 4 * SECOND_NS, 11 * MS)),
        (6.0, aged(socket, 6 * SECOND_NS, -9 * MS)._replace(segs_in=2, last_ack_ns=MS)),
        (8.0, client_socket(1, 1, bytes_received=20)),
    ]
    lines = []
    for after_s, read in readings:
        changes = analysis.take(Polled(polls.take(poll(after_s, read))))
        if analysis.unowned:
            changes = analysis.take(Owned({read.inode: owned()}))
        lines += [json.loads(verdict_line(change, CLOCK)) for change in changes]
    assert [line["verdict"] for line in lines] == ["greeting-missing", "recovered"]
    assert len({line["established_time"] for line in lines}) == 1
