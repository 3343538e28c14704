"""Sockets, owners and polls for the tests of the client's side."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tcpstuck_bpf.client.facts import ClientSocket, Owner, Owners, Poll
from tcpstuck_bpf.client.steps import ClientHeader
from tcpstuck_bpf.model import SECOND_NS, FourTuple, TraceFilter, address_bytes
from tcpstuck_bpf.steps import WallClock

NETNS = 4_026_531_840
OTHER_NETNS = 4_026_532_177
BEGIN_NS = 1_000 * SECOND_NS
CLOCK = WallClock(BEGIN_NS, 1_700_000_000 * SECOND_NS)


def header(**changes: Any) -> ClientHeader:
    """The header of a run on port 3306, with some fields changed."""
    wanted = TraceFilter(ports=(3306,))
    return replace(ClientHeader(wanted, 3 * SECOND_NS, CLOCK, "port 3306"), **changes)


def client_socket(
    number: int = 1,
    age_s: float = 60.0,
    *,
    server: str = "10.9.0.1",
    client: str = "10.9.0.2",
    port: int = 3306,
    netns: int = NETNS,
    **facts: int | None,
) -> ClientSocket:
    """A socket without a byte either way; its cookie, inode and port have the same number."""
    age_ns = round(age_s * SECOND_NS)
    who = FourTuple(address_bytes(client), address_bytes(server), 40_000 + number, port, netns)
    base = ClientSocket(who, number, 7_000 + number, 1000, age_ns, age_ns, 1, 0, 1, 0, 0, 0, None)
    return base._replace(**facts)


def poll(after_s: float, *sockets: ClientSocket, established: int | None = None) -> Poll:
    """A poll of two namespaces, `after_s` seconds after the beginning."""
    return Poll(
        BEGIN_NS + round(after_s * SECOND_NS),
        sockets,
        len(sockets) if established is None else established,
        frozenset({NETNS, OTHER_NETNS}),
    )


def owned(name: str = "python3", pid: int = 288, fd: int = 6, container: str = "") -> Owners:
    return Owners((Owner(name, pid, fd, container),), 0, False)
