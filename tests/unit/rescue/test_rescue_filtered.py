"""The rescue of clients whose ACK this host dropped before TCP looked at it."""

from __future__ import annotations

import pytest

from tcpstuck_bpf.handshake.flow import State
from tcpstuck_bpf.rescue.candidate import DROPPED_AGAIN, MAX_TRIES, NO_ANSWER, NOT_KNOWN, SENT_DATA
from tcpstuck_bpf.rescue.policy import RescuePolicy
from tests.builders import CLIENT_ISN, START_NS, seconds
from tests.rescue_world import COMPLETES, FILTERED, SILENT, RescueWorld, client

WHO = client(0)


def filtered_world(answer: str, *, known: bool = True, data: int = 0) -> RescueWorld:
    """A client whose ACK met a rule; that is what becomes of the answers."""
    world = RescueWorld(RescuePolicy(), answer=lambda *_: answer, is_known=lambda _: known)
    world.table.syn(WHO, CLIENT_ISN, world.now_ns)
    world.filter(WHO, data)
    world.run_until(START_NS + seconds(30))
    return world


def test_nobody_has_looked_at_its_cookie_so_it_may_be_spoofed() -> None:
    world = filtered_world(COMPLETES, known=False)
    assert world.plans == []
    assert world.rescuer.left_alone == {NOT_KNOWN: 1}


def test_a_known_one_is_mended_once_the_rule_is_gone() -> None:
    world = filtered_world(COMPLETES)
    assert [plan.number for _, plan in world.plans] == [1]
    assert WHO in world.completed


@pytest.mark.parametrize(("answer", "why"), [(SILENT, NO_ANSWER), (FILTERED, DROPPED_AGAIN)])
def test_one_that_goes_on_being_filtered_is_not_called_gone(answer: str, why: str) -> None:
    world = filtered_world(answer)
    assert len(world.plans) == MAX_TRIES
    assert world.rescuer.left_alone == {why: 1}
    assert bool(world.unanswered) == (answer == SILENT)
    assert world.correlate.stats().reported_now == {State.ACK_FILTERED: 1}


def test_one_whose_data_was_filtered_connects_by_itself() -> None:
    world = filtered_world(COMPLETES, data=5)
    assert world.plans == []
    assert world.rescuer.left_alone == {SENT_DATA: 1}
