"""The buckets that pace the rescue, against exact arithmetic."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcpstuck_bpf.model import SECOND_NS
from tcpstuck_bpf.rescue.pace import AddressPace, TokenBucket
from tests.builders import four_tuple


@given(
    st.integers(1, 1_000),
    st.none() | st.integers(1, 2_000),
    st.lists(st.integers(0, 3 * SECOND_NS), min_size=1, max_size=200),
)
def test_the_bucket_is_exact(rate: int, burst: int | None, gaps: list[int]) -> None:
    bucket = TokenBucket(rate, burst)
    most = rate if burst is None else min(rate, burst)
    level, now_ns = Fraction(most), 0
    for gap_ns in gaps:
        now_ns += gap_ns
        level = min(Fraction(most), level + Fraction(gap_ns * rate, SECOND_NS))
        assert bucket.is_full(now_ns) == (level == most)
        next_ns = bucket.next_ns(now_ns)
        assert (next_ns == now_ns) == (level >= 1)
        assert level + Fraction((next_ns - now_ns) * rate, SECOND_NS) >= 1
        assert bucket.take(now_ns) == (level >= 1)
        level -= level >= 1


def test_addresses_not_in_use_are_forgotten() -> None:
    pace = AddressPace(20)
    for number in range(1_000):
        now_ns = number * SECOND_NS // 50
        assert pace.bucket(four_tuple(number), now_ns).take(now_ns)
    assert len(pace) <= 51


def test_an_address_in_use_is_not_forgotten() -> None:
    pace = AddressPace(1)
    assert pace.bucket(four_tuple(0), 0).take(0)
    for number in range(1, 100):
        pace.bucket(four_tuple(number), SECOND_NS // 2).take(SECOND_NS // 2)
    assert not pace.bucket(four_tuple(0), SECOND_NS - 1).take(SECOND_NS - 1)


def test_a_namespace_has_addresses_of_its_own() -> None:
    pace = AddressPace(1)
    for netns in (1, 2):
        assert pace.bucket(four_tuple()._replace(netns=netns), 0).take(0)


def test_a_rate_below_one_is_refused() -> None:
    for rate, burst in ((0, None), (1, 0)):
        with pytest.raises(ValueError, match="nothing through"):
            AddressPace(rate, burst)
