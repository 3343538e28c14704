"""A classic BPF program that passes SYN-ACKs from some ports, and their decoding. Pure.

The program is for a packet socket of type SOCK_DGRAM, where a packet begins with its IP header
(packet(7)). It passes IPv4 with or without options, but no fragments, and IPv6 without extension
headers: Linux sends no extension headers with a SYN-ACK unless an application asks for them. It
drops PACKET_OUTGOING: on the loopback device every packet passes a packet socket twice, and what
this host sends is no answer to a client of this namespace.

Numbers of instructions are those of include/uapi/linux/bpf_common.h and filter.h.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from tcpstuck_bpf.model import IPV4_MAPPED_PREFIX, FourTuple

SNAP_BYTES = 120
"""Bytes of a packet that are handed over: IPv4 and TCP headers of 60 bytes each."""
MOST_RANGES = 1000
"""Ranges of ports that fit into a program; BPF_MAXINSNS is 4096."""
CHALLENGE_ACKNOWLEDGES = 0
"""The acknowledgement in a SYN-ACK of our own (`challenge`): it says nothing about a handshake."""

_TCP_HEADER_BYTES = 20
_IPV6_HEADER_BYTES = 40
_IPPROTO_TCP = 6
_FLAGS, _SYN_ACK = 0x17, 0x12
"""FIN, SYN, RST and ACK; and what they are in a SYN-ACK."""
_FRAGMENT = 0x3FFF
"""More fragments, and the offset (RFC 791)."""
_PACKET_TYPE = 0xFFFFF004
"""SKF_AD_OFF + SKF_AD_PKTTYPE."""
_PACKET_OUTGOING = 4
_TIMESTAMPS, _TIMESTAMPS_BYTES, _WINDOW_SCALE = 8, 10, 3

_LOAD_WORD, _LOAD_HALF, _LOAD_BYTE = 0x20, 0x28, 0x30
_LOAD_HALF_AT_X, _LOAD_BYTE_AT_X = 0x48, 0x50
_X_HEADER_LENGTH, _X_CONSTANT = 0xB1, 0x01
_AND, _EQUAL, _GREATER, _AT_LEAST, _ANY_BIT, _ALWAYS, _RETURN = (
    *(0x54, 0x15, 0x25, 0x35),
    *(0x45, 0x05, 0x06),
)
_DROP = "drop"


class Instruction(NamedTuple):
    """A struct sock_filter: jumps are numbers of instructions to skip."""

    code: int
    if_true: int
    if_false: int
    constant: int


class Synack(NamedTuple):
    """What a SYN-ACK says. Sequence numbers are in host order."""

    four_tuple: FourTuple
    client_isn: int
    server_isn: int
    """The server's ISN; under SYN cookies, the cookie."""
    timestamps: tuple[int, int] | None
    """TSval and TSecr (RFC 7323); None without the option."""
    window_scale: int | None
    """The server's window scale; None without the option, and then neither side scales."""
    time_ns: int
    """When it arrived: CLOCK_MONOTONIC nanoseconds."""


_Step = tuple[int, str, str, int]
"""An instruction whose jumps name a label; an empty label is the next instruction."""


def synack_filter(ports: Iterable[int]) -> tuple[Instruction, ...]:
    """The program for SYN-ACKs from these ports; from every port where `ports` is empty.

    From every port, too, where the ports make more than MOST_RANGES ranges.
    """
    ranges = list(_ranges(ports))
    steps: list[_Step | str] = [
        (_LOAD_WORD, "", "", _PACKET_TYPE),
        (_EQUAL, _DROP, "", _PACKET_OUTGOING),
        (_LOAD_BYTE, "", "", 0),
        (_AND, "", "", 0xF0),
        (_EQUAL, "", "ipv6", 0x40),
        (_LOAD_BYTE, "", "", 9),
        (_EQUAL, "", _DROP, _IPPROTO_TCP),
        (_LOAD_HALF, "", "", 6),
        (_ANY_BIT, _DROP, "", _FRAGMENT),
        (_X_HEADER_LENGTH, "", "", 0),
        (_ALWAYS, "tcp", "tcp", 0),
        "ipv6",
        (_EQUAL, "", _DROP, 0x60),
        (_LOAD_BYTE, "", "", 6),
        (_EQUAL, "", _DROP, _IPPROTO_TCP),
        (_X_CONSTANT, "", "", _IPV6_HEADER_BYTES),
        (_ALWAYS, "tcp", "tcp", 0),
        # A conditional jump goes at most 255 instructions far, so this is before the ports.
        _DROP,
        (_RETURN, "", "", 0),
        "tcp",
        (_LOAD_BYTE_AT_X, "", "", 13),
        (_AND, "", "", _FLAGS),
        (_EQUAL, "flags are right", "", _SYN_ACK),
        (_RETURN, "", "", 0),
        "flags are right",
        (_LOAD_HALF_AT_X, "", "", 0),
    ]
    return (*_assembled(steps), *_for_ports(ranges))


