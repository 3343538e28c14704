"""The programs' counts for each network namespace, and room for new namespaces.

The table of counts has a limited number of entries. Entries of removed namespaces are freed, and
their counts stay in one total. A namespace without an entry is traced like any other, but its
counts go to no namespace.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import NamedTuple

from tcpstuck_bpf import wire
from tcpstuck_bpf.kernel.maps import BpfMap
from tcpstuck_bpf.model import (
    CROWDED_NETNS,
    GONE_NETNS,
    NOT_KNOWN,
    NetnsCount,
    NetnsCounts,
)

KEPT_APART = 4096
"""Number of freed entries whose counts are still kept one by one."""

_ONLY = struct.pack("=I", 0)
"""The key of a table with one entry."""


class _Entry(NamedTuple):
    netns: int
    cookie: int
    """The namespace's cookie; 0 where the programs do not know it."""
    counts: Counter[NetnsCount]


class CountsTable:
    """The tables `counts` and `crowded_out` of bpf/tcpstuck.bpf.c."""

    def __init__(self, counts: BpfMap, crowded_out: BpfMap) -> None:
        self._counts = counts
        self._crowded_out = crowded_out
        self._apart: dict[bytes, Counter[NetnsCount]] = {}
        """Counts of freed entries, the oldest first."""
        self._gone: Counter[NetnsCount] = Counter()
        """Total counts of the freed entries that are not in `_apart`."""

    def read(self, living: Mapping[int, int]) -> NetnsCounts:
        """All counts, by the namespace's inode number where it is known.

        `living` has the cookies of existing namespaces, as far as they are known. Counts of an
        earlier namespace with the same inode number go to GONE_NETNS. A namespace whose entry was
        freed although it still exists gets its counts back.
        """
        found: dict[int, Counter[NetnsCount]] = {}
        for one in self._entries():
            _add(found, GONE_NETNS if _is_there(one, living) is False else one.netns, one.counts)
        for key, counts in self._apart.items():
            one = _entry(key, counts)
            _add(found, one.netns if _is_there(one, living) else GONE_NETNS, counts)
        _add(found, GONE_NETNS, self._gone, unless_nothing=True)
        crowded = _sum(self._crowded_out.per_cpu(_ONLY))
        _add(found, CROWDED_NETNS, crowded, unless_nothing=True)
        return found

    def _keys(self) -> list[bytes]:
        return list(dict.fromkeys(self._counts.keys(2 * self._counts.shape.entries)))

    def _entries(self) -> Iterator[_Entry]:
        for key in self._keys():
            yield _entry(key, _sum(self._counts.per_cpu(key)))

    def take_all(self) -> NetnsCounts:
        """Return all counts and set them to zero."""
        counted = self.read({})
        for key in self._keys():
            self._counts.delete(key)
        self._apart.clear()
        self._gone.clear()
        # `BpfMap.update` pads with zeros, so this resets every CPU's value.
        self._crowded_out.update(_ONLY, bytes(wire.COUNTS.size))
        return counted

    def crowd(self) -> frozenset[int]:
        """The namespaces with an entry if more than half of the table is used, else none."""
        keys = self._keys()
        if 2 * len(keys) <= self._counts.shape.entries:
            return frozenset()
        return frozenset(_entry(key, Counter()).netns for key in keys)

    def free(self, gone: Collection[int], living: Mapping[int, int] = NOT_KNOWN) -> None:
        """Free the entries of the removed namespaces `gone`.

        Also free the entries whose inode number belongs to another namespace by now, according to
        `living` (see `read`). A removed namespace counts nothing more, so no count is lost between
        reading and deleting an entry. One count can be lost if only a socket holds the namespace,
        which looks the same from here.
        """
        for key in self._keys():
            one = _entry(key, Counter())
            if one.netns in gone or _is_there(one, living) is False:
                counts = _sum(self._counts.per_cpu(key))
                self._counts.delete(key)
                self._keep(key, one.cookie, counts)

    def _keep(self, key: bytes, cookie: int, counts: Counter[NetnsCount]) -> None:
        """Keep the counts of a freed entry.

        Without a cookie they go to the total: the same inode number may come again for another
        namespace.
        """
        if not cookie:
            self._gone += counts
            return
        self._apart[key] = self._apart.pop(key, Counter()) + counts
        if len(self._apart) > KEPT_APART:
            self._gone += self._apart.pop(next(iter(self._apart)))


def _is_there(one: _Entry, living: Mapping[int, int]) -> bool | None:
    """Whether the entry's namespace still has its inode number; None if unknown."""
    cookie = living.get(one.netns)
    return one.cookie == cookie if one.cookie and cookie else None


def _entry(key: bytes, counts: Counter[NetnsCount]) -> _Entry:
    cookie, netns = wire.NETNS_KEY.unpack(key)
    return _Entry(netns, cookie, counts)


def _sum(of_each_cpu: Iterable[bytes]) -> Counter[NetnsCount]:
    total: Counter[NetnsCount] = Counter()
    for one in of_each_cpu:
        total.update(wire.decode_counts(one))
    return total


def _add(
    found: dict[int, Counter[NetnsCount]],
    netns: int,
    counts: Counter[NetnsCount],
    *,
    unless_nothing: bool = False,
) -> None:
    if unless_nothing and not any(counts.values()):
        return
    found.setdefault(netns, Counter(dict.fromkeys(NetnsCount, 0))).update(counts)
