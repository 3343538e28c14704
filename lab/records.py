"""What a scenario hands back: the clients' own view, and the oracle made from it.

Pure data and pure functions; times are CLOCK_MONOTONIC nanoseconds, so they compare with the
tracer's of the same machine. Nothing here comes from the tracer but the argument of `compare`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class FourTuple(NamedTuple):
    """A connection as the client names it; addresses in text, IPv4 always dotted."""

    client_ip: str
    client_port: int
    server_ip: str
    server_port: int


@dataclass
class ClientRecord:
    """One client socket, as its own process saw it."""

    four_tuple: FourTuple
    opened_ns: int
    """When connect() was called."""
    connected_ns: int | None = None
    """When the socket reported that connect() had succeeded."""
    greeted_ns: int | None = None
    """When the server's first bytes arrived."""
    greeting: bytes = b""
    """The beginning of what the server said first."""
    error: str | None = None
    """errno name of what ended the connection, such as ECONNRESET."""
    closed_ns: int | None = None
    """When the socket was closed, by whichever side."""
    closed_by: str | None = None
    """`client`, `server` or None while it is open or after an error."""

    @property
    def waiting(self) -> bool:
        """Connected and still waiting for the greeting: what a stuck client looks like."""
        return (
            self.connected_ns is not None
            and self.greeted_ns is None
            and self.error is None
            and self.closed_ns is None
        )


@dataclass
class WireRecord:
    """What one connection looked like on the client's end of the wire."""

    syns: int = 0
    synacks: int = 0
    acks: int = 0
    """Segments of the client with ACK but neither SYN nor RST."""
    client_resets: int = 0
    server_resets: int = 0
    client_isn: int | None = None
    cookie_isn: int | None = None
    """Sequence number of the last SYN-ACK."""


VERDICTS_OF_STUCK = frozenset({"ack-missing", "ack-filtered", "accept-queue-full", "ack-failed"})
"""Verdicts after which a real client waits for ever."""
VERDICTS_OF_HEALTHY = frozenset({"completed"})


@dataclass(frozen=True)
class Outcome:
    """How a scenario ended, all of it from the clients, the wire and the kernel's counters."""

    scenario: str
    family: str
    netns: int
    """Inode number of the server's network namespace, as the tracer prints it."""
    clients: tuple[ClientRecord, ...] = ()
    wire: Mapping[FourTuple, WireRecord] = field(default_factory=dict)
    expected: Mapping[FourTuple, str] = field(default_factory=dict)
    """The verdict that is true of each connection that is not simply healthy."""
    healthy: frozenset[FourTuple] = frozenset()
    """Greeted without ever having been stuck."""
    accepted: Mapping[FourTuple, int | None] = field(default_factory=dict)
    """What the server's application got from accept(), and when; None where only `ss` tells."""
    counters_before: Mapping[str, int] = field(default_factory=dict)
    counters_after: Mapping[str, int] = field(default_factory=dict)

    def having(self, *verdicts: str) -> frozenset[FourTuple]:
        """The connections of which one of these verdicts is true."""
        return frozenset(key for key, verdict in self.expected.items() if verdict in verdicts)

    @property
    def stuck(self) -> frozenset[FourTuple]:
        """Connections that are owed a greeting by a server that does not know them."""
        return self.having(*VERDICTS_OF_STUCK)

    def moved(self, counter: str) -> int:
        """By how much a TcpExt counter of the server's namespace rose during the scenario."""
        return self.counters_after.get(counter, 0) - self.counters_before.get(counter, 0)


@dataclass(frozen=True)
class Comparison:
    """The tracer's last word on every connection beside the oracle's."""

    missing: Mapping[FourTuple, str]
    """Expected verdict of connections the tracer did not name."""
    extra: Mapping[FourTuple, str]
    """Verdict of connections the tracer named although they are healthy or unknown."""
    different: Mapping[FourTuple, tuple[str, str]]
    """Expected and reported verdict where both have one."""
    stuck_expected: int
    stuck_reported: int

    @property
    def agrees(self) -> bool:
        """Whether the tracer named each connection, with the right verdict, and no other."""
        return not (self.missing or self.extra or self.different)


def _last_lines(
    lines: Iterable[Mapping[str, Any]], netns: int
) -> dict[FourTuple, Mapping[str, Any]]:
    found: dict[FourTuple, Mapping[str, Any]] = {}
    for line in lines:
        if line.get("type") == "verdict" and line.get("netns") == netns:
            key = FourTuple(
                line["client_ip"], line["client_port"], line["server_ip"], line["server_port"]
            )
            found[key] = line
    return found


def reported_verdicts(lines: Iterable[Mapping[str, Any]], netns: int) -> dict[FourTuple, str]:
    """The tracer's last verdict on every connection to one server namespace.

    Takes the decoded JSON lines of `tcpstuck-trace --json`, in the order they were printed.
    """
    return {key: line["verdict"] for key, line in _last_lines(lines, netns).items()}


def settled_verdicts(lines: Iterable[Mapping[str, Any]], netns: int) -> dict[FourTuple, str]:
    """The same without those that the tracer itself says it will tell again."""
    return {
        key: line["verdict"]
        for key, line in _last_lines(lines, netns).items()
        if not line.get("to_be_updated")
    }


def compare(outcome: Outcome, lines: Iterable[Mapping[str, Any]]) -> Comparison:
    """Set the tracer's JSON lines beside the oracle, connection by connection."""
    reported = {
        key: verdict
        for key, verdict in reported_verdicts(lines, outcome.netns).items()
        if verdict not in VERDICTS_OF_HEALTHY or key in outcome.expected
    }
    expected = outcome.expected
    both = expected.keys() & reported.keys()
    return Comparison(
        missing={key: expected[key] for key in expected.keys() - both},
        extra={key: reported[key] for key in reported.keys() - both},
        different={
            key: (expected[key], reported[key]) for key in both if expected[key] != reported[key]
        },
        stuck_expected=len(outcome.stuck),
        stuck_reported=sum(verdict in VERDICTS_OF_STUCK for verdict in reported.values()),
    )
