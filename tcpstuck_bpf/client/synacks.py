"""Watches the SYN-ACKs that arrive in a network namespace, for numbers that sock_diag lacks.

A packet socket sees them where tracing is forbidden too. Its filter (`synack_filter`) drops all
other packets in the kernel.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
import time
from collections import OrderedDict
from collections.abc import Collection
from types import TracebackType
from typing import NamedTuple

from tcpstuck_bpf.client.synack_filter import (
    SNAP_BYTES,
    Synack,
    parse_synack,
    program_bytes,
    synack_filter,
)
from tcpstuck_bpf.errors import CannotTraceError, as_root_remedy
from tcpstuck_bpf.host import netns
from tcpstuck_bpf.host.wall_clock import RunClock
from tcpstuck_bpf.model import SECOND_NS, FourTuple
from tcpstuck_bpf.steps import WallClock

KEPT_FOR_NS = 180 * SECOND_NS
"""Longer than a cookie lives: at most two minutes (MAX_SYNCOOKIE_AGE of include/net/tcp.h)."""
MOST_KEPT = 65_536
"""Connections, 30 MB of them."""
MOST_AT_ONCE = 10_000
"""Packets that one `take_in` reads, so that a flood cannot hold it up."""
_ETH_P_ALL = 3
_BUFFER_BYTES = 4 << 20
# Python's socket module lacks these (asm-generic/socket.h, linux/if_packet.h).
_SO_ATTACH_FILTER, _SO_RCVBUFFORCE, _SO_TIMESTAMPNS = 26, 33, 35
_SOL_PACKET, _PACKET_STATISTICS = 263, 6
_SOCKADDR_LL = struct.Struct("=HHiHBB8s")
_TIMESPEC = struct.Struct("@qq")
_STATISTICS = struct.Struct("=II")


class Seen(NamedTuple):
    """The SYN-ACKs of one attempt of a client to connect."""

    first: Synack
    """The one that made the client's connection, unless the firewall dropped it."""
    last_ns: int
    """Arrival of the last one, CLOCK_MONOTONIC nanoseconds: the youngest cookie's age."""
    ambiguous: bool
    """They had different server ISNs, so which one the client took is not known."""


class SynackTable:
    """The last attempt of each 4-tuple, for KEPT_FOR_NS since its last SYN-ACK. Pure.

    A client's connection takes its numbers from the first SYN-ACK that it accepts, and answers each
    later one by a challenge ACK. So the first one is kept. If the client repeats its SYN when a new
    minute has begun, the second cookie differs from the first (secure_tcp_syn_cookie): an ACK of
    the cookie that the client did not take would make a connection whose bytes it refuses.
    """

    def __init__(self, most: int = MOST_KEPT) -> None:
        self.evicted = 0
        """Entries that were removed early because the table was full."""
        self._most = most
        self._seen: OrderedDict[FourTuple, Seen] = OrderedDict()

    def __len__(self) -> int:
        return len(self._seen)

    def note(self, synack: Synack) -> None:
        """Add a SYN-ACK; they come in the order of their times."""
        known = self._seen.pop(synack.four_tuple, None)
        if known is None or known.first.client_isn != synack.client_isn:
            known = Seen(synack, synack.time_ns, ambiguous=False)
        differs = synack.server_isn != known.first.server_isn
        self._seen[synack.four_tuple] = known._replace(
            last_ns=synack.time_ns, ambiguous=known.ambiguous or differs
        )
        if len(self._seen) > self._most:
            self._seen.popitem(last=False)
            self.evicted += 1

    def find(self, four_tuple: FourTuple) -> Seen | None:
        """What was seen of a connection; None if nothing was, or too long ago."""
        return self._seen.get(four_tuple)

    def forget_old(self, now_ns: int) -> None:
        """Remove what was last seen KEPT_FOR_NS ago."""
        while self._seen:
            oldest = next(iter(self._seen.values()))
            if now_ns - oldest.last_ns < KEPT_FOR_NS:
                return
            self._seen.popitem(last=False)


