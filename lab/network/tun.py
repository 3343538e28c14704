"""Clients behind a tun device: the kernel receives their packets in the sending thread's context.

A write to a tun runs netif_receive_skb before it returns (tun_get_user), with bottom halves
disabled. A veth queues packets on the CPU's backlog, which processes one packet after the other.
Therefore only a tun lets two packets on one CPU overlap on a PREEMPT_RT kernel.
"""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import os
import select
import struct
from collections.abc import Iterator

from pyroute2 import NetNS

from lab.errors import LabTimeoutError
from lab.network.segments import ACK, SYN, SynTemplate, parse_segment, segment_packet
from lab.network.topology import Namespace
from lab.patience import SETTLE_S, Deadline
from lab.records import FourTuple

_TUNSETIFF = 0x400454CA
_TUN_WITHOUT_HEADER = 0x1001
"""IFF_TUN and IFF_NO_PI of linux/if_tun.h."""
_NO_DUPLICATE_DETECTION = 0x02
_LARGEST_PACKET = 2048


class TunClients:
    """One IPv6 client address that a server's namespace reaches through its own tun device.

    A context manager that removes the device at its end. `number` distinguishes the devices of one
    namespace. Raises LabError without the kernel module, OSError if the device cannot be created.
    """

    def __init__(self, server: Namespace, number: int) -> None:
        self.server_ip = f"fd09:0:0:{number}::1"
        self.client_ip = f"fd09:0:0:{number}::2"
        name = f"tun{number}"
        server.command("modprobe", "tun")
        self._tun = server.run(_open_tun, name)
        with NetNS(server.name, flags=0) as route:
            link = int(route.link_lookup(ifname=name)[0])
            route.addr(
                "add",
                index=link,
                address=self.server_ip,
                prefixlen=64,
                flags=_NO_DUPLICATE_DETECTION,
            )
            route.link("set", index=link, state="up")

    def __enter__(self) -> TunClients:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._tun)

    def shake_hands(self, client_port: int, server_port: int, isn: int, answer: bool) -> FourTuple:
        """Send the SYN, await the SYN-ACK and, if `answer`, send the ACK from the calling thread.

        Raises LabTimeoutError if no SYN-ACK arrives.
        """
        who, ack = self.connect(client_port, server_port, isn)
        if answer:
            self.send(ack)
        return who

    def connect(self, client_port: int, server_port: int, isn: int) -> tuple[FourTuple, bytes]:
        """Send the SYN and await the SYN-ACK; returns the 4-tuple and the ACK packet to send.

        Raises LabTimeoutError if no SYN-ACK arrives.
        """
        template = SynTemplate(self.server_ip, server_port)
        source = ipaddress.ip_address(self.client_ip).packed
        self.send(template.packet(source, client_port, isn))
        cookie = self._synack(client_port)
        who = FourTuple(self.client_ip, client_port, self.server_ip, server_port)
        return who, segment_packet(who, isn + 1, cookie + 1)

    def send(self, packet: bytes) -> None:
        """Send a packet; the kernel has processed it completely when the call returns."""
        os.write(self._tun, packet)

    def _synack(self, client_port: int) -> int:
        """The sequence number of the SYN-ACK to a port, in host byte order."""
        deadline = Deadline(SETTLE_S)
        while not deadline.passed():
            select.select([self._tun], [], [], deadline.left())
            for packet in self._arrived():
                segment = parse_segment(packet)
                expected = segment is not None and segment.destination_port == client_port
                if segment is not None and expected and segment.flags & (SYN | ACK) == SYN | ACK:
                    return segment.sequence
        raise LabTimeoutError(f"a SYN-ACK to port {client_port}", deadline.limit_s, "none")

    def _arrived(self) -> Iterator[bytes]:
        with contextlib.suppress(BlockingIOError):
            while True:
                yield os.read(self._tun, _LARGEST_PACKET)


def _open_tun(name: str) -> int:
    tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    fcntl.ioctl(tun, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _TUN_WITHOUT_HEADER))
    return tun
