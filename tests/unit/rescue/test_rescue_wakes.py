"""The rescuer says when it has something to do: nobody but its own time wakes it here."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tcpstuck_bpf.handshake.flow import FlowFlags, FlowReport, State
from tcpstuck_bpf.model import Ending, EventKind, FourTuple
from tcpstuck_bpf.rescue import accept_queues, planner
from tcpstuck_bpf.rescue.candidate import LAST_TRY_AFTER_NS
from tcpstuck_bpf.rescue.planner import LOOK_AGAIN_NS, TICK_NS, Rescuer
from tcpstuck_bpf.rescue.policy import RescuePolicy
from tests.builders import (
    OVERFLOW,
    SECOND_NS,
    ack_dropped,
    at,
    ended,
    event,
    four_tuple,
    handshake,
    reports,
    sweep,
)
from tests.rescue_world import OF_MEMORY, client

WHO = client(0)
SYN_NS, BEGIN_NS, EXPIRED_NS = at(0), at(4), at(58)


def silent(who: FourTuple = WHO) -> FlowReport:
    (report,) = reports([sweep(BEGIN_NS, handshake(SYN_NS))], BEGIN_NS)
    return report._replace(four_tuple=who)


def dropped(who: FourTuple = WHO, counters: int = OF_MEMORY) -> FlowReport:
    entry = ack_dropped(handshake(SYN_NS), at(0.1), counters)
    seen = [event(EventKind.ACK_DROPPED, entry, at(0.1)), sweep(BEGIN_NS, entry)]
    (report,) = reports(seen, BEGIN_NS)
    return report._replace(four_tuple=who)


def woken(
    rescuer: Rescuer, is_known: Callable[[FourTuple], bool] = lambda _: True
) -> list[tuple[int, FourTuple]]:
    """All that it sends when it is called when it is due, and never besides."""
    sent, now_ns = [], BEGIN_NS
    for _ in range(10_000):
        sent += [(now_ns, plan.handshake_id.four_tuple) for plan in rescuer.plan(now_ns, is_known)]
        if rescuer.due_ns is None:
            return sent
        assert rescuer.due_ns > now_ns
        now_ns = rescuer.due_ns
    raise AssertionError("it is due for ever")


def rescuer_of(*stuck: FlowReport, **policy: int) -> Rescuer:
    rescuer = Rescuer(RescuePolicy(**policy))
    for report in stuck:
        rescuer.report(report)
    return rescuer


def test_three_tries_and_then_nothing() -> None:
    rescuer = rescuer_of(silent())
    times = [time_ns for time_ns, _ in woken(rescuer)]
    assert times == [BEGIN_NS, BEGIN_NS + SECOND_NS, BEGIN_NS + SECOND_NS + LAST_TRY_AFTER_NS]
    assert rescuer.left_alone == {"no answer": 1}


@pytest.mark.parametrize("kind", [silent, dropped])
def test_who_waits_for_a_token_of_the_run_is_woken_by_it(
    kind: Callable[[FourTuple], FlowReport],
) -> None:
    rescuer = rescuer_of(*(kind(four_tuple(n)) for n in range(8)), rate=5)
    first = {who: time_ns for time_ns, who in reversed(woken(rescuer))}
    assert sorted(time_ns - BEGIN_NS for time_ns in first.values()) == [
        *([0] * 5),
        *(n * SECOND_NS // 5 for n in (1, 2, 3)),
    ]


def test_who_waits_for_a_token_of_its_address_is_woken_by_it() -> None:
    rescuer = rescuer_of(*(silent(client(n)) for n in range(4)), rate_per_address=2)
    first = {who: time_ns for time_ns, who in reversed(woken(rescuer))}
    assert sorted(time_ns - BEGIN_NS for time_ns in first.values()) == [
        0,
        0,
        SECOND_NS // 2,
        SECOND_NS,
    ]


def test_a_full_queue_gets_its_pathfinder_and_expiry_its_word() -> None:
    rescuer = rescuer_of()
    entry = ack_dropped(handshake(SYN_NS), BEGIN_NS, OVERFLOW)
    for n in range(3):
        rescuer.report(dropped(client(n), OVERFLOW))
        rescuer.observe(event(EventKind.ACK_DROPPED, entry, BEGIN_NS, client(n)))
    sent = woken(rescuer)
    assert sent[0][0] == BEGIN_NS + accept_queues.ANSWER_NS
    gaps = [later - earlier for (earlier, _), (later, _) in zip(sent, sent[1:])]
    assert all(SECOND_NS <= gap <= SECOND_NS + TICK_NS for gap in gaps)
    assert len({who for _, who in sent[:3]}) == 3


def test_who_cannot_be_written_to_in_time_is_named_when_its_cookie_is_too_old() -> None:
    """Nothing else happens meanwhile: the last try was made, and the next would be too late."""
    rescuer = rescuer_of(silent())
    assert [len(rescuer.plan(BEGIN_NS, lambda _: True))] == [1]
    late_ns = at(50)
    assert len(rescuer.plan(late_ns, lambda _: True)) == 1
    now_ns = late_ns
    while rescuer.due_ns is not None:
        now_ns = rescuer.due_ns
        assert rescuer.plan(now_ns, lambda _: True) == []
    assert EXPIRED_NS < now_ns <= EXPIRED_NS + TICK_NS
    assert rescuer.left_alone == {"too late": 1}


def test_an_unknown_address_is_asked_about_however_many_others_come() -> None:
    rescuer = Rescuer(RescuePolicy())
    known_ns = BEGIN_NS + SECOND_NS
    rescuer.report(silent())
    sent = []
    for tenth in range(40):
        now_ns = BEGIN_NS + tenth * SECOND_NS // 10
        rescuer.report(silent(four_tuple(tenth + 1)))
        known = now_ns >= known_ns
        plans = rescuer.plan(now_ns, lambda who, known=known: known and who == WHO)
        sent += [now_ns for plan in plans if plan.handshake_id.four_tuple == WHO]
    assert sent[:1]
    assert sent[0] <= known_ns + LOOK_AGAIN_NS + TICK_NS


def test_after_a_flood_has_passed_unknown_ones_are_tried_again() -> None:
    rescuer = Rescuer(RescuePolicy(include_unknown=True))
    for n in range(200):
        rescuer.report(silent(four_tuple(n)))
    assert rescuer.plan(BEGIN_NS, lambda _: False) == []
    assert rescuer.left_alone == {"flood suspected": 200}
    rescuer.report(silent(four_tuple(200)))
    (plan,) = rescuer.plan(BEGIN_NS + 20 * SECOND_NS, lambda _: False)
    assert plan.handshake_id.four_tuple == four_tuple(200)


def test_what_a_report_tells_is_taken_in_where_the_event_was_lost() -> None:
    rescuer = rescuer_of(dropped())
    told = dropped()
    rescuer.report(told._replace(flags=told.flags | FlowFlags.CLIENT_SENT_DATA))
    assert (rescuer.pending, rescuer.left_alone) == (0, {"sent data": 1})


def test_an_end_that_only_a_report_tells_is_an_end() -> None:
    rescuer = rescuer_of(dropped())
    over = ended(dropped().handshake, Ending.RESET, BEGIN_NS)
    rescuer.report(dropped()._replace(state=State.RESET, handshake=over))
    assert (rescuer.pending, rescuer.left_alone) == (0, {})
    assert woken(rescuer) == []


def test_one_that_was_not_stuck_for_a_while_is_tried_when_it_is_again() -> None:
    rescuer = rescuer_of(silent())
    rescuer.report(silent()._replace(state=State.REPEATING))
    assert (rescuer.pending, rescuer.left_alone) == (0, {})
    rescuer.report(silent())
    assert rescuer.pending == 1


def test_of_those_left_alone_the_oldest_are_forgotten_and_stay_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(planner, "MAX_LEFT_ALONE", 5)
    rescuer = Rescuer(RescuePolicy())
    for n in range(9):
        told = dropped(client(n))
        rescuer.report(told._replace(flags=told.flags | FlowFlags.CLIENT_SENT_DATA))
    assert len(rescuer._left) == 5
    assert rescuer.left_alone == {"sent data": 9}


def test_listeners_without_clients_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accept_queues, "MAX_LISTENERS", 8)
    rescuer = Rescuer(RescuePolicy())
    for port in range(1, 100):
        who = client(0, port)
        rescuer.observe(event(EventKind.ACK_DROPPED, ack_dropped(handshake(), at(1)), at(1), who))
    assert len(rescuer._queues) <= 8
