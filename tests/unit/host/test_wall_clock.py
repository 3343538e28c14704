"""One pair of clocks for a whole run, and a word where it is not the wall's any more."""

from __future__ import annotations

from typing import Any

import pytest

from tcpstuck_bpf.host.wall_clock import RunClock
from tests.builders import SECOND_NS, at
from tests.scripted_run import FakeKernel, live

HOUR_NS = 3600 * SECOND_NS


class Clocks:
    """The three clocks of a machine, set by hand; a reading takes as long as is said."""

    def __init__(self) -> None:
        self.monotonic_ns, self.slept_ns, self.offset_ns = 7 * SECOND_NS, 0, 1_700 * 10**15
        self.delays_ns: list[int] = []

    def monotonic(self) -> int:
        return self.monotonic_ns

    def realtime(self) -> int:
        if self.delays_ns:
            self.monotonic_ns += self.delays_ns.pop(0)
        return self.monotonic_ns + self.slept_ns + self.offset_ns

    def boottime(self) -> int:
        return self.monotonic_ns + self.slept_ns

    def started(self) -> RunClock:
        return RunClock(self.monotonic, self.realtime, self.boottime)


@pytest.mark.parametrize(
    ("slept_ns", "set_ns", "told"),
    [
        (0, 0, []),
        (0, SECOND_NS // 2, []),
        (8 * HOUR_NS, 0, ["slept for 8:00:00 (h:m:s)"]),
        (0, HOUR_NS, ["set forward by 1:00:00 (h:m:s)"]),
        (0, -HOUR_NS, ["set back by 1:00:00 (h:m:s)"]),
        (8 * HOUR_NS, -HOUR_NS, ["slept for 8:00:00 (h:m:s)", "set back by 1:00:00 (h:m:s)"]),
    ],
)
def test_what_moved_the_wall_clock_is_told(slept_ns: int, set_ns: int, told: list[str]) -> None:
    clocks = Clocks()
    run = clocks.started()
    clocks.monotonic_ns += 60 * SECOND_NS
    clocks.slept_ns += slept_ns
    clocks.offset_ns += set_ns
    note = run.note()
    assert bool(note) == bool(told)
    assert all(words in note for words in told)
    assert ("slept" in note) == bool(slept_ns)
    assert ("set " in note) == (abs(set_ns) > SECOND_NS)


def test_a_sleep_and_a_step_that_cancel_out_leave_the_times_right() -> None:
    clocks = Clocks()
    run = clocks.started()
    clocks.slept_ns, clocks.offset_ns = HOUR_NS, clocks.offset_ns - HOUR_NS
    assert run.note() == ""


def test_times_keep_their_distances_whatever_the_clock_does() -> None:
    clocks = Clocks()
    run = clocks.started()
    before = run.clock.realtime(at(1))
    clocks.slept_ns += HOUR_NS
    clocks.offset_ns -= HOUR_NS // 2
    assert run.clock.realtime(at(2)) - before == at(2) - at(1)


def test_a_pair_that_was_interrupted_between_its_readings_is_not_taken() -> None:
    clocks = Clocks()
    clocks.delays_ns = [SECOND_NS, 3 * SECOND_NS, 100]
    taken = clocks.started().clock
    off_ns = taken.realtime_ns - taken.monotonic_ns - clocks.offset_ns
    assert abs(off_ns) <= 100


@pytest.mark.parametrize("note", ["the machine slept", ""])
def test_the_summary_has_the_note(note: str) -> None:
    lines: list[dict[str, Any]] = live(FakeKernel(), 1, clock_note=lambda: note)
    assert lines[-1]["notes"] == ([note] if note else [])
