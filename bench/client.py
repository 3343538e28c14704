"""`python -m bench.client`: CPU time of one poll of `--client`, by the number of sockets.

It runs as root on this machine's own kernel, in network namespaces of its own. Figures of different
machines cannot be compared. `waiting`: every connection waits for the server, and `--rescue` looks
at each; `talking`: every client has sent data, so none is remembered.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

from tabulate import tabulate

from lab.network.topology import LOCAL_SOURCES, SERVER_ADDRESS, Topology, source_addresses
from lab.patience import LOAD_S, patient
from lab.processes.clients import Clients
from lab.processes.servers import Greeter
from tcpstuck_bpf.client.planner import MendPolicy, Planner
from tcpstuck_bpf.client.sockets import SocketReader, Wanted
from tcpstuck_bpf.client.steady import SteadyPolls
from tcpstuck_bpf.client.waits import Waits
from tcpstuck_bpf.host import netns

SIZES = (100, 10_000, 50_000)
POLLS = 7
FIRST_POLLS = 2
"""Not counted: they fill what later polls only renew."""
PER_PROCESS = 15_000
"""Sockets of one client process, fewer than the usual limit of open files."""
KINDS = {"waiting": b"", "talking": b"GET /\r\n"}
AT_ONCE, SOURCES = 500, 16
MOST_QUEUED = 65_535


@contextlib.contextmanager
def connections(topology: Topology, number: int, first_words: bytes) -> Iterator[int]:
    """Connections to a server that accepts none of them; the server's port."""
    address = SERVER_ADDRESS[4]
    # From one address, the search for a free port takes longer and longer.
    sources = source_addresses(LOCAL_SOURCES[4], SOURCES)
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(Greeter(topology.server, address, 0, backlog=MOST_QUEUED))
        left = number
        while left:
            clients = stack.enter_context(Clients(topology.client))
            part = min(left, PER_PROCESS)
            clients.connect(
                part,
                address,
                server.port,
                in_flight=AT_ONCE,
                sources=sources,
                first_words=first_words,
            )
            clients.await_counts(LOAD_S, connected=part)
            left -= part
        yield server.port


def costs_of_polls(port: int) -> dict[str, Any]:
    """CPU seconds of each poll of this process's namespace, with what `--rescue` adds."""
    own = netns.own_netns()
    reader = SocketReader(Wanted((port,), netns=own))
    steady, waits = SteadyPolls(), Waits(0)
    planner = Planner(MendPolicy())
    polls, looks = [], []
    established = 0
    for _ in range(FIRST_POLLS + POLLS):
        begun = time.process_time()
        poll = reader.read(waits.wants)
        waits.take(steady.take(poll))
        between = time.process_time()
        planner.renew(waits.candidates(), poll.time_ns)
        looks.append(time.process_time() - between)
        polls.append(between - begun)
        established = poll.established
    return {"established": established, "polls": polls[FIRST_POLLS:], "looks": looks[FIRST_POLLS:]}


def rows() -> Iterator[tuple[str, ...]]:
    """Measure; the rows of the table as they are known."""
    with Topology() as topology:
        topology.server.pin({"net/core/somaxconn": str(MOST_QUEUED)})
        for kind, first_words in KINDS.items():
            for size in SIZES:
                with connections(topology, size, first_words) as port:
                    words = [sys.executable, "-m", "bench.client", "--port", str(port)]
                    process = topology.client.popen(words, stdout=subprocess.PIPE)
                    found = json.loads(process.communicate(timeout=patient(LOAD_S))[0])
                assert found["established"] == size
                polls, looks = found["polls"], found["looks"]
                milliseconds = (min(polls), statistics.median(polls), max(polls), min(looks))
                yield kind, f"{size:,}", *(f"{1000 * one:.1f}" for one in milliseconds)


def main() -> int:
    """Measure and print, or measure the polls of one namespace."""
    parser = argparse.ArgumentParser(prog="python -m bench.client", description=__doc__)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    port = parser.parse_args().port
    if port is not None:
        print(json.dumps(costs_of_polls(port)))
        return 0
    headings = ("connections", "number", "least ms", "median ms", "most ms", "for --rescue ms")
    print(tabulate(list(rows()), headings, disable_numparse=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
