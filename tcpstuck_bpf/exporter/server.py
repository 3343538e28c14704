"""Serves the metrics over HTTP: GET /metrics, in separate threads.

A client has LIMIT_S to send its request, of at most MOST_REQUEST_BYTES, and LIMIT_S to read the
answer. At most MOST_CLIENTS are served at once; further connections are closed. A client that hangs
or sends garbage therefore occupies one of these places for a bounded time and never delays tracing.
"""

from __future__ import annotations

import contextlib
import io
import socket
import threading
import time
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from typing import NamedTuple

from tcpstuck_bpf.errors import UsageError
from tcpstuck_bpf.exporter.exposition import Exposition
from tcpstuck_bpf.threads import start_beside

LIMIT_S = 5.0
MOST_CLIENTS = 8
MOST_REQUEST_BYTES = 16_384
_WAITING_CLIENTS = 16
_PAUSE_S = 0.1
"""Pause after accept() failed, for example because file descriptors ran out."""


class Address(NamedTuple):
    """The address to listen on."""

    ip: str
    port: int
    """0 means any free port."""

    def __str__(self) -> str:
        return f"[{self.ip}]:{self.port}" if ":" in self.ip else f"{self.ip}:{self.port}"


class MetricsServer:
    """Listens at once and answers after `start`.

    Raises UsageError if it cannot listen on the address.
    """

    def __init__(self, address: Address, exposition: Exposition, limit_s: float = LIMIT_S) -> None:
        self._exposition = exposition
        self._limit_s = limit_s
        self._closed = False
        self._places = threading.BoundedSemaphore(MOST_CLIENTS)
        try:
            self._socket = _listening(address)
        except OSError as error:
            raise UsageError(
                f"cannot serve metrics at {address}",
                str(error.strerror),
                "name an address of this machine and a free port: --metrics ADDR:PORT",
            ) from error
        self.address = Address(*self._socket.getsockname()[:2])

    def start(self) -> None:
        """Start to answer requests."""
        start_beside("metrics", self._serve)

    def close(self) -> None:
        """Stop listening. Answers in progress are not awaited."""
        self._closed = True
        # shutdown() makes accept() return.
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _serve(self) -> None:
        while not self._closed:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                time.sleep(0 if self._closed else _PAUSE_S)
                continue
            if self._places.acquire(blocking=False):
                self._answer_beside(connection)
            else:
                connection.close()

    def _answer_beside(self, connection: socket.socket) -> None:
        def answer() -> None:
            try:
                # An error while serving a client concerns that client only.
                with contextlib.suppress(Exception):
                    _Handler(connection, self._exposition, self._limit_s)
            finally:
                connection.close()
                self._places.release()

        try:
            start_beside("metrics-client", answer)
        except RuntimeError:  # cannot start another thread
            connection.close()
            self._places.release()


def _listening(address: Address) -> socket.socket:
    family = socket.AF_INET6 if ":" in address.ip else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        # Lets a restarted run bind the port while old connections are in TIME_WAIT.
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((address.ip, address.port))
        listening.listen(_WAITING_CLIENTS)
    except BaseException:
        listening.close()
        raise
    return listening


def request_head(receive: Callable[[int, float], bytes], limit_s: float) -> bytes:
    """A request up to the empty line, or the part that arrived within the time and size limits.

    `receive` takes the most bytes to read and the most seconds to wait. It returns no bytes at the
    end of the stream. Raises TimeoutError.
    """
    until = time.monotonic() + limit_s
    head = b""
    while len(head) < MOST_REQUEST_BYTES and b"\n\r\n" not in head and b"\n\n" not in head:
        left_s = until - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        some = receive(MOST_REQUEST_BYTES - len(head), left_s)
        if not some:
            break
        head += some
    return head


class _Handler(BaseHTTPRequestHandler):
    """One request and its answer. A connection serves one request only (HTTP/1.0)."""

    server_version = "tcpstuck-trace"
    sys_version = ""

    def __init__(self, connection: socket.socket, exposition: Exposition, limit_s: float) -> None:
        self._exposition = exposition
        self._limit_s = limit_s
        super().__init__(connection, ("", 0), None)  # type: ignore[arg-type]

    def setup(self) -> None:
        """Read the whole request first: a time-out per read would not stop a slow sender."""
        self.connection = self.request
        self.rfile = io.BytesIO(request_head(self._receive, self._limit_s))
        self.connection.settimeout(self._limit_s)
        self.wfile = self._written = io.BytesIO()

    def _receive(self, most: int, limit_s: float) -> bytes:
        self.connection.settimeout(limit_s)
        return bytes(self.connection.recv(most))

    def finish(self) -> None:
        """Write the answer. The time-out of sendall covers the whole answer."""
        self.connection.sendall(self._written.getvalue())
        self.connection.shutdown(socket.SHUT_WR)

    def do_GET(self) -> None:
        """Answer with the metrics."""
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        """Answer with the headers only."""
        self._answer(with_body=False)

    def _answer(self, *, with_body: bool) -> None:
        if self.path.partition("?")[0] != "/metrics":
            self.send_error(HTTPStatus.NOT_FOUND, "the only path is /metrics")
            return
        text = self._exposition.text(self.headers.get("Accept", ""))
        if text is None:
            self.send_error(HTTPStatus.SERVICE_UNAVAILABLE, "tracing has not begun")
            return
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", text.content_type)
        self.send_header("Content-Length", str(len(text.body)))
        self.end_headers()
        if with_body:
            self.wfile.write(text.body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Log nothing: standard error belongs to the run."""
