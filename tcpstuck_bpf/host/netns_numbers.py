"""Detects inode numbers that have passed to another network namespace. Pure.

A new namespace gets the lowest free number, often that of a namespace just removed. The cookie
(NETNS_COOKIE) distinguishes the two.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple


class _There(NamedTuple):
    cookie: int
    seen_ns: int


class NetnsNumbers:
    """The last cookie seen for each inode number. Memory is bounded by the namespaces at a time."""

    def __init__(self) -> None:
        self._there: dict[int, _There] = {}
        self._reused: dict[int, int] = {}

    def note(self, living: Mapping[int, int], time_ns: int) -> None:
        """Take in cookies by inode number, read at `time_ns` or later."""
        for netns, cookie in living.items():
            before = self._there.get(netns)
            if before is not None and before.cookie != cookie:
                self._reused[netns] = before.seen_ns
            self._there[netns] = _There(cookie, time_ns)

    def take_reused(self, wanted: Collection[int]) -> dict[int, int]:
        """The numbers in `wanted` that passed to another namespace, each reported only once.

        The value is the last time at which the old namespace was seen.
        """
        found = sorted(self._reused.keys() & set(wanted))
        return {netns: self._reused.pop(netns) for netns in found}
