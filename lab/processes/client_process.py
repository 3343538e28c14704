"""The process that owns the client sockets: one thread, one selector, no blocking call.

`lab.processes.clients.Clients` starts the process.
"""

from __future__ import annotations

import errno
import selectors
import socket
import struct
import time
from collections import Counter
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

from lab.network.readings import plain_address
from lab.processes.child import Failure, channel_of_child
from lab.processes.clients import ALL, Close, Connect, Report, Send, WaitFor
from lab.records import ClientRecord, FourTuple

OPENED_PER_ROUND = 64
"""A limit, so that opening thousands of sockets does not starve those that already connect."""
GREETING_KEPT = 80
IP_BIND_ADDRESS_NO_PORT = 24
"""From linux/in.h; the socket module has no name for it before Python 3.14."""
RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class Client:
    """One socket and its record."""

    def __init__(self, order: Connect, source: str | None) -> None:
        family = socket.AF_INET6 if ":" in order.server_ip else socket.AF_INET
        self.socket = socket.socket(family, socket.SOCK_STREAM)
        self.socket.setblocking(False)
        self.then_close = order.then_close
        self.first_words = order.first_words
        if source is not None:
            # Without this option, bind() would reserve a port before the peer is known.
            self.socket.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
            self.socket.bind((source, 0))
        opened_ns = time.monotonic_ns()
        self.connect_status = self.socket.connect_ex((order.server_ip, order.server_port))
        local_ip, local_port = self.socket.getsockname()[:2]
        self.record = ClientRecord(
            FourTuple(plain_address(local_ip), local_port, order.server_ip, order.server_port),
            opened_ns,
        )

    @property
    def open(self) -> bool:
        """Whether the socket is neither closed nor failed."""
        return self.socket.fileno() >= 0


class ClientLoop:
    """All client sockets, and the loop that serves requests."""

    def __init__(self, channel: Connection[Any, Any]) -> None:
        self.channel = channel
        self.selector = selectors.DefaultSelector()
        self.selector.register(channel.fileno(), selectors.EVENT_READ)
        self.clients: list[Client] = []
        self.counts: Counter[str] = Counter()
        self.order = Connect(0, 0, "", 0)
        self.left_to_open = 0
        self.on_their_way: set[Client] = set()
        self.awaited: WaitFor | None = None
        self.await_until = 0.0

    def run(self) -> None:
        """Serve until the parent closes the channel."""
        while True:
            self._open_some()
            self._answer_wait()
            for key, _ in self.selector.select(self._patience()):
                if key.data is None:
                    try:
                        request = self.channel.recv()
                    except (EOFError, ConnectionResetError):
                        return
                    self._obey(request)
                elif key.data.open:
                    self._serve(key.data)

    def _patience(self) -> float | None:
        if self._may_open():
            return 0.0
        if self.awaited is not None:
            return max(0.0, self.await_until - time.monotonic())
        return None

    def _may_open(self) -> int:
        return max(0, min(self.left_to_open, self.order.in_flight - len(self.on_their_way)))

    def _open_some(self) -> None:
        for _ in range(min(self._may_open(), OPENED_PER_ROUND)):
            sources = self.order.sources
            source = sources[self.left_to_open % len(sources)] if sources else None
            client = Client(self.order, source)
            self.clients.append(client)
            self.on_their_way.add(client)
            self.left_to_open -= 1
            self.counts["opened"] += 1
            if client.connect_status in (0, errno.EINPROGRESS):
                both = selectors.EVENT_READ | selectors.EVENT_WRITE
                self.selector.register(client.socket, both, client)
            else:
                self._fail(client, client.connect_status)

    def _answer_wait(self) -> None:
        if self.awaited is None:
            return
        reached = all(self.counts[name] >= least for name, least in self.awaited.counts.items())
        if reached or time.monotonic() >= self.await_until:
            self.awaited = None
            self.channel.send(reached)

    def _obey(self, request: object) -> None:
        if isinstance(request, WaitFor):
            self.awaited = request
            self.await_until = time.monotonic() + request.limit_s
        elif isinstance(request, Report):
            self.channel.send([client.record for client in self.clients])
        elif isinstance(request, Connect):
            if self.left_to_open:
                self.channel.send(Failure("earlier connections are not all open yet"))
                return
            self.order = request
            self.left_to_open = request.how_many
            self.channel.send(True)
        elif isinstance(request, Send):
            for client in self._chosen(request.which):
                self._write(client, request.payload)
            self.channel.send(True)
        elif isinstance(request, Close):
            for client in self._chosen(request.which):
                if request.reset:
                    client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
                self._close(client, "client")
            self.channel.send(True)
        else:
            self.channel.send(Failure(f"unknown request {request!r}"))

    def _chosen(self, which: str) -> Iterator[Client]:
        return (
            client
            for client in self.clients
            if client.open and (which == ALL or client.record.waiting)
        )

    def _serve(self, client: Client) -> None:
        if client.record.connected_ns is None:
            status = client.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if status:
                self._fail(client, status)
                return
            client.record.connected_ns = time.monotonic_ns()
            self.counts["connected"] += 1
            self.counts["settled"] += 1
            if not client.then_close:
                self.on_their_way.discard(client)
            self.selector.modify(client.socket, selectors.EVENT_READ, client)
            if client.first_words:
                self._write(client, client.first_words)
        if client.open:
            self._read(client)

    def _read(self, client: Client) -> None:
        try:
            data = client.socket.recv(4096)
        except BlockingIOError:
            return
        except OSError as error:
            self._fail(client, error.errno or 0)
            return
        if not data:
            self._close(client, "server")
            return
        if client.record.greeted_ns is None:
            client.record.greeted_ns = time.monotonic_ns()
            client.record.greeting = data[:GREETING_KEPT]
            self.counts["greeted"] += 1
            if client.then_close:
                self._close(client, "client")

    def _write(self, client: Client, payload: bytes) -> None:
        try:
            client.socket.send(payload)
        except OSError as error:
            self._fail(client, error.errno or 0)

    def _fail(self, client: Client, status: int) -> None:
        client.record.error = errno.errorcode.get(status, str(status))
        self.counts["failed"] += 1
        self._end(client)

    def _close(self, client: Client, side: str) -> None:
        client.record.closed_by = side
        self._end(client)

    def _end(self, client: Client) -> None:
        if client.record.connected_ns is None:
            self.counts["settled"] += 1
        client.record.closed_ns = time.monotonic_ns()
        self.counts["ended"] += 1
        self.on_their_way.discard(client)
        if client.connect_status in (0, errno.EINPROGRESS):
            self.selector.unregister(client.socket)
        client.socket.close()


def main() -> None:
    """Answer requests until the parent closes the channel."""
    ClientLoop(channel_of_child()).run()
