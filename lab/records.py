"""The result of a scenario: the clients' own view, and the oracle derived from it.

The module has pure data and pure functions. Times are CLOCK_MONOTONIC nanoseconds, comparable with
the tracer's times on the same machine. Only the lines passed to `compare`, `reported_verdicts` and
`settled_verdicts` come from the tracer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class FourTuple(NamedTuple):
    """A connection as the client sees it; addresses are text, IPv4 always dotted."""

    client_ip: str
    client_port: int
    server_ip: str
    server_port: int


def endpoint(address: str, port: int) -> str:
    """An address and a port as text, with IPv6 in brackets."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


@dataclass
class ClientRecord:
    """One client socket, as the client process saw it."""

    four_tuple: FourTuple
    opened_ns: int
    """When connect() was called."""
    connected_ns: int | None = None
    """When the socket reported that connect() had succeeded."""
    greeted_ns: int | None = None
    """When the server's first bytes arrived."""
    greeting: bytes = b""
    """The first bytes that the server sent."""
    error: str | None = None
    """Name of the errno that ended the connection, such as ECONNRESET."""
    closed_ns: int | None = None
    """When either side closed the socket."""
    closed_by: str | None = None
    """`client` or `server`; None while the socket is open or after an error."""

    @property
    def waiting(self) -> bool:
        """Whether the client is connected and still waits for the greeting, like a stuck one."""
        return (
            self.connected_ns is not None
            and self.greeted_ns is None
            and self.error is None
            and self.closed_ns is None
        )


@dataclass
class WireRecord:
    """One connection as captured at the client's end of the wire."""

    syns: int = 0
    synacks: int = 0
    acks: int = 0
    """Client segments with ACK but neither SYN nor RST."""
    client_resets: int = 0
    server_resets: int = 0
    client_isn: int | None = None
    cookie_isn: int | None = None
    """Sequence number of the last SYN-ACK."""


VERDICTS_OF_STUCK = frozenset({"ack-missing", "ack-filtered", "accept-queue-full", "ack-failed"})
"""Verdicts after which a real client waits forever."""
VERDICTS_OF_HEALTHY = frozenset({"completed"})


@dataclass(frozen=True)
class Outcome:
    """The result of a scenario, taken from the clients, the wire and the kernel's counters."""

    scenario: str
    family: str
    netns: int
    """Inode number of the server's network namespace, as the tracer prints it."""
    clients: tuple[ClientRecord, ...] = ()
    wire: Mapping[FourTuple, WireRecord] = field(default_factory=dict)
    expected: Mapping[FourTuple, str] = field(default_factory=dict)
    """The true verdict of each connection that is not simply healthy."""
    healthy: frozenset[FourTuple] = frozenset()
    """Connections that were greeted and never stuck."""
    accepted: Mapping[FourTuple, int | None] = field(default_factory=dict)
    """Connections returned by the server's accept(), with the time; None if known only from
    `ss`."""
    counters_before: Mapping[str, int] = field(default_factory=dict)
    counters_after: Mapping[str, int] = field(default_factory=dict)

    def having(self, *verdicts: str) -> frozenset[FourTuple]:
        """The connections whose true verdict is one of these."""
        return frozenset(key for key, verdict in self.expected.items() if verdict in verdicts)

    @property
    def stuck(self) -> frozenset[FourTuple]:
        """Connections that wait for a greeting from a server that has no record of them."""
        return self.having(*VERDICTS_OF_STUCK)

    def moved(self, counter: str) -> int:
        """The increase of a TcpExt counter in the server's namespace during the scenario."""
        return self.counters_after.get(counter, 0) - self.counters_before.get(counter, 0)


@dataclass(frozen=True)
class Comparison:
    """The tracer's last verdict on each connection, compared with the oracle's."""

    missing: Mapping[FourTuple, str]
    """Expected verdict of connections that the tracer did not report."""
    extra: Mapping[FourTuple, str]
    """Verdict of connections that the tracer reported although they are healthy or unknown."""
    different: Mapping[FourTuple, tuple[str, str]]
    """Expected and reported verdict of connections where the two differ."""
    stuck_expected: int
    stuck_reported: int

    @property
    def agrees(self) -> bool:
        """Whether the tracer reported exactly the expected connections with the right verdicts."""
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
    """The tracer's last verdict on each connection to one server namespace.

    `lines` are the decoded JSON lines of `tcpstuck-trace --json`, in the order printed.
    """
    return {key: line["verdict"] for key, line in _last_lines(lines, netns).items()}


def settled_verdicts(lines: Iterable[Mapping[str, Any]], netns: int) -> dict[FourTuple, str]:
    """As `reported_verdicts`, without verdicts that the tracer marks `to_be_updated`."""
    return {
        key: line["verdict"]
        for key, line in _last_lines(lines, netns).items()
        if not line.get("to_be_updated")
    }


def compare(outcome: Outcome, lines: Iterable[Mapping[str, Any]]) -> Comparison:
    """Compare the tracer's JSON lines with the oracle, connection by connection."""
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