def _ranges(ports: Iterable[int]) -> Iterator[tuple[int, int]]:
    low = high = -1
    for port in sorted(set(ports)):
        if port != high + 1 or low < 0:
            if low >= 0:
                yield low, high
            low = port
        high = port
    if low >= 0:
        yield low, high


def _for_ports(ranges: list[tuple[int, int]]) -> Iterator[Instruction]:
    """Pass the packet if the port in the accumulator is in any range."""
    if not ranges or len(ranges) > MOST_RANGES:
        yield Instruction(_RETURN, 0, 0, SNAP_BYTES)
        return
    for low, high in ranges:
        yield Instruction(_AT_LEAST, 0, 2, low)
        yield Instruction(_GREATER, 1, 0, high)
        yield Instruction(_RETURN, 0, 0, SNAP_BYTES)
    yield Instruction(_RETURN, 0, 0, 0)


def _assembled(steps: list[_Step | str]) -> Iterator[Instruction]:
    """Instructions with their jumps as numbers."""
    places: dict[str, int] = {}
    plain: list[_Step] = []
    for step in steps:
        if isinstance(step, str):
            places[step] = len(plain)
        else:
            plain.append(step)
    for number, (code, if_true, if_false, constant) in enumerate(plain, 1):
        over = [places[label] - number if label else 0 for label in (if_true, if_false)]
        if code == _ALWAYS:
            yield Instruction(code, 0, 0, over[0])
        else:
            yield Instruction(code, over[0], over[1], constant)


def program_bytes(program: Iterable[Instruction]) -> bytes:
    """A program as an array of struct sock_filter, in this machine's byte order."""
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


def parse_synack(packet: bytes, netns: int, time_ns: int) -> Synack | None:
    """The SYN-ACK in a packet that begins with its IP header; None for any other packet.

    None also for a SYN-ACK that `challenge` made; one real SYN-ACK in 2^32 looks like that. `netns`
    is the inode number of the namespace in which it arrived.
    """
    addresses = _addresses_and_length(packet)
    if addresses is None:
        return None
    server, client, start = addresses
    segment = packet[start:]
    if len(segment) < _TCP_HEADER_BYTES or segment[13] & _FLAGS != _SYN_ACK:
        return None
    server_port, client_port, sequence, acknowledged = struct.unpack_from("!HHII", segment)
    if acknowledged == CHALLENGE_ACKNOWLEDGES:
        return None
    timestamps, scale = _options(segment[_TCP_HEADER_BYTES : (segment[12] >> 4) * 4])
    return Synack(
        FourTuple(client, server, client_port, server_port, netns),
        (acknowledged - 1) % 2**32,
        sequence,
        timestamps,
        scale,
        time_ns,
    )


def _addresses_and_length(packet: bytes) -> tuple[bytes, bytes, int] | None:
    """Source and destination as 16 bytes, and the length of the IP header."""
    version = packet[0] >> 4 if packet else 0
    if version == 4 and len(packet) >= 20 and packet[9] == _IPPROTO_TCP:
        (fragment,) = struct.unpack_from("!H", packet, 6)
        start = (packet[0] & 0x0F) * 4
        if fragment & _FRAGMENT or start < 20:
            return None
        return (IPV4_MAPPED_PREFIX + packet[12:16], IPV4_MAPPED_PREFIX + packet[16:20], start)
    if version == 6 and len(packet) >= _IPV6_HEADER_BYTES and packet[6] == _IPPROTO_TCP:
        return packet[8:24], packet[24:40], _IPV6_HEADER_BYTES
    return None


def _options(data: bytes) -> tuple[tuple[int, int] | None, int | None]:
    """Timestamps and window scale; what follows a malformed option is not read."""
    timestamps, scale = None, None
    at = 0
    while at < len(data) and data[at] != 0:
        if data[at] == 1:
            at += 1
            continue
        length = data[at + 1] if at + 1 < len(data) else 0
        if length < 2 or at + length > len(data):
            break
        if (data[at], length) == (_TIMESTAMPS, _TIMESTAMPS_BYTES):
            timestamps = struct.unpack_from("!II", data, at + 2)
        elif (data[at], length) == (_WINDOW_SCALE, 3):
            scale = data[at + 2]
        at += length
    return timestamps, scale
