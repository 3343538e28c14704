"""Makes the client's own kernel send the third ACK again, without knowing any number. Pure.

An established connection answers every SYN or SYN-ACK by a challenge ACK, whatever its numbers are
(RFC 5961, 4.2; tcp_validate_incoming). That ACK has the sequence number and the acknowledgement of
the third ACK, current timestamps and the right window, and leaves by the socket's own route, mark
and address translation. So a listener that knows only the cookie validates it. It is safe at every
age: its sequence number is not one too low, as a probe's is.

The packet is sent within the client's host: from the server's address to a local one, so it comes
in by the loopback device. Reverse path filters do not look at it (loopback_xmit keeps its route).
Connection tracking takes a stray SYN-ACK of a known connection for a duplicate and calls it neither
new nor invalid, unlike a SYN or an ACK with made-up numbers. Seen on 6.18 with rp_filter 1, and
with rules that accept `established` alone.

Limits: the kernel sends one challenge ACK in 500 ms for each socket (tcp_invalid_ratelimit), and in
a namespace tcp_challenge_ack_limit a second. None comes from a socket that demands signatures
(TCP-MD5, TCP-AO). A socket that is bound to the address's device is reached, because a local route
keeps that device (ip_route_output_key_hash_rcu). With VRFs it was not tried. Where no socket is
found, the host sends the server an RST with sequence number 0, which disturbs no connection.
"""

from __future__ import annotations

import struct

from tcpstuck_bpf.model import FourTuple
from tcpstuck_bpf.synack import addresses_of, ip_packet

_SYN_ACK = 0x12
_HEADER_WORDS = 5
_SEQUENCE = _ACKNOWLEDGED = _WINDOW = 0


def challenge(four_tuple: FourTuple) -> bytes:
    """The IP packet from server to client, with computed checksums, for `Resender.send`.

    Not for a client that has sent data: its ACK would not have the sequence number of the third
    one, and the server's RST would end the connection. Such a client repairs itself.
    """
    client, server = addresses_of(four_tuple)
    header = struct.pack(
        "!HHIIBBHHH",
        four_tuple.server_port,
        four_tuple.client_port,
        _SEQUENCE,
        _ACKNOWLEDGED,
        _HEADER_WORDS << 4,
        _SYN_ACK,
        _WINDOW,
        0,
        0,
    )
    return ip_packet(server, client, header)
