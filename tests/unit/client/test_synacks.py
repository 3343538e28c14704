"""The numbers of real handshakes are found, and what is lost or forgotten is counted.

scapy's reading of the same packets, from another packet socket, is the oracle.
"""

from __future__ import annotations

import contextlib
import ctypes
import select
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
from scapy.layers.inet import IP, TCP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Dot1Q, Ether

from lab.network.topology import INTERFACE, Namespace
from lab.patience import COMMAND_S, Deadline, patient
from tcpstuck_bpf.client import synacks
from tcpstuck_bpf.client.synack_filter import Synack, program_bytes, synack_filter
from tcpstuck_bpf.client.synacks import KEPT_FOR_NS, SynackTable, SynackWatch
from tcpstuck_bpf.errors import CannotTraceError
from tcpstuck_bpf.model import SECOND_NS, FourTuple, address_bytes
from tests.builders import four_tuple
from tests.unit.client.mending import PORT, world

NO_NAMESPACE = 1
READ_LATER_S = 0.01
"""How long a packet waits in the socket where its age is looked at."""
FAMILIES = pytest.mark.parametrize("family", [4, 6])


def synack(number: int = 1, time_ns: int = 0, **changes: Any) -> Synack:
    return Synack(four_tuple(number), 5, 77, None, None, time_ns)._replace(**changes)


def test_the_first_of_equal_synacks_is_kept_with_the_last_ones_time() -> None:
    table = SynackTable()
    table.note(synack(time_ns=1, timestamps=(1, 2)))
    table.note(synack(time_ns=9, timestamps=(8, 2)))
    seen = table.find(four_tuple(1))
    assert seen is not None
    assert (seen.first.timestamps, seen.last_ns, seen.ambiguous) == ((1, 2), 9, False)


def test_two_cookies_for_one_attempt_are_ambiguous() -> None:
    table = SynackTable()
    for isn in (77, 78, 77):
        table.note(synack(server_isn=isn))
    seen = table.find(four_tuple(1))
    assert seen is not None
    assert (seen.first.server_isn, seen.ambiguous) == (77, True)


def test_a_new_connection_of_the_same_4_tuple_replaces_the_old_one() -> None:
    table = SynackTable()
    for isns in ((5, 77), (5, 78), (6, 79)):
        table.note(synack(client_isn=isns[0], server_isn=isns[1]))
    seen = table.find(four_tuple(1))
    assert seen is not None
    assert (seen.first.client_isn, seen.first.server_isn, seen.ambiguous) == (6, 79, False)
    assert len(table) == 1


def test_the_table_is_bounded_and_counts_what_it_evicts() -> None:
    table = SynackTable(most=3)
    for number in range(5):
        table.note(synack(number, number))
        table.note(synack(0, number))
    assert (len(table), table.evicted) == (3, 2)
    assert [table.find(four_tuple(number)) is not None for number in range(5)] == [
        *(True, False, False),
        *(True, True),
    ]


def test_old_ones_are_forgotten() -> None:
    table = SynackTable()
    for second in range(3):
        table.note(synack(second, second * SECOND_NS))
    table.forget_old(KEPT_FOR_NS + SECOND_NS)
    assert [table.find(four_tuple(number)) is not None for number in range(3)] == [
        *(False, False, True)
    ]
    assert table.evicted == 0


