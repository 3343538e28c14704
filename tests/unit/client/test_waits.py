"""Who waits, by one poll after the other."""

from __future__ import annotations

import pytest

from tcpstuck_bpf.client.actions import Action, Attempt, Outcome, Plan
from tcpstuck_bpf.client.facts import ClientSocket
from tcpstuck_bpf.client.waits import Change, Waits
from tcpstuck_bpf.model import SECOND_NS
from tests.unit.client.world import NETNS, OTHER_NETNS, client_socket, owned, poll

TIMEOUT_NS = 3 * SECOND_NS


def told(changes: list[Change]) -> list[tuple[str, int]]:
    return [(one.verdict, one.socket.cookie) for one in changes]


def test_one_that_hung_before_the_start_is_told_at_the_first_poll() -> None:
    waits = Waits(TIMEOUT_NS)
    changes = waits.take(poll(0, client_socket(1, 3.0), client_socket(2, 2.9)))
    assert told(changes) == [("greeting-missing", 1)]
    assert changes[0].waited_ns == TIMEOUT_NS
    assert (waits.stuck, waits.young, waits.ever_stuck) == (1, 1, 1)


def test_the_oldest_is_told_first_and_each_once() -> None:
    waits = Waits(TIMEOUT_NS)
    sockets = [client_socket(number, age) for number, age in ((1, 5), (2, 9), (3, 7))]
    assert told(waits.take(poll(0, *sockets))) == [("greeting-missing", n) for n in (2, 3, 1)]
    assert waits.take(poll(1, *sockets)) == []


@pytest.mark.parametrize(
    "facts",
    [
        {"data_segs_out": 1},
        {"bytes_acked": 2},
        {"unsent": 1},
        {"bytes_received": 1},
        {"unread": 1},
        {"bytes_acked": 0},  # a server's end
    ],
)
def test_whoever_sent_or_received_anything_is_never_told(facts: dict[str, int]) -> None:
    waits = Waits(TIMEOUT_NS)
    for second in range(5):
        assert waits.take(poll(second, client_socket(1, 9_000, **facts))) == []
    assert (waits.stuck, waits.young, waits.ever_stuck) == (0, 0, 0)


def test_a_slow_greeting_within_the_time_out_is_no_news() -> None:
    waits = Waits(TIMEOUT_NS)
    assert waits.take(poll(0, client_socket(1, 2.5))) == []
    greeted = client_socket(1, 0.1, bytes_received=25)
    assert waits.take(poll(2.5, greeted)) == []
    assert not waits.verdicts


def test_one_that_is_greeted_late_has_recovered() -> None:
    waits = Waits(TIMEOUT_NS)
    waits.take(poll(0, client_socket(1, 60)))
    (change,) = waits.take(poll(10, client_socket(1, 0.2, bytes_received=25)))
    assert change.verdict == "recovered"
    # Its own age is by now the time since the data came.
    assert change.waited_ns == 70 * SECOND_NS
    assert dict(+waits.verdicts) == {"recovered": 1}
    assert (waits.stuck, waits.ever_stuck) == (0, 1)
    assert waits.take(poll(11, client_socket(1, 1.2, bytes_received=25))) == []


def test_one_that_speaks_after_all_was_never_stuck() -> None:
    waits = Waits(TIMEOUT_NS)
    waits.take(poll(0, client_socket(1, 60)))
    spoke = client_socket(1, 61, data_segs_out=1)
    assert told(waits.take(poll(1, spoke))) == [("client-spoke", 1)]
    assert (waits.stuck, waits.ever_stuck) == (0, 0)


def test_one_that_spoke_and_got_an_answer_has_recovered() -> None:
    waits = Waits(TIMEOUT_NS)
    waits.take(poll(0, client_socket(1, 60)))
    both = client_socket(1, 0.1, data_segs_out=1, bytes_received=9)
    assert told(waits.take(poll(1, both))) == [("recovered", 1)]


def test_a_poll_that_misses_one_changes_nothing() -> None:
    waits = Waits(TIMEOUT_NS)
    waits.take(poll(0, client_socket(1)))
    assert waits.take(poll(1)) == []
    assert (waits.stuck, waits.closed) == (1, 0)
    assert waits.take(poll(2, client_socket(1, 62))) == []
    assert (waits.stuck, waits.closed) == (1, 0)


def test_one_that_is_gone_for_two_polls_is_closed() -> None:
    waits = Waits(TIMEOUT_NS)
    waits.take(poll(0, client_socket(1)))
    waits.take(poll(1))
    waits.take(poll(2))
    assert (waits.stuck, waits.closed, waits.ever_stuck) == (0, 1, 1)
    assert waits.groups(poll(2).time_ns) == []


