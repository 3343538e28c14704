"""Silent clients left alone because their address is not known, and when to ask again. Pure.

Of a pool's clients some get stuck and others through, and the first of these may come after the
verdict on those. It is addresses that are asked about and not clients, and only so many of them, so
that a flood of spoofed ones costs little. Times are CLOCK_MONOTONIC nanoseconds.
"""

from __future__ import annotations

from collections.abc import Iterator

from tcpstuck_bpf.model import SECOND_NS, FourTuple
from tcpstuck_bpf.rescue.pacing import KeyedHeap

ASK_AGAIN_NS = 2 * SECOND_NS
MAX_ADDRESSES = 1000
"""That are asked about at a time; one beyond stays not known."""

_Key = tuple[int, bytes, bytes, int]


def _key_of(who: FourTuple) -> _Key:
    return (who.netns, who.client_address, who.server_address, who.server_port)


class _Address:
    def __init__(self) -> None:
        self.clients: dict[FourTuple, None] = {}
        self.until_ns = 0


class UnknownClients:
    """The clients by their address and listener, each of which is asked about every 2 s."""

    def __init__(self) -> None:
        self._addresses: dict[_Key, _Address] = {}
        self.asking: KeyedHeap[_Key] = KeyedHeap()
        """When to ask about an address."""

    def add(self, who: FourTuple, now_ns: int, until_ns: int) -> None:
        """A client that is worth asking about until then."""
        key = _key_of(who)
        address = self._addresses.get(key)
        if address is None:
            if len(self._addresses) >= MAX_ADDRESSES:
                return
            address = self._addresses[key] = _Address()
            self.asking.put(key, now_ns + ASK_AGAIN_NS)
        address.clients[who] = None
        address.until_ns = max(address.until_ns, until_ns)

    def discard(self, who: FourTuple) -> None:
        """A client that is not to be asked about."""
        key = _key_of(who)
        address = self._addresses.get(key)
        if address is not None:
            address.clients.pop(who, None)
            if not address.clients:
                self._forget(key)

    def _forget(self, key: _Key) -> None:
        del self._addresses[key]
        self.asking.discard(key)

    def pop_due(self, now_ns: int) -> Iterator[tuple[FourTuple, ...]]:
        """The clients of each address that is to be asked about now; it is again 2 s later."""
        for key in self.asking.pop_due(now_ns):
            address = self._addresses[key]
            if now_ns > address.until_ns:
                self._forget(key)
                continue
            self.asking.put(key, now_ns + ASK_AGAIN_NS)
            yield tuple(address.clients)
