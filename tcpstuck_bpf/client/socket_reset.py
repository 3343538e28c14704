"""Ends a connection of this host by SOCK_DESTROY of sock_diag; its application gets ECONNABORTED.

The netlink code is our own: pyroute2 knows the number of SOCK_DESTROY and has no function that
sends it, and is not needed otherwise to run the tool. The peer gets an RST (tcp_abort).
"""

from __future__ import annotations

import enum
import errno
import os
import socket
import struct

from tcpstuck_bpf.host import netns
from tcpstuck_bpf.model import FourTuple
from tcpstuck_bpf.synack import addresses_of

LIMIT_S = 5.0
"""For the kernel's answer, which is given during the call that asks for it."""

_NETLINK_SOCK_DIAG = 4
_SOCK_DESTROY = 21
_NLMSG_ERROR = 2
_REQUEST, _ACKNOWLEDGE = 1, 4
_HEADER = struct.Struct("=IHHII")
"""struct nlmsghdr: length, type, flags, sequence number, port."""
_ERROR = struct.Struct("=i")
_REQUEST_START = struct.Struct("=BBBBI")
"""struct inet_diag_req_v2 up to the socket: family, protocol, extensions, padding, states."""
_EVERY_STATE = 0xFFFFFFFF
_NO_COOKIE = 0xFFFFFFFFFFFFFFFF
"""INET_DIAG_NOCOOKIE, twice: any socket would do."""
_SEQUENCE = 1


class Reset(enum.Enum):
    """What came of ending a socket."""

    DONE = "done"
    GONE = "gone"
    """There is no such socket, or another one has its addresses now."""
    NOT_PERMITTED = "not-permitted"
    """It takes CAP_NET_ADMIN in the network namespace (sock_diag_destroy)."""
    NOT_SUPPORTED = "not-supported"
    """The kernel lacks CONFIG_INET_DIAG_DESTROY."""


_MEANING = {
    0: Reset.DONE,
    errno.ENOENT: Reset.GONE,
    errno.ESTALE: Reset.GONE,
    errno.EPERM: Reset.NOT_PERMITTED,
    errno.EACCES: Reset.NOT_PERMITTED,
    errno.EOPNOTSUPP: Reset.NOT_SUPPORTED,
}


def end_socket(four_tuple: FourTuple, cookie: int, interface: int = 0) -> Reset:
    """End the client's socket of a connection, in its namespace.

    `interface` is the index of the device that it is bound to; 0: none. `cookie` is the socket's
    (idiag_cookie or SO_COOKIE), in host order. It is needed: for a connection that has ended, the
    kernel would find a listener at the same address and port (inet_diag_find_one_icsk). Raises
    ValueError for INET_DIAG_NOCOOKIE. Raises OSError if the namespace is gone or cannot be entered,
    and for any other refusal of the kernel.
    """
    if not 0 <= cookie < _NO_COOKIE:
        raise ValueError("a socket's cookie is needed")
    return netns.run_in(four_tuple.netns, lambda: _result(_request(four_tuple, cookie, interface)))


def kernel_can_end_sockets() -> bool:
    """Whether the kernel has CONFIG_INET_DIAG_DESTROY. No socket can match the request.

    Raises OSError if the kernel gives an unexpected answer, for instance without CONFIG_INET_DIAG.
    """
    nobody = FourTuple(bytes(16), bytes(16), 0, 0, 0)
    return _result(_request(nobody, 0, 0)) is not Reset.NOT_SUPPORTED


def _request(four_tuple: FourTuple, cookie: int, interface: int) -> bytes:
    """A message with struct inet_diag_req_v2 (include/uapi/linux/inet_diag.h)."""
    family = socket.AF_INET if four_tuple.family == 4 else socket.AF_INET6
    client, server = addresses_of(four_tuple)
    # The cookie's halves, the lower one first, whatever the byte order (sock_diag_save_cookie).
    halves = (cookie & 0xFFFFFFFF, cookie >> 32)
    body = (
        _REQUEST_START.pack(family, socket.IPPROTO_TCP, 0, 0, _EVERY_STATE)
        + struct.pack("!HH", four_tuple.client_port, four_tuple.server_port)
        + client.ljust(16, b"\0")
        + server.ljust(16, b"\0")
        + struct.pack("=III", interface, *halves)
    )
    flags = _REQUEST | _ACKNOWLEDGE
    return _HEADER.pack(_HEADER.size + len(body), _SOCK_DESTROY, flags, _SEQUENCE, 0) + body


def _result(request: bytes) -> Reset:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, _NETLINK_SOCK_DIAG) as asking:
        asking.settimeout(LIMIT_S)
        asking.sendto(request, (0, 0))
        answer = asking.recv(1 << 16)
    _, kind, _, sequence, _ = _HEADER.unpack_from(answer)
    if (kind, sequence) != (_NLMSG_ERROR, _SEQUENCE):
        raise OSError(errno.EPROTO, "an unexpected answer of sock_diag")
    number = -_ERROR.unpack_from(answer, _HEADER.size)[0]
    meaning = _MEANING.get(number)
    if meaning is None:
        raise OSError(number, os.strerror(number))
    return meaning
