"""Sends SYNs with chosen source addresses through a raw socket in the client's namespace."""

from __future__ import annotations

import ipaddress
import itertools
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from lab.network.segments import IPPROTO_TCP, SynTemplate, segment_packet
from lab.network.topology import source_addresses
from lab.patience import LOAD_S
from lab.records import FourTuple

if TYPE_CHECKING:
    from lab.network.topology import Namespace
    from lab.network.watch import Watch

SOURCES_USED = 250
FIRST_PORT = 1024
LAST_PORT = 65_535
BURST = 256
"""Number of SYNs sent before waiting for their SYN-ACKs. The number is well below
net.core.netdev_max_backlog (1000 per CPU); above that limit the kernel drops veth packets."""
ISN_STEP = 0x9E37_79B1
"""An odd step, so that up to 2^32 SYNs have different ISNs."""


class Syn(NamedTuple):
    """One SYN to send."""

    four_tuple: FourTuple
    isn: int
    packet: bytes


def make_syns(prefix: str, server_ip: str, server_port: int, count: int) -> Iterator[Syn]:
    """SYNs with `count` different 4-tuples, from the host addresses of a prefix.

    Raises ValueError if the prefix has too few addresses.
    """
    sources = source_addresses(prefix, SOURCES_USED)
    if count > len(sources) * (LAST_PORT - FIRST_PORT + 1):
        raise ValueError(f"{count} SYNs are more than {prefix} has addresses and ports for")
    packed = [ipaddress.ip_address(source).packed for source in sources]
    template = SynTemplate(server_ip, server_port)
    for number in range(count):
        which = number % len(sources)
        port = FIRST_PORT + number // len(sources)
        isn = number * ISN_STEP & 0xFFFF_FFFF
        yield Syn(
            FourTuple(sources[which], port, server_ip, server_port),
            isn,
            template.packet(packed[which], port, isn),
        )


def make_syn(four_tuple: FourTuple, isn: int, mss: int | None = None) -> Syn:
    """The SYN of one 4-tuple; a call with the same ISN gives a client's retransmission.

    `mss` is in bytes; the default is that of Ethernet.
    """
    source = ipaddress.ip_address(four_tuple.client_ip).packed
    template = SynTemplate(four_tuple.server_ip, four_tuple.server_port, mss)
    return Syn(four_tuple, isn, template.packet(source, four_tuple.client_port, isn))


def send_in_bursts(namespace: Namespace, watch: Watch, syns: Iterable[Syn]) -> None:
    """Send SYNs to one server in bursts; each burst waits for the answers to the previous one.

    SYN-ACKs are counted on the wire, so a 4-tuple may occur more than once. Raises LabTimeoutError
    if the server does not answer every SYN.
    """
    sent = 0
    watch.take_in()
    before = watch.synacks

    def all_answered() -> bool:
        return watch.synacks - before >= sent

    waiting = iter(syns)
    while burst := list(itertools.islice(waiting, BURST)):
        server_ip = burst[0].four_tuple.server_ip
        with namespace.run(_raw_socket, ":" in server_ip) as raw:
            for syn in burst:
                raw.sendto(syn.packet, (server_ip, 0))
        sent += len(burst)
        watch.until(all_answered, f"SYN-ACKs for {sent} SYNs", LOAD_S)


def repeat_until(
    namespace: Namespace,
    syns: Sequence[Syn],
    is_over: Callable[[], bool],
    note: Callable[[int], None],
) -> None:
    """Send the same SYNs to one server repeatedly, as fast as possible.

    After each round, `note` is called with the number of SYNs sent in the round.
    """
    server_ip = syns[0].four_tuple.server_ip
    with namespace.run(_raw_socket, ":" in server_ip) as raw:
        while not is_over():
            for syn in syns:
                raw.sendto(syn.packet, (server_ip, 0))
            note(len(syns))


def send_syns(
    namespace: Namespace, watch: Watch, prefix: str, server_ip: str, server_port: int, count: int
) -> set[FourTuple]:
    """Send SYNs with `count` different 4-tuples in bursts; returns the 4-tuples.

    Raises LabTimeoutError if the server does not answer every SYN.
    """
    syns = list(make_syns(prefix, server_ip, server_port, count))
    send_in_bursts(namespace, watch, syns)
    return {syn.four_tuple for syn in syns}


def send_syn(namespace: Namespace, syn: Syn) -> None:
    """Send one SYN without waiting for an answer."""
    with namespace.run(_raw_socket, ":" in syn.four_tuple.server_ip) as raw:
        raw.sendto(syn.packet, (syn.four_tuple.server_ip, 0))


def send_segment(
    namespace: Namespace,
    four_tuple: FourTuple,
    sequence: int,
    acknowledgement: int,
    payload: bytes = b"",
    wrong_by: int = 0,
    extensions: tuple[int, bytes] = (IPPROTO_TCP, b""),
) -> None:
    """Send an ACK or data as the 4-tuple's client; `segment_packet` describes the arguments."""
    packet = segment_packet(four_tuple, sequence, acknowledgement, payload, wrong_by, extensions)
    with namespace.run(_raw_socket, ":" in four_tuple.server_ip) as raw:
        raw.sendto(packet, (four_tuple.server_ip, 0))


def flood(namespace: Namespace, four_tuple: FourTuple, packets: int) -> None:
    """Send ACKs that belong to no connection, as fast as possible."""
    packet = segment_packet(four_tuple, 1, 1)
    with namespace.run(_raw_socket, ":" in four_tuple.server_ip) as raw:
        for _ in range(packets):
            raw.sendto(packet, (four_tuple.server_ip, 0))


def _raw_socket(ipv6: bool) -> socket.socket:
    # IPPROTO_RAW means that the caller supplies the IP header, in both families.
    family = socket.AF_INET6 if ipv6 else socket.AF_INET
    return socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW)
