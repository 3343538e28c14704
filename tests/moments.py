"""The tool's times on the clock of the lab's records."""

from __future__ import annotations

import time
from datetime import datetime, timedelta

EPOCH = datetime(1970, 1, 1)


def monotonic_ns(text: str) -> int:
    """A time in the tool's JSON, to the microsecond, as CLOCK_MONOTONIC has it.

    Both clocks are read now; the result is wrong if the wall clock has been set since then.
    """
    monotonic_minus_real_ns = time.monotonic_ns() - time.time_ns()
    elapsed = datetime.strptime(text, "%Y-%m-%dT%H:%M:%S.%fZ") - EPOCH
    return elapsed // timedelta(microseconds=1) * 1_000 + monotonic_minus_real_ns
