"""What `pair` runs in its two guests: a server with the tool, and clients that wait for it.

Started as `python3 -m lab.guests.pair_end server|client`. The client's end asks the server's over
the wire itself (XML-RPC), at a port that neither the tool nor the firewall's rule looks at. What
the clients see goes to the client's standard output: a line of JSON for each try, and one for the
pair.
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
"""In each try; fewer than the tool writes to in a second at one address."""
UNTRACED = 2
"""In each family, stuck before the tool is there: nobody can rescue them."""
BULK = 256 * 1024
NEGOTIATED = ("timestamps", "SACK", "scaling")
"""By bit, from the lowest, of tcpi_options in linux/tcp.h."""
OPTIONS_OF_TCP_INFO = 5
"""Where that byte is."""
TRY_S = 5.0
"""A SYN that comes before the other guest has its interface is lost; its repetitions get rare."""
TOOL = ("-m", "tcpstuck_bpf", "-p", str(PORT), "--json", "--rescue", "-t", "1")


class GreetAndEcho(socketserver.BaseRequestHandler):
    """Speaks first, then says again what it hears."""

    def handle(self) -> None:
        """Serve one connection to its end."""
        with contextlib.suppress(ConnectionError):
            self.request.sendall(GREETING)
            while data := self.request.recv(65_536):
                self.request.sendall(data)


class EchoServer(socketserver.ThreadingTCPServer):
    """Listens for both families."""

    address_family = socket.AF_INET6
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 128


@contextlib.contextmanager
def echoing(port: int) -> Iterator[int]:
    """A server of `GreetAndEcho` while the context lasts; the port it listens on."""
    with EchoServer(("::", port), GreetAndEcho) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield int(server.server_address[1])
        finally:
            server.shutdown()
            thread.join()


def is_greeted(client: socket.socket, deadline: Deadline) -> bool:
    """Whether the greeting, which is one segment, comes in time."""
    with contextlib.suppress(OSError):
        client.settimeout(deadline.left() or 0.001)
        return client.recv(len(GREETING)) == GREETING
    return False


def echoes(client: socket.socket) -> bool:
    """Whether what is sent comes back as it was, more at once than a window without scaling."""
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
    """The options that a connection's SYN-ACK agreed to, by the client's kernel."""
    info = client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, OPTIONS_OF_TCP_INFO + 1)
    bits = info[OPTIONS_OF_TCP_INFO]
    return " ".join(name for at, name in enumerate(NEGOTIATED) if bits >> at & 1) or "none"


def four_tuple_of(client: socket.socket) -> FourTuple:
    """A client's own name for its connection."""
    return FourTuple(*client.getsockname()[:2], *client.getpeername()[:2])


def join_wire(place: OwnNamespace, ours: str) -> None:
    """Bring up this end's interface, the neighbour entered by hand as in the other topology."""
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
    """The server's end: what the client's end may ask for."""

    def __init__(self, place: OwnNamespace, tracer: Tracer) -> None:
        self._place = place
        self._tracer = tracer
        self._rules = contextlib.ExitStack()
        self._asked_to_end = False

    def trace(self) -> str:
        """Start the tool; answers with the kernel's release once it traces."""
        self._tracer.start()
        return platform.release()

    def silence(self, family: int) -> None:
        """Drop bare ACKs from now on; the tool pauses, or its tries would be used up in vain."""
        self._tracer.pause()
        self._rules.enter_context(dropping(self._place, ack_rule(PORT), family))

    def known(self) -> list[list[Any]]:
        """The established connections, by `ss`; no ACK sent before this was asked comes after."""
        rows = self._place.sockets("established", f"sport = :{PORT}")
        return [[row.peer_ip, row.peer_port, row.local_ip, row.local_port] for row in rows]

    def listen(self) -> None:
        """Drop nothing any more."""
        self._rules.close()
        self._tracer.resume()

    def rescued(self, clients: Sequence[Sequence[Any]]) -> int:
        """How many of these the tool says it has rescued."""
        wanted, netns = [FourTuple(*client) for client in clients], self._place.inode
        self._tracer.await_reported(dict.fromkeys(wanted, "rescued"), netns)
        told = reported_verdicts(self._tracer.lines, netns)
        return sum(told.get(client) == "rescued" for client in wanted)

    def end(self) -> None:
        """Answer this, and nothing after it."""
        self._asked_to_end = True

    def serve(self, control: SimpleXMLRPCServer) -> None:
        """Do what is asked, one thing after the other, until asked to end."""
        control.register_instance(self)
        while not self._asked_to_end:
            control.handle_request()


def control_server(port: int) -> SimpleXMLRPCServer:
    """Where the client's end asks."""
    return SimpleXMLRPCServer(("", port), logRequests=False, allow_none=True)


def run_server(place: OwnNamespace) -> None:
    """The whole life of the server's guest."""
    words = [sys.executable, *TOOL, "--ready-file", READY_PLACEHOLDER]
    # The listeners are there before the interface: no connection is ever refused.
    with control_server(CONTROL_PORT) as control, echoing(PORT), Tracer(words) as tool:
        join_wire(place, SERVER)
        place.pin({"net/ipv4/tcp_syncookies": "2"})
        Server(place, tool).serve(control)
        tool.stop()
        # For whoever has to find out why a client was not rescued.
        print(*map(json.dumps, tool.lines), sep="\n", flush=True)


def server_at(address: str, port: int) -> Any:
    """The server's end, to be asked for what `Server` does. Raises LabTimeoutError."""
    deadline = Deadline(START_S)
    while not deadline.passed():
        with contextlib.suppress(OSError), socket.create_connection((address, port), TRY_S):
            return ServerProxy(f"http://{address}:{port}", allow_none=True)
    raise LabTimeoutError("the server's guest", deadline.limit_s, "no answer on the wire")


def silenced(server: Any, family: int, count: int) -> list[socket.socket]:
    """Clients whose ACKs were dropped, by a rule that is still there."""
    server.silence(family)
    place = (SERVER_ADDRESS[family], PORT)
    return [socket.create_connection(place, patient(COMMAND_S)) for _ in range(count)]


def stuck_of(server: Any, clients: Sequence[socket.socket]) -> list[socket.socket]:
    """Those that are connected, have heard nothing, and are unknown to the server."""
    known = {FourTuple(*one) for one in server.known()}
    spoken_to, _, _ = select.select(clients, [], [], 0)
    return [
        client
        for client in clients
        if four_tuple_of(client) not in known and client not in spoken_to
    ]


def play(place: OwnNamespace, server: Any, family: int, options: str) -> dict[str, Any]:
    """One try: a client that makes the address known, then silenced ones, and what they see."""
    place.pin({**SYSCTLS, **OPTION_SETS[options]})
    with socket.create_connection((SERVER_ADDRESS[family], PORT), patient(COMMAND_S)) as first:
        if not is_greeted(first, Deadline(SETTLE_S)):
            raise LabError("no client is greeted", "nor is one that nobody silenced", "see the log")
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
    """The whole life of the client's guest."""
    join_wire(place, CLIENT)
    # For an answer of the server's end, too.
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
    """Play a part to its end; the exit status."""
    try:
        {SERVER: run_server, CLIENT: run_client}[part](OwnNamespace())
    except LabError as error:
        print(*error.lines(), sep="\n", file=sys.stderr)
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
