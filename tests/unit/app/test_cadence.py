"""Readings that cost much are made seldom."""

from __future__ import annotations

from tcpstuck_bpf.app.cadence import SHARE, Cadence


def test_a_reading_is_due_at_first() -> None:
    assert Cadence(10).due_ns == 0


def test_a_cheap_one_is_due_after_the_pause_and_may_come_before() -> None:
    cadence = Cadence(100)
    cadence.note(1000, 1)
    assert (cadence.soonest_ns, cadence.due_ns) == (1000 + SHARE, 1100)


def test_a_costly_one_waits_in_proportion() -> None:
    cadence = Cadence(100)
    cadence.note(1000, 90)
    assert (cadence.soonest_ns, cadence.due_ns) == (1000 + SHARE * 90, 1000 + SHARE * 90)
