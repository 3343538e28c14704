"""The packet around a kept SYN-ACK is one that any stack accepts, and of that handshake only.

The oracles are scapy's own building of the same packet, and the sum of RFC 1071 over the finished
one, which must come out as all ones.
"""

from __future__ import annotations

import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import IP, TCP
from scapy.layers.inet6 import IPv6
from scapy.packet import Packet

from tcpstuck_bpf.model import FourTuple
from tcpstuck_bpf.synack import checksum, is_synack_of, synack_packet
from tests.builders import CLIENT_ISN, COOKIE_ISN, four_tuple, handshake

KEPT_BYTES = 60
OPTIONS = st.lists(
    st.one_of(
        st.just(("NOP", None)),
        st.tuples(st.just("MSS"), st.integers(0, 2**16 - 1)),
        st.just(("SAckOK", b"")),
        st.tuples(st.just("WScale"), st.integers(0, 14)),
        st.tuples(
            st.just("Timestamp"), st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
        ),
    ),
    max_size=4,
    unique_by=lambda option: option[0],
)
FAMILIES = pytest.mark.parametrize("family", [4, 6])


def segment_of(who: FourTuple, **changes: Any) -> bytes:
    """A SYN-ACK as tcp_make_synack leaves it: no checksum, and garbage behind the header."""
    fields: dict[str, Any] = {
        "sport": who.server_port,
        "dport": who.client_port,
        "seq": COOKIE_ISN,
        "ack": CLIENT_ISN + 1,
        "flags": "SA",
        "window": 64_240,
        "chksum": 0,
        "options": [("MSS", 1460), ("SAckOK", b""), ("Timestamp", (7, 9)), ("WScale", 7)],
        **changes,
    }
    return bytes(TCP(**fields)).ljust(KEPT_BYTES, b"\xa5")


def ones_sum(data: bytes) -> int:
    """The sum of RFC 1071 taken another way: by the remainder, 0xffff being its zero."""
    return int.from_bytes(data + bytes(len(data) % 2), "big") % 0xFFFF


def test_the_example_of_rfc_1071() -> None:
    """Section 3: the sum of these bytes is ddf2."""
    assert checksum(bytes.fromhex("0001f203f4f5f6f7")) == 0xFFFF - 0xDDF2


@given(st.binary(max_size=70))
def test_data_with_its_checksum_sums_up_to_all_ones(data: bytes) -> None:
    padded = data + bytes(len(data) % 2)
    assert ones_sum(padded + struct.pack("!H", checksum(data))) == 0


@FAMILIES
@given(options=OPTIONS, garbage=st.binary(min_size=40, max_size=40), old=st.integers(0, 65_535))
def test_the_packet_is_what_scapy_makes_of_the_same_header(
    family: int, options: list[tuple[str, object]], garbage: bytes, old: int
) -> None:
    who = four_tuple(300, family)
    blank = TCP(
        sport=who.server_port,
        dport=who.client_port,
        seq=COOKIE_ISN,
        ack=CLIENT_ISN + 1,
        flags="SA",
        window=64_240,
        options=options,
    )
    whole: Packet
    if family == 4:
        whole = IP(src=who.server_ip, dst=who.client_ip, id=0, flags="DF", ttl=64) / blank
    else:
        whole = IPv6(src=who.server_ip, dst=who.client_ip, hlim=64) / blank
    unfinished = blank.copy()
    unfinished.chksum = old
    kept = (bytes(unfinished) + garbage)[:KEPT_BYTES]
    assert synack_packet(who, kept) == bytes(whole)


@FAMILIES
def test_every_checksum_verifies(family: int) -> None:
    who = four_tuple(300, family)
    packet = synack_packet(who, segment_of(who))
    if family == 4:
        assert ones_sum(packet[:20]) == 0
        segment, addresses = packet[20:], packet[12:20]
    else:
        segment, addresses = packet[40:], packet[8:40]
    assert ones_sum(addresses + struct.pack("!II", len(segment), 6) + segment) == 0


@FAMILIES
def test_the_kept_segment_is_recognised(family: int) -> None:
    who = four_tuple(1, family)
    assert is_synack_of(segment_of(who), handshake(), who)
    assert is_synack_of(segment_of(who, flags="SAE"), handshake(), who)
    assert is_synack_of(segment_of(who, options=[]), handshake(), who)


def test_sequence_numbers_wrap() -> None:
    who = four_tuple()
    assert is_synack_of(segment_of(who, ack=0), handshake(client_isn=2**32 - 1), who)


@pytest.mark.parametrize(
    "changes",
    [
        {"flags": "S"},
        {"flags": "A"},
        {"flags": "SAR"},
        {"flags": "SAF"},
        {"seq": COOKIE_ISN + 1},
        {"ack": CLIENT_ISN},
        {"sport": 1},
        {"dport": 1},
        {"dataofs": 4},
        {"dataofs": 0},
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, object]) -> None:
    assert not is_synack_of(segment_of(four_tuple(), **changes), handshake(), four_tuple())


@given(st.binary(max_size=KEPT_BYTES))
def test_anything_can_be_asked_about(data: bytes) -> None:
    assert not is_synack_of(data, handshake(), four_tuple())


def test_a_header_longer_than_what_was_kept_is_refused() -> None:
    segment = segment_of(four_tuple())
    assert not is_synack_of(segment[: (segment[12] >> 4) * 4 - 1], handshake(), four_tuple())