def capture_of(namespace: Namespace) -> socket.socket:
    """Everything that passes the namespace's interfaces, with link headers."""
    made = namespace.run(socket.socket, socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
    made.setblocking(False)
    return made


def captured(capture: socket.socket) -> Iterator[Any]:
    """The SYN-ACKs that came in, as scapy reads them."""
    with contextlib.suppress(BlockingIOError):
        while True:
            data, place = capture.recvfrom(65_536)
            packet = Ether(data)
            if place[2] != 4 and TCP in packet and packet[TCP].flags == "SA":
                yield packet


def as_scapy_reads(packet: Any, netns: int) -> tuple[object, ...]:
    segment = packet[TCP]
    options = dict(segment.options)
    ip = packet["IPv6"] if IPv6 in packet else packet["IP"]
    ends = address_bytes(ip.dst), address_bytes(ip.src)
    return (
        FourTuple(*ends, segment.dport, segment.sport, netns),
        segment.ack - 1,
        segment.seq,
        options.get("Timestamp"),
        options.get("WScale"),
    )


@FAMILIES
@pytest.mark.parametrize("stamps", ["1", "0"])
@pytest.mark.parametrize("scaling", ["1", "0"])
def test_the_numbers_of_real_handshakes(family: int, stamps: str, scaling: str) -> None:
    pinned = {"tcp_timestamps": stamps, "tcp_window_scaling": scaling}
    with (
        world(family, **pinned) as made,
        capture_of(made.client) as capture,
        SynackWatch(made.client.inode, [PORT]) as watch,
    ):
        clients = [made.connect() for _ in range(10)] + [made.forgotten()]
        readable, _, _ = select.select([watch], [], [], patient(COMMAND_S))
        assert readable
        assert watch.take_in() == len(clients)
        seen = {watch.table.find(made.four_tuple(client)) for client in clients}
        mine = {one.first[:5] for one in seen if one is not None}
        theirs = {as_scapy_reads(packet, made.client.inode) for packet in captured(capture)}
        assert mine == theirs
        assert len(mine) == len(clients)
        assert (watch.dropped, watch.table.evicted) == (0, 0)


def test_the_ports_of_others_are_not_seen() -> None:
    with world() as made, SynackWatch(made.client.inode, [PORT + 1]) as watch:
        made.connect()
        assert watch.take_in() == 0


@FAMILIES
def test_on_loopback_a_synack_is_seen_once(family: int) -> None:
    loopback = {4: "127.0.0.1", 6: "::1"}[family]
    kind = socket.AF_INET if family == 4 else socket.AF_INET6
    with world(family) as made, SynackWatch(made.client.inode, []) as watch:
        place = (loopback, 0)
        with made.client.run(socket.create_server, place, family=kind) as listener:
            client = made.keep(
                made.client.run(socket.create_connection, listener.getsockname()[:2])
            )
            who = made.four_tuple(client)
        assert watch.take_in() == 1
        assert watch.table.find(who) is not None


@FAMILIES
@pytest.mark.parametrize("tags", [0, 1, 2])
def test_a_vlan_tag_hides_nothing_but_two_do(family: int, tags: int) -> None:
    """The kernel takes the first tag off before a packet socket sees the packet."""
    with world(family) as made, SynackWatch(made.client.inode, [PORT]) as watch:
        who = FourTuple(*([address_bytes(made.address)] * 2), 40_000, PORT, made.client.inode)
        ip = IP if family == 4 else IPv6
        frame = Ether(dst="ff:ff:ff:ff:ff:ff")
        for number in range(tags):
            frame /= Dot1Q(vlan=10 + number)
        frame /= ip(src=made.address, dst=made.address)
        frame /= TCP(sport=PORT, dport=40_000, seq=77, ack=56, flags="SA")
        with made.server.run(socket.socket, socket.AF_PACKET, socket.SOCK_RAW) as sender:
            sender.bind((INTERFACE, 0))
            sender.send(bytes(frame))
        watch.take_in()
        seen = watch.table.find(who)
        assert (seen and seen.first[1:3]) == (None if tags == 2 else (55, 77))


def test_the_arrival_is_the_kernels_time() -> None:
    """Also of a packet that waited in the socket, as soon as the kernel stamps packets."""
    tolerated_ns = 1_000_000  # the two clocks are read one after the other
    deadline = Deadline(COMMAND_S)
    with world() as made, SynackWatch(made.client.inode, [PORT]) as watch:
        arrived_ns = after_ns = 0
        while not 0 < arrived_ns <= after_ns + tolerated_ns:
            assert not deadline.passed()
            before_ns = time.monotonic_ns()
            client = made.connect()
            after_ns = time.monotonic_ns()
            made.accept()
            time.sleep(READ_LATER_S)
            watch.take_in()
            seen = watch.table.find(made.four_tuple(client))
            assert seen is not None
            arrived_ns = seen.first.time_ns
            assert before_ns - tolerated_ns <= arrived_ns <= time.monotonic_ns()


def test_what_the_buffer_has_no_room_for_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synacks, "_BUFFER_BYTES", 1)
    with world() as made, SynackWatch(made.client.inode, [PORT]) as watch:
        for _ in range(20):
            made.connect()
        taken = watch.take_in()
        assert taken < 20
        assert (taken + watch.dropped, len(watch.table)) == (20, taken)
        watch.take_in()
        assert taken + watch.dropped == 20


def test_at_most_so_many_are_read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synacks, "MOST_AT_ONCE", 3)
    with world() as made, SynackWatch(made.client.inode, [PORT]) as watch:
        for _ in range(4):
            made.connect()
        assert [watch.take_in(), watch.take_in(), watch.take_in()] == [3, 1, 0]


def test_the_kernel_accepts_the_program_of_every_length() -> None:
    for count in (0, 1, 2, 500, 1000, 1001):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as tried:
            code = program_bytes(synack_filter(range(1, 2 * count, 2)))
            kept = ctypes.create_string_buffer(code, len(code))
            address = ctypes.addressof(kept)
            program = struct.pack("@HP", len(code) // 8, address)
            tried.setsockopt(socket.SOL_SOCKET, synacks._SO_ATTACH_FILTER, program)


def test_a_namespace_that_is_gone_is_said() -> None:
    with pytest.raises(CannotTraceError) as raised:
        SynackWatch(NO_NAMESPACE, [])
    assert "is gone" in raised.value.why


def test_without_the_privilege_the_remedy_is_said() -> None:
    text = (
        "import os; from tcpstuck_bpf.client.synacks import SynackWatch, netns\n"
        "from tcpstuck_bpf.errors import CannotTraceError\n"
        "if os.geteuid() == 0: os.setgid(65534); os.setuid(65534)\n"
        "try: SynackWatch(netns.own_netns(), [])\n"
        "except CannotTraceError as error: print(*error.lines(), sep='\\n')\n"
    )
    words = [sys.executable, "-c", text]
    done = subprocess.run(words, capture_output=True, text=True, timeout=patient(COMMAND_S))
    assert "CAP_NET_RAW" in done.stdout, done.stderr
    assert "root" in done.stdout
