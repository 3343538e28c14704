"""No more than so many SYN-ACKs per second to the silent clients of one address. Pure.

A client whose address has no token waits in that address's queue, so that a thousand waiting ones
cost as little as one. Times are CLOCK_MONOTONIC nanoseconds.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from tcpstuck_bpf.model import SECOND_NS, FourTuple
from tcpstuck_bpf.rescue.pacing import KeyedHeap, TokenBucket

_Key = tuple[int, bytes]


def _key_of(who: FourTuple) -> _Key:
    return (who.netns, who.client_address)


class _Address:
    def __init__(self, rate: int) -> None:
        self.bucket = TokenBucket(rate)
        self.blocked: KeyedHeap[FourTuple] = KeyedHeap()


class AddressPace:
    """A token bucket for each address, with those who wait for it.

    Buckets not used for a second are full again and forgotten. Raises ValueError for a rate
    below 1.
    """

    def __init__(self, rate: int) -> None:
        self._rate = rate
        self._token_ns = max(1, SECOND_NS // rate) if rate >= 1 else 0
        self._addresses: OrderedDict[_Key, _Address] = OrderedDict()
        self.waking: KeyedHeap[_Key] = KeyedHeap()
        """When an address that clients wait for has a token."""

    def __len__(self) -> int:
        return len(self._addresses)

    def take(self, who: FourTuple, now_ns: int) -> bool:
        """Take a token of a client's address; whether there was one."""
        key = _key_of(who)
        address = self._addresses.get(key)
        if address is None:
            self._forget_idle(now_ns)
            address = self._addresses[key] = _Address(self._rate)
        self._addresses.move_to_end(key)
        return address.bucket.take(now_ns)

    def _forget_idle(self, now_ns: int) -> None:
        while self._addresses:
            key, address = next(iter(self._addresses.items()))
            if address.blocked:
                self._addresses.move_to_end(key)
                return
            if not address.bucket.is_full(now_ns):
                return
            self.waking.discard(key)
            del self._addresses[key]

    def block(self, who: FourTuple, now_ns: int, *order: int) -> None:
        """A client for whom `take` found no token waits for one; the lowest `order` first."""
        key = _key_of(who)
        address = self._addresses[key]
        address.blocked.put(who, *order)
        if key not in self.waking:
            self.waking.put(key, address.bucket.next_ns(now_ns))

    def discard(self, who: FourTuple) -> None:
        """A client waits no more."""
        address = self._addresses.get(_key_of(who))
        if address is not None:
            address.blocked.discard(who)

    def pop_due(self, now_ns: int) -> Iterator[FourTuple]:
        """Take out as many of each address's waiting clients as it has tokens now."""
        for key in self.waking.pop_due(now_ns):
            address = self._addresses[key]
            for _ in range(min(len(address.blocked), max(1, address.bucket.tokens(now_ns)))):
                yield address.blocked.pop()
            if address.blocked:
                self.waking.put(key, now_ns + self._token_ns)
