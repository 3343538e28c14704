"""The search for network namespaces that are gone; their table entries make room for others."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from tcpstuck_bpf.app.cadence import Cadence
from tcpstuck_bpf.app.interfaces import Source
from tcpstuck_bpf.host.netns_numbers import NetnsNumbers
from tcpstuck_bpf.model import NOT_KNOWN, SECOND_NS
from tcpstuck_bpf.steps import Vanished

LOOK_INTERVAL_NS = 5 * SECOND_NS
"""The pause between two looks: each is a walk over every process."""


class NamespaceWatch:
    """Finds network namespaces that are gone, or whose inode number is another one's by now.

    `find_gone` returns those of the given network namespaces that nothing leads to any more.
    `find_living` returns the known cookies of network namespaces by inode number; without it the
    cookies come from `note_living` alone.
    """

    def __init__(
        self,
        source: Source,
        find_gone: Callable[[Collection[int]], Collection[int]],
        find_living: Callable[[Collection[int]], Mapping[int, int]] | None,
        clock_ns: Callable[[], int],
    ) -> None:
        self._source = source
        self._find_gone = find_gone
        self._find_living = find_living
        self._clock_ns = clock_ns
        self._numbers = NetnsNumbers()
        self._looks = Cadence(LOOK_INTERVAL_NS)

    def note_living(self, living: Mapping[int, int], time_ns: int) -> None:
        """Take in cookies by inode number, as they were at this time or after it."""
        self._numbers.note(living, time_ns)

    def hurry(self) -> None:
        """Make the next look due at once, because the run ends."""
        self._looks.due_ns = 0

    @property
    def is_due(self) -> bool:
        """Whether it is time for another look."""
        return self._clock_ns() >= self._looks.due_ns

    def look(self, stuck: Collection[int]) -> list[Vanished]:
        """Find the network namespaces with stuck clients that are gone.

        Where tables fill, the entries of all namespaces that are gone are removed.
        """
        begun_ns = self._clock_ns()
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
        self._looks.note(done_ns, done_ns - begun_ns)
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
