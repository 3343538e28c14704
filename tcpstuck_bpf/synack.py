"""Makes an IP packet from a TCP segment: from the kernel's own SYN-ACK, to send it again. Pure.

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
HOPS = 64
"""TTL or hop limit of a packet."""
_MOST_BYTES = 0xFFFF
"""Largest length that an IP header can hold."""
_IPV4_DONT_FRAGMENT = 0x4000
_IPV4_HEADER_BYTES = 20


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
    client, server = addresses_of(four_tuple)
    return ip_packet(server, client, segment)


def addresses_of(four_tuple: FourTuple) -> tuple[bytes, bytes]:
    """The client's and the server's address as in an IP header: 4 or 16 bytes."""
    addresses = four_tuple.client_address, four_tuple.server_address
    if four_tuple.family == 6:
        return addresses
    client, server = (address[-4:] for address in addresses)
    return client, server


def ip_packet(source: bytes, destination: bytes, segment: bytes, payload_length: int = 0) -> bytes:
    """The IP packet of a TCP segment without payload, with computed checksums.

    `payload_length` is the number of payload bytes that are cut off after the segment. The IP
    header counts them, and TCP's checksum is the one for zeros in their place. A length that the
    header cannot hold is 0 there, as in a packet that a device is still to split.
    """
    length = len(segment) + payload_length
    is_ipv4 = len(source) == 4
    width = "HH" if is_ipv4 else "II"
    numbers = (_IPPROTO_TCP, length & _MOST_BYTES) if is_ipv4 else (length, _IPPROTO_TCP)
    pseudo = source + destination + struct.pack(f"!{width}", *numbers)
    blank = segment[:_CHECKSUM_AT] + bytes(2) + segment[_CHECKSUM_AT + 2 :]
    whole = struct.pack("!H", checksum(pseudo + blank))
    segment = segment[:_CHECKSUM_AT] + whole + segment[_CHECKSUM_AT + 2 :]
    return _ip_header(source, destination, length) + segment


def _ip_header(source: bytes, destination: bytes, length: int) -> bytes:
    """The IP header in front of so many bytes of TCP."""
    if len(source) != 4:
        told = length if length <= _MOST_BYTES else 0
        return struct.pack("!IHBB", 6 << 28, told, _IPPROTO_TCP, HOPS) + source + destination
    whole = _IPV4_HEADER_BYTES + length
    told = whole if whole <= _MOST_BYTES else 0
    numbers = (0x45, 0, told, 0, _IPV4_DONT_FRAGMENT, HOPS, _IPPROTO_TCP)
    header = struct.pack("!BBHHHBB", *numbers)
    of_header = struct.pack("!H", checksum(header + bytes(2) + source + destination))
    return header + of_header + source + destination
