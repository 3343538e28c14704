"""The pair of clock readings that converts a run's times to wall-clock time, and its drift.

A run uses one pair. The programs stamp with CLOCK_MONOTONIC (bpf_ktime_get_ns), which ignores steps
of the wall clock and stands still in a suspend. With a second pair, printed times would no longer
match the printed ages, and a replay would need every pair. So all times follow the wall clock as it
was at the start. If the wall clock has moved since, a note says by how much.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta

from tcpstuck_bpf.steps import WallClock

TRIES = 5
"""Number of pairs read; the pair with the shortest reading counts."""
TOLERATED_NS = 1_000_000_000
"""Tolerated drift: printed times have whole seconds. ntpd's slewing moves both clocks alike."""

Clock = Callable[[], int]


def _boottime_ns() -> int:
    """CLOCK_BOOTTIME: CLOCK_MONOTONIC plus the time suspended (clock_gettime(2))."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def _hours(nanoseconds: int) -> str:
    return f"{timedelta(seconds=round(nanoseconds / 1_000_000_000))} (h:m:s)"


class RunClock:
    """A run's pair of clock readings in ns, taken by the constructor."""

    def __init__(
        self,
        monotonic: Clock = time.monotonic_ns,
        realtime: Clock = time.time_ns,
        boottime: Clock = _boottime_ns,
    ) -> None:
        self._monotonic, self._realtime, self._boottime = monotonic, realtime, boottime
        self.clock = self._pair(realtime)
        self._asleep_ns = self._ahead(boottime)

    def _pair(self, other: Clock) -> WallClock:
        """A reading of another clock, paired with the mean of CLOCK_MONOTONIC before and after."""
        readings = []
        for _ in range(TRIES):
            before, read, after = self._monotonic(), other(), self._monotonic()
            readings.append((after - before, (before + after) // 2, read))
        _, middle_ns, read = min(readings)
        return WallClock(middle_ns, read)

    def _ahead(self, other: Clock) -> int:
        pair = self._pair(other)
        return pair.realtime_ns - pair.monotonic_ns

    def note(self) -> str:
        """A note on what moved the wall clock since the start; empty if it did not move."""
        moved_ns = self._ahead(self._realtime) - (self.clock.realtime_ns - self.clock.monotonic_ns)
        if abs(moved_ns) < TOLERATED_NS:
            return ""
        slept_ns = self._ahead(self._boottime) - self._asleep_ns
        set_ns = moved_ns - slept_ns
        why = []
        if slept_ns >= TOLERATED_NS:
            why.append(f"the machine slept for {_hours(slept_ns)}")
        if abs(set_ns) >= TOLERATED_NS:
            way = "forward" if set_ns > 0 else "back"
            why.append(f"its clock was set {way} by {_hours(abs(set_ns))}")
        cause = " and ".join(why) or "the clock was moved"
        return (
            f"{cause} during this run: all printed times follow the clock as it was at the start, "
            f"so later times are {_hours(abs(moved_ns))} "
            f"{'behind' if moved_ns > 0 else 'ahead of'} the current clock"
        )
