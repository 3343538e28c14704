"""The kernel's warnings of full SYN queues, and the handshakes that they explain. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from tcpstuck_bpf.handshake.flow import TimelineEntry
from tcpstuck_bpf.model import SECOND_NS, KernelWarning, address_bytes

CONCERNED_NS = 60 * SECOND_NS
"""Longest time from a warning to the begin of a handshake that it explains."""


MAX_WARNINGS = 256


class WarningHistory:
    """The latest warnings of a run. Pure."""

    def __init__(self) -> None:
        self._warnings: deque[KernelWarning] = deque(maxlen=MAX_WARNINGS)

    def take(self, warnings: Sequence[KernelWarning]) -> None:
        """Take in more warnings."""
        self._warnings += warnings

    def added_to(
        self,
        timeline: tuple[TimelineEntry, ...],
        endpoint: tuple[bytes, int],
        first_syn_ns: int,
        until_ns: int,
    ) -> tuple[TimelineEntry, ...]:
        """Add the warnings about a handshake's listener to its timeline.

        `endpoint` is the listener's address and port.
        """
        address, port = endpoint
        lines = [
            TimelineEntry(warning.time_ns, "kernel's log", warning.text)
            for warning in self._warnings
            if first_syn_ns - CONCERNED_NS <= warning.time_ns <= until_ns
            and warning.port == port
            and _reaches(warning.address, address)
        ]
        return tuple(sorted((*timeline, *lines))) if lines else timeline


def _reaches(listening: bytes | None, address: bytes) -> bool:
    """Whether a listener at one address can be reached at another; None and :: mean any."""
    return listening in (None, address, address_bytes("0.0.0.0"), address_bytes("::"))
