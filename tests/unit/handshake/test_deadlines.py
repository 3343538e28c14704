"""When a sweep would decide something: few times, in order."""

from __future__ import annotations

from tcpstuck_bpf.handshake.deadlines import STEP_NS, Deadlines


def test_the_earliest_comes_first_and_is_never_early() -> None:
    deadlines = Deadlines()
    assert deadlines.next_ns is None
    for due_ns in (3 * STEP_NS, STEP_NS + 1, 2 * STEP_NS):
        deadlines.note(due_ns)
    assert deadlines.next_ns == 2 * STEP_NS


def test_flows_that_are_due_together_share_one() -> None:
    deadlines = Deadlines()
    for due_ns in range(1, 1000):
        deadlines.note(due_ns)
    deadlines.forget_until(STEP_NS - 1)
    assert deadlines.next_ns == STEP_NS
    deadlines.forget_until(STEP_NS)
    assert deadlines.next_ns is None
