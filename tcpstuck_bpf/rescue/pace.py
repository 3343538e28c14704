"""Token buckets that limit SYN-ACKs per second, in total and per address of silent clients. Pure.

Times are nanoseconds of any one clock.
"""

from __future__ import annotations

from collections import OrderedDict

from tcpstuck_bpf.model import SECOND_NS, FourTuple


class TokenBucket:
    """`rate` tokens per second, with a burst of at most `burst` (None: `rate`); full at first.

    The level is an integer in units of 1e-9 tokens, so rounding never exceeds the rate. Raises
    ValueError for a rate or a burst below 1.
    """

    def __init__(self, rate: int, burst: int | None = None) -> None:
        if rate < 1 or (burst is not None and burst < 1):
            raise ValueError(f"a rate of {rate} per second lets nothing through")
        self._rate = rate
        self._most = min(rate, rate if burst is None else burst) * SECOND_NS
        self._level = self._most
        self._filled_ns = 0

    def _fill(self, now_ns: int) -> None:
        if now_ns > self._filled_ns:
            gained = (now_ns - self._filled_ns) * self._rate
            self._level = min(self._most, self._level + gained)
            self._filled_ns = now_ns

    def take(self, now_ns: int) -> bool:
        """Take a token; whether there was one."""
        self._fill(now_ns)
        if self._level < SECOND_NS:
            return False
        self._level -= SECOND_NS
        return True

    def next_ns(self, now_ns: int) -> int:
        """Earliest time at which a token is available."""
        self._fill(now_ns)
        missing = max(0, SECOND_NS - self._level)
        return now_ns + -(-missing // self._rate)

    def is_full(self, now_ns: int) -> bool:
        """Whether the bucket is full."""
        self._fill(now_ns)
        return self._level == self._most


class AddressPace:
    """A token bucket for each client address and network namespace.

    A bucket that is full again is forgotten. Raises ValueError for a rate or a burst below 1.
    """

    def __init__(self, rate: int, burst: int | None = None) -> None:
        TokenBucket(rate, burst)
        self._rate, self._burst = rate, burst
        self._buckets: OrderedDict[tuple[int, bytes], TokenBucket] = OrderedDict()

    def __len__(self) -> int:
        return len(self._buckets)

    def bucket(self, who: FourTuple, now_ns: int) -> TokenBucket:
        """The bucket of a client's address."""
        key = (who.netns, who.client_address)
        bucket = self._buckets.get(key)
        if bucket is None:
            self._forget_full(now_ns)
            bucket = self._buckets[key] = TokenBucket(self._rate, self._burst)
        self._buckets.move_to_end(key)
        return bucket

    def _forget_full(self, now_ns: int) -> None:
        while self._buckets:
            key, bucket = next(iter(self._buckets.items()))
            if not bucket.is_full(now_ns):
                return
            del self._buckets[key]
