"""Polls whose ages do not jitter. Pure.

The kernel says how long ago something happened, and a poll takes a while to read all sockets. So
the moment that an age leads back to differs a little in each poll. A socket to which nothing
happened gets the age that it had, moved on by the time between the polls. Then every verdict on a
connection names the same time of establishment, and a recording needs only what has changed.
"""

from __future__ import annotations

from collections.abc import Mapping

from tcpstuck_bpf.client.facts import ClientSocket, Poll
from tcpstuck_bpf.model import SECOND_NS

JITTER_NS = SECOND_NS
"""A larger difference is no jitter: the time itself has changed."""

Key = tuple[int, int]

_MAKE = ClientSocket._make


def moved_on(socket: ClientSocket, passed_ns: int) -> ClientSocket:
    """The socket after this time, if nothing has happened to it.

    The time to the next keep-alive probe may become negative: the probe has been sent since.
    """
    # By position, because every poll does this to each socket that waits: _replace takes several
    # times as long.
    who, cookie, inode, uid, age_ns, last_ack_ns, *counts, due_ns, is_subflow, interface = socket
    times = (age_ns + passed_ns, last_ack_ns + passed_ns)
    due_ns = None if due_ns is None else due_ns - passed_ns
    return _MAKE((who, cookie, inode, uid, *times, *counts, due_ns, is_subflow, interface))


class SteadyPolls:
    """Takes each poll of a run, and returns it with steady ages and its sockets in a fixed order.

    The order is that of the sockets' keys: the kernel's depends on its hash table, and a recording
    does not keep it. A socket that a poll has twice is kept once; one that a single poll misses is
    remembered.
    """

    def __init__(self) -> None:
        self._before: Mapping[Key, ClientSocket] = {}
        """The sockets of the last poll."""
        self._missed: Mapping[Key, ClientSocket] = {}
        """Those of the poll before that the last one did not show, with the ages of that time."""
        self._time_ns = 0

    def take(self, poll: Poll) -> Poll:
        """The poll as it is judged and recorded."""
        passed_ns = poll.time_ns - self._time_ns
        found = {socket.key: socket for socket in poll.sockets}
        known = {
            key: moved_on(socket, passed_ns)
            for sockets in (self._missed, self._before)
            for key, socket in sockets.items()
        }
        steady = {key: _steady(found[key], known.get(key)) for key in sorted(found)}
        self._missed = {key: known[key] for key in self._before.keys() - found.keys()}
        self._before, self._time_ns = steady, poll.time_ns
        return poll._replace(sockets=tuple(steady.values()))


def _steady(socket: ClientSocket, expected: ClientSocket | None) -> ClientSocket:
    """The socket with the times that were expected, where these agree but for jitter."""
    if expected is None or not _near(socket.age_ns, expected.age_ns):
        return socket
    if _without_times(socket) == _without_times(expected) and _times_agree(socket, expected):
        return expected
    # Once data has gone by, an age is the time since that data.
    if expected.waits and socket.waits:
        return socket._replace(age_ns=expected.age_ns)
    return socket


def _without_times(socket: ClientSocket) -> tuple[object, ...]:
    """All but the three times, by position as in `moved_on`."""
    return socket[:4] + socket[6:12] + socket[13:]


def _times_agree(socket: ClientSocket, expected: ClientSocket) -> bool:
    """Whether the last ACK and the next keep-alive probe are those that were expected."""
    due_ns, expected_due_ns = socket.keepalive_ns, expected.keepalive_ns
    if due_ns is None or expected_due_ns is None:
        counts_down = due_ns is expected_due_ns
    else:
        counts_down = expected_due_ns >= 0 and _near(due_ns, expected_due_ns)
    return counts_down and _near(socket.last_ack_ns, expected.last_ack_ns)


def _near(time_ns: int, expected_ns: int) -> bool:
    return abs(time_ns - expected_ns) <= JITTER_NS
