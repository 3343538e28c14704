"""Time limits of the lab's waits, with one factor for slow machines.

The limits are generous. A limit only ends a wait that would never succeed; no limit delays a
successful run.
"""

from __future__ import annotations

import os
import time

PATIENCE_VARIABLE = "TCPSTUCK_LAB_PATIENCE"

COMMAND_S = 60.0
"""For one external command or one request to a lab process."""
START_S = 300.0
"""For a server or client process to be ready; an emulated guest is 20 times slower than a host."""
SETTLE_S = 120.0
"""For a few connections to reach the state that a scenario needs, SYN retransmissions included."""
LOAD_S = 400.0
"""For thousands of connections."""


def patient(limit_s: float) -> float:
    """The limit in seconds, multiplied by the user's factor; an invalid factor counts as 1."""
    try:
        factor = float(os.environ.get(PATIENCE_VARIABLE, "1"))
    except ValueError:
        factor = 1.0
    return limit_s * factor if factor > 0 else limit_s


class Deadline:
    """The end of a wait with several steps, shared by all of them."""

    def __init__(self, limit_s: float) -> None:
        self.limit_s = patient(limit_s)
        self._end = time.monotonic() + self.limit_s

    def left(self) -> float:
        """Seconds left, never negative."""
        return max(0.0, self._end - time.monotonic())

    def passed(self) -> bool:
        """Whether no time is left."""
        return self.left() == 0.0
