"""Which connections wait for the server's first byte, by one poll after the other.

Pure: it takes polls, does no I/O and knows no clock. It remembers only connections that wait, and a
bounded number of those that ended. Data on a connection never goes away again (the kernel's counts
only rise), so one that has sent or received data needs no memory, and never gets a verdict.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from tcpstuck_bpf.client.actions import Attempt, Candidate, Outcome
from tcpstuck_bpf.client.facts import NOT_SOUGHT, ClientSocket, Owners, Poll

GREETING_MISSING, RECOVERED, CLIENT_SPOKE = "greeting-missing", "recovered", "client-spoke"
RESCUED, SERVER_FORGOT, SERVER_SLOW, RESET = "rescued", "server-forgot", "server-slow", "reset"
"""Verdicts that only `--rescue` leads to."""
_BY_OUTCOME = {
    Outcome.FORGOT: SERVER_FORGOT,
    Outcome.KNOWS: SERVER_SLOW,
    Outcome.ENDED: RESET,
}
MOST_TRACKED = 100_000
"""Most connections that are remembered; further ones are counted."""
MOST_ENDED = 4096
"""Most ended ones that are remembered, in case that a poll only missed them."""
ABSENT_POLLS = 2
"""A connection has ended once this many polls in a row do not show it. The kernel lists sockets
bucket by bucket, without a lock on all of them, so a single poll may miss one."""

Key = tuple[int, int]


class Change(NamedTuple):
    """A verdict on a connection. Times are CLOCK_MONOTONIC nanoseconds."""

    verdict: str
    socket: ClientSocket
    """As the poll that decided found it."""
    time_ns: int
    waited_ns: int
    """From the connection's establishment to this verdict."""
    owners: Owners = NOT_SOUGHT
    was: str | None = None
    """The verdict that this one replaces."""
    challenged_ns: int | None = None
    """When our last challenge was sent; None if none was."""
    reason: str = ""
    """What came of the question or of the reset that led to this verdict."""


class Group(NamedTuple):
    """Connections that wait now, of the same owners to the same server."""

    netns: int
    server_address: bytes
    server_port: int
    owners: tuple[tuple[str, int, str], ...]
    """Name, pid and container of each."""
    more_owners: int
    uid: int


class Waiting(NamedTuple):
    """How many connections of a group wait, and for how long the oldest does."""

    number: int
    oldest_ns: int


@dataclass
class _Wait:
    """A connection without a byte either way."""

    socket: ClientSocket
    seen_ns: int
    """Time of the last poll that showed it."""
    verdict: str | None = None
    """What was reported last: GREETING_MISSING, SERVER_SLOW, or nothing yet."""
    challenged_ns: int | None = None
    absent: int = 0
    """Polls since then that did not."""
    owners: Owners = NOT_SOUGHT

    def age_ns(self, now_ns: int) -> int:
        """How long it has waited by now."""
        return self.socket.age_ns + now_ns - self.seen_ns


