"""The programs' table of listeners, and room in it for new ones."""

from __future__ import annotations

from collections.abc import Collection

from tcpstuck_bpf import wire
from tcpstuck_bpf.kernel.maps import BpfMap
from tcpstuck_bpf.model import ListenerFacts


class ListenerTable:
    """The table `listeners` of bpf/tcpstuck.bpf.c. An entry is freed only after it was read."""

    def __init__(self, table: BpfMap) -> None:
        self.let_go = 0
        """Number of freed entries whose listeners may still exist."""
        self._table = table
        self._values: dict[bytes, bytes] = {}
        """Values of the last read, by packed key; the least recently changed first."""

    def _keys(self) -> list[bytes]:
        return list(dict.fromkeys(self._table.keys(2 * self._table.shape.entries)))

    def read(self) -> tuple[ListenerFacts, ...]:
        """Queue figures of every listener that SYNs came for, in order."""
        found = {}
        for key in self._keys():
            value = self._table.lookup(key)
            if value is not None:
                found[key] = value
        same = {key: value for key, value in self._values.items() if found.get(key) == value}
        self._values = {**same, **{key: found[key] for key in found if key not in same}}
        return tuple(sorted(wire.decode_listener(*item) for item in found.items()))

    def crowd(self) -> frozenset[int]:
        """The listeners' network namespaces if more than half of the table is used, else none."""
        if 2 * len(self._values) <= self._table.shape.entries:
            return frozenset()
        return frozenset(wire.decode_listener(*item).netns for item in self._values.items())

    def free(self, gone: Collection[int]) -> None:
        """Free the entries of removed namespaces, and further ones if the table stays too full.

        If more than three quarters stay used, entries are freed until half of the table is free.
        Only listeners that turned nobody away and sent no cookie are chosen, the least recently
        changed first. Such a listener loses its peaks, and is counted.
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
