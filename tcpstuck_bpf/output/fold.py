"""Findings that say the same, folded into groups, so that a thousand of them take one line. Pure.

Findings say the same if listener, verdict and cause are the same. A group is due to be printed
soon after its first finding, and again at most every `REPEAT_NS` while it grows.

Times are CLOCK_MONOTONIC nanoseconds.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator
from typing import NamedTuple

from tcpstuck_bpf.judge.verdict import Finding
from tcpstuck_bpf.model import SECOND_NS, FourTuple

GATHER_NS = SECOND_NS
"""Time that a new group waits for others of its kind, if nobody asks for it before."""
REPEAT_NS = 10 * SECOND_NS
"""Least time between two lines of the same group."""
MAX_GROUPS = 4096
"""Number of groups after which the oldest are let go; one of these that grows later is new again.
A proxy's listener (TPROXY) has as many server addresses as its clients like."""
MAX_ADDRESSES = 1000
"""Number of client addresses of a group that are told apart."""
EXAMPLES = 3


class GroupKey(NamedTuple):
    """What the findings of a group have in common.

    For those of a suspected SYN flood that is the listener alone.
    """

    netns: int
    server_ip: str
    server_port: int
    verdict: str
    certainty: str
    meaning: str
    """Names the cause, and for a firewall its rule."""
    updates: str | None
    to_be_updated: bool
    flood_suspected: bool


def key_of(finding: Finding) -> GroupKey:
    """The group that a finding belongs to."""
    who = finding.four_tuple
    if finding.flood_suspected:
        server = (who.netns, who.server_ip, who.server_port)
        return GroupKey(*server, finding.verdict, "", "", None, False, True)
    return GroupKey(
        who.netns,
        who.server_ip,
        who.server_port,
        finding.verdict,
        finding.certainty,
        finding.meaning,
        finding.updates,
        finding.to_be_updated,
        finding.flood_suspected,
    )


class Group:
    """The findings of one kind so far, and how many of them were printed."""

    def __init__(self, first: Finding) -> None:
        self.key = key_of(first)
        self.first = first
        self.since_ns = first.verdict_ns
        """When the first finding came that is not printed."""
        self.printed_ns = 0
        self.printed = 0
        """Number of its findings at the last time it was printed; 0: it is new."""
        self.number = 0
        self.corrected = 0
        """Number of those since it was printed that replace an earlier verdict."""
        self.addresses: Counter[str] = Counter()
        """Number of clients by address, of the first MAX_ADDRESSES addresses."""
        self.examples: list[FourTuple] = []
        """The first clients."""
        self.from_ns = self.until_ns = first.first_syn_ns
        """When the first and the last of the clients since it was printed sent their first SYN."""

    @property
    def growth(self) -> int:
        """Number of findings since it was printed."""
        return self.number - self.printed

    def take(self, finding: Finding) -> None:
        """Take in one more finding of its kind."""
        if not self.growth:
            self.since_ns = finding.verdict_ns
            self.from_ns = self.until_ns = finding.first_syn_ns
            self.corrected = 0
        self.number += 1
        self.corrected += finding.updates is not None
        address = finding.four_tuple.client_ip
        if address in self.addresses or len(self.addresses) < MAX_ADDRESSES:
            self.addresses[address] += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(finding.four_tuple)
        self.from_ns = min(self.from_ns, finding.first_syn_ns)
        self.until_ns = max(self.until_ns, finding.first_syn_ns)

    def is_due(self, now_ns: int) -> bool:
        """Whether it has waited long enough to be printed."""
        if not self.growth:
            return False
        if self.key.flood_suspected:
            return now_ns - self.since_ns >= REPEAT_NS
        if not self.printed:
            return now_ns - self.since_ns >= GATHER_NS
        return now_ns - self.printed_ns >= REPEAT_NS


class Folding:
    """The groups of a run, in the order in which they came up."""

    def __init__(self) -> None:
        self._groups: OrderedDict[GroupKey, Group] = OrderedDict()

    def take(self, finding: Finding) -> Iterator[Group]:
        """Take in a finding; first come the groups that are due at its time.

        What is yielded counts as printed.
        """
        yield from self.due(finding.verdict_ns)
        key = key_of(finding)
        group = self._groups.get(key)
        if group is None:
            if len(self._groups) >= MAX_GROUPS:
                _, oldest = self._groups.popitem(last=False)
                yield from self._print(oldest, finding.verdict_ns)
            group = self._groups[key] = Group(finding)
        group.take(finding)

    def due(self, now_ns: int) -> Iterator[Group]:
        """The groups that are to be printed at this time."""
        for group in list(self._groups.values()):
            if group.is_due(now_ns):
                yield from self._print(group, now_ns)

    def new(self, now_ns: int) -> Iterator[Group]:
        """The groups that are due, and those that were never printed.

        A suspected flood waits until it is due.
        """
        for group in list(self._groups.values()):
            is_new = not group.printed and not group.key.flood_suspected
            if is_new or group.is_due(now_ns):
                yield from self._print(group, now_ns)

    def rest(self) -> Iterator[Group]:
        """All groups that have grown since they were printed: nothing more will come."""
        for group in self._groups.values():
            yield from self._print(group, group.printed_ns)

    @staticmethod
    def _print(group: Group, now_ns: int) -> Iterator[Group]:
        if group.growth:
            yield group
            group.printed = group.number
            group.printed_ns = now_ns
