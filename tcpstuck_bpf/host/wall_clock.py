"""The pair of clocks by which a run prints its times, and what has become of it at the end.

One pair for a whole run. The kernel's programs stamp by CLOCK_MONOTONIC (bpf_ktime_get_ns), which
neither stops for a step of the wall clock nor goes on in a suspend. With a second pair the times
before and after such a moment would have other distances than the ages beside them, and a replay
would need every pair. So all times go by the wall clock as it was at the start, and where that is
not what a clock on the wall shows any more, a note says by how much.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta

from tcpstuck_bpf.steps import WallClock

TRIES = 5
"""Pairs read, of which the one whose readings are closest together counts."""
TOLERATED_NS = 1_000_000_000
"""The table's times have whole seconds. The slewing of ntpd moves both clocks alike."""

Clock = Callable[[], int]


def _boottime_ns() -> int:
    """CLOCK_BOOTTIME: CLOCK_MONOTONIC and the time suspended (clock_gettime(2))."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def _hours(nanoseconds: int) -> str:
    return f"{timedelta(seconds=round(nanoseconds / 1_000_000_000))} (h:m:s)"


class RunClock:
    """The pair of a run, read when it is made. The clocks are in ns."""

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
        """A reading of another clock beside the middle of two of CLOCK_MONOTONIC."""
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
        """What has moved the wall clock against the run's times since; empty where nothing did."""
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
            f"{cause} during this run: all its times go by the clock as it was at the start, and "
            f"those since then are {_hours(abs(moved_ns))} "
            f"{'behind' if moved_ns > 0 else 'ahead of'} the clock of now"
        )
