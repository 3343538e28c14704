"""A length of time as a person writes it."""

from __future__ import annotations

import pytest

from tcpstuck_bpf.judge.evidence import duration_text
from tcpstuck_bpf.model import SECOND_NS

MINUTE_NS = 60 * SECOND_NS
HOUR_NS = 60 * MINUTE_NS
DAY_NS = 24 * HOUR_NS


@pytest.mark.parametrize(
    ("nanoseconds", "text"),
    [
        (0, "0.0 ms"),
        (500_000_000, "500.0 ms"),
        (999_940_000, "999.9 ms"),
        (999_960_000, "1.0 s"),
        (SECOND_NS, "1.0 s"),
        (59_940_000_000, "59.9 s"),
        (59_960_000_000, "1 min"),
        (MINUTE_NS, "1 min"),
        (128_300_000_000, "2 min 08 s"),
        (HOUR_NS - 1, "59 min 59 s"),
        (HOUR_NS, "1 h"),
        (8 * HOUR_NS + 5 * MINUTE_NS + 59 * SECOND_NS, "8 h 05 min"),
        (DAY_NS - 1, "23 h 59 min"),
        (DAY_NS, "1 d"),
        (100 * DAY_NS + 4 * HOUR_NS, "100 d 04 h"),
    ],
)
def test_a_length_of_time_has_the_units_that_people_use(nanoseconds: int, text: str) -> None:
    assert duration_text(nanoseconds) == text
