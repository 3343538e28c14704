"""The common setup of all scenarios: topology, packet capture, counters and stages."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import NamedTuple

from lab.errors import LabError
from lab.network.topology import CLIENT_ADDRESS, SERVER_ADDRESS, Topology
from lab.network.watch import Watch
from lab.processes.clients import Clients
from lab.processes.servers import Greeter
from lab.records import FourTuple, Outcome

FAMILIES = ("4", "6", "mapped")
"""IPv4, IPv6, and IPv4 clients of a listener on `::`."""
PORT = 3311
"""The port in Evan Jones, A TCP "stuck" connection mystery (2011), the origin of this tool."""

READY = "ready"
"""The server listens and no packet has been sent: a tracer may start now."""
STUCK = "stuck"
"""Clients are stuck for now, and more will happen to them. Not all scenarios have this stage."""
DONE = "done"
"""Nothing more will happen; every socket and namespace still exists."""


class Stage(NamedTuple):
    """The argument of the caller's hook; the scenario waits until the hook returns."""

    name: str
    expected: Mapping[FourTuple, str]
    """The current true verdict of each connection that is not simply healthy."""
    netns: int
    """Inode number of the server's network namespace."""


def go_on(stage: Stage) -> None:
    """A hook that does nothing."""


@dataclass(frozen=True)
class Settings:
    """The caller's choices for a scenario."""

    clients: int
    family: str = "4"
    port: int = PORT
    after: Callable[[Stage], None] = go_on


class Scene:
    """The running setup of one scenario; a context manager."""

    topology: Topology
    watch: Watch
    clients: Clients

    def __init__(
        self, name: str, settings: Settings, *, syncookies: int, watched: bool = True
    ) -> None:
        self.name = name
        self.settings = settings
        self.ip_version = 6 if settings.family == "6" else 4
        self.server_ip = SERVER_ADDRESS[self.ip_version]
        self.client_ip = CLIENT_ADDRESS[self.ip_version]
        self.listen_ip = "::" if settings.family == "mapped" else self.server_ip
        self._syncookies = syncookies
        self._watched = watched
        self._cleanup = contextlib.ExitStack()
        self._before: Mapping[str, int] = {}

    def __enter__(self) -> Scene:
        with contextlib.ExitStack() as building:
            self.topology = building.enter_context(Topology())
            self.topology.server.pin({"net/ipv4/tcp_syncookies": str(self._syncookies)})
            if self._watched:
                self.watch = building.enter_context(Watch(self.topology.client, self.settings.port))
            self.clients = building.enter_context(Clients(self.topology.client))
            self._cleanup = building.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # Cut the wire first: a tracer that runs on must not see one end closed before the other.
        self._cleanup.callback(self.topology.cut)
        self._cleanup.close()

    def greeter(self, backlog: int) -> Greeter:
        """The lab's own server: listening, paused, and closed when the scene ends."""
        server = Greeter(
            self.topology.server,
            self.listen_ip,
            self.settings.port,
            backlog=backlog,
            both_families=self.settings.family == "mapped",
        )
        self._cleanup.enter_context(server)
        return server

    def connect(self, *, in_flight: int | None = None, then_close: bool = False) -> None:
        """Start to connect all clients."""
        self.clients.connect(
            self.settings.clients,
            self.server_ip,
            self.settings.port,
            in_flight=in_flight,
            then_close=then_close,
        )

    def ready(self) -> None:
        """Call the hook once the server listens; then read the counters as the baseline."""
        self.settings.after(Stage(READY, {}, self.topology.server.inode))
        self._before = self.topology.server.counters()

    def stuck(self, expected: Mapping[FourTuple, str]) -> None:
        """Call the hook with the connections that are stuck for now."""
        self.settings.after(Stage(STUCK, expected, self.topology.server.inode))

    def done(
        self,
        expected: Mapping[FourTuple, str],
        accepted: Mapping[FourTuple, int | None] | None = None,
    ) -> Outcome:
        """Call the hook at the end of the scenario, and return the outcome."""
        if self._watched:
            self.watch.take_in()
        self.settings.after(Stage(DONE, expected, self.topology.server.inode))
        records = self.clients.records()
        greeted = {record.four_tuple for record in records if record.greeted_ns is not None}
        return Outcome(
            scenario=self.name,
            family=self.settings.family,
            netns=self.topology.server.inode,
            clients=records,
            wire=self.watch.records if self._watched else {},
            expected=dict(expected),
            healthy=frozenset(greeted - expected.keys()),
            accepted=accepted or {},
            counters_before=self._before,
            counters_after=self.topology.server.counters(),
        )

    def syns_answered(self) -> int:
        """Number of SYNs answered with a cookie, plus connections and handshakes at the server."""
        return self.moved("SyncookiesSent") + self.topology.server.count_known(self.settings.port)

    def moved(self, counter: str) -> int:
        """The increase of a TcpExt counter in the server's namespace since `ready`."""
        return self.topology.server.counters()[counter] - self._before[counter]

    def accepted_by(self, server: Greeter) -> dict[FourTuple, int]:
        """The connections that the lab's own server has accepted, with the time."""
        return {
            FourTuple(
                peer.peer_ip, peer.peer_port, self.server_ip, self.settings.port
            ): peer.time_ns
            for peer in server.accepted()
        }

    def waiting(self) -> frozenset[FourTuple]:
        """The clients that are connected and wait for the greeting, from the clients' records."""
        return frozenset(record.four_tuple for record in self.clients.records() if record.waiting)

    def known_to_client(self) -> frozenset[FourTuple]:
        """The established connections at the client's end, from `ss`."""
        rows = self.topology.client.sockets("established", f"dport = :{self.settings.port}")
        return frozenset(
            FourTuple(row.local_ip, row.local_port, row.peer_ip, row.peer_port) for row in rows
        )

    def known_to_server(self) -> frozenset[FourTuple]:
        """The established connections at the server's end, from `ss`."""
        rows = self.topology.server.sockets("established", f"sport = :{self.settings.port}")
        return frozenset(
            FourTuple(row.peer_ip, row.peer_port, row.local_ip, row.local_port) for row in rows
        )

    def forgotten(self) -> frozenset[FourTuple]:
        """The clients that the server has no record of, not even in its SYN queue, from `ss`."""
        rows = self.topology.server.sockets("syn-recv", f"sport = :{self.settings.port}")
        asked = {
            FourTuple(row.peer_ip, row.peer_port, row.local_ip, row.local_port) for row in rows
        }
        return self.known_to_client() - self.known_to_server() - asked

    def server_is_idle(self) -> bool:
        """Whether no handshake is pending at the server and its accept queue is empty."""
        port = f"sport = :{self.settings.port}"
        if self.topology.server.sockets("syn-recv", port):
            return False
        return all(
            row.receive_queue == 0 for row in self.topology.server.sockets("listening", port)
        )

    def verified_stuck(self) -> frozenset[FourTuple]:
        """The stuck clients: waiting, established at their end and unknown at the server's end.

        Raises LabError if the clients' own view and `ss` on both ends disagree.
        """
        waiting = self.waiting()
        by_ss = self.known_to_client() - self.known_to_server()
        if waiting != by_ss:
            raise LabError(
                f"the oracle of {self.name} contradicts itself",
                f"{len(waiting)} clients wait for a greeting, but ss finds {len(by_ss)} stuck",
                "play it again; if the error persists, the scenario is wrong",
            )
        return waiting