@pytest.mark.parametrize("facts", [{}, {"bytes_received": 9}])
def test_one_that_comes_back_is_the_same(facts: dict[str, int]) -> None:
    waits = Waits(TIMEOUT_NS)
    waits.take(poll(0, client_socket(1)))
    waits.take(poll(1))
    waits.take(poll(2))
    again = client_socket(1, 63, **facts)
    assert waits.wants(again)
    assert told(waits.take(poll(3, again))) == ([("recovered", 1)] if facts else [])
    assert (waits.closed, waits.ever_stuck) == (0, 1)


def test_what_was_not_read_is_not_closed() -> None:
    waits = Waits(TIMEOUT_NS)
    waits.take(poll(0, client_socket(1, netns=OTHER_NETNS)))
    for second in range(1, 9):
        waits.take(poll(second)._replace(namespaces=frozenset({NETNS})))
    assert (waits.stuck, waits.closed) == (1, 0)
    waits.take(poll(9)._replace(namespaces=frozenset({NETNS}), gone=frozenset({OTHER_NETNS})))
    assert (waits.stuck, waits.closed) == (0, 1)


def test_equal_cookies_of_two_namespaces_are_two_sockets() -> None:
    waits = Waits(TIMEOUT_NS)
    changes = waits.take(poll(0, client_socket(1), client_socket(1, netns=OTHER_NETNS)))
    assert len(changes) == 2


def test_a_new_socket_on_an_old_four_tuple_is_another() -> None:
    waits = Waits(TIMEOUT_NS)
    first = client_socket(1)
    waits.take(poll(0, first))
    assert told(waits.take(poll(9, first._replace(cookie=77, age_ns=TIMEOUT_NS)))) == [
        ("greeting-missing", 77)
    ]


def test_memory_is_bounded_and_what_did_not_fit_is_counted() -> None:
    waits = Waits(TIMEOUT_NS, most=10)
    sockets = [client_socket(number) for number in range(1, 26)]
    assert len(waits.take(poll(0, *sockets))) == 10
    waits.take(poll(1, *sockets))
    assert (waits.stuck, waits.untracked) == (10, 15)


def test_groups_are_by_server_and_owner_with_the_oldest_wait() -> None:
    waits = Waits(TIMEOUT_NS)
    sockets = [client_socket(number, 10 * number) for number in range(1, 6)]
    sockets.append(client_socket(6, server="10.9.0.7"))
    waits.take(poll(0, *sockets))
    waits.note_owners({one.inode: owned() for one in sockets[:4]})
    now_ns = poll(5).time_ns
    found = [
        (group.server_address[-1], [pid for _, pid, _ in group.owners], *waiting)
        for group, waiting in waits.groups(now_ns)
    ]
    assert found == [
        (1, [288], 4, 45 * SECOND_NS),
        (7, [], 1, 65 * SECOND_NS),
        (1, [], 1, 55 * SECOND_NS),
    ]


def test_only_those_that_wait_are_asked_for() -> None:
    waits = Waits(TIMEOUT_NS)
    healthy: ClientSocket = client_socket(2, bytes_received=9)
    assert not waits.wants(healthy)
    assert waits.wants(client_socket(1))
    waits.take(poll(0, client_socket(2, 1)))
    assert waits.wants(healthy)


def came(socket: ClientSocket, after_s: float, outcome: Outcome, action: Action) -> Attempt:
    return Attempt(Plan(action, socket, owned()), poll(after_s).time_ns, outcome, "a reason")


def challenged(waits: Waits, socket: ClientSocket, after_s: float) -> None:
    attempt = came(socket, after_s, Outcome.SENT, Action.CHALLENGE)
    assert waits.attempted(attempt, attempt.time_ns) is None


def asked(waits: Waits, socket: ClientSocket, after_s: float, outcome: Outcome) -> Change | None:
    attempt = came(socket, after_s, outcome, Action.QUESTION)
    return waits.attempted(attempt, attempt.time_ns)


def test_data_after_a_challenge_is_a_rescue() -> None:
    waits = Waits(TIMEOUT_NS)
    waits.take(poll(0, client_socket(1, 5), client_socket(2, 5)))
    challenged(waits, client_socket(1), 0.1)
    greeted = [client_socket(number, 0.1, bytes_received=25) for number in (1, 2)]
    assert sorted(told(waits.take(poll(1, *greeted)))) == [("recovered", 2), ("rescued", 1)]
    assert (waits.stuck, waits.ever_stuck, waits.closed) == (0, 2, 0)


def test_a_challenge_without_data_changes_nothing() -> None:
    waits = Waits(TIMEOUT_NS)
    waits.take(poll(0, client_socket(1, 5)))
    challenged(waits, client_socket(1), 0.1)
    assert waits.take(poll(1, client_socket(1, 6))) == []
    assert told(waits.take(poll(2, client_socket(1, 7, data_segs_out=1)))) == [("client-spoke", 1)]


