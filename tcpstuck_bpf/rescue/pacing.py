"""Token buckets and a priority queue whose entries can be changed: what paces the rescue. Pure.

Times are nanoseconds of any one clock.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import Generic, TypeVar

from tcpstuck_bpf.model import SECOND_NS

_STALE_ALLOWED = 64

Key = TypeVar("Key")
Priority = tuple[int, ...]


class TokenBucket:
    """`rate` tokens per second, and no more than that at once; full at first.

    In whole numbers, so that no rounding lets more through: the level is in tokens times 10**9.
    Raises ValueError for a rate below 1.
    """

    def __init__(self, rate: int) -> None:
        if rate < 1:
            raise ValueError(f"a rate of {rate} per second lets nothing through")
        self._rate = rate
        self._level = rate * SECOND_NS
        self._filled_ns = 0

    def _fill(self, now_ns: int) -> None:
        if now_ns > self._filled_ns:
            gained = (now_ns - self._filled_ns) * self._rate
            self._level = min(self._rate * SECOND_NS, self._level + gained)
            self._filled_ns = now_ns

    def tokens(self, now_ns: int) -> int:
        """How many there are."""
        self._fill(now_ns)
        return self._level // SECOND_NS

    def take(self, now_ns: int) -> bool:
        """Take one; whether there was one."""
        if self.tokens(now_ns) == 0:
            return False
        self._level -= SECOND_NS
        return True

    def next_ns(self, now_ns: int) -> int:
        """When there is one at the earliest."""
        self._fill(now_ns)
        missing = max(0, SECOND_NS - self._level)
        return now_ns + -(-missing // self._rate)

    def is_full(self, now_ns: int) -> bool:
        """Whether it is as good as new."""
        self._fill(now_ns)
        return self._level == self._rate * SECOND_NS


class KeyedHeap(Generic[Key]):
    """Keys by priority, the lowest first and equal ones by key; each key is in it once.

    A changed or removed entry stays in the heap as a stale one, so that either costs O(log n);
    there are never many more stale entries than true ones.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[Priority, Key]] = []
        self._priorities: dict[Key, Priority] = {}

    def __len__(self) -> int:
        return len(self._priorities)

    def __contains__(self, key: Key) -> bool:
        return key in self._priorities

    def put(self, key: Key, *priority: int) -> None:
        """Put a key in, or give it another priority."""
        if self._priorities.get(key) != priority:
            self._priorities[key] = priority
            heapq.heappush(self._heap, (priority, key))
            self._sweep()

    def discard(self, key: Key) -> None:
        """Take a key out, where it is in."""
        if self._priorities.pop(key, None) is not None:
            self._sweep()

    def _sweep(self) -> None:
        if len(self._heap) > 2 * len(self._priorities) + _STALE_ALLOWED:
            self._heap = [(priority, key) for key, priority in self._priorities.items()]
            heapq.heapify(self._heap)

    def first(self) -> Priority | None:
        """The lowest priority; None where it is empty."""
        while self._heap:
            priority, key = self._heap[0]
            if self._priorities.get(key) == priority:
                return priority
            heapq.heappop(self._heap)
        return None

    def pop(self) -> Key:
        """Take out the first. Raises IndexError where it is empty."""
        if self.first() is None:
            raise IndexError("nothing is in it")
        _, key = heapq.heappop(self._heap)
        del self._priorities[key]
        return key

    def pop_due(self, now_ns: int) -> Iterator[Key]:
        """Take out those whose priority is a time that has come.

        What is put in meanwhile must be due later, or it is taken out as well.
        """
        while True:
            first = self.first()
            if first is None or first[0] > now_ns:
                return
            yield self.pop()
