"""Packets go out in the namespace they are for, and the calling thread stays where it is."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest

from lab.errors import LabError
from lab.network.topology import Namespace
from lab.patience import COMMAND_S, patient
from tcpstuck_bpf.host import netns
from tcpstuck_bpf.model import FourTuple, address_bytes
from tcpstuck_bpf.rescue.raw_socket import KEPT_FOR_NS, MAX_SOCKETS, Resender
from tcpstuck_bpf.synack import synack_packet
from tests.unit.test_synack import segment_of

LOOPBACK = {4: "127.0.0.1", 6: "::1"}
NO_NAMESPACE = 1
"""Inode numbers of nsfs are far above."""


def own_place() -> str:
    return str(Path("/proc/thread-self/ns/net").readlink())


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    if os.geteuid() != 0:
        pytest.skip("making a network namespace takes root")
    try:
        made = Namespace(f"tcpstuck-{os.getpid()}-resend")
    except LabError as error:
        pytest.skip(f"network namespaces cannot be made here: {error}")
    with contextlib.closing(made):
        made.command("ip", "link", "set", "lo", "up")
        yield made


def loopback_tuple(family: int, inode: int) -> FourTuple:
    address = address_bytes(LOOPBACK[family])
    return FourTuple(address, address, 40_000, 3311, inode)


def listening(namespace: Namespace, family: int) -> socket.socket:
    kind = socket.AF_INET if family == 4 else socket.AF_INET6
    heard = namespace.run(socket.socket, kind, socket.SOCK_RAW, socket.IPPROTO_TCP)
    heard.settimeout(patient(COMMAND_S))
    return heard


@pytest.mark.parametrize("family", [4, 6])
def test_a_packet_arrives_in_its_namespace_and_nowhere_else(
    namespace: Namespace, family: int
) -> None:
    who = loopback_tuple(family, namespace.inode)
    packet = synack_packet(who, segment_of(who))
    kind = socket.AF_INET if family == 4 else socket.AF_INET6
    with (
        Resender() as resender,
        listening(namespace, family) as there,
        socket.socket(kind, socket.SOCK_RAW, socket.IPPROTO_TCP) as here,
    ):
        here.setblocking(False)
        before = own_place()
        resender.send(who, packet)
        assert own_place() == before
        received = there.recv(4096)
        ip_header = 20 if family == 4 else 0
        assert received[ip_header:] == packet[20 if family == 4 else 40 :]
        ours = received[ip_header : ip_header + 12]
        with contextlib.suppress(BlockingIOError):
            while True:
                assert here.recv(4096)[ip_header : ip_header + 12] != ours


WAYS = {"main": (1, 0), "other": (2, 100)}
"""Devices: which of the server's addresses is theirs, and the table that leads out by them."""


def two_ways_out(namespace: Namespace) -> None:
    """The table of the second is looked at only for what comes from the second's address."""
    for device, (number, table) in WAYS.items():
        peer = ("peer", "name", f"{device}-end")
        namespace.command("ip", "link", "add", device, "type", "veth", *peer)
        namespace.command("ip", "link", "set", f"{device}-end", "up")
        namespace.command("ip", "link", "set", device, "up")
        for net, nodad in ((f"10.0.{number}.%d/24", ()), (f"fd00:{number}::%d/64", ("nodad",))):
            own, router = net % 1, (net % 9).partition("/")[0]
            namespace.command("ip", "address", "add", own, "dev", device, *nodad)
            namespace.command(
                "ip", "neighbour", "add", router, "lladdr", "02:00:00:00:00:09", "dev", device
            )
            chosen = ("table", str(table)) if table else ()
            family = "-6" if ":" in net else "-4"
            namespace.command("ip", family, "route", "add", "default", "via", router, *chosen)
            if table:
                own_address = own.partition("/")[0]
                rule = ("from", own_address, "lookup", str(table))
                namespace.command("ip", family, "rule", "add", *rule)


