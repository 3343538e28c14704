"""Reads the firewall's rules beside the loop that takes in events, as often as that may cost.

To run `nft` takes milliseconds on an idle machine and seconds on a busy one. No event waits for it:
a thread reads, and what it found is fetched when it is there.
"""

from __future__ import annotations

import queue
import resource
import threading
from collections.abc import Callable
from typing import NamedTuple

from tcpstuck_bpf.model import Ruleset

INTERVAL_NS = 1_000_000_000
"""A namespace's rules are not read more often than that: a flood must not be paid for."""
MAX_NAMESPACES = 1024
"""Whose readings are remembered, and so many may wait for one: where there are more, the ones read
longest ago may be read again sooner, and a drop may stay without the rules that were there."""
SHARE = 1
"""To each reading belongs a pause of so many times the processor time it took, whichever namespace
is next: all of them together take half of one processor at the most, at a low priority. It is not
the time that passed, because a busy machine would then wait the longer the busier it is."""
AT_ONCE_NS = 10_000_000_000
"""Readings of so much processor time together follow one another, and their pauses come later."""


class _Done(NamedTuple):
    netns: int
    ruleset: Ruleset


def _in_a_thread(job: Callable[[], None]) -> None:
    """Run a job beside the caller. A daemon: the end of the process does not wait for it.

    Raises RuntimeError where no thread can be made.
    """
    threading.Thread(target=job, name="ruleset-reader", daemon=True).start()


def _spent_by_children_ns() -> int:
    """Processor time of all children that have ended: hardly any but those that read rules."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return int((used.ru_utime + used.ru_stime) * 1_000_000_000)


class RulesetWatch:
    """Reads the rules of each network namespace after the latest drop there; one at a time.

    `read` gives a namespace's rules, and may take long; `run_beside` runs it elsewhere; `spent_ns`
    says how much processor time readings have taken so far. Every method returns at once.
    """

    def __init__(
        self,
        read: Callable[[int], Ruleset],
        clock_ns: Callable[[], int],
        run_beside: Callable[[Callable[[], None]], None] = _in_a_thread,
        spent_ns: Callable[[], int] = _spent_by_children_ns,
    ) -> None:
        self._read = read
        self._clock_ns = clock_ns
        self._run_beside = run_beside
        self._spent_ns = spent_ns
        self._spent_before_ns = 0
        self._wanted: dict[int, None] = {}
        """Namespaces to be read, those that wait longest first."""
        self._read_ns: dict[int, int] = {}
        """By namespace, when the latest reading began; the one read longest ago first."""
        self._rests_until_ns: dict[int, int] = {}
        self._paid_until_ns = 0
        """When all readings so far and their pauses would be over, had each had its own at once."""
        self._under_way = False
        self._hurried = False
        self._done: queue.SimpleQueue[_Done] = queue.SimpleQueue()

    def want(self, netns: int, dropped_ns: int) -> None:
        """Have a namespace's rules read after a drop, unless they have been, or are being read."""
        if dropped_ns > self._read_ns.get(netns, 0) and len(self._wanted) < MAX_NAMESPACES:
            self._wanted[netns] = None

    def taken(self) -> dict[int, Ruleset]:
        """What has been read since it was asked last, by namespace; begins what is due."""
        found: dict[int, Ruleset] = {}
        while not self._done.empty():
            self._take(self._done.get(), found)
        now_ns = self._clock_ns()
        if not self._under_way:
            due = next((n for n in self._wanted if self._is_due(n, now_ns)), None)
            if due is not None:
                self._begin(due)
        return found

    def _is_due(self, netns: int, now_ns: int) -> bool:
        is_paused = self._paid_until_ns - now_ns >= SHARE * AT_ONCE_NS
        has_rested = now_ns >= self._rests_until_ns.get(netns, 0)
        return self._hurried or (has_rested and not is_paused)

    def hurry(self) -> None:
        """The run ends: what is wanted is read without a pause from now on."""
        self._hurried = True

    def _take(self, done: _Done, found: dict[int, Ruleset]) -> None:
        now_ns = self._clock_ns()
        cost_ns = self._spent_ns() - self._spent_before_ns
        begun_ns = max(self._paid_until_ns, done.ruleset.read_ns)
        self._paid_until_ns = begun_ns + (SHARE + 1) * cost_ns
        self._rests_until_ns = {n: t for n, t in self._rests_until_ns.items() if t > now_ns}
        self._rests_until_ns[done.netns] = now_ns + INTERVAL_NS
        self._under_way = False
        found[done.netns] = done.ruleset

    def _begin(self, netns: int) -> None:
        del self._wanted[netns]
        self._read_ns.pop(netns, None)
        begun_ns = self._read_ns[netns] = self._clock_ns()
        if len(self._read_ns) > MAX_NAMESPACES:
            del self._read_ns[next(iter(self._read_ns))]
        self._under_way = True
        self._spent_before_ns = self._spent_ns()

        def read() -> None:
            try:
                ruleset = self._read(netns)
            except Exception as error:  # a thread has nobody else to tell it to
                ruleset = _unread(error)
            self._done.put(_Done(netns, ruleset._replace(read_ns=begun_ns)))

        try:
            self._run_beside(read)
        except RuntimeError as error:
            self._done.put(_Done(netns, _unread(error)._replace(read_ns=begun_ns)))


def _unread(error: Exception) -> Ruleset:
    return Ruleset((), (f"the rules cannot be read: {error or type(error).__name__}",))
