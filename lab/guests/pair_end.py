"""Runs in the two guests of `pair`: a server with the tool, and clients that wait for a greeting.

Usage: `python3 -m lab.guests.pair_end server|client`. The client's end controls the server's end
with XML-RPC over the same wire, at a port that neither the tool nor the firewall rule matches. The
client's end prints the clients' view: one JSON line per try, and one for the pair.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import select
import socket
import socketserver
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from xmlrpc.client import ServerProxy
from xmlrpc.server import SimpleXMLRPCServer

from lab.errors import LabError, LabTimeoutError
from lab.network.faults import ack_rule, dropping
from lab.network.topology import (
    CLIENT_ADDRESS,
    PREFIX_LENGTH,
    SERVER_ADDRESS,
    SYSCTLS,
    SYSCTLS_OF_SOME_KERNELS,
    OwnNamespace,
)
from lab.patience import COMMAND_S, LOAD_S, SETTLE_S, START_S, Deadline, patient
from lab.processes.servers import GREETING
from lab.records import FourTuple, reported_verdicts
from lab.scenarios.scene import PORT
from lab.scenarios.tracer import READY_PLACEHOLDER, Tracer

SERVER, CLIENT = "server", "client"
ADDRESSES = {SERVER: SERVER_ADDRESS, CLIENT: CLIENT_ADDRESS}
HARDWARE = {SERVER: "02:00:00:00:09:01", CLIENT: "02:00:00:00:09:02"}
CONTROL_PORT = 3312
FAMILIES = (4, 6)
OPTION_SETS: Mapping[str, Mapping[str, str]] = {
    "all": {},
    "no timestamps": {"net/ipv4/tcp_timestamps": "0"},
}
CLIENTS = 8
"""Clients per try; fewer than the tool's limit of rescues per second and address."""
UNTRACED = 2
"""Clients per family that are stuck before the tool starts, so the tool cannot rescue them."""
BULK = 256 * 1024
NEGOTIATED = ("timestamps", "SACK", "scaling")
"""Names of the bits of tcpi_options in linux/tcp.h, lowest first."""
OPTIONS_OF_TCP_INFO = 5
"""Offset of tcpi_options in struct tcp_info."""
TRY_S = 5.0
"""Timeout of one connection attempt. A SYN is lost before the other guest's interface is up, and
retransmissions become rare."""
TOOL = ("-m", "tcpstuck_bpf", "-p", str(PORT), "--json", "--rescue", "-t", "1")


class GreetAndEcho(socketserver.BaseRequestHandler):
    """Sends the greeting, then echoes the received data."""

    def handle(self) -> None:
        """Serve one connection to its end."""
        with contextlib.suppress(ConnectionError):
            self.request.sendall(GREETING)
            while data := self.request.recv(65_536):
                self.request.sendall(data)


class EchoServer(socketserver.ThreadingTCPServer):
    """A TCP server that listens for both families."""

    address_family = socket.AF_INET6
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 128


@contextlib.contextmanager
def echoing(port: int) -> Iterator[int]:
    """Run a `GreetAndEcho` server while the context lasts; yields the server's port."""
    with EchoServer(("::", port), GreetAndEcho) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield int(server.server_address[1])
        finally:
            server.shutdown()
            thread.join()


def is_greeted(client: socket.socket, deadline: Deadline) -> bool:
    """Whether the greeting, which is one segment, arrives in time."""
    with contextlib.suppress(OSError):
        client.settimeout(deadline.left() or 0.001)
        return client.recv(len(GREETING)) == GREETING
    return False


def echoes(client: socket.socket) -> bool:
    """Whether data larger than an unscaled window comes back unchanged."""
    data = os.urandom(BULK)
    client.settimeout(patient(COMMAND_S))
    with ThreadPoolExecutor(1) as thread, contextlib.suppress(OSError):
        sent = thread.submit(client.sendall, data)
        with client.makefile("rb") as heard:
            same = heard.read(BULK) == data
        sent.result()
        return same
    return False


