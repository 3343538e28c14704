"""Limits how often a costly reading is repeated, according to its cost."""

from __future__ import annotations

SHARE = 5
"""A reading takes at most one part in SHARE of the time."""


class Cadence:
    """The schedule of one kind of reading. The first reading is due at once.

    `pause_ns`: the regular time from the end of one reading to the next.
    """

    def __init__(self, pause_ns: int = 0) -> None:
        self._pause_ns = pause_ns
        self.soonest_ns = 0
        """Earliest time of the next reading if it is wanted early."""
        self.due_ns = 0
        """Regular time of the next reading."""

    def note(self, done_ns: int, cost_ns: int) -> None:
        """Note that a reading ended at `done_ns` and cost `cost_ns` nanoseconds."""
        self.soonest_ns = done_ns + SHARE * cost_ns
        self.due_ns = max(done_ns + self._pause_ns, self.soonest_ns)
