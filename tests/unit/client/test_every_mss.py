"""A challenge mends a forgotten client whatever MSS its cookie says. Needs root, no tracing.

A cookie keeps one of four MSS values, as an index, in the bits that a probe with a wrong sequence
number changes. The oracle: the server's socket (TCP_INFO), and 1 MB each way, compared.
"""

from __future__ import annotations

import socket
import struct

import pytest

from lab.network.topology import INTERFACE
from tests.unit.client.mending import GREETING, PORT, World, exchange, world
from tests.unit.client.test_native import told
from tests.unit.client.test_rescue_native import started

MSS_OF_COOKIES = {4: (536, 1300, 1440, 1460), 6: (1220, 1420, 1440, 8940)}
"""msstab of net/ipv4/syncookies.c and of net/ipv6/syncookies.c."""
BESIDE = {4: (500, 1299, 1350, 1452, 1600), 6: (1219, 1300, 1430, 1500, 8000)}
"""MSS values that a cookie rounds to one of the table, the lowest ones up."""
JUMBO = "9000"
BYTES_EACH_WAY = 1_000_000
STAMP_BYTES = 12
"""The timestamp option takes so many bytes of each segment."""
TIMESTAMPS, _SACK, _SCALING = 1, 2, 4
"""Bits of tcpi_options (include/uapi/linux/tcp.h)."""


def rounded(mss: int, family: int) -> int:
    """What a cookie keeps of an MSS."""
    table = MSS_OF_COOKIES[family]
    return max((one for one in table if one <= mss), default=table[0])


def options_and_mss(server_end: socket.socket) -> tuple[int, int]:
    """TCP_INFO's option bits, and the largest data segment that the server will send."""
    data = server_end.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 24)
    return data[5], struct.unpack_from("=I", data, 16)[0]


def talk(made: World, clients: dict[int, socket.socket], stamps: bool) -> None:
    """The server accepts each client, and greets it; each end's 1 MB arrives at the other."""
    by_name = {one.getsockname()[:2]: (mss, one) for mss, one in clients.items()}
    for _ in clients:
        end = made.accept()
        mss, client = by_name.pop(end.getpeername()[:2])
        options, largest = options_and_mss(end)
        assert largest == rounded(mss, made.family) - STAMP_BYTES * stamps, mss
        assert options == (TIMESTAMPS | _SACK | _SCALING if stamps else 0), mss
        end.sendall(GREETING)
        assert client.recv(len(GREETING), socket.MSG_WAITALL) == GREETING, mss
        exchange(client, end, BYTES_EACH_WAY)


@pytest.mark.parametrize("stamps", [True, False], ids=["timestamps", "plain"])
@pytest.mark.parametrize("family", [4, 6])
def test_a_client_of_any_mss_is_mended_and_all_bytes_arrive(family: int, stamps: bool) -> None:
    """Without timestamps a cookie keeps nothing but the MSS."""
    with world(family, tcp_timestamps=str(int(stamps))) as made:
        for end in (made.server, made.client):
            end.command("ip", "link", "set", INTERFACE, "mtu", JUMBO)
        sizes = (*MSS_OF_COOKIES[family], *BESIDE[family])
        clients = dict(zip(sizes, made.all_forgotten(sizes)))
        words = ["--rescue", "-t", "10ms"]
        with started(made.topology, PORT, *words) as tracer:
            tracer.start()
            talk(made, clients, stamps)
            assert tracer.await_lines(3 * len(clients))
            tracer.stop()
        names = {one.getsockname()[:2] for one in clients.values()}
        found = told(tracer.lines)
        assert {who[:2] for who in found} == names
        assert [*found.values()] == [["greeting-missing", "rescued"]] * len(clients)
        assert made.server.counters()["SyncookiesRecv"] == len(clients)
        assert made.server.counters()["SyncookiesFailed"] == 0
