"""Sends complete IP packets from within network namespaces, through raw sockets."""

from __future__ import annotations

import errno
import ipaddress
import socket
import struct
import time
from collections import OrderedDict
from collections.abc import Callable
from types import TracebackType

from tcpstuck_bpf.ending import close_all
from tcpstuck_bpf.host import netns
from tcpstuck_bpf.model import FourTuple, address_text

MAX_SOCKETS = 64
KEPT_FOR_NS = 2_000_000_000
_LINK_LOCAL = ipaddress.IPv6Network("fe80::/10")
# Python's socket module lacks these constants in some versions (linux/in.h, linux/in6.h).
_IP_PKTINFO = 8
_IPV6_FREEBIND = 78

_ControlMessage = tuple[int, int, bytes]


def _raw_socket(family: socket.AddressFamily) -> socket.socket:
    # IPPROTO_RAW: the packet includes its IP header (raw(7)), and the socket receives nothing.
    made = socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW)
    if family == socket.AF_INET6:
        # The source address may belong to no interface (AnyIP route, transparent proxy). For
        # IPv4, the supplied header suffices (inet_sk_flowi_flags).
        made.setsockopt(socket.IPPROTO_IPV6, _IPV6_FREEBIND, 1)
    made.setblocking(False)
    return made


def _sent_from(family: int, address: bytes) -> _ControlMessage:
    """A control message that routes the packet as one from this 16-byte address.

    The kernel ignores the source address in the supplied header for routing. Rules by source may
    choose the uplink.
    """
    if family == 4:
        source = struct.pack("=I4s4s", 0, address[12:], bytes(4))
        return (socket.IPPROTO_IP, _IP_PKTINFO, source)
    source = struct.pack("=16sI", address, 0)
    return (socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, source)


class Resender:
    """Keeps a socket per namespace and family, for KEPT_FOR_NS.

    A socket keeps the namespace in which it was opened alive, with its network devices. So every
    socket is closed after KEPT_FOR_NS, even one in use: a removed namespace cannot be entered
    again. `close_old` must be called regularly. `clock_ns` is any monotonic clock.
    """

    def __init__(self, clock_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self._clock_ns = clock_ns
        self._sockets: OrderedDict[tuple[int, int], tuple[socket.socket, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._sockets)

    def __enter__(self) -> Resender:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def send(self, four_tuple: FourTuple, packet: bytes) -> None:
        """Send a packet, IP header included, to the client of a 4-tuple, in its namespace.

        The calling thread stays in its own namespace. Raises OSError if the namespace is gone or
        cannot be entered, if the kernel refuses the packet, or if the address is link-local: it
        would need an interface (RFC 4007), which is not recorded.
        """
        destination = four_tuple.client_address
        if ipaddress.IPv6Address(destination) in _LINK_LOCAL:
            raise OSError(errno.EINVAL, "link-local address with unknown interface")
        try:
            place = (address_text(destination), 0)
            control = [_sent_from(four_tuple.family, four_tuple.server_address)]
            self._socket(four_tuple).sendmsg([packet], control, 0, place)
        except BlockingIOError as error:
            raise OSError(errno.ENOBUFS, "the socket's send buffer is full") from error

    def _socket(self, four_tuple: FourTuple) -> socket.socket:
        key = (four_tuple.netns, four_tuple.family)
        kept = self._sockets.get(key)
        if kept is not None:
            return kept[0]
        family = socket.AF_INET if four_tuple.family == 4 else socket.AF_INET6
        opened = netns.run_in(four_tuple.netns, lambda: _raw_socket(family))
        if len(self._sockets) >= MAX_SOCKETS:
            self._close_oldest()
        self._sockets[key] = (opened, self._clock_ns())
        return opened

    def _close_oldest(self) -> None:
        _, (oldest, _) = self._sockets.popitem(last=False)
        oldest.close()

    def close_old(self) -> None:
        """Close the sockets that were opened at least KEPT_FOR_NS ago."""
        now_ns = self._clock_ns()
        while self._sockets:
            _, opened_ns = next(iter(self._sockets.values()))
            if now_ns - opened_ns < KEPT_FOR_NS:
                return
            self._close_oldest()

    def close(self) -> None:
        """Close every socket, then raise any OSError. A later `send` opens new sockets."""
        sockets, self._sockets = self._sockets, OrderedDict()
        close_all(one.close for one, _ in sockets.values())
