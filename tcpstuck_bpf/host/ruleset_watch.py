"""Reads firewall rules in parallel to the event loop, at a limited cost.

Running `nft` takes milliseconds on an idle machine and seconds on a busy one. Events must not wait
for it, so a thread reads the rules and the loop fetches the result later.
"""

from __future__ import annotations

import queue
import resource
import threading
from collections.abc import Callable
from typing import NamedTuple

from tcpstuck_bpf.rulesets import Ruleset

INTERVAL_NS = 1_000_000_000
"""Shortest time between two reads of a namespace's rules, so that a flood of drops costs little."""
MAX_NAMESPACES = 1024
"""Largest number of namespaces whose last read is remembered, and of waiting namespaces. Beyond it,
a namespace may be read again too early, and a drop may get no rules."""
SHARE = 1
"""Pause after a read, as a multiple of its processor time, whichever namespace is next. So all
reads together take at most half of one processor, at low priority. Elapsed time is not used,
because it would lengthen the pauses on a busy machine."""
AT_ONCE_NS = 10_000_000_000
"""Processor time that reads may take in a row before their pauses are made up for."""


class _Done(NamedTuple):
    netns: int
    ruleset: Ruleset


def _in_a_thread(job: Callable[[], None]) -> None:
    """Run a job in a daemon thread, so the end of the process does not wait for it.

    Raises RuntimeError where no thread can be made.
    """
    threading.Thread(target=job, name="ruleset-reader", daemon=True).start()


def _spent_by_children_ns() -> int:
    """Processor time of all ended children, which are almost only those that read rules."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return int((used.ru_utime + used.ru_stime) * 1_000_000_000)


class RulesetWatch:
    """Reads the rules of a network namespace after the latest drop there, one namespace at a time.

    `read` returns a namespace's rules and may be slow. `run_beside` runs it in parallel. `spent_ns`
    returns the processor time of all reads so far. Every method returns at once.
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
        """Namespaces to read, the longest waiting first."""
        self._read_ns: dict[int, int] = {}
        """Start of the latest read by namespace, the oldest first."""
        self._rests_until_ns: dict[int, int] = {}
        self._paid_until_ns = 0
        """Time at which all reads so far would be over if each had its pause right after it."""
        self._under_way = False
        self._hurried = False
        self._done: queue.SimpleQueue[_Done] = queue.SimpleQueue()

    def want(self, netns: int, dropped_ns: int) -> None:
        """Request a namespace's rules after a drop, unless a later read has begun already."""
        if dropped_ns > self._read_ns.get(netns, 0) and len(self._wanted) < MAX_NAMESPACES:
            self._wanted[netns] = None

    def taken(self) -> dict[int, Ruleset]:
        """The rules read since the last call, by namespace. Also starts the next due read."""
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
        """Read without pauses from now on, because the run ends."""
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
            except Exception as error:  # nobody else would catch it in this thread
                ruleset = _unread(error)
            self._done.put(_Done(netns, ruleset._replace(read_ns=begun_ns)))

        try:
            self._run_beside(read)
        except RuntimeError as error:
            self._done.put(_Done(netns, _unread(error)._replace(read_ns=begun_ns)))


def _unread(error: Exception) -> Ruleset:
    return Ruleset((), (f"the rules cannot be read: {error or type(error).__name__}",))
