"""Parsers for the output of `ss`, /proc/net/tcp and /proc/net/netstat. All functions are pure."""

from __future__ import annotations

import ipaddress
from typing import NamedTuple

KNOWN_STATES = ("01", "03")
"""TCP_ESTABLISHED and TCP_SYN_RECV (include/net/tcp_states.h) as /proc/net/tcp prints them."""


class SocketRow(NamedTuple):
    """One TCP socket as `ss` prints it; addresses are text, IPv4-mapped ones dotted."""

    receive_queue: int
    """Bytes; for a listener, the length of its accept queue."""
    send_queue: int
    """Bytes; for a listener, its backlog."""
    local_ip: str
    local_port: int
    peer_ip: str
    peer_port: int


def plain_address(text: str) -> str:
    """An address without brackets and zone; an IPv4-mapped IPv6 address becomes dotted."""
    bare = text.partition("%")[0].strip("[]")
    if bare in ("*", ""):
        return "*"
    address = ipaddress.ip_address(bare)
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(address)


def parse_ss(text: str) -> list[SocketRow]:
    """The rows of `ss -tnH state STATE`, which has no state column."""
    rows = []
    for line in text.splitlines():
        receive_queue, send_queue, local, peer = line.split()[:4]
        local_ip, _, local_port = local.rpartition(":")
        peer_ip, _, peer_port = peer.rpartition(":")
        rows.append(
            SocketRow(
                int(receive_queue),
                int(send_queue),
                plain_address(local_ip),
                int(local_port),
                plain_address(peer_ip),
                0 if peer_port == "*" else int(peer_port),
            )
        )
    return rows


def count_known(text: str, port: int) -> int:
    """Number of connections and handshakes at a server's port in /proc/net/tcp or tcp6."""
    rows = (line.split()[1:4] for line in text.splitlines()[1:])
    return sum(
        state in KNOWN_STATES and int(local.rpartition(":")[2], 16) == port
        for local, _, state in rows
    )


def parse_netstat(text: str, group: str = "TcpExt") -> dict[str, int]:
    """One group of counters in /proc/net/netstat: a line of names, then a line of values.

    Raises ValueError if the group is missing.
    """
    lines = [line.split() for line in text.splitlines() if line.startswith(f"{group}:")]
    if len(lines) != 2:
        raise ValueError(f"no {group} counters")
    names, values = lines
    return {name: int(value) for name, value in zip(names[1:], values[1:])}
