"""The packets whose cost is measured. Each load runs in one process on one CPU.

All kernel work for a packet, veth and softirq included, is charged to the process that sends the
packet. CLOCK_PROCESS_CPUTIME_ID of this process is therefore the whole cost. In a guest whose clock
counts instructions, one nanosecond is one instruction.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from bench.tracer import PORT
from lab.network.segments import segment_packet
from lab.network.syns import make_syns
from lab.network.topology import CLIENT_ADDRESS, SERVER_ADDRESS, SILENT_SOURCES, Namespace, Topology
from lab.records import FourTuple

UNRELATED_PORT = 9999
SYNS = 8000
HANDSHAKES = 1500
SEGMENTS = 4000
DROPPED_PORT = 9998
DROPPED = 8000
CONNECTIONS = 6

Load = Callable[[], float]
"""Sends its packets and returns the cost per packet in ns of process CPU time."""


def _listener(port: int) -> socket.socket:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((SERVER_ADDRESS[4], port))
    listener.listen(4096)
    return listener


def _raw() -> socket.socket:
    return socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)


def _client() -> socket.socket:
    client = socket.socket()
    client.bind((CLIENT_ADDRESS[4], 0))
    return client


def _spoofed_syns(raw: socket.socket) -> float:
    server = SERVER_ADDRESS[4]
    packets = [syn.packet for syn in make_syns(SILENT_SOURCES[4], server, PORT, SYNS)]
    begun = time.process_time_ns()
    for packet in packets:
        raw.sendto(packet, (server, 0))
    return (time.process_time_ns() - begun) / SYNS


def _dropped_elsewhere(raw: socket.socket) -> float:
    """Send ACKs without a connection to another port, where a firewall rule drops them."""
    server = SERVER_ADDRESS[4]
    flow = FourTuple(CLIENT_ADDRESS[4], 1024, server, DROPPED_PORT)
    packets = [segment_packet(flow, number, number) for number in range(DROPPED)]
    begun = time.process_time_ns()
    for packet in packets:
        raw.sendto(packet, (server, 0))
    return (time.process_time_ns() - begun) / DROPPED


def _healthy_handshakes(inside: Namespace, listener: socket.socket) -> float:
    address = listener.getsockname()
    spent = 0
    for _ in range(HANDSHAKES):
        client = inside.run(_client)
        begun = time.process_time_ns()
        client.connect(address)
        accepted, _ = listener.accept()
        spent += time.process_time_ns() - begun
        accepted.close()
        client.close()
    return spent / HANDSHAKES


def _unrelated_segments(inside: Namespace, listener: socket.socket) -> float:
    """The minimum over several connections: a timer's phase adds 80 instructions to some."""
    return min(_segments_of_one_connection(inside, listener) for _ in range(CONNECTIONS))


def _segments_of_one_connection(inside: Namespace, listener: socket.socket) -> float:
    one = inside.run(_client)
    one.connect(listener.getsockname())
    other, _ = listener.accept()
    with one, other:
        for end in (one, other):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        begun = time.process_time_ns()
        for _ in range(SEGMENTS // 2):
            one.send(b"x")
            other.recv(1)
            other.send(b"x")
            one.recv(1)
        return (time.process_time_ns() - begun) / SEGMENTS


@contextmanager
def all_loads() -> Iterator[dict[str, Load]]:
    """The loads by name, all on one topology with syncookies=2."""
    with Topology() as topology:
        topology.server.pin({"net/ipv4/tcp_syncookies": "2"})
        topology.server.command(
            "nft",
            "add table inet storm; "
            "add chain inet storm drops { type filter hook input priority 0; }; "
            f"add rule inet storm drops tcp dport {DROPPED_PORT} drop",
        )
        listener = topology.server.run(_listener, PORT)
        unrelated = topology.server.run(_listener, UNRELATED_PORT)
        raw = topology.client.run(_raw)
        with listener, unrelated, raw:
            yield {
                "spoofed SYN": lambda: _spoofed_syns(raw),
                "healthy handshake": lambda: _healthy_handshakes(topology.client, listener),
                "drop elsewhere": lambda: _dropped_elsewhere(raw),
                "unrelated segment": lambda: _unrelated_segments(topology.client, unrelated),
            }
