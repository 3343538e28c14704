"""The queue and the buckets that pace the rescue, against the simplest things that do the same."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcpstuck_bpf.model import SECOND_NS
from tcpstuck_bpf.rescue.addresses import AddressPace
from tcpstuck_bpf.rescue.pacing import KeyedHeap, TokenBucket
from tests.builders import four_tuple
from tests.rescue_world import client

KEYS = st.integers(0, 5)
CHANGES = st.lists(
    st.one_of(
        st.tuples(st.just("put"), KEYS, st.integers(0, 9)),
        st.tuples(st.sampled_from(["discard", "pop"]), KEYS, st.just(0)),
        st.tuples(st.just("due"), KEYS, st.integers(0, 9)),
    ),
    max_size=300,
)


@given(CHANGES)
def test_the_heap_gives_what_sorting_gives(changes: list[tuple[str, int, int]]) -> None:
    heap: KeyedHeap[int] = KeyedHeap()
    model: dict[int, int] = {}

    def in_order() -> list[int]:
        return sorted(model, key=lambda key: (model[key], key))

    for what, key, number in changes:
        if what == "put":
            heap.put(key, number)
            model[key] = number
        elif what == "discard":
            heap.discard(key)
            model.pop(key, None)
        elif what == "due":
            due = [key for key in in_order() if model[key] <= number]
            assert list(heap.pop_due(number)) == due
            for one in due:
                del model[one]
        elif model:
            first = in_order()[0]
            assert heap.pop() == first
            del model[first]
        else:
            with pytest.raises(IndexError):
                heap.pop()
        assert len(heap) == len(model)
        assert heap.first() == ((min(model.values()),) if model else None)
        assert all((key in heap) == (key in model) for key in range(6))


def test_changing_one_entry_for_ever_takes_no_memory() -> None:
    heap: KeyedHeap[int] = KeyedHeap()
    for number in range(10_000):
        heap.put(0, number)
        heap.put(1, number)
        heap.discard(1)
    assert len(heap._heap) < 100


@given(st.integers(1, 1_000), st.lists(st.integers(0, 3 * SECOND_NS), min_size=1, max_size=200))
def test_the_bucket_is_exact(rate: int, gaps: list[int]) -> None:
    bucket = TokenBucket(rate)
    level, now_ns = Fraction(rate), 0
    for gap_ns in gaps:
        now_ns += gap_ns
        level = min(Fraction(rate), level + Fraction(gap_ns * rate, SECOND_NS))
        assert bucket.is_full(now_ns) == (level == rate)
        next_ns = bucket.next_ns(now_ns)
        assert (next_ns == now_ns) == (level >= 1)
        assert level + Fraction((next_ns - now_ns) * rate, SECOND_NS) >= 1
        assert bucket.take(now_ns) == (level >= 1)
        level -= level >= 1


def test_addresses_not_in_use_are_forgotten() -> None:
    pace = AddressPace(20)
    for number in range(1_000):
        assert pace.take(four_tuple(number), number * SECOND_NS // 50)
    assert len(pace) <= 51


def test_waiting_clients_cost_nothing_while_nothing_is_due() -> None:
    """Each token wakes one of a thousand waiting clients."""
    pace = AddressPace(10)
    woken = 0
    for number in range(1_000):
        if not pace.take(client(number), 0):
            pace.block(client(number), 0, number)
    for tenth in range(1, 51):
        now_ns = tenth * SECOND_NS // 10
        for who in pace.pop_due(now_ns):
            woken += 1
            assert pace.take(who, now_ns)
        first = pace.waking.first()
        assert first is not None
        assert first[0] > now_ns
    assert woken == 50
