"""What the user allows the rescue to do. Pure."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import Union

from tcpstuck_bpf.model import address_bytes
from tcpstuck_bpf.rescue.pace import TokenBucket

IPNetwork = Union[ipaddress.IPv4Network, ipaddress.IPv6Network]

_MAPPED = ipaddress.IPv6Network((address_bytes("0.0.0.0"), 96))


@dataclass(frozen=True)
class RescuePolicy:
    """Limits set by the user. Raises ValueError for a rate below 1."""

    include_unknown: bool = False
    """Also try silent clients whose address never completed a handshake."""
    rate: int = 100
    """SYN-ACKs per second, and the largest burst."""
    rate_per_address: int = 20
    """The same limit for the silent clients of one address."""
    excluded: tuple[IPNetwork, ...] = ()
    after_expiry: bool = False
    """Also try when the cookie may have expired, so that the client would get an RST."""

    def __post_init__(self) -> None:
        for rate in (self.rate, self.rate_per_address):
            TokenBucket(rate)

    def excludes(self, address: bytes) -> bool:
        """Whether nothing may be sent to an address (16 bytes).

        A network of IPv4-mapped addresses excludes IPv4 clients too, but ::/0 does not.
        """
        ip = ipaddress.IPv6Address(address)
        if ip not in _MAPPED:
            return any(ip in network for network in self.excluded)
        return any(
            ip.ipv4_mapped in network
            if isinstance(network, ipaddress.IPv4Network)
            else network.subnet_of(_MAPPED) and ip in network
            for network in self.excluded
        )
