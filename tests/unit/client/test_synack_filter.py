"""The filter passes SYN-ACKs of the wanted ports and nothing else.

The kernel itself runs it: it is attached to a datagram socket, and each packet is sent to that as a
message. scapy makes the packets.
"""

from __future__ import annotations

import contextlib
import ctypes
import socket
import struct
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet import IP, TCP, IPOption_NOP
from scapy.layers.inet6 import IPv6, IPv6ExtHdrDestOpt
from scapy.layers.l2 import ARP

from tcpstuck_bpf.client.synack_filter import (
    MOST_RANGES,
    SNAP_BYTES,
    parse_synack,
    program_bytes,
    synack_filter,
)
from tcpstuck_bpf.model import FourTuple, address_bytes

SO_ATTACH_FILTER = 26
CLIENT = {4: "10.9.0.2", 6: "fd09::2"}
SERVER = {4: "10.9.0.1", 6: "fd09::1"}
FAMILIES = pytest.mark.parametrize("family", [4, 6])


def head(family: int, **fields: Any) -> Any:
    ends = {"src": SERVER[family], "dst": CLIENT[family]}
    return IP(**ends, **fields) if family == 4 else IPv6(**ends, **fields)


def tcp(**changes: Any) -> Any:
    fields = {"sport": 3306, "dport": 40_000, "seq": 77, "ack": 56, "flags": "SA"}
    return TCP(**{**fields, **changes})


class Filtering:
    """A socket with the filter of some ports; the kernel's answer for any packet."""

    def __init__(self, ports: Iterable[int]) -> None:
        self.source, self.target = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        code = program_bytes(synack_filter(ports))
        buffer = ctypes.create_string_buffer(code, len(code))
        program = struct.pack("@HP", len(code) // 8, ctypes.addressof(buffer))
        self.target.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, program)
        self.target.setblocking(False)

    def passed(self, packet: bytes) -> bytes | None:
        """What is left of a packet; None if it was dropped."""
        self.source.send(packet)
        try:
            return self.target.recv(65_536)
        except BlockingIOError:
            return None

    def close(self) -> None:
        self.source.close()
        self.target.close()


@contextlib.contextmanager
def filtering(*ports: int) -> Iterator[Filtering]:
    with contextlib.closing(Filtering(ports)) as made:
        yield made


@FAMILIES
def test_a_synack_of_the_port_passes(family: int) -> None:
    packet = bytes(head(family) / tcp())
    with filtering(3306) as kernel:
        assert kernel.passed(packet) == packet
    with filtering(3307) as kernel:
        assert kernel.passed(packet) is None
    with filtering() as kernel:
        assert kernel.passed(packet) == packet


@FAMILIES
def test_only_the_headers_are_handed_over(family: int) -> None:
    packet = bytes(head(family) / tcp() / (b"x" * 1000))
    with filtering(3306) as kernel:
        assert kernel.passed(packet) == packet[:SNAP_BYTES]


def test_ip_options_are_stepped_over() -> None:
    packet = bytes(head(4, options=[IPOption_NOP()] * 40) / tcp())
    assert packet[0] == 0x4F
    with filtering(3306) as kernel:
        assert kernel.passed(packet) == packet
    seen = parse_synack(packet, 1, 2)
    assert seen is not None
    assert (seen.server_isn, seen.client_isn) == (77, 55)


@FAMILIES
@pytest.mark.parametrize("flags", ["S", "A", "SAR", "SAF", "R", "PA", "FA", ""])
def test_other_flags_do_not_pass(family: int, flags: str) -> None:
    packet = bytes(head(family) / tcp(flags=flags))
    with filtering(3306) as kernel:
        assert kernel.passed(packet) is None
    assert parse_synack(packet, 1, 2) is None


@FAMILIES
@pytest.mark.parametrize("flags", ["SAE", "SAC", "SAP", "SAU"])
def test_flags_that_do_not_matter_pass(family: int, flags: str) -> None:
    packet = bytes(head(family) / tcp(flags=flags))
    with filtering(3306) as kernel:
        assert kernel.passed(packet) == packet
    assert parse_synack(packet, 1, 2) is not None


OTHERS = {
    "first fragment": bytes(head(4, flags="MF") / tcp()),
    "later fragment": bytes(head(4, frag=1) / tcp()),
    "UDP": bytes(head(4, proto=17) / tcp()),
    "UDP of IPv6": bytes(head(6, nh=17) / tcp()),
    "extension header": bytes(head(6) / IPv6ExtHdrDestOpt() / tcp()),
    "ARP": bytes(ARP()),
    "nothing": b"",
    "one byte": b"\x45",
    "cut in IPv4": bytes(head(4) / tcp())[:30],
    "cut in IPv6": bytes(head(6) / tcp())[:50],
}


