"""How often a costly reading may be repeated, by what it costs."""

from __future__ import annotations

SHARE = 5
"""A reading takes at most one part in this many of the time."""


class Cadence:
    """The times of one kind of reading; at first it is due at once.

    `pause_ns`: the regular time from the end of one reading to the next.
    """

    def __init__(self, pause_ns: int = 0) -> None:
        self._pause_ns = pause_ns
        self.soonest_ns = 0
        """The reading may be repeated from this time on, where it is wanted early."""
        self.due_ns = 0
        """The reading is due at this time."""

    def note(self, done_ns: int, cost_ns: int) -> None:
        """Take in that a reading ended at `done_ns` and cost so many nanoseconds."""
        self.soonest_ns = done_ns + SHARE * cost_ns
        self.due_ns = max(done_ns + self._pause_ns, self.soonest_ns)
