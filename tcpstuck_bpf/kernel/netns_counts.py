"""What the programs counted in each network namespace, and room for those that are yet to come.

The table of the counts has a place for so many namespaces. Those that are gone give theirs up, and
what was counted in them stays in one figure. A namespace that finds no place is traced like any
other; what is counted in it belongs to no namespace then.
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
"""Namespaces that gave their place up whose figures are remembered one by one."""

_ONLY = struct.pack("=I", 0)
"""The key of a table with one entry."""


class _Entry(NamedTuple):
    netns: int
    cookie: int
    """0 where the programs do not know it."""
    counts: Counter[NetnsCount]


class CountsTable:
    """The tables `counts` and `crowded_out` of bpf/tcpstuck.bpf.c."""

    def __init__(self, counts: BpfMap, crowded_out: BpfMap) -> None:
        self._counts = counts
        self._crowded_out = crowded_out
        self._apart: dict[bytes, Counter[NetnsCount]] = {}
        """What was counted in namespaces that gave their place up, the oldest first."""
        self._gone: Counter[NetnsCount] = Counter()
        """The same of all that are not in `_apart`."""

    def read(self, living: Mapping[int, int]) -> NetnsCounts:
        """What was counted, by inode number, where one is known; all of it in any case.

        `living` has the cookies of the namespaces that are there, as far as they are known. What
        was counted in another one with such a number is counted as gone, and what gave its place
        up without being gone gets its figures back.
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
        """What was counted until now, which begins anew from nothing."""
        counted = self.read({})
        for key in self._keys():
            self._counts.delete(key)
        self._apart.clear()
        self._gone.clear()
        # What is not given is zero (`BpfMap.update`): every CPU's.
        self._crowded_out.update(_ONLY, bytes(wire.COUNTS.size))
        return counted

    def crowd(self) -> frozenset[int]:
        """The namespaces that have a place, where more than half of the places are taken."""
        keys = self._keys()
        if 2 * len(keys) <= self._counts.shape.entries:
            return frozenset()
        return frozenset(_entry(key, Counter()).netns for key in keys)

    def free(self, gone: Collection[int], living: Mapping[int, int] = NOT_KNOWN) -> None:
        """Have the namespaces with these inode numbers give their places up.

        So do those whose number is another one's by now, as far as `living` (see `read`) tells.
        Nothing is counted in one that is gone, so that nothing comes between the reading and the
        removal. Of one that a socket alone holds, which cannot be told from it, a segment may.
        """
        for key in self._keys():
            one = _entry(key, Counter())
            if one.netns in gone or _is_there(one, living) is False:
                counts = _sum(self._counts.per_cpu(key))
                self._counts.delete(key)
                self._keep(key, one.cookie, counts)

    def _keep(self, key: bytes, cookie: int, counts: Counter[NetnsCount]) -> None:
        """Without a cookie a number that comes again is taken for another namespace's."""
        if not cookie:
            self._gone += counts
            return
        self._apart[key] = self._apart.pop(key, Counter()) + counts
        if len(self._apart) > KEPT_APART:
            self._gone += self._apart.pop(next(iter(self._apart)))


def _is_there(one: _Entry, living: Mapping[int, int]) -> bool | None:
    """Whether it is the namespace that has its inode number now; None where that is not known."""
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
