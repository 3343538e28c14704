"""Counts the clients that are stuck now, by listener, verdict and cause. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from tcpstuck_bpf.judge.verdict import Finding
from tcpstuck_bpf.model import HandshakeId


class StuckGroup(NamedTuple):
    """Clients that are stuck at the same listener for the same cause."""

    netns: int
    """Inode number of the network namespace."""
    server_ip: str
    server_port: int
    """In host byte order."""
    socket: int
    """Inode number of the listening socket; 0 if unknown."""
    verdict: str
    certainty: str
    cause: str
    """What dropped their ACKs, in words; for a firewall, its rule. Empty if the verdict already
    says all that is known."""
    what: str = ""
    """What dropped their ACKs, as one stable word (`Drop.what`)."""


def group_of(finding: Finding) -> StuckGroup:
    """The group of a stuck client."""
    who = finding.four_tuple
    return StuckGroup(
        who.netns,
        who.server_ip,
        who.server_port,
        finding.listener_socket,
        finding.verdict,
        finding.certainty,
        finding.cause,
        "" if finding.drop is None else finding.drop.what,
    )


class StuckNow:
    """The group of each stuck client, by the latest finding of its connection.

    A client whose state cannot change any more is only counted.
    """

    def __init__(self) -> None:
        self._groups: dict[HandshakeId, StuckGroup] = {}
        self._same: dict[StuckGroup, StuckGroup] = {}
        self._counts: Counter[StuckGroup] = Counter()
        """Number of clients in each group, including those that are only counted."""

    def take(self, finding: Finding) -> None:
        """Take a verdict. Clients of a suspected SYN flood do not count as stuck."""
        identity = HandshakeId(finding.four_tuple, finding.first_syn_ns)
        self.leave(identity)
        if not finding.stuck or finding.flood_suspected:
            return
        group = group_of(finding)
        # One object for all clients of a group: there may be a hundred thousand of them.
        self._groups[identity] = self._same.setdefault(group, group)
        self._counts[group] += 1

    def __contains__(self, identity: HandshakeId) -> bool:
        """Whether a connection is stuck and its state may still change."""
        return identity in self._groups

    def settle(self, may_change: Callable[[HandshakeId], bool]) -> None:
        """Drop the entries of connections that cannot change any more; they stay counted."""
        for identity in [one for one in self._groups if not may_change(one)]:
            del self._groups[identity]

    def leave(self, identity: HandshakeId) -> None:
        """Remove a connection that is no longer stuck, for whatever reason."""
        group = self._groups.pop(identity, None)
        if group is not None:
            self._counts[group] -= 1
            if not self._counts[group]:
                del self._counts[group], self._same[group]

    def groups(self) -> tuple[tuple[StuckGroup, int], ...]:
        """The groups with their number of clients; the largest comes first."""
        return tuple(sorted(self._counts.items(), key=lambda one: (-one[1], one[0])))
