"""The polls in a recording: only what differs from the poll before is written.

Every socket gets a number when it is first written. A poll has the sockets that changed in full,
and the numbers of those that merely aged, as runs. A socket that a poll does not show loses its
number. What else a poll says is written where it differs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tcpstuck_bpf import wire
from tcpstuck_bpf.client.facts import ClientSocket, Poll
from tcpstuck_bpf.client.steady import moved_on
from tcpstuck_bpf.client.steps import Polled
from tcpstuck_bpf.recording.lines import Values
from tcpstuck_bpf.recording.table import (
    four_tuple_of,
    integer,
    integers,
    numbers_of,
    runs_of,
)

Key = tuple[int, int]

_COUNTS = len(ClientSocket._fields) - 4
"""The facts of a socket without its addresses, its keep-alive, its kind and its device."""


def socket_values(socket: ClientSocket) -> list[Any]:
    """Encode a socket."""
    who, *counts, keepalive_ns, is_subflow, interface = socket._asdict().values()
    return [wire.encode_key(who).hex(), *counts, keepalive_ns, int(is_subflow), interface]


def socket_of(values: Any) -> ClientSocket:
    """Decode a socket. Raises TypeError or ValueError for damaged values."""
    key, *counts, keepalive_ns, is_subflow, interface = values
    if is_subflow not in (0, 1):
        raise ValueError(f"{is_subflow!r} is neither 0 nor 1")
    due_ns = None if keepalive_ns is None else integer(keepalive_ns)
    facts = (*integers(counts, _COUNTS), due_ns, bool(is_subflow), integer(interface))
    return ClientSocket._make((four_tuple_of(key), *facts))


def _other_values(step: Polled) -> Values:
    """What a poll says besides its time, its sockets and the number of connections."""
    poll = step.poll
    return {
        "namespaces": sorted(poll.namespaces),
        "gone": sorted(poll.gone),
        "unreadable": poll.unreadable,
        "accepted": poll.accepted,
        "subflows": poll.subflows,
        "failures": {str(inode): why for inode, why in poll.failures.items()},
        "beyond": step.beyond,
    }


def _failures_of(values: Mapping[str, Any]) -> dict[int, str]:
    return {integer(int(inode)): str(why) for inode, why in values.items()}


class RecordedSockets:
    """The last poll according to the recording so far; the writer and the reader have the same."""

    def __init__(self) -> None:
        self._numbers: dict[Key, int] = {}
        self._sockets: dict[int, ClientSocket] = {}
        self._next = 0
        self._time_ns = 0
        self._others = _other_values(Polled(Poll(0, (), 0, frozenset())))

    def values_of(self, step: Polled) -> Values:
        """Encode a poll, whose sockets have keys of their own, in ascending order."""
        poll = step.poll
        passed_ns = poll.time_ns - self._time_ns
        kept: dict[int, ClientSocket] = {}
        changed = []
        for socket in poll.sockets:
            number = self._numbers.get(socket.key)
            if number is not None and moved_on(self._sockets[number], passed_ns) == socket:
                kept[number] = socket
            else:
                changed.append(socket)
        before, self._others = self._others, _other_values(step)
        differing = {name: one for name, one in self._others.items() if one != before[name]}
        self._note(poll.time_ns, kept, changed)
        return {
            "poll": poll.time_ns,
            "sockets": [socket_values(one) for one in changed],
            "kept": list(runs_of(sorted(kept))),
            "established": poll.established,
            **differing,
        }

    def step_of(self, values: Values) -> Polled:
        """Decode a poll. Raises KeyError, TypeError or ValueError where it is damaged."""
        time_ns = integer(values["poll"])
        if time_ns < self._time_ns:
            raise ValueError("a poll before the one before it")
        passed_ns = time_ns - self._time_ns
        numbers = numbers_of(values["kept"], self._next)
        kept = {number: moved_on(self._sockets[number], passed_ns) for number in numbers}
        changed = [socket_of(one) for one in values["sockets"]]
        others: Values = {name: values.get(name, before) for name, before in self._others.items()}
        sockets = self._note(time_ns, kept, changed)
        self._others = others
        poll = Poll(
            time_ns,
            tuple(sorted(sockets, key=lambda one: one.key)),
            integer(values["established"]),
            frozenset(map(integer, others["namespaces"])),
            frozenset(map(integer, others["gone"])),
            integer(others["unreadable"]),
            integer(others["accepted"]),
            integer(others["subflows"]),
            _failures_of(others["failures"]),
        )
        return Polled(poll, integer(others["beyond"]))

    def _note(
        self, time_ns: int, kept: dict[int, ClientSocket], changed: list[ClientSocket]
    ) -> list[ClientSocket]:
        """Note the sockets of a poll: those that aged by number, and the others. Returns all.

        Raises ValueError for a socket that is there twice, or whose keep-alive probe would be
        overdue.
        """
        now = dict(kept)
        for socket in changed:
            number = self._numbers.get(socket.key)
            if number is None:
                number = self._next
                self._next += 1
            if number in now:
                raise ValueError(f"socket {socket.key} is there twice")
            now[number] = socket
        if any((one.keepalive_ns or 0) < 0 for one in now.values()):
            raise ValueError("a keep-alive probe is overdue")
        self._sockets, self._time_ns = now, time_ns
        self._numbers = {socket.key: number for number, socket in now.items()}
        if len(self._numbers) != len(now):
            raise ValueError("a socket is there twice")
        return [*now.values()]
