"""A server that answers every SYN by a cookie, and clients whose every segment is made by hand.

Such a client's address is nobody's: what it sends, and that it repeats nothing, is certain.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from lab.network.faults import dropping
from lab.network.segments import IPPROTO_TCP
from lab.network.syns import make_syn, send_in_bursts, send_segment
from lab.network.topology import SERVER_ADDRESS, SILENT_SOURCES, Topology, source_addresses
from lab.network.watch import Watch
from lab.patience import COMMAND_S, patient
from lab.records import FourTuple
from lab.scenarios.scene import PORT
from lab.scenarios.tracer import Tracer

MSS_TABLE = {4: (536, 1300, 1440, 1460), 6: (1280 - 60, 1480 - 60, 1500 - 60, 9000 - 60)}
"""msstab[] of net/ipv4/syncookies.c and net/ipv6/syncookies.c; a cookie holds an index into it."""
ISN = 0xFFFF_FFFD
"""An ISN so high that the sequence numbers of a few bytes wrap."""
_ports = itertools.count(2000)
"""Each client has its own, for the inode number of a namespace that is gone may be used again, and
what a tracer told of that one is no answer."""


@dataclass(frozen=True)
class Site:
    """The server's and the client's namespace, a listener, and the wire between."""

    topology: Topology
    listener: socket.socket
    watch: Watch
    family: int

    @property
    def netns(self) -> int:
        return self.topology.server.inode

    @property
    def server_ip(self) -> str:
        return SERVER_ADDRESS[self.family]

    def known_to_server(self) -> set[int]:
        """Client ports of the established connections, by `ss`."""
        rows = self.topology.server.sockets("established", f"sport = :{PORT}")
        return {row.peer_port for row in rows}


@contextlib.contextmanager
def site(family: int, backlog: int = 128) -> Iterator[Site]:
    """A server and a client's namespace; the listener accepts only on request."""
    socket_family = socket.AF_INET6 if family == 6 else socket.AF_INET
    with contextlib.ExitStack() as opened:
        topology = opened.enter_context(Topology())
        topology.server.pin({"net/ipv4/tcp_syncookies": "2"})
        listen = partial(
            socket.create_server,
            (SERVER_ADDRESS[family], PORT),
            family=socket_family,
            backlog=backlog,
        )
        listener = opened.enter_context(topology.server.run(listen))
        listener.settimeout(patient(COMMAND_S))
        watch = opened.enter_context(Watch(topology.client, PORT))
        yield Site(topology, listener, watch, family)


class Client:
    """One handshake and the segments after it."""

    def __init__(self, where: Site) -> None:
        self._site = where
        self.port = next(_ports)
        address = source_addresses(SILENT_SOURCES[where.family], 1)[0]
        self.four_tuple = FourTuple(address, self.port, where.server_ip, PORT)
        self.cookie_isn: int | None = None

    def connect(self, mss_index: int = 3, times: int = 1) -> None:
        """Have a SYN answered, several times if need be."""
        syn = make_syn(self.four_tuple, ISN, MSS_TABLE[self._site.family][mss_index])
        for _ in range(times):
            send_in_bursts(self._site.topology.client, self._site.watch, [syn])
        self.cookie_isn = self._site.watch.records[self.four_tuple].cookie_isn

    def send(
        self,
        offset: int,
        payload: bytes = b"",
        wrong_by: int = 0,
        extensions: tuple[int, bytes] = (IPPROTO_TCP, b""),
    ) -> None:
        """A segment whose data begin so far into the stream; no data: an ACK."""
        assert self.cookie_isn is not None
        send_segment(
            self._site.topology.client,
            self.four_tuple,
            ISN + 1 + offset,
            self.cookie_isn + 1,
            payload,
            wrong_by,
            extensions,
        )

    def lose(self, *segments: tuple[int, bytes]) -> None:
        """Send segments that the server's host drops before TCP."""
        rule = ("-p", "tcp", "--dport", str(PORT))
        server, family = self._site.topology.server, self._site.family
        program = "iptables" if family == 4 else "ip6tables"
        with dropping(server, rule, family):
            for segment in segments:
                self.send(*segment)
            listed = server.command(program, "-w", "-L", "INPUT", "-nvx").splitlines()
        (packets,) = (int(line.split()[0]) for line in listed if f"dpt:{PORT}" in line)
        assert packets == len(segments)

    def read_by_server(self, length: int) -> bytes:
        """What the server's application reads first."""
        served, peer = self._site.listener.accept()
        with served:
            assert peer[:2] == self.four_tuple[:2]
            served.settimeout(patient(COMMAND_S))
            return served.recv(length, socket.MSG_WAITALL)

    def await_reset(self) -> None:
        """Wait for the server's RST."""
        record = self._site.watch.records[self.four_tuple]
        self._site.watch.until(lambda: record.server_resets > 0, "an RST of the server")


def told(tracer: Tracer, netns: int, who: FourTuple, verdict: str) -> dict[str, Any]:
    """The last line about a client, once the tool has printed it with this verdict."""
    assert tracer.await_reported({who: verdict}, netns), (who, verdict)
    about = (
        dict(line) for line in tracer.lines if line["type"] == "verdict" and line["netns"] == netns
    )
    return [line for line in about if line["client_port"] == who.client_port][-1]
