"""Finds removed network namespaces, and removes their table entries to make room."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping

from tcpstuck_bpf.app.cadence import Cadence
from tcpstuck_bpf.app.interfaces import Source
from tcpstuck_bpf.host.netns_numbers import NetnsNumbers
from tcpstuck_bpf.model import NOT_KNOWN, SECOND_NS
from tcpstuck_bpf.steps import Vanished

LOOK_INTERVAL_NS = 5 * SECOND_NS
"""Time between two checks: each one walks over all processes."""


class NamespaceWatch:
    """Finds network namespaces that were removed, or whose inode number was reused.

    `find_gone` returns those of the given network namespaces that no longer exist. `find_living`
    returns the known cookies of network namespaces by inode number; without it, only `note_living`
    supplies cookies.
    """

    def __init__(
        self,
        source: Source,
        find_gone: Callable[[Collection[int]], Collection[int]],
        find_living: Callable[[Collection[int]], Mapping[int, int]] | None,
        clock_ns: Callable[[], int],
        cpu_ns: Callable[[], int] = time.process_time_ns,
    ) -> None:
        self._source = source
        self._find_gone = find_gone
        self._find_living = find_living
        self._clock_ns = clock_ns
        self._cpu_ns = cpu_ns
        self._numbers = NetnsNumbers()
        self._looks = Cadence(LOOK_INTERVAL_NS)

    def note_living(self, living: Mapping[int, int], time_ns: int) -> None:
        """Note cookies by inode number, as valid at this time or later."""
        self._numbers.note(living, time_ns)

    def hurry(self) -> None:
        """Make the next check due at once, because the run ends."""
        self._looks.due_ns = 0

    @property
    def is_due(self) -> bool:
        """Whether a check is due."""
        return self._clock_ns() >= self._looks.due_ns

    def look(self, stuck: Collection[int]) -> list[Vanished]:
        """Find the removed network namespaces with stuck clients.

        If tables fill up, the entries of all removed namespaces are deleted.
        """
        begun_ns, begun_cpu_ns = self._clock_ns(), self._cpu_ns()
        crowd = self._source.netns_in_full_tables()
        wanted = {*stuck, *crowd}
        if not wanted:
            return []
        found = self._find_gone(wanted)
        gone = sorted(set(stuck).intersection(found))
        living = self._living(wanted.difference(found), begun_ns)
        if crowd:
            self._source.free(found, living)
        reused = self._numbers.take_reused(set(stuck).difference(gone))
        done_ns = self._clock_ns()
        self._looks.note(done_ns, self._cpu_ns() - begun_cpu_ns)
        steps = [Vanished(done_ns, (netns,), until_ns) for netns, until_ns in reused.items()]
        if gone:
            steps.append(Vanished(done_ns, tuple(gone)))
        return steps

    def _living(self, wanted: Collection[int], now_ns: int) -> Mapping[int, int]:
        if self._find_living is None or not wanted:
            return NOT_KNOWN
        living = self._find_living(wanted)
        self.note_living(living, now_ns)
        return living