def negotiated(client: socket.socket) -> str:
    """The TCP options that a connection's SYN-ACK accepted, from the client's kernel."""
    info = client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, OPTIONS_OF_TCP_INFO + 1)
    bits = info[OPTIONS_OF_TCP_INFO]
    return " ".join(name for at, name in enumerate(NEGOTIATED) if bits >> at & 1) or "none"


def four_tuple_of(client: socket.socket) -> FourTuple:
    """The 4-tuple of a client's connection."""
    return FourTuple(*client.getsockname()[:2], *client.getpeername()[:2])


def join_wire(place: OwnNamespace, ours: str) -> None:
    """Bring up this end's interface, with a permanent neighbour entry as in `Topology`."""
    theirs = CLIENT if ours == SERVER else SERVER
    place.pin(SYSCTLS)
    place.pin(SYSCTLS_OF_SOME_KERNELS, if_known=True)
    place.command("modprobe", "virtio_net")
    cards = Path("/sys/class/net").iterdir()
    (card,) = (one.name for one in cards if (one / "address").read_text().strip() == HARDWARE[ours])
    place.command("ip", "link", "set", card, "up")
    for family in FAMILIES:
        address = f"{ADDRESSES[ours][family]}/{PREFIX_LENGTH[family]}"
        now = ("nodad",) if family == 6 else ()
        place.command("ip", "address", "add", address, "dev", card, *now)
        neighbour = (ADDRESSES[theirs][family], "lladdr", HARDWARE[theirs], "dev", card)
        place.command("ip", "neighbour", "replace", *neighbour, "nud", "permanent")


class Server:
    """The server's end, with the methods that the client's end may call."""

    def __init__(self, place: OwnNamespace, tracer: Tracer) -> None:
        self._place = place
        self._tracer = tracer
        self._rules = contextlib.ExitStack()
        self._asked_to_end = False

    def trace(self) -> str:
        """Start the tool; returns the kernel release once the tool traces."""
        self._tracer.start()
        return platform.release()

    def silence(self, family: int) -> None:
        """Drop bare ACKs from now on; the tool pauses, so that it does not waste its attempts."""
        self._tracer.pause()
        self._rules.enter_context(dropping(self._place, ack_rule(PORT), family))

    def known(self) -> list[list[Any]]:
        """The established connections, from `ss`; ACKs sent before this call have arrived."""
        rows = self._place.sockets("established", f"sport = :{PORT}")
        return [[row.peer_ip, row.peer_port, row.local_ip, row.local_port] for row in rows]

    def listen(self) -> None:
        """Stop dropping ACKs, and resume the tool."""
        self._rules.close()
        self._tracer.resume()

    def rescued(self, clients: Sequence[Sequence[Any]]) -> int:
        """The number of these clients that the tool reports as rescued."""
        wanted, netns = [FourTuple(*client) for client in clients], self._place.inode
        self._tracer.await_reported(dict.fromkeys(wanted, "rescued"), netns)
        told = reported_verdicts(self._tracer.lines, netns)
        return sum(told.get(client) == "rescued" for client in wanted)

    def end(self) -> None:
        """End after this request."""
        self._asked_to_end = True

    def serve(self, control: SimpleXMLRPCServer) -> None:
        """Serve requests one after the other, until `end`."""
        control.register_instance(self)
        while not self._asked_to_end:
            control.handle_request()


def control_server(port: int) -> SimpleXMLRPCServer:
    """The XML-RPC server that the client's end calls."""
    return SimpleXMLRPCServer(("", port), logRequests=False, allow_none=True)


