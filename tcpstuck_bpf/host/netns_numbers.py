"""Whose the inode number of a network namespace is. Pure.

A new namespace gets the lowest number that is free, mostly that of the one that has just gone. Its
cookie (NETNS_COOKIE) tells the two apart.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple


class _There(NamedTuple):
    cookie: int
    seen_ns: int


class NetnsNumbers:
    """Takes in what is read of namespaces. There are no more numbers than namespaces at a time."""

    def __init__(self) -> None:
        self._there: dict[int, _There] = {}
        self._reused: dict[int, int] = {}

    def note(self, living: Mapping[int, int], time_ns: int) -> None:
        """The cookies of namespaces by inode number, as they were at this time or after it."""
        for netns, cookie in living.items():
            before = self._there.get(netns)
            if before is not None and before.cookie != cookie:
                self._reused[netns] = before.seen_ns
            self._there[netns] = _There(cookie, time_ns)

    def take_reused(self, wanted: Collection[int]) -> dict[int, int]:
        """Numbers that have become another namespace's, and the latest time they were not yet.

        Each is told once.
        """
        found = sorted(self._reused.keys() & set(wanted))
        return {netns: self._reused.pop(netns) for netns in found}
