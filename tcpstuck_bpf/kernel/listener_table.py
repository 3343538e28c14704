"""The programs' table of listeners, and room in it for those that are yet to come."""

from __future__ import annotations

from collections.abc import Collection

from tcpstuck_bpf import wire
from tcpstuck_bpf.kernel.maps import BpfMap
from tcpstuck_bpf.model import ListenerFacts


class ListenerTable:
    """The table `listeners` of bpf/tcpstuck.bpf.c. Who gives its place up was read before."""

    def __init__(self, table: BpfMap) -> None:
        self.let_go = 0
        """Listeners that gave their places up although they may still be there."""
        self._table = table
        self._values: dict[bytes, bytes] = {}
        """As they were read last, by packed key; the one that changed longest ago first."""

    def _keys(self) -> list[bytes]:
        return list(dict.fromkeys(self._table.keys(2 * self._table.shape.entries)))

    def read(self) -> tuple[ListenerFacts, ...]:
        """What is known of the queues of each address and port that SYNs came for, in order."""
        found = {}
        for key in self._keys():
            value = self._table.lookup(key)
            if value is not None:
                found[key] = value
        same = {key: value for key, value in self._values.items() if found.get(key) == value}
        self._values = {**same, **{key: found[key] for key in found if key not in same}}
        return tuple(sorted(wire.decode_listener(*item) for item in found.items()))

    def crowd(self) -> frozenset[int]:
        """The network namespaces of the listeners, where more than half of the places are taken."""
        if 2 * len(self._values) <= self._table.shape.entries:
            return frozenset()
        return frozenset(wire.decode_listener(*item).netns for item in self._values.items())

    def free(self, gone: Collection[int]) -> None:
        """Have those of namespaces that are gone give their places up, and others where need be.

        Where they leave more than three quarters taken, half of the places are made free: by those
        that turned nobody away and sent no cookie, the ones that changed longest ago first. Of such
        a listener its peaks are lost, and it is counted.
        """
        facts = {key: wire.decode_listener(key, value) for key, value in self._values.items()}
        self._remove([key for key, one in facts.items() if one.netns in gone])
        entries = self._table.shape.entries
        if 4 * len(self._values) <= 3 * entries:
            return
        idle = [key for key in self._values if not facts[key].suffered]
        leaving = idle[: len(self._values) - entries // 2]
        self.let_go += len(leaving)
        self._remove(leaving)

    def _remove(self, keys: Collection[bytes]) -> None:
        for key in keys:
            self._table.delete(key)
            del self._values[key]
