"""A server that speaks first: it accepts, greets, and closes after the client.

`lab.processes.servers.Greeter` starts the process.
"""

from __future__ import annotations

import functools
import selectors
import socket
import time
from multiprocessing.connection import Connection
from typing import Any

from lab.network.readings import plain_address
from lab.processes.child import Failure, channel_of_child
from lab.processes.servers import (
    GREETING,
    Accepted,
    AwaitAccepted,
    Listen,
    Listening,
    Pause,
    Peers,
    Resume,
)

IP_TRANSPARENT = 19
"""From include/uapi/linux/in.h; the socket module has the name since Python 3.14."""


class GreeterLoop:
    """The listener and its connections, and the loop that serves requests."""

    def __init__(self, channel: Connection[Any, Any]) -> None:
        self.channel = channel
        self.selector = selectors.DefaultSelector()
        self.selector.register(channel.fileno(), selectors.EVENT_READ, self._obey_next)
        self.listener: socket.socket | None = None
        self.accepting = False
        self.peers: list[Accepted] = []
        self.awaited: AwaitAccepted | None = None
        self.await_until = 0.0
        self.ended = False

    def run(self) -> None:
        """Serve until the parent closes the channel."""
        while not self.ended:
            patience = None
            if self.awaited is not None:
                patience = max(0.0, self.await_until - time.monotonic())
            for key, _ in self.selector.select(patience):
                key.data()
            self._answer_wait()

    def _obey_next(self) -> None:
        try:
            request = self.channel.recv()
        except (EOFError, ConnectionResetError):
            self.ended = True
            return
        if isinstance(request, AwaitAccepted):
            self.awaited = request
            self.await_until = time.monotonic() + request.limit_s
        else:
            self.channel.send(self._obey(request))

    def _obey(self, request: object) -> object:
        if isinstance(request, Listen):
            return self._listen(request)
        if isinstance(request, Peers):
            return self.peers
        if isinstance(request, Resume) and self.listener is not None and not self.accepting:
            self.accepting = True
            self.selector.register(self.listener, selectors.EVENT_READ, self._accept_all)
            return True
        if isinstance(request, Pause) and self.listener is not None and self.accepting:
            self.accepting = False
            self.selector.unregister(self.listener)
            return True
        return Failure(f"cannot obey {request!r} now")

    def _listen(self, request: Listen) -> object:
        family = socket.AF_INET6 if ":" in request.address else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setblocking(False)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if request.shares_port:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if request.transparent:
            listener.setsockopt(socket.SOL_IP, IP_TRANSPARENT, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not request.both_families)
        try:
            listener.bind((request.address, request.port))
            listener.listen(request.backlog)
        except OSError as error:
            return Failure(f"listen on {request.address} port {request.port}: {error}")
        self.listener = listener
        return Listening(listener.getsockname()[1])

    def _accept_all(self) -> None:
        while self.listener is not None and self.accepting:
            try:
                connection, peer = self.listener.accept()
            except BlockingIOError:
                return
            self.peers.append(Accepted(plain_address(peer[0]), peer[1], time.monotonic_ns()))
            connection.setblocking(False)
            try:
                connection.send(GREETING)
            except OSError:
                # The client has already gone; its connection is recorded as accepted.
                connection.close()
                continue
            self.selector.register(
                connection, selectors.EVENT_READ, functools.partial(self._read, connection)
            )

    def _read(self, connection: socket.socket) -> None:
        try:
            data = connection.recv(4096)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.selector.unregister(connection)
            connection.close()

    def _answer_wait(self) -> None:
        if self.awaited is None:
            return
        reached = len(self.peers) >= self.awaited.how_many
        if reached or time.monotonic() >= self.await_until:
            self.awaited = None
            self.channel.send(reached)


def main() -> None:
    """Answer requests until the parent closes the channel."""
    GreeterLoop(channel_of_child()).run()
