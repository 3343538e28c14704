"""Queue lengths over time: bounded, and the same in whatever order they come."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcpstuck_bpf.conversions import queues
from tcpstuck_bpf.conversions.queues import MOST_READINGS, Queues, Series
from tcpstuck_bpf.model import EventKind, Row, Sweep, SweepPart, listener_of
from tcpstuck_bpf.steps import Observed, Swept
from tests.builders import ack_dropped, at, event, four_tuple, handshake

READINGS = st.lists(st.tuples(st.integers(0, 2**63), st.integers(0, 60)), max_size=60)


@given(READINGS, st.randoms(use_true_random=False), st.integers(1, 12))
def test_the_order_of_readings_does_not_matter_and_the_highest_stays(
    readings: list[tuple[int, int]], random: object, most: int
) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(queues, "MOST_READINGS", most)
        one, other = Series(), Series()
        for reading in readings:
            one.note(*reading)
        random.shuffle(readings)  # type: ignore[attr-defined]
        for reading in (*readings, *readings[:3]):
            other.note(*reading)
    assert one.readings() == other.readings()
    assert len(one.readings()) <= most
    assert set(one.readings()) <= set(readings)
    highest = max((number for _, number in readings), default=None)
    assert max((number for _, number in one.readings()), default=None) == highest


def test_few_readings_are_all_kept() -> None:
    series = Series()
    for number in range(MOST_READINGS):
        series.note(number, number % 7)
    assert series.readings() == [(number, number % 7) for number in range(MOST_READINGS)]


def test_a_length_at_a_dropped_syn_is_that_of_the_event() -> None:
    entry = handshake(at(1), accept_queue=3, syn_queue=9)
    entry = entry._replace(syn_count=2, syns_dropped=1, last_syn_ns=at(2))
    seen = Queues()
    seen.take(Observed((event(EventKind.SYN_DROPPED, entry, at(2), accept_queue=51),)))
    lengths = seen.of(listener_of(four_tuple(), entry))
    assert lengths.accept_queue.readings() == [(at(2), 51)]
    assert lengths.syn_queue.readings() == []


def test_where_no_syn_was_seen_the_syn_queue_is_unknown() -> None:
    entry = ack_dropped(handshake(at(1), syn_count=0, accept_queue=51), at(1))
    seen = Queues()
    seen.take(Swept(Sweep(at(2), (Row(four_tuple(), entry),), SweepPart.LAST)))
    lengths = seen.of(listener_of(four_tuple(), entry))
    assert lengths.accept_queue.readings() == [(at(1), 51)]
    assert lengths.syn_queue.readings() == []


def test_listeners_are_bounded_and_those_with_events_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queues, "MOST_LISTENERS", 3)
    seen = Queues()
    wanted = ack_dropped(handshake(at(1), socket=1), at(1.5))
    seen.take(Observed((event(EventKind.ACK_DROPPED, wanted, at(1.5)),)))
    for socket in range(2, 40):
        row = Row(four_tuple(socket), handshake(at(2), socket=socket))
        seen.take(Swept(Sweep(at(3), (row,), SweepPart.MORE)))
    assert len(seen._kept) == 3
    assert seen.of(listener_of(four_tuple(), wanted)).accept_queue.readings()
    gone = listener_of(four_tuple(2), handshake(at(2), socket=2))
    assert seen.of(gone).accept_queue.readings() == []
