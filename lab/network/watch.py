"""Captures the packets at a namespace's end of the wire with a packet socket."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING

from lab.errors import LabError, LabTimeoutError
from lab.network.segments import ACK, RST, SYN, Segment, parse_segment
from lab.network.topology import INTERFACE
from lab.patience import SETTLE_S, Deadline
from lab.records import FourTuple, WireRecord

if TYPE_CHECKING:
    from lab.network.topology import Namespace

ETH_P_ALL = 3
SOL_PACKET = 263
PACKET_STATISTICS = 6
SO_RCVBUFFORCE = 33
RECEIVE_BUFFER = 64 << 20
RECHECK_S = 0.25
"""Longest time between two checks of a condition. The packet socket can see a segment before the
kernel has acted on the segment, so a check on arrival alone may be too early."""


class Watch:
    """All TCP segments to and from one server port, as one record per connection.

    A context manager. The capture is at the interface: before the namespace's netfilter for
    received packets, after netfilter for sent ones.
    """

    def __init__(self, namespace: Namespace, server_port: int) -> None:
        self.records: dict[FourTuple, WireRecord] = {}
        self.synacks = 0
        """Number of SYN-ACKs to all clients."""
        self._port = server_port
        self._socket = namespace.run(_packet_socket)

    def __enter__(self) -> Watch:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._socket.close()

    def until(self, condition: Callable[[], bool], what: str, limit_s: float = SETTLE_S) -> None:
        """Wait until a condition holds; checks again whenever a segment passes.

        Raises LabTimeoutError with `what` if the condition does not hold within `limit_s` seconds.
        """
        deadline = Deadline(limit_s)
        self.take_in()
        while not condition():
            if deadline.passed():
                raise LabTimeoutError(what, deadline.limit_s, self.summary())
            self._socket.settimeout(min(RECHECK_S, deadline.left() or 0.001))
            try:
                self._note(self._socket.recv(128))
            except socket.timeout:
                continue
            self.take_in()

    def take_in(self) -> None:
        """Record all segments seen so far. Raises LabError if the kernel dropped some."""
        for packet in self._waiting_packets():
            self._note(packet)
        _, lost = struct.unpack("II", self._socket.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8))
        if lost:
            raise LabError(
                f"{lost} packets were missed",
                "the packet socket's buffer is full",
                "use fewer clients",
            )

    def count(self, condition: Callable[[WireRecord], bool]) -> int:
        """The number of connections whose record meets a condition."""
        return sum(condition(record) for record in self.records.values())

    def summary(self) -> str:
        """One line that counts the captured segments."""
        records = self.records.values()
        return (
            f"{len(records)} connections, {sum(record.syns for record in records)} SYNs, "
            f"{sum(record.synacks for record in records)} SYN-ACKs, "
            f"{sum(record.acks for record in records)} ACKs, "
            f"{sum(record.client_resets for record in records)} RSTs from clients"
        )

    def _waiting_packets(self) -> Iterator[bytes]:
        self._socket.setblocking(False)
        while True:
            try:
                yield self._socket.recv(128)
            except BlockingIOError:
                return

    def _note(self, packet: bytes) -> None:
        segment = parse_segment(packet)
        if segment is None:
            return
        if segment.destination_port == self._port:
            self._note_of_client(segment)
        elif segment.source_port == self._port:
            self._note_of_server(segment)

    def _note_of_client(self, segment: Segment) -> None:
        key = FourTuple(
            segment.source_ip,
            segment.source_port,
            segment.destination_ip,
            segment.destination_port,
        )
        record = self.records.setdefault(key, WireRecord())
        if segment.flags & RST:
            record.client_resets += 1
        elif segment.flags & SYN:
            record.syns += 1
            record.client_isn = segment.sequence
        elif segment.flags & ACK:
            record.acks += 1

    def _note_of_server(self, segment: Segment) -> None:
        key = FourTuple(
            segment.destination_ip,
            segment.destination_port,
            segment.source_ip,
            segment.source_port,
        )
        record = self.records.setdefault(key, WireRecord())
        if segment.flags & RST:
            record.server_resets += 1
        elif segment.flags & SYN:
            record.synacks += 1
            self.synacks += 1
            record.cookie_isn = segment.sequence


def _packet_socket() -> socket.socket:
    # SOCK_DGRAM removes the link header.
    watcher = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ETH_P_ALL))
    watcher.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, RECEIVE_BUFFER)
    watcher.bind((INTERFACE, ETH_P_ALL))
    return watcher
