"""A rescued connection is as good as any other, whatever options its handshake had."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from lab.network.topology import SERVER_ADDRESS
from lab.patience import COMMAND_S, patient
from lab.scenarios.tracer import Tracer
from tests.kernel.conftest import be_greeted
from tests.kernel.rescue import cookie_server, rescuing, silenced

pytestmark = pytest.mark.kernel

OPTION_SETS = {
    "all options": {},
    "no timestamps": {"net/ipv4/tcp_timestamps": "0"},
    "no SACK": {"net/ipv4/tcp_sack": "0"},
    "no window scaling": {"net/ipv4/tcp_window_scaling": "0"},
    "bare": {
        "net/ipv4/tcp_timestamps": "0",
        "net/ipv4/tcp_sack": "0",
        "net/ipv4/tcp_window_scaling": "0",
    },
}
EVERY_TIME = ("all options", "bare")
SCALED, SELECTIVE, STAMPED = 4, 2, 1
"""Bits of tcpi_options (TCPI_OPT_*, linux/tcp.h); a cookie keeps the first two in the timestamp."""
OPTIONS_OF = {
    "all options": SCALED | SELECTIVE | STAMPED,
    "no timestamps": 0,
    "no SACK": SCALED | STAMPED,
    "no window scaling": SELECTIVE | STAMPED,
    "bare": 0,
}
MEGABYTE = 1 << 20
BULK = 10 * MEGABYTE


def options_of(end: socket.socket) -> int:
    """What the two ends have agreed on, by the kernel of this one."""
    return end.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 8)[5]


def pump(sender: socket.socket, receiver: socket.socket) -> None:
    """Ten megabytes one way arrive as they were sent."""
    data = os.urandom(BULK)
    for side in (sender, receiver):
        side.settimeout(patient(COMMAND_S))
    with ThreadPoolExecutor(1) as thread:
        sent = thread.submit(sender.sendall, data)
        received = bytearray()
        while len(received) < BULK:
            chunk = receiver.recv(MEGABYTE)
            assert chunk, "the connection ended"
            received += chunk
        sent.result(patient(COMMAND_S))
    assert received == data


@pytest.fixture(scope="module")
def rescuer() -> Iterator[Tracer]:
    with rescuing("--rescue", "-v") as tracer:
        yield tracer
        tracer.stop()


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize(
    "options",
    [
        pytest.param(name, marks=[] if name in EVERY_TIME else pytest.mark.slow)
        for name in OPTION_SETS
    ],
)
def test_a_known_client_that_is_silent_can_use_its_connection(
    rescuer: Tracer, family: int, options: str
) -> None:
    with cookie_server() as (topology, listener):
        netns = topology.server.inode
        topology.client.pin(OPTION_SETS[options])
        be_greeted(topology, listener, SERVER_ADDRESS[family])
        with silenced(topology, family) as client:
            assert rescuer.await_reported({client.four_tuple: "ack-missing"}, netns)
        served, _ = listener.accept()
        with served, client.socket:
            assert rescuer.await_reported({client.four_tuple: "rescued"}, netns)
            for end in (client.socket, served):
                assert options_of(end) & (SCALED | SELECTIVE | STAMPED) == OPTIONS_OF[options]
            pump(client.socket, served)
            pump(served, client.socket)


@pytest.mark.parametrize("syncookies", ["1", "2"])
def test_an_ordinary_handshake_makes_an_address_known_too(rescuer: Tracer, syncookies: str) -> None:
    with cookie_server(syncookies) as (topology, listener):
        be_greeted(topology, listener, SERVER_ADDRESS[4])
        topology.server.pin({"net/ipv4/tcp_syncookies": "2"})
        with silenced(topology, 4) as client:
            named = {client.four_tuple: "ack-missing"}
            assert rescuer.await_reported(named, topology.server.inode)
        with listener.accept()[0], client.socket:
            assert rescuer.await_reported({client.four_tuple: "rescued"}, topology.server.inode)
