"""Converts the kernel's bytes to values of `model`: the Python half of bpf/tcpstuck.h.

The formats spell out every pad byte and use the host's byte order without alignment, so that a
test can compare them, offset by offset, with the C compiler's layout of the header.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator

from tcpstuck_bpf.model import (
    Event,
    FourTuple,
    Handshake,
    ListenerFacts,
    NetnsCount,
    Row,
    TraceSettings,
)

KEY_FORMAT = "16s16s2s2sI"
HANDSHAKE_FORMAT = "9Q13IH3B7x2I"
SEGMENT_FORMAT = "Q4IH3B3x"

KEY = struct.Struct("=" + KEY_FORMAT)
HANDSHAKE = struct.Struct("=" + HANDSHAKE_FORMAT)
ROW = struct.Struct("=" + KEY_FORMAT + HANDSHAKE_FORMAT)
EVENT = struct.Struct("=" + KEY_FORMAT + HANDSHAKE_FORMAT + SEGMENT_FORMAT)
NETNS_KEY = struct.Struct("=QI4x")
COUNTS = struct.Struct(f"={len(NetnsCount)}Q")
SYNACK = struct.Struct("=60s")
KNOWN_CLIENT = struct.Struct("=16s16sI2s2x")
LISTENER_KEY = struct.Struct("=16sI2s2xI")
LISTENER_FACTS = struct.Struct("=5Q11I16s2s2x")
CONFIG = struct.Struct("=4Q2I3B5s16s")

_KEY_FIELDS = 5
_HANDSHAKE_FIELDS = len(Handshake._fields)


def _four_tuple(client: bytes, server: bytes, cport: bytes, sport: bytes, netns: int) -> FourTuple:
    return FourTuple(
        client, server, int.from_bytes(cport, "big"), int.from_bytes(sport, "big"), netns
    )


def decode_key(data: bytes) -> FourTuple:
    """Decode a struct handshake_key. Raises struct.error if the length is wrong."""
    return _four_tuple(*KEY.unpack(data))


def encode_key(four_tuple: FourTuple) -> bytes:
    """The struct handshake_key of a 4-tuple."""
    return KEY.pack(
        four_tuple.client_address,
        four_tuple.server_address,
        four_tuple.client_port.to_bytes(2, "big"),
        four_tuple.server_port.to_bytes(2, "big"),
        four_tuple.netns,
    )


def encode_known_client(four_tuple: FourTuple) -> bytes:
    """The struct known_client of a 4-tuple."""
    return KNOWN_CLIENT.pack(
        four_tuple.client_address,
        four_tuple.server_address,
        four_tuple.netns,
        four_tuple.server_port.to_bytes(2, "big"),
    )


def decode_rows(keys: bytes, values: bytes) -> Iterator[Row]:
    """Decode a batch of packed struct handshake_key and struct handshake, in the same order.

    Raises ValueError if the two do not have the same number of entries.
    """
    if len(keys) // KEY.size != len(values) // HANDSHAKE.size:
        raise ValueError(f"{len(keys)} bytes of keys do not match {len(values)} bytes of values")
    for key, value in zip(KEY.iter_unpack(keys), HANDSHAKE.iter_unpack(values)):
        yield Row(_four_tuple(*key), Handshake._make(value))


def decode_handshake(data: bytes) -> Handshake:
    """Decode a struct handshake. Raises struct.error if the length is wrong."""
    return Handshake._make(HANDSHAKE.unpack(data))


def decode_event(data: bytes) -> Event:
    """Decode a struct event. Raises struct.error if there are too few bytes.

    The ring buffer may round a record up to 8 bytes, so bytes after the struct are ignored.
    """
    values = EVENT.unpack_from(data)
    segment = values[_KEY_FIELDS + _HANDSHAKE_FIELDS :]
    return Event(
        _four_tuple(*values[:_KEY_FIELDS]),
        Handshake._make(values[_KEY_FIELDS : _KEY_FIELDS + _HANDSHAKE_FIELDS]),
        *segment,
    )


TELL_SYN_AGAIN_AFTER_NS = 900_000_000
"""Shortest time between two events for repeated SYNs of one handshake. Every TCP waits longer
before it repeats a SYN (1 s; RFC 6298), so this suppresses only floods."""
TELL_ACK_AGAIN_AFTER_NS = 250_000_000
"""Shortest time between two events for ACKs of one handshake. A client waits longer before it
answers a repeated SYN-ACK again (500 ms by default; tcp_invalid_ratelimit)."""


REPEATS_TOLD, REPEATS_READ = 0, 1
"""Indices of the two counts in the table `repeats`."""


def encode_config(
    settings: TraceSettings, per_cpu_offset_table: int | None, most_repeats_unread: int
) -> bytes:
    """The struct trace_config for these settings; the ports have a table of their own.

    `per_cpu_offset_table` is the address of the kernel's __per_cpu_offset; None if unknown.
    `most_repeats_unread` limits the unread events for repeated SYNs.
    """
    wanted = settings.trace_filter
    return CONFIG.pack(
        0 if settings.tell_healthy else settings.timeout_ns * 3 // 4,
        TELL_SYN_AGAIN_AFTER_NS,
        TELL_ACK_AGAIN_AFTER_NS,
        per_cpu_offset_table or 0,
        wanted.netns or 0,
        most_repeats_unread,
        bool(wanted.ports),
        wanted.listener_address is not None,
        wanted.family or 0,
        bytes(5),
        wanted.listener_address or bytes(16),
    )


def port_bits(ports: Iterable[int]) -> dict[int, int]:
    """The nonzero words of the programs' table of wanted ports, one bit per port, by index."""
    words: dict[int, int] = {}
    for port in ports:
        words[port >> 6] = words.get(port >> 6, 0) | 1 << (port & 63)
    return words


def decode_counts(data: bytes) -> dict[NetnsCount, int]:
    """Decode a struct netns_counts of one CPU."""
    return dict(zip(NetnsCount, COUNTS.unpack(data)))


def decode_listener(key: bytes, value: bytes) -> ListenerFacts:
    """Decode a struct listener_key and its struct listener_facts."""
    _, netns, _, socket = LISTENER_KEY.unpack(key)
    *figures, address, port = LISTENER_FACTS.unpack(value)
    facts = ListenerFacts(netns, address, int.from_bytes(port, "big"), *figures)
    return facts._replace(socket=socket)