def test_one_that_the_server_forgot_is_over() -> None:
    waits = Waits(TIMEOUT_NS)
    waits.take(poll(0, client_socket(1, 130)))
    change = asked(waits, client_socket(1), 2, Outcome.FORGOT)
    assert change is not None
    assert (change.verdict, change.was, change.reason) == (
        "server-forgot",
        "greeting-missing",
        "a reason",
    )
    assert change.waited_ns == 132 * SECOND_NS
    for second in range(3, 9):
        assert waits.take(poll(second)) == []
    assert (waits.stuck, waits.closed, waits.ever_stuck) == (0, 0, 1)
    assert dict(+waits.verdicts) == {"server-forgot": 1}


@pytest.mark.parametrize("polls", [1, 2, 3])
def test_an_answer_that_comes_after_the_polls_missed_it_still_counts(polls: int) -> None:
    waits = Waits(TIMEOUT_NS)
    waits.take(poll(0, client_socket(1, 130)))
    for second in range(1, 1 + polls):
        waits.take(poll(second))
    change = asked(waits, client_socket(1), 5, Outcome.FORGOT)
    assert change is not None
    assert (waits.closed, waits.stuck, dict(+waits.verdicts)) == (0, 0, {"server-forgot": 1})


def test_one_that_the_server_has_waits_on_and_is_told_once() -> None:
    waits = Waits(TIMEOUT_NS)
    waits.take(poll(0, client_socket(1, 130), client_socket(2, 130)))
    first = asked(waits, client_socket(1), 1, Outcome.KNOWS)
    assert first is not None
    assert first.verdict == "server-slow"
    assert asked(waits, client_socket(1), 700, Outcome.KNOWS) is None
    assert (waits.stuck, waits.slow, waits.young) == (2, 1, 0)
    assert [one.server_knows for one in waits.candidates()] == [True, False]
    (change,) = waits.take(poll(701, client_socket(1, 0.1, bytes_received=9), client_socket(2)))
    assert (change.verdict, change.was) == ("recovered", "server-slow")
    assert (waits.stuck, waits.slow) == (1, 0)


def test_a_slow_one_that_is_closed_is_counted_apart() -> None:
    waits = Waits(TIMEOUT_NS)
    waits.take(poll(0, client_socket(1, 130), client_socket(2, 130)))
    asked(waits, client_socket(1), 1, Outcome.KNOWS)
    for second in (2, 3):
        waits.take(poll(second))
    assert (waits.closed, waits.closed_slow, waits.stuck, waits.slow) == (2, 1, 0, 0)
    waits.take(poll(4, client_socket(1, 134)))
    assert (waits.closed, waits.closed_slow, waits.stuck, waits.slow) == (1, 0, 1, 1)


@pytest.mark.parametrize(
    "outcome",
    [Outcome.NO_ANSWER, Outcome.NOT_OURS, Outcome.GONE, Outcome.REFUSED, Outcome.CHANGED],
)
def test_a_question_without_an_answer_is_no_verdict(outcome: Outcome) -> None:
    waits = Waits(TIMEOUT_NS)
    waits.take(poll(0, client_socket(1, 130)))
    assert asked(waits, client_socket(1), 1, outcome) is None
    assert (waits.stuck, dict(+waits.verdicts)) == (1, {"greeting-missing": 1})


def test_one_that_we_ended_is_no_closed_one() -> None:
    waits = Waits(TIMEOUT_NS)
    waits.take(poll(0, client_socket(1, 130)))
    attempt = came(client_socket(1), 1, Outcome.ENDED, Action.RESET)
    change = waits.attempted(attempt, attempt.time_ns)
    assert change is not None
    assert change.verdict == "reset"
    for second in (2, 3, 4):
        waits.take(poll(second))
    assert (waits.stuck, waits.closed, waits.ever_stuck) == (0, 0, 1)


def test_only_what_is_reported_and_there_may_be_touched() -> None:
    waits = Waits(TIMEOUT_NS)
    young, old, gone = client_socket(1, 1), client_socket(2, 9), client_socket(3, 9)
    waits.take(poll(0, young, old, gone))
    waits.take(poll(1, young, old))
    assert [one.socket.cookie for one in waits.candidates()] == [2]
    late = asked(waits, young, 1, Outcome.FORGOT)
    assert late is None  # it was never reported


def test_an_ack_for_one_that_polls_missed_leaves_the_figures_right() -> None:
    waits = Waits(TIMEOUT_NS)
    waits.take(poll(0, client_socket(1, 130)))
    asked(waits, client_socket(1), 1, Outcome.KNOWS)
    for second in (2, 3):
        waits.take(poll(second))
    assert (waits.stuck, waits.closed) == (0, 1)
    assert asked(waits, client_socket(1), 4, Outcome.KNOWS) is None
    assert (waits.stuck, waits.closed, waits.young) == (1, 0, 0)
    waits.take(poll(5))
    assert (waits.stuck, waits.closed, waits.young) == (0, 1, 0)