@pytest.mark.parametrize(
    ("client", "server"), [("192.0.2.7", "10.0.2.1"), ("2001:db8::7", "fd00:2::1")]
)
def test_a_packet_takes_the_way_of_its_source_address(
    namespace: Namespace, client: str, server: str
) -> None:
    """With several uplinks it takes the route of the kernel's SYN-ACK (inet_csk_route_req)."""
    two_ways_out(namespace)
    who = FourTuple(address_bytes(client), address_bytes(server), 40_000, 3311, namespace.inode)
    segment = segment_of(who)
    everything = socket.htons(3)
    watching = namespace.run(socket.socket, socket.AF_PACKET, socket.SOCK_DGRAM, everything)
    with watching, Resender() as resender:
        watching.settimeout(patient(COMMAND_S))
        resender.send(who, synack_packet(who, segment))
        device = ""
        while not device:
            seen, place = watching.recvfrom(4096)
            device = place[0] if segment[:12] in seen else ""
    assert device == "other"


def test_a_socket_is_kept_for_a_while_and_then_closed(namespace: Namespace) -> None:
    now_ns = 0
    who = loopback_tuple(4, namespace.inode)
    packet = synack_packet(who, segment_of(who))
    with Resender(lambda: now_ns) as resender:
        resender.send(who, packet)
        opened = open_sockets()
        resender.send(who, packet)
        assert open_sockets() == opened
        now_ns = KEPT_FOR_NS - 1
        resender.close_old()
        assert open_sockets() == opened
        now_ns = KEPT_FOR_NS
        resender.close_old()
        assert open_sockets() == opened - 1
        resender.send(who, packet)
        assert open_sockets() == opened
    assert open_sockets() == opened - 1


def test_a_namespace_in_use_is_left_every_now_and_then(namespace: Namespace) -> None:
    """An open socket would keep a removed namespace and its devices alive."""
    now_ns = 0
    who = loopback_tuple(4, namespace.inode)
    packet = synack_packet(who, segment_of(who))
    with Resender(lambda: now_ns) as resender:
        for _ in range(5):
            resender.send(who, packet)
            resender.close_old()
            now_ns += KEPT_FOR_NS // 4
        assert len(resender) == 0


def open_sockets() -> int:
    found = 0
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            found += str(entry.readlink()).startswith("socket:")
    return found


def test_the_number_of_sockets_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Datagram sockets in place of raw ones: no namespaces, and no root."""
    made: list[socket.socket] = []

    def open_one(_inode: int, _function: object) -> socket.socket:
        made.append(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        return made[-1]

    monkeypatch.setattr(netns, "run_in", open_one)
    with Resender() as resender:
        for inode in range(MAX_SOCKETS + 5):
            with contextlib.suppress(OSError):
                resender.send(loopback_tuple(4, inode), b"")
        assert [one.fileno() for one in made[:5]] == [-1] * 5
        assert all(one.fileno() >= 0 for one in made[5:])
    assert all(one.fileno() == -1 for one in made)


def test_a_namespace_that_is_gone_is_said_in_one_line() -> None:
    with Resender() as resender, pytest.raises(OSError, match="is gone") as raised:
        resender.send(loopback_tuple(4, NO_NAMESPACE), b"")
    assert raised.value.strerror == "the network namespace is gone"


def test_a_way_that_leads_elsewhere_by_now_is_not_taken(
    namespace: Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process changes namespaces, or a new one gets its number, just when it was looked at."""
    way = tmp_path / "way"
    way.symlink_to(Path("/run/netns") / namespace.name)
    open_path = Path.open

    def open_late(path: Path, *arguments: str) -> IO[Any]:
        if path == way:
            way.unlink()
            way.symlink_to("/proc/self/ns/net")
        return open_path(path, *arguments)

    monkeypatch.setattr(netns, "_ways_into", lambda _inode: iter([way]))
    monkeypatch.setattr(Path, "open", open_late)
    with pytest.raises(OSError, match="is gone"):
        netns.run_in(namespace.inode, own_place)


def test_what_a_function_raises_inside_reaches_the_caller(namespace: Namespace) -> None:
    def fail() -> None:
        raise ValueError(own_place())

    with pytest.raises(ValueError, match=str(namespace.inode)):
        netns.run_in(namespace.inode, fail)
    assert str(namespace.inode) not in own_place()


def test_a_link_local_client_is_not_guessed_at() -> None:
    client, server = address_bytes("fe80::2"), address_bytes("fe80::1")
    with Resender() as resender, pytest.raises(OSError, match="link-local"):
        resender.send(FourTuple(client, server, 40_000, 3311, NO_NAMESPACE), b"")
