"""Finds for each connection of the client's side its handshake on the server's. Pure.

sock_diag does not show sequence numbers, so addresses, ports and time must do. The same addresses
and ports may occur several times, and the clocks of two hosts differ.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from statistics import median
from typing import NamedTuple

from tcpstuck_bpf.joining.sides import ClientConnection, Ends, ServerHandshake
from tcpstuck_bpf.model import SECOND_NS, FourTuple

TOLERATED_NS = 5 * SECOND_NS
"""Largest distance between a connection's establishment and its SYNs, by two hosts' clocks."""


class Joined(NamedTuple):
    """A connection as both sides saw it; one of them may have reported nothing."""

    server: ServerHandshake | None
    client: ClientConnection | None

    @property
    def four_tuple(self) -> FourTuple:
        """The connection as the client sees it if it does, else as the server does."""
        if self.client is not None:
            return self.client.socket.four_tuple
        if self.server is not None:
            return self.server.finding.four_tuple
        raise ValueError("a connection that neither side reported")

    @property
    def difference_ns(self) -> int | None:
        """Establishment by the client's clock, less the last SYN by the server's.

        On one host it is the round trip; between two, the difference of their clocks besides. None
        if one side reported nothing.
        """
        if self.server is None or self.client is None:
            return None
        return self.client.established_ns - self.server.last_syn_ns


class Difference(NamedTuple):
    """How the two sides' times differ over all joined connections, in ns."""

    median: int
    least: int
    most: int


def distance_ns(server: ServerHandshake, client: ClientConnection) -> int:
    """How far a connection's establishment is from the time of a handshake's SYNs."""
    before = server.first_syn_ns - client.established_ns
    after = client.established_ns - server.last_syn_ns
    return max(0, before, after)


def join(servers: Iterable[ServerHandshake], clients: Iterable[ClientConnection]) -> list[Joined]:
    """Every handshake and every connection once, joined where addresses, ports and time agree.

    The nearest are joined first; those further apart than TOLERATED_NS are not joined. Connections
    that the client's side did not report are left out unless they are joined.
    """
    at_server: dict[Ends, list[ServerHandshake]] = defaultdict(list)
    at_client: dict[Ends, list[ClientConnection]] = defaultdict(list)
    for server in servers:
        at_server[server.ends].append(server)
    for client in clients:
        at_client[client.ends].append(client)
    joined: list[Joined] = []
    for ends in dict.fromkeys((*at_client, *at_server)):
        joined += _join_one(at_server.get(ends, []), at_client.get(ends, []))
    return joined


def _join_one(servers: list[ServerHandshake], clients: list[ClientConnection]) -> Iterable[Joined]:
    """The connections with the same addresses and ports."""
    near = sorted(
        (distance_ns(server, client), abs(client.established_ns - server.last_syn_ns), at, of)
        for at, server in enumerate(servers)
        for of, client in enumerate(clients)
        if distance_ns(server, client) <= TOLERATED_NS
    )
    taken: dict[int, int] = {}
    free = set(range(len(servers)))
    for _, _, at, of in near:
        if of not in taken and at in free:
            taken[of] = at
            free.discard(at)
    for of, client in enumerate(clients):
        if of in taken:
            yield Joined(servers[taken[of]], client)
        elif client.verdict is not None:
            yield Joined(None, client)
    yield from (Joined(servers[at], None) for at in sorted(free))


def difference_of(joined: Iterable[Joined]) -> Difference | None:
    """The difference that the joined connections show; None if there are none."""
    found = [one.difference_ns for one in joined if one.difference_ns is not None]
    return Difference(round(median(found)), min(found), max(found)) if found else None


def nearest_apart_ns(joined: Iterable[Joined]) -> int | None:
    """How far apart the nearest two are that have the same addresses and ports and are not joined.

    None if no addresses and ports are in both recordings without being joined.
    """
    servers: dict[Ends, list[ServerHandshake]] = defaultdict(list)
    clients: list[ClientConnection] = []
    for one in joined:
        if one.client is None and one.server is not None:
            servers[one.server.ends].append(one.server)
        elif one.server is None and one.client is not None:
            clients.append(one.client)
    found = (distance_ns(server, one) for one in clients for server in servers.get(one.ends, []))
    return min(found, default=None)