class SynackWatch:
    """A packet socket on all interfaces of a namespace, and a table of what it saw.

    A context manager. `inode` is the namespace's, `ports` are the servers' (every port if empty).
    `fileno` becomes readable when a SYN-ACK has come; `take_in` must be called regularly. An open
    watch keeps a removed namespace and its devices alive. Raises CannotTraceError.
    """

    def __init__(self, inode: int, ports: Collection[int]) -> None:
        self.table = SynackTable()
        self.dropped = 0
        """SYN-ACKs for which the socket's buffer had no room (tp_drops of packet(7))."""
        self._inode = inode
        try:
            self._socket = netns.run_in(inode, lambda: _packet_socket(ports))
        except PermissionError as error:
            raise CannotTraceError(
                "cannot watch SYN-ACKs",
                f"a packet socket takes CAP_NET_RAW in the network namespace: {error.strerror}",
                as_root_remedy(),
            ) from error
        except OSError as error:
            raise CannotTraceError(
                "cannot watch SYN-ACKs",
                f"no packet socket can be opened in network namespace {inode}: {error.strerror}",
                "see whether the namespace still exists, and whether the kernel has CONFIG_PACKET",
            ) from error

    def __enter__(self) -> SynackWatch:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the socket; the table stays."""
        self._socket.close()

    def fileno(self) -> int:
        """The descriptor to poll for input."""
        return self._socket.fileno()

    def take_in(self) -> int:
        """Read up to MOST_AT_ONCE waiting SYN-ACKs, without waiting; returns how many there were.

        Raises OSError if the kernel refuses to be read.
        """
        taken = 0
        clock = RunClock().clock
        while taken < MOST_AT_ONCE:
            try:
                packet, control, _, _ = self._socket.recvmsg(
                    SNAP_BYTES, socket.CMSG_SPACE(_TIMESPEC.size)
                )
            except BlockingIOError:
                break
            taken += 1
            synack = parse_synack(packet, self._inode, _arrival_ns(control, clock))
            if synack is not None:
                self.table.note(synack)
        counts = self._socket.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, _STATISTICS.size)
        # Reading them resets them.
        self.dropped += _STATISTICS.unpack(counts)[1]
        self.table.forget_old(time.monotonic_ns())
        return taken


def _packet_socket(ports: Collection[int]) -> socket.socket:
    # Protocol 0: nothing is received until bind(), so that no packet passes before the filter.
    made = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0)
    try:
        code = program_bytes(synack_filter(ports))
        kept = ctypes.create_string_buffer(code, len(code))
        program = struct.pack("@HP", len(code) // 8, ctypes.addressof(kept))
        made.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)
        made.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        try:
            made.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER_BYTES)
        except PermissionError:  # this alone takes CAP_NET_ADMIN
            made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
        made.setblocking(False)
        _bind_to_all(made)
    except BaseException:
        made.close()
        raise
    return made


def _bind_to_all(made: socket.socket) -> None:
    """Receive from all interfaces; Python's bind() has no word for interface 0 in packet(7)."""
    libc = ctypes.CDLL(None, use_errno=True)
    protocol, everything = socket.htons(_ETH_P_ALL), 0
    address = _SOCKADDR_LL.pack(socket.AF_PACKET, protocol, everything, 0, 0, 0, bytes(8))
    if libc.bind(made.fileno(), address, len(address)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _arrival_ns(control: list[tuple[int, int, bytes]], clock: WallClock) -> int:
    """When the kernel received a packet, CLOCK_MONOTONIC; the clock's time if it did not say.

    The kernel's timestamp is of CLOCK_REALTIME (SO_TIMESTAMPNS). If the wall clock was set
    meanwhile, a packet still cannot arrive later than it was read. In the first moment of a watch
    the kernel does not stamp packets yet (net_enable_timestamp defers it): then the time is that of
    reading, which makes a cookie seem younger.
    """
    waited_ns = 0
    for level, kind, data in control:
        if (level, kind) == (socket.SOL_SOCKET, _SO_TIMESTAMPNS):
            seconds, nanoseconds = _TIMESPEC.unpack_from(data)
            waited_ns = clock.realtime_ns - (seconds * SECOND_NS + nanoseconds)
    return clock.monotonic_ns - min(max(waited_ns, 0), KEPT_FOR_NS)
