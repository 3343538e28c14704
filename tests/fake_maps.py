"""A table of the kernel's as `Tables` sees it: packed keys and values in a dictionary."""

from __future__ import annotations

from collections.abc import Iterator

from tcpstuck_bpf.kernel.artifact import MapShape
from tcpstuck_bpf.kernel.maps import BpfMap

HASH, PERCPU_HASH = 1, 5


class FakeMap(BpfMap):
    """A map in memory with a fixed number of entries; a per-CPU value is a list."""

    def __init__(self, entries: int) -> None:
        self.shape = MapShape("fake", HASH, 0, 0, entries)
        self.held: dict[bytes, list[bytes]] = {}

    def lookup(self, key: bytes) -> bytes | None:
        found = self.held.get(key)
        return None if found is None else b"".join(found)

    def per_cpu(self, key: bytes) -> list[bytes]:
        return list(self.held.get(key, []))

    def update(self, key: bytes, value: bytes, flags: int = 0) -> bool:
        if flags and key in self.held:
            return False
        self.held[key] = [value]
        return True

    def delete(self, key: bytes) -> bool:
        return self.held.pop(key, None) is not None

    def take(self, key: bytes) -> bytes | None:
        found = self.lookup(key)
        self.delete(key)
        return found

    def keys(self, most: int) -> Iterator[bytes]:
        yield from list(self.held)[:most]
