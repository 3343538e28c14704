"""What the tests of --rescue share: the tool with it, and clients that a firewall has silenced."""

from __future__ import annotations

import contextlib
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from lab.network.faults import ack_rule, dropping
from lab.network.topology import SERVER_ADDRESS, Topology
from lab.patience import COMMAND_S, patient
from lab.processes.preloaded import start_tool
from lab.records import FourTuple
from lab.scenarios.scene import PORT
from lab.scenarios.tracer import READY_PLACEHOLDER, Tracer
from tests.kernel.conftest import listening

EARLY_VERDICT_S = "1"


@contextlib.contextmanager
def rescuing(*options: str) -> Iterator[Tracer]:
    """The tool with --rescue and these options, ready."""
    words = [
        sys.executable,
        "-m",
        "tcpstuck_bpf",
        "--json",
        "-t",
        EARLY_VERDICT_S,
        *options,
        "--ready-file",
        READY_PLACEHOLDER,
    ]
    with Tracer(words, start_tool) as tracer:
        tracer.start()
        yield tracer


def attempts(tracer: Tracer, outcome: str = "sent") -> list[FourTuple]:
    """Whom the tool says it has sent a SYN-ACK to, each time."""
    return [
        FourTuple(line["client_ip"], line["client_port"], line["server_ip"], line["server_port"])
        for line in tracer.lines
        if line["type"] == "rescue" and line["outcome"] == outcome
    ]


@dataclass
class Silenced:
    """A client that is connected at its end only: its ACK was lost on the way."""

    socket: socket.socket
    four_tuple: FourTuple


@contextlib.contextmanager
def silenced(
    topology: Topology, family: int, source: str = "", port: int = 0
) -> Iterator[Silenced]:
    """While the context lasts, none of its bare ACKs leaves the client."""
    server = (SERVER_ADDRESS[family], PORT)
    with dropping(topology.client, ack_rule(PORT), family, "OUTPUT"):
        client = topology.client.run(
            socket.create_connection, server, patient(COMMAND_S), source_address=(source, port)
        )
        client_ip, client_port = client.getsockname()[:2]
        yield Silenced(client, FourTuple(client_ip, client_port, *server))


@contextlib.contextmanager
def cookie_server(syncookies: str = "2") -> Iterator[tuple[Topology, socket.socket]]:
    with Topology() as topology:
        topology.server.pin({"net/ipv4/tcp_syncookies": syncookies})
        with listening(topology.server) as (listener,):
            yield topology, listener
