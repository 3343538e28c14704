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
    due_ns = socket.keepalive_ns
    return with_times(
        socket,
        socket.age_ns + passed_ns,
        socket.last_ack_ns + passed_ns,
        None if due_ns is None else due_ns - passed_ns,
    )


def with_times(
    socket: ClientSocket, age_ns: int, last_ack_ns: int, keepalive_ns: int | None
) -> ClientSocket:
    """The socket with other times.

    By position, because every poll does this to each socket that waits, and _replace takes several
    times as long.
    """
    who, cookie, inode, uid, _, _, *counts, _, is_subflow, interface = socket
    times = (age_ns, last_ack_ns)
    return _MAKE((who, cookie, inode, uid, *times, *counts, keepalive_ns, is_subflow, interface))


class SteadyPolls:
    """Takes each poll of a run, and returns it with steady ages and its sockets in a fixed order.

    The order is that of the sockets' keys: the kernel's depends on its hash table, and a recording
    does not keep it. A socket that a poll has twice is kept once.
    """

    def __init__(self) -> None:
        self._before: Mapping[Key, ClientSocket] = {}
        self._time_ns = 0

    def take(self, poll: Poll) -> Poll:
        """The poll as it is judged and recorded."""
        passed_ns = poll.time_ns - self._time_ns
        found = {socket.key: socket for socket in poll.sockets}
        steady = {
            key: self._steady(found[key], self._before.get(key), passed_ns) for key in sorted(found)
        }
        self._before, self._time_ns = steady, poll.time_ns
        return poll._replace(sockets=tuple(steady.values()))

    def _steady(
        self, socket: ClientSocket, before: ClientSocket | None, passed_ns: int
    ) -> ClientSocket:
        # Once data has gone by, an age is the time since that data.
        if before is None or not (before.waits and socket.waits):
            return socket
        expected = moved_on(before, passed_ns)
        if not _near(socket.age_ns, expected.age_ns):
            return socket
        times = (socket.last_ack_ns, socket.keepalive_ns)
        agree = _near(times[0], expected.last_ack_ns)
        if agree and _counts_down(times[1], expected.keepalive_ns):
            same = with_times(expected, socket.age_ns, *times) == socket
            if same:
                return expected
        return with_times(socket, expected.age_ns, *times)


def _near(time_ns: int, expected_ns: int) -> bool:
    return abs(time_ns - expected_ns) <= JITTER_NS


def _counts_down(due_ns: int | None, expected_ns: int | None) -> bool:
    """Whether a keep-alive timer is the one that was seen before."""
    if due_ns is None or expected_ns is None:
        return due_ns is expected_ns
    return expected_ns >= 0 and _near(due_ns, expected_ns)
