"""Folds findings with equal listener, verdict and cause into groups: one line for a thousand. Pure.

A group is due to be printed soon after its first finding, and again while it grows: after
`REPEAT_NS`, then after twice that time, and so on up to `LONGEST_REPEAT_NS`.

Times are CLOCK_MONOTONIC nanoseconds.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator
from typing import NamedTuple

from tcpstuck_bpf.judge.verdict import Finding
from tcpstuck_bpf.model import SECOND_NS, FourTuple

GATHER_NS = SECOND_NS
"""Time that a new group waits for more findings, unless it is requested earlier."""
REPEAT_NS = 10 * SECOND_NS
"""Least time from the first line of a group to the second; it doubles with each line."""
LONGEST_REPEAT_NS = 600 * SECOND_NS
MAX_GROUPS = 4096
"""Largest number of groups. Beyond it the oldest are removed; a removed group that grows again
counts as new. Clients can give a TPROXY listener any number of server addresses."""
MAX_ADDRESSES = 1000
"""Largest number of client addresses that a group distinguishes."""
EXAMPLES = 3


class GroupKey(NamedTuple):
    """The properties shared by the findings of a group.

    The findings of a suspected SYN flood share only the listener and the verdict.
    """

    netns: int
    server_ip: str
    server_port: int
    verdict: str
    certainty: str
    meaning: str
    """Names the cause; for a firewall, its rule."""
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
    """The findings of one group so far, and how many of them were printed."""

    def __init__(self, first: Finding) -> None:
        self.key = key_of(first)
        self.first = first
        self.since_ns = first.verdict_ns
        """Time of the first finding that is not printed yet."""
        self.latest_ns = first.verdict_ns
        """Time of the latest finding."""
        self.printed_ns = 0
        self.shown_ns = 0
        """Time of the latest finding that is printed. A busy machine prints it much later."""
        self._repeat_ns = REPEAT_NS
        self.printed = 0
        """Number of findings when the group was last printed; 0 if it was never printed."""
        self.number = 0
        self.corrected = 0
        """Number of unprinted findings that replace an earlier verdict."""
        self.addresses: Counter[str] = Counter()
        """Number of clients by address, for the first MAX_ADDRESSES addresses."""
        self.examples: list[FourTuple] = []
        """The first clients."""
        self.from_ns = self.until_ns = first.first_syn_ns
        """Times of the earliest and the latest first SYN among the unprinted findings."""

    @property
    def growth(self) -> int:
        """Number of findings since the group was printed."""
        return self.number - self.printed

    def take(self, finding: Finding) -> None:
        """Add a finding to the group."""
        if not self.growth:
            self.since_ns = finding.verdict_ns
            self.from_ns = self.until_ns = finding.first_syn_ns
            self.corrected = 0
        self.number += 1
        self.latest_ns = finding.verdict_ns
        self.corrected += finding.updates is not None
        address = finding.four_tuple.client_ip
        if address in self.addresses or len(self.addresses) < MAX_ADDRESSES:
            self.addresses[address] += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(finding.four_tuple)
        self.from_ns = min(self.from_ns, finding.first_syn_ns)
        self.until_ns = max(self.until_ns, finding.first_syn_ns)

    def is_due(self, now_ns: int) -> bool:
        """Whether the group has waited long enough to be printed."""
        if not self.growth:
            return False
        if self.key.flood_suspected:
            return now_ns - self.since_ns >= REPEAT_NS
        if not self.printed:
            return now_ns - self.since_ns >= GATHER_NS
        return now_ns - self.printed_ns >= self._repeat_ns

    def note_printed(self, now_ns: int) -> None:
        """Note that the group was printed."""
        if self.printed and not self.key.flood_suspected:
            self._repeat_ns = min(2 * self._repeat_ns, LONGEST_REPEAT_NS)
        self.printed, self.printed_ns = self.number, now_ns
        self.shown_ns = self.latest_ns


class Folding:
    """The groups of a run, in order of appearance."""

    def __init__(self) -> None:
        self._groups: OrderedDict[GroupKey, Group] = OrderedDict()

    def take(self, finding: Finding) -> Iterator[Group]:
        """Add a finding, after yielding the groups that are due at its time.

        A yielded group counts as printed.
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
        """The groups that are due at this time."""
        for group in list(self._groups.values()):
            if group.is_due(now_ns):
                yield from self._print(group, now_ns)

    def new(self, now_ns: int) -> Iterator[Group]:
        """The groups that are due, and those that were never printed.

        A suspected flood is yielded only when it is due.
        """
        for group in list(self._groups.values()):
            is_new = not group.printed and not group.key.flood_suspected
            if is_new or group.is_due(now_ns):
                yield from self._print(group, now_ns)

    def rest(self) -> Iterator[Group]:
        """All groups that have grown since they were printed. Called at the end of the run."""
        for group in self._groups.values():
            yield from self._print(group, group.printed_ns)

    def unseen(self) -> Iterator[Group]:
        """The groups that were never printed, and the suspected floods that have grown.

        Called before the summary, which has the latest number of the others.
        """
        for group in self._groups.values():
            if group.printed and not group.key.flood_suspected:
                group.note_printed(group.printed_ns)
            yield from self._print(group, group.printed_ns)

    @staticmethod
    def _print(group: Group, now_ns: int) -> Iterator[Group]:
        if group.growth:
            yield group
            group.note_printed(now_ns)
