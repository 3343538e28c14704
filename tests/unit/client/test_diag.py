"""Messages of sock_diag, made and read here by the kernel's definitions and not the tool's."""

from __future__ import annotations

import socket
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcpstuck_bpf.client.diag import Answer, bytecode, parse, request, runs_of

NETNS = 7
PORTS = st.lists(st.integers(1, 65535), min_size=1, max_size=40, unique=True).map(sorted)


def attribute(kind: int, value: bytes) -> bytes:
    text = struct.pack("=HH", 4 + len(value), kind) + value
    return text + bytes(-len(text) % 4)


def tcp_info(**facts: int) -> bytes:
    """struct tcp_info up to tcpi_data_segs_out, of include/uapi/linux/tcp.h."""
    words = struct.pack("=8B", 1, 0, 0, 0, 0, 7, 0x77, 0)
    for name in (
        *("rto", "ato", "snd_mss", "rcv_mss", "unacked", "sacked", "lost", "retrans", "fackets"),
        *("last_data_sent", "last_ack_sent", "last_data_recv", "last_ack_recv"),
        *("pmtu", "rcv_ssthresh", "rtt", "rttvar", "snd_ssthresh", "snd_cwnd", "advmss"),
        *("reordering", "rcv_rtt", "rcv_space", "total_retrans"),
    ):
        words += struct.pack("=I", facts.pop(name, 0))
    for name in ("pacing_rate", "max_pacing_rate", "bytes_acked", "bytes_received"):
        words += struct.pack("=Q", facts.pop(name, 0))
    names = ("segs_out", "segs_in", "notsent_bytes", "min_rtt", "data_segs_in", "data_segs_out")
    for name in names:
        words += struct.pack("=I", facts.pop(name, 0))
    assert not facts
    return words


def message(
    family: int, source: str, destination: str, *attributes: bytes, timer: int = 0
) -> bytes:
    ends = [socket.inet_pton(family, one).ljust(16, b"\0") for one in (source, destination)]
    body = struct.pack("=4B", family, 1, timer, 0) + struct.pack(">HH", 43_904, 3306)
    body += ends[0] + ends[1] + struct.pack("=IQ", 2, 0x1_0000_0005)
    body += struct.pack("=5I", 9_500, 0, 0, 1000, 7001)
    return framed(20, body + b"".join(attributes))


def framed(kind: int, body: bytes) -> bytes:
    return struct.pack("=IHHII", 16 + len(body), kind, 2, 1, 5) + body + bytes(-len(body) % 4)


DONE = framed(3, struct.pack("=i", 0))
INFO = attribute(2, tcp_info(last_data_recv=60_000, last_ack_recv=40_000, bytes_acked=1, segs_in=2))


@pytest.mark.parametrize(
    ("family", "source", "destination", "client", "server", "version"),
    [
        (socket.AF_INET, "10.9.0.2", "10.9.0.1", "10.9.0.2", "10.9.0.1", 4),
        (socket.AF_INET6, "fd09::2", "fd09::1", "fd09::2", "fd09::1", 6),
        (socket.AF_INET6, "::ffff:10.9.0.2", "::ffff:10.9.0.1", "10.9.0.2", "10.9.0.1", 4),
    ],
)
def test_a_socket_is_read(
    family: int, source: str, destination: str, client: str, server: str, version: int
) -> None:
    others = attribute(8, b"\0"), attribute(22, b"\0\0")
    data = message(family, source, destination, others[0], INFO, others[1], timer=2)
    (one,) = parse(data, NETNS).sockets
    who = one.four_tuple
    assert (who.client_ip, who.client_port) == (client, 43_904)
    assert (who.server_ip, who.server_port) == (server, 3306)
    assert (who.family, who.netns) == (version, NETNS)
    assert (one.cookie, one.inode, one.uid) == (0x1_0000_0005, 7001, 1000)
    assert (one.age_ns, one.last_ack_ns) == (60_000_000_000, 40_000_000_000)
    assert (one.bytes_acked, one.bytes_received, one.segs_in, one.data_segs_out) == (1, 0, 2, 0)
    assert one.keepalive_ns == 9_500_000_000
    assert one.waits