@pytest.mark.parametrize("what", OTHERS)
def test_other_packets_do_not_pass(what: str) -> None:
    with filtering() as kernel:
        assert kernel.passed(OTHERS[what]) is None
    assert parse_synack(OTHERS[what], 1, 2) is None


@settings(max_examples=25)
@given(ports=st.sets(st.integers(1, 65_535), max_size=30), more=st.integers(1, 65_535))
def test_exactly_the_wanted_ports_pass(ports: set[int], more: int) -> None:
    tried = {p % 65_536 for port in [*ports, more] for p in (port - 1, port, port + 1)}
    with filtering(*ports) as kernel:
        passed = {
            port
            for port in tried
            if kernel.passed(bytes(IP(dst="10.9.0.2") / tcp(sport=port))) is not None
        }
    assert passed == (tried & ports if ports else tried)


def test_many_ranges_fit_and_too_many_pass_every_port() -> None:
    many = range(1, 2 * MOST_RANGES, 2)
    first, none = (bytes(head(4) / tcp(sport=port)) for port in (1, 2))
    last = bytes(head(4) / tcp(sport=2 * MOST_RANGES - 1))
    with filtering(*many) as kernel:
        assert kernel.passed(first) == first
        assert kernel.passed(last) == last
        assert kernel.passed(none) is None
    with filtering(*many, 60_001) as kernel:
        assert kernel.passed(none) == none


def test_all_ports_of_a_range_are_one_range() -> None:
    assert len(synack_filter(range(1, 65_536))) < len(synack_filter([1, 3])) + 1


@given(st.binary(max_size=130))
def test_whatever_passes_is_decoded_and_nothing_else(data: bytes) -> None:
    with filtering() as kernel:
        if kernel.passed(data) is None:
            assert parse_synack(data, 1, 2) is None


@FAMILIES
@given(data=st.binary(min_size=12, max_size=12), length=st.integers(0, 60))
def test_what_passes_whole_is_decoded(family: int, data: bytes, length: int) -> None:
    """If a header is cut off, the kernel's program needs the first 14 bytes only."""
    segment = bytearray(bytes(tcp()))
    segment[:12] = data
    packet = (bytes(head(family)) + segment)[:length]
    whole = length >= len(packet) and len(packet) == len(bytes(head(family) / tcp()))
    with filtering() as kernel:
        passed = kernel.passed(packet) is not None
    decoded = parse_synack(packet, 1, 2) is not None
    assert decoded == (passed and whole and data[8:] != bytes(4))


@FAMILIES
@given(
    numbers=st.tuples(*[st.integers(0, 2**32 - 2)] * 4),
    ports=st.tuples(st.integers(1, 65_535), st.integers(1, 65_535)),
    scale=st.none() | st.integers(0, 14),
    stamped=st.booleans(),
)
def test_the_numbers_are_scapys(
    family: int,
    numbers: tuple[int, int, int, int],
    ports: tuple[int, int],
    scale: int | None,
    stamped: bool,
) -> None:
    server_isn, client_isn, value, echo = numbers
    options: list[tuple[str, object]] = [("MSS", 1460), ("SAckOK", b"")]
    options += [("Timestamp", (value, echo))] if stamped else []
    options += [("NOP", None), ("WScale", scale)] if scale is not None else []
    fields = {"sport": ports[0], "dport": ports[1], "options": options, "seq": server_isn}
    packet = bytes(head(family) / tcp(**fields, ack=(client_isn + 1) % 2**32))
    seen = parse_synack(packet, 5, 6)
    ends = address_bytes(CLIENT[family]), address_bytes(SERVER[family])
    assert seen is not None
    assert seen.four_tuple == FourTuple(*ends, ports[1], ports[0], 5)
    assert (seen.server_isn, seen.client_isn, seen.time_ns) == (server_isn, client_isn, 6)
    assert seen.timestamps == ((value, echo) if stamped else None)
    assert seen.window_scale == scale


@given(st.binary(max_size=40))
def test_any_options_can_be_read(options: bytes) -> None:
    padded = options.ljust(-(-len(options) // 4) * 4, b"\0")
    packet = bytearray(bytes(head(4) / tcp()) + padded)
    packet[32] = (5 + len(padded) // 4) << 4
    assert parse_synack(bytes(packet), 1, 2) is not None