def run_server(place: OwnNamespace) -> None:
    """Run the server's guest until `end`."""
    words = [sys.executable, *TOOL, "--ready-file", READY_PLACEHOLDER]
    # Start the listeners before the interface, so that no connection is refused.
    with control_server(CONTROL_PORT) as control, echoing(PORT), Tracer(words) as tool:
        join_wire(place, SERVER)
        place.pin({"net/ipv4/tcp_syncookies": "2"})
        Server(place, tool).serve(control)
        tool.stop()
        # For debugging: the tool's output shows why a client was not rescued.
        print(*map(json.dumps, tool.lines), sep="\n", flush=True)


def server_at(address: str, port: int) -> Any:
    """A proxy for the server's end, with the methods of `Server`. Raises LabTimeoutError."""
    deadline = Deadline(START_S)
    while not deadline.passed():
        with contextlib.suppress(OSError), socket.create_connection((address, port), TRY_S):
            return ServerProxy(f"http://{address}:{port}", allow_none=True)
    raise LabTimeoutError("the server's guest", deadline.limit_s, "no answer on the wire")


def silenced(server: Any, family: int, count: int) -> list[socket.socket]:
    """Connect clients while a rule drops their ACKs; the rule stays."""
    server.silence(family)
    place = (SERVER_ADDRESS[family], PORT)
    return [socket.create_connection(place, patient(COMMAND_S)) for _ in range(count)]


def stuck_of(server: Any, clients: Sequence[socket.socket]) -> list[socket.socket]:
    """The clients that are connected, have received no data, and are unknown to the server."""
    known = {FourTuple(*one) for one in server.known()}
    spoken_to, _, _ = select.select(clients, [], [], 0)
    return [
        client
        for client in clients
        if four_tuple_of(client) not in known and client not in spoken_to
    ]


def play(place: OwnNamespace, server: Any, family: int, options: str) -> dict[str, Any]:
    """Play one try and return its figures.

    A healthy client first makes the address known. Then clients connect while their ACKs are
    dropped.
    """
    place.pin({**SYSCTLS, **OPTION_SETS[options]})
    with socket.create_connection((SERVER_ADDRESS[family], PORT), patient(COMMAND_S)) as first:
        if not is_greeted(first, Deadline(SETTLE_S)):
            raise LabError("no client is greeted", "not even one whose ACK passed", "see the log")
    clients = silenced(server, family, CLIENTS)
    stuck = stuck_of(server, clients)
    server.listen()
    deadline = Deadline(SETTLE_S)
    greeted = [client for client in clients if is_greeted(client, deadline)]
    result = {
        "family": family,
        "options": options,
        "negotiated": ", ".join(sorted(set(map(negotiated, clients)))),
        "clients": len(clients),
        "stuck": len(stuck),
        "greeted": len(greeted),
        "equal": sum(map(echoes, greeted)),
        "rescued": server.rescued([list(four_tuple_of(client)) for client in clients]),
    }
    for client in clients:
        client.close()
    return result


def run_client(place: OwnNamespace) -> None:
    """Run the client's guest to its end."""
    join_wire(place, CLIENT)
    # This timeout also limits the wait for an answer of the server's end.
    socket.setdefaulttimeout(patient(LOAD_S))
    server = server_at(SERVER_ADDRESS[4], CONTROL_PORT)
    untraced = []
    for family in FAMILIES:
        untraced += silenced(server, family, UNTRACED)
        server.known()
        server.listen()
    pair = {"server": server.trace(), "client": platform.release()}
    for options in OPTION_SETS:
        for family in FAMILIES:
            print(json.dumps(play(place, server, family, options)), flush=True)
    waiting = stuck_of(server, untraced)
    print(json.dumps({**pair, "untraced": len(untraced), "waiting": len(waiting)}), flush=True)
    server.end()


def main(part: str) -> int:
    """Play a part to its end; returns the exit status."""
    try:
        {SERVER: run_server, CLIENT: run_client}[part](OwnNamespace())
    except LabError as error:
        print(*error.lines(), sep="\n", file=sys.stderr)
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