class Waits:
    """The connections that wait. `timeout_ns`: how long one must wait to get a verdict."""

    def __init__(self, timeout_ns: int, most: int = MOST_TRACKED) -> None:
        self.verdicts: Counter[str] = Counter()
        """Connections by their last verdict."""
        self._closed: Counter[str] = Counter()
        """Reported connections that ended without a byte either way, by their last verdict."""
        self.untracked = 0
        """Most connections that a poll found waiting and that were too many to be remembered."""
        self.established = 0
        """Connections to the wanted ports at the last poll."""
        self.seen_any = False
        self.seen_waiting = False
        """Whether a poll showed a connection without a byte either way."""
        self._timeout_ns = timeout_ns
        self._most = most
        self._waits: dict[Key, _Wait] = {}
        self._ended: OrderedDict[Key, _Wait] = OrderedDict()

    @property
    def ever_stuck(self) -> int:
        """Connections that were reported as stuck, without those whose client spoke."""
        return sum(self.verdicts.values()) - self.verdicts[CLIENT_SPOKE]

    @property
    def closed(self) -> int:
        """Reported connections that ended without a byte either way, and not by us."""
        return sum(self._closed.values())

    @property
    def closed_slow(self) -> int:
        """Those of `closed` whose server had answered that it has them."""
        return self._closed[SERVER_SLOW]

    @property
    def slow(self) -> int:
        """Connections that wait still and whose server has answered that it has them."""
        return self.verdicts[SERVER_SLOW] - self._closed[SERVER_SLOW]

    @property
    def stuck(self) -> int:
        """Connections that were reported and wait still."""
        return self.verdicts[GREETING_MISSING] - self._closed[GREETING_MISSING] + self.slow

    @property
    def young(self) -> int:
        """Connections that wait, but not long enough for a verdict."""
        return len(self._waits) - self.stuck

    @property
    def misses_any(self) -> bool:
        """Whether the last poll did not show a connection that has not been given up yet."""
        return any(wait.absent for wait in self._waits.values())

    def wants(self, socket: ClientSocket) -> bool:
        """Whether the next poll must have the facts of this socket."""
        return socket.waits or socket.key in self._waits or socket.key in self._ended

    def take(self, poll: Poll) -> list[Change]:
        """Take a poll. Returns the verdicts that it leads to, the longest wait first."""
        self.established = poll.established
        self.seen_any |= poll.established > 0
        untracked = 0
        changes: list[Change] = []
        for socket in poll.sockets:
            wait = self._waits.get(socket.key) or self._returned(socket.key)
            self.seen_waiting |= socket.waits
            if not socket.waits:
                self._waits.pop(socket.key, None)
                if wait is not None and wait.verdict is not None:
                    changes.append(self._ended_by_data(wait, socket, poll.time_ns))
            elif wait is None and len(self._waits) >= self._most:
                untracked += 1
            else:
                wait = self._noted(wait, socket, poll.time_ns)
                if wait.verdict is None and socket.age_ns >= self._timeout_ns:
                    wait.verdict = GREETING_MISSING
                    self.verdicts[GREETING_MISSING] += 1
                    changes.append(
                        Change(GREETING_MISSING, socket, poll.time_ns, socket.age_ns, wait.owners)
                    )
        self.untracked = max(self.untracked, untracked)
        self._end_absent(poll)
        changes.sort(key=lambda change: -change.waited_ns)
        return changes

    def note_owners(self, owners: Mapping[int, Owners]) -> None:
        """Note who owns connections, by the inode numbers of their sockets."""
        for wait in self._waits.values():
            wait.owners = owners.get(wait.socket.inode, wait.owners)

    def candidates(self) -> list[Candidate]:
        """The reported connections that wait and that the last poll showed."""
        return [
            _candidate(wait)
            for wait in self._waits.values()
            if wait.verdict is not None and not wait.absent
        ]

    def waiting(self) -> list[Candidate]:
        """All connections that wait, also those too young for a verdict."""
        return [_candidate(wait) for wait in self._waits.values()]

    def attempted(self, attempt: Attempt, now_ns: int) -> Change | None:
        """Take what came of an action on a connection. Returns the verdict that it leads to."""
        key = attempt.plan.socket.key
        wait = self._waits.get(key)
        if attempt.outcome is Outcome.SENT and wait is not None:
            wait.challenged_ns = attempt.time_ns
        verdict = _BY_OUTCOME.get(attempt.outcome)
        if verdict is None:
            return None
        wait = wait or self._returned(key)
        if wait is None:
            return None
        # Polls may have missed it. If it has ended, the next ones will find that out again.
        self._waits[key] = wait
        if wait.verdict in (None, verdict):
            return None
        change = self._judged(wait, verdict, wait.socket, now_ns)
        if verdict == SERVER_SLOW:
            wait.verdict = verdict
        else:
            del self._waits[key]
        return change._replace(reason=attempt.reason)

    def groups(self, now_ns: int) -> list[tuple[Group, Waiting]]:
        """The reported connections that wait still, the largest group first."""
        found: dict[Group, Waiting] = {}
        for wait in self._waits.values():
            if wait.verdict is None:
                continue
            group = group_of(wait.socket, wait.owners)
            before = found.get(group, Waiting(0, 0))
            oldest_ns = max(before.oldest_ns, wait.age_ns(now_ns))
            found[group] = Waiting(before.number + 1, oldest_ns)
        return sorted(found.items(), key=lambda item: (-item[1].number, -item[1].oldest_ns))

    def _noted(self, wait: _Wait | None, socket: ClientSocket, now_ns: int) -> _Wait:
        if wait is None:
            wait = _Wait(socket, now_ns)
        wait.socket, wait.seen_ns, wait.absent = socket, now_ns, 0
        self._waits[socket.key] = wait
        return wait

    def _returned(self, key: Key) -> _Wait | None:
        """A connection that counted as ended; the polls had only missed it."""
        wait = self._ended.pop(key, None)
        if wait is not None and wait.verdict is not None:
            self._closed[wait.verdict] -= 1
        return wait

    def _ended_by_data(self, wait: _Wait, socket: ClientSocket, now_ns: int) -> Change:
        # The server's data is the proof that it has the connection, whoever spoke first.
        if not socket.heard:
            verdict = CLIENT_SPOKE
        elif wait.challenged_ns is None or wait.verdict == SERVER_SLOW:
            verdict = RECOVERED
        else:
            # The socket was read again right before the challenge: so the data came after it.
            verdict = RESCUED
        return self._judged(wait, verdict, socket, now_ns)

    def _judged(self, wait: _Wait, verdict: str, socket: ClientSocket, now_ns: int) -> Change:
        """Replace the verdict of a reported connection, in the figures."""
        was = wait.verdict or GREETING_MISSING
        self.verdicts[was] -= 1
        self.verdicts[verdict] += 1
        # The socket's own age is not it: after data, that is the time since the data came.
        waited_ns = wait.age_ns(now_ns)
        return Change(verdict, socket, now_ns, waited_ns, wait.owners, was, wait.challenged_ns)

    def _end_absent(self, poll: Poll) -> None:
        """Forget what is not listed any more, where the list is known to be complete."""
        ended = []
        for key, wait in self._waits.items():
            netns = wait.socket.four_tuple.netns
            if netns in poll.gone:
                ended.append(key)
            elif wait.seen_ns != poll.time_ns and netns in poll.namespaces:
                wait.absent += 1
                if wait.absent >= ABSENT_POLLS:
                    ended.append(key)
        for key in ended:
            wait = self._waits.pop(key)
            if wait.verdict is not None:
                self._closed[wait.verdict] += 1
                self._ended[key] = wait
                if len(self._ended) > MOST_ENDED:
                    self._ended.popitem(last=False)


def _candidate(wait: _Wait) -> Candidate:
    return Candidate(wait.socket, wait.seen_ns, wait.owners, wait.verdict == SERVER_SLOW)


def group_of(socket: ClientSocket, owners: Owners) -> Group:
    """The group of a connection."""
    who = socket.four_tuple
    named = dict.fromkeys((one.name, one.pid, one.container) for one in owners.processes)
    return Group(
        who.netns, who.server_address, who.server_port, tuple(named), owners.more, socket.uid
    )


def inodes_of(changes: Iterable[Change]) -> Iterator[int]:
    """The sockets whose owners are still to be found."""
    for change in changes:
        unknown = change.verdict == GREETING_MISSING and not change.owners.sought
        if unknown and change.socket.inode:
            yield change.socket.inode
