"""Makes the third packet of a client's handshake once more, from the numbers in the SYN-ACK. Pure.

A listener that knows only the cookie validates this ACK and makes the connection. A server that
knows the connection takes it for an old duplicate. A server that knows neither answers by an RST.
Seen on 6.18.
"""

from __future__ import annotations

import struct

from tcpstuck_bpf.client.synack_filter import Synack
from tcpstuck_bpf.synack import addresses_of, ip_packet

USUAL_WINDOW_SCALE = 10
"""Linux's choice on a machine with the default limit of receive memory (tcp_select_window)."""

_ACK = 0x10
_HEADER_WORDS, _WORDS_WITH_TIMESTAMPS = 5, 8
_NOP, _TIMESTAMPS, _TIMESTAMPS_BYTES = 1, 8, 10
_WINDOW_BYTES = 64_000
"""The kernel offers 64 KiB at first (tcp_select_initial_window)."""


def third_ack(synack: Synack, client_scale: int = USUAL_WINDOW_SCALE) -> bytes:
    """The IP packet from client to server, with computed checksums.

    Its numbers are those of the client's own ACK. TSval is the SYN's timestamp, which the SYN-ACK
    echoes: a newer one could make the server reject the client's next packet (PAWS, RFC 7323).
    TSecr is the SYN-ACK's timestamp, in which a cookie keeps window scale, SACK and ECN
    (cookie_timestamp_decode): without it the two ends would scale windows differently.

    `client_scale` is the shift of the client's receive window (tcpi_rcv_wscale). The new connection
    takes its first send window from this ACK. A wrong shift makes the first window too small or too
    large until the client's next ACK.
    """
    client, server = addresses_of(synack.four_tuple)
    words, options = _HEADER_WORDS, b""
    if synack.timestamps is not None:
        value, echo = synack.timestamps
        words = _WORDS_WITH_TIMESTAMPS
        kinds = (_NOP, _NOP, _TIMESTAMPS, _TIMESTAMPS_BYTES)
        options = struct.pack("!BBBBII", *kinds, echo, value)
    # Without the option in the SYN-ACK no window is scaled (RFC 7323, 2.2).
    window = _WINDOW_BYTES >> (0 if synack.window_scale is None else client_scale)
    header = struct.pack(
        "!HHIIBBHHH",
        synack.four_tuple.client_port,
        synack.four_tuple.server_port,
        (synack.client_isn + 1) % 2**32,
        (synack.server_isn + 1) % 2**32,
        words << 4,
        _ACK,
        window,
        0,
        0,
    )
    return ip_packet(client, server, header + options)
