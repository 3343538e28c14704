"""Times at which a sweep would decide a flow. Pure.

Times are CLOCK_MONOTONIC nanoseconds.
"""

from __future__ import annotations

import bisect

from tcpstuck_bpf.model import SECOND_NS

STEP_NS = SECOND_NS // 10
"""Deadlines are rounded up to a multiple of this, so that few distinct ones are kept."""


class Deadlines:
    """The deadlines that no sweep has reached yet."""

    def __init__(self) -> None:
        self._rounded: list[int] = []

    def note(self, due_ns: int) -> None:
        """Note that a flow is due at this time."""
        due_ns = -(-due_ns // STEP_NS) * STEP_NS
        place = bisect.bisect_left(self._rounded, due_ns)
        if place == len(self._rounded) or self._rounded[place] != due_ns:
            self._rounded.insert(place, due_ns)

    def forget_until(self, time_ns: int) -> None:
        """Drop the deadlines up to this time: a sweep of that time has decided those flows."""
        del self._rounded[: bisect.bisect_right(self._rounded, time_ns)]

    @property
    def next_ns(self) -> int | None:
        """The earliest deadline, up to 100 ms late; None: no flow waits for one."""
        return self._rounded[0] if self._rounded else None