@pytest.mark.parametrize("timer", [0, 1, 3, 4])
def test_other_timers_are_no_keep_alive(timer: int) -> None:
    data = message(socket.AF_INET, "10.9.0.2", "10.9.0.1", INFO, timer=timer)
    assert parse(data, NETNS).sockets[0].keepalive_ns is None


@pytest.mark.parametrize(
    "facts", [{"data_segs_out": 3}, {"bytes_received": 25}, {"bytes_acked": 0}, {"bytes_acked": 9}]
)
def test_whoever_spoke_or_heard_does_not_wait(facts: dict[str, int]) -> None:
    info = attribute(2, tcp_info(**{"bytes_acked": 1, **facts}))
    (one,) = parse(message(socket.AF_INET, "10.9.0.2", "10.9.0.1", info), NETNS).sockets
    assert not one.waits


def test_sockets_without_the_counts_are_counted() -> None:
    short = attribute(2, tcp_info()[:156])
    data = b"".join(
        message(socket.AF_INET, "10.9.0.2", "10.9.0.1", *some) for some in ((), (short,))
    )
    assert parse(data + DONE, NETNS) == Answer([], True, 0, 2)


def test_a_subflow_of_mptcp_is_known_by_its_upper_layer() -> None:
    for name, expected in ((b"mptcp", True), (b"tls", False)):
        layer = attribute(0x8000 | 19, attribute(1, name + b"\0"))
        data = message(socket.AF_INET, "10.9.0.2", "10.9.0.1", layer, INFO)
        assert parse(data, NETNS).sockets[0].is_subflow is expected


def test_the_end_and_errors_are_told() -> None:
    assert parse(DONE, NETNS) == Answer([], True, 0, 0)
    assert parse(framed(2, struct.pack("=i", -2) + bytes(16)), NETNS).error == 2
    assert parse(framed(3, struct.pack("=i", -12)), NETNS).error == 12


@given(st.binary(max_size=300))
def test_whatever_comes_is_read_or_refused(data: bytes) -> None:
    try:
        parse(data, NETNS)
    except ValueError:
        return


@given(st.integers(0, 500), st.integers(0, 255))
def test_a_damaged_message_is_read_or_refused(at: int, byte: int) -> None:
    data = bytearray(message(socket.AF_INET, "10.9.0.2", "10.9.0.1", INFO) + DONE)
    data[at % len(data)] = byte
    try:
        parse(bytes(data), NETNS)
    except ValueError:
        return


def kernel_runs(program: bytes, port: int) -> bool:
    """inet_diag_bc_run of net/ipv4/inet_diag.c, for comparisons of the destination port."""
    at, left = 0, len(program)
    while left > 0:
        code, yes, no = struct.unpack_from("=BBH", program, at)
        holds = False  # INET_DIAG_BC_JMP
        if code == 4:
            holds = port >= struct.unpack_from("=H", program, at + 6)[0]
        elif code == 5:
            holds = port <= struct.unpack_from("=H", program, at + 6)[0]
        else:
            assert code == 1
        step = yes if holds else no
        left -= step
        at += step
    return left == 0


def kernel_accepts(program: bytes) -> bool:
    """inet_diag_bc_audit: every target is the begin of an operation, or the end, or 4 beyond."""
    starts, at = {len(program)}, 0
    while at < len(program):
        starts.add(at)
        at += struct.unpack_from("=BBH", program, at)[1]
    if at != len(program):
        return False
    for begin in starts - {len(program)}:
        code, yes, no = struct.unpack_from("=BBH", program, begin)
        least, left = (4 if code == 1 else 8), len(program) - begin
        if not least <= yes <= left + 4 or not least <= no <= left + 4 or yes % 4 or no % 4:
            return False
        if no < left and begin + no not in starts:
            return False
    return True


@given(PORTS, st.integers(0, 65535))
def test_the_kernel_s_filter_takes_these_ports_and_no_other(ports: list[int], other: int) -> None:
    program = bytecode(runs_of(ports))
    assert kernel_accepts(program)
    for port in (*ports, *(one + 1 for one in ports), *(one - 1 for one in ports), other):
        assert kernel_runs(program, port) == (port in ports)


def test_too_many_ranges_are_not_filtered_by_the_kernel() -> None:
    assert len(request(socket.AF_INET, range(1, 65536, 2))) == 72
    assert len(request(socket.AF_INET, range(1, 65536))) == 72 + 4 + 16
