"""Parses TCP segments and builds SYNs quickly. All functions are pure.

Sequence numbers and ports are in host byte order; addresses are text.
"""

from __future__ import annotations

import ipaddress
import struct
from typing import NamedTuple

SYN, RST, PSH, ACK = 0x02, 0x04, 0x08, 0x10
IPPROTO_TCP = 6
MSS = {4: 1460, 6: 1440}
TIMESTAMP_OF_SYN = 100_000


class Segment(NamedTuple):
    """The TCP segment fields that the lab uses."""

    source_ip: str
    source_port: int
    destination_ip: str
    destination_port: int
    sequence: int
    flags: int


def parse_segment(packet: bytes) -> Segment | None:
    """The TCP segment in an IPv4 or IPv6 packet without link header; None for any other packet.

    A packet with IPv6 extension headers, or a fragment, also returns None.
    """
    version = packet[0] >> 4 if packet else 0
    if version == 4 and len(packet) >= 40 and packet[9] == IPPROTO_TCP:
        start = (packet[0] & 0x0F) * 4
        source = str(ipaddress.IPv4Address(packet[12:16]))
        destination = str(ipaddress.IPv4Address(packet[16:20]))
    elif version == 6 and len(packet) >= 60 and packet[6] == IPPROTO_TCP:
        start = 40
        source = str(ipaddress.IPv6Address(packet[8:24]))
        destination = str(ipaddress.IPv6Address(packet[24:40]))
    else:
        return None
    if len(packet) < start + 20:
        return None
    source_port, destination_port, sequence, _, _, flags = struct.unpack_from(
        "!HHIIBB", packet, start
    )
    return Segment(source, source_port, destination, destination_port, sequence, flags)


def ones_complement_sum(data: bytes) -> int:
    """The unfolded sum of 16-bit words, as RFC 1071 checksums need it."""
    if len(data) % 2:
        data += b"\0"
    return sum(struct.unpack(f"!{len(data) // 2}H", data))


def checksum(unfolded: int) -> int:
    """The Internet checksum (RFC 1071) of an unfolded sum."""
    while unfolded >> 16:
        unfolded = (unfolded & 0xFFFF) + (unfolded >> 16)
    return ~unfolded & 0xFFFF


class SynTemplate:
    """SYNs to one server that differ only in source address, source port and ISN.

    The constant bytes and their part of the checksum are computed once, so a SYN costs little more
    than its system call. `mss` is in bytes; the default is that of Ethernet.
    """

    def __init__(self, server_ip: str, server_port: int, mss: int | None = None) -> None:
        self._server = ipaddress.ip_address(server_ip).packed
        self.family = 4 if len(self._server) == 4 else 6
        options = struct.pack("!BBH", 2, 4, mss or MSS[self.family])
        # SACK permitted, timestamps, NOP, window scale 7: the options and order of Linux.
        options += struct.pack("!BBBBIIBBBB", 4, 2, 8, 10, TIMESTAMP_OF_SYN, 0, 1, 3, 3, 7)
        length = 20 + len(options)
        self._after_isn = struct.pack("!IBBH", 0, length // 4 << 4, SYN, 64240)
        self._after_checksum = struct.pack("!H", 0) + options
        self._port = server_port
        if self.family == 4:
            self._ip_header = struct.pack("!BBHHHBB", 0x45, 0, 20 + length, 0, 0x4000, 64, 6)
        else:
            self._ip_header = struct.pack("!IHBB", 6 << 28, length, IPPROTO_TCP, 64)
        self._constant_sum = (
            ones_complement_sum(self._server + self._after_isn + self._after_checksum)
            + server_port
            + length
            + IPPROTO_TCP
        )

    def packet(self, source: bytes, source_port: int, isn: int) -> bytes:
        """A complete IP packet; `source` is the packed address, in the server's family.

        The IPv4 header checksum stays 0; the kernel fills it in for raw sockets.
        """
        ports_and_isn = struct.pack("!HHI", source_port, self._port, isn)
        total = self._constant_sum + ones_complement_sum(source)
        total += source_port + (isn >> 16) + (isn & 0xFFFF)
        header = self._ip_header + (b"\0\0" if self.family == 4 else b"") + source + self._server
        tcp = ports_and_isn + self._after_isn + struct.pack("!H", checksum(total))
        return header + tcp + self._after_checksum


def segment_packet(
    ends: tuple[str, int, str, int],
    sequence: int,
    acknowledgement: int,
    payload: bytes = b"",
    wrong_by: int = 0,
    extensions: tuple[int, bytes] = (IPPROTO_TCP, b""),
) -> bytes:
    """A complete IP packet from client to server, without TCP options: ACK, plus PSH with data.

    `ends` is source address and port, then destination address and port. `wrong_by` is added to the
    TCP checksum; any value but a multiple of 65535 makes the checksum wrong. The kernel fills in
    the IPv4 header checksum. `extensions` are the IPv6 headers before TCP: the number of the first
    header, and the bytes of all headers.
    """
    source, destination = (ipaddress.ip_address(ends[which]).packed for which in (0, 2))
    flags = ACK | (PSH if payload else 0)
    numbers = (sequence % 2**32, acknowledgement % 2**32)
    tcp = struct.pack("!HHIIBBHHH", ends[1], ends[3], *numbers, 5 << 4, flags, 64240, 0, 0)
    tcp += payload
    total = ones_complement_sum(source + destination + tcp) + len(tcp) + IPPROTO_TCP
    spoilt = (checksum(total) + wrong_by) % 0xFFFF
    tcp = tcp[:16] + struct.pack("!H", spoilt) + tcp[18:]
    if len(source) == 4:
        ip = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(tcp), 0, 0x4000, 64, IPPROTO_TCP, 0)
    else:
        first, between = extensions
        ip = struct.pack("!IHBB", 6 << 28, len(between) + len(tcp), first, 64)
        tcp = between + tcp
    return ip + source + destination + tcp
