"""Makes an IP packet from a SYN-ACK that the kernel built, to send it again. Pure.

The TCP segment exists already; only an IP header and two checksums are missing. A packet library
for that would be the largest dependency of all.
"""

from __future__ import annotations

import struct

from tcpstuck_bpf.model import FourTuple, Handshake

_TCP_HEADER_BYTES = 20
_CHECKSUM_AT = 16
_SYN_ACK = 0x12
_FLAGS = 0x3F
_IPPROTO_TCP = 6
_HOPS = 64
_IPV4_DONT_FRAGMENT = 0x4000


def checksum(data: bytes) -> int:
    """The Internet checksum of RFC 1071."""
    if len(data) % 2:
        data += b"\0"
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total >> 16) + (total & 0xFFFF)
    return ~total & 0xFFFF


def _header_bytes(tcp_segment: bytes) -> int:
    offset: int = tcp_segment[12] >> 4
    return offset * 4


def is_synack_of(tcp_segment: bytes, handshake: Handshake, four_tuple: FourTuple) -> bool:
    """Whether a segment is the last SYN-ACK of a handshake; no other segment may be sent.

    `tcp_segment` is a struct synack: a TCP header with options, and the rest of the buffer.
    """
    if len(tcp_segment) < _TCP_HEADER_BYTES:
        return False
    source, destination, sequence, acknowledgement = struct.unpack_from("!HHII", tcp_segment)
    return (
        _TCP_HEADER_BYTES <= _header_bytes(tcp_segment) <= len(tcp_segment)
        and tcp_segment[13] & _FLAGS == _SYN_ACK
        and (source, destination) == (four_tuple.server_port, four_tuple.client_port)
        and sequence == handshake.cookie_isn
        and acknowledgement == (handshake.client_isn + 1) % 2**32
    )


def synack_packet(four_tuple: FourTuple, tcp_segment: bytes) -> bytes:
    """The IP packet from server to client, with a segment that `is_synack_of` accepts.

    The segment is cut at its own header length, and the checksums are computed.
    """
    segment = tcp_segment[: _header_bytes(tcp_segment)]
    if four_tuple.family == 4:
        source, destination = four_tuple.server_address[12:], four_tuple.client_address[12:]
        pseudo = source + destination + struct.pack("!HH", _IPPROTO_TCP, len(segment))
    else:
        source, destination = four_tuple.server_address, four_tuple.client_address
        pseudo = source + destination + struct.pack("!II", len(segment), _IPPROTO_TCP)
    blank = segment[:_CHECKSUM_AT] + bytes(2) + segment[_CHECKSUM_AT + 2 :]
    whole = struct.pack("!H", checksum(pseudo + blank))
    segment = segment[:_CHECKSUM_AT] + whole + segment[_CHECKSUM_AT + 2 :]
    if four_tuple.family == 6:
        header = struct.pack("!IHBB", 6 << 28, len(segment), _IPPROTO_TCP, _HOPS)
        return header + source + destination + segment
    numbers = (0x45, 0, 20 + len(segment), 0, _IPV4_DONT_FRAGMENT, _HOPS, _IPPROTO_TCP)
    header = struct.pack("!BBHHHBB", *numbers)
    of_header = struct.pack("!H", checksum(header + bytes(2) + source + destination))
    return header + of_header + source + destination + segment
