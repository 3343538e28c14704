"""More network namespaces come and go than the tool has places for; what comes later is told.

The tables are made small, so that few namespaces fill them. The oracle is each namespace's own
counters, read by the lab before it goes.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import sys
from collections.abc import Iterator

import pytest

from lab.network.topology import Namespace
from lab.patience import COMMAND_S, patient
from lab.records import FourTuple
from lab.scenarios.scene import PORT
from lab.scenarios.tracer import READY_PLACEHOLDER, Tracer
from tcpstuck_bpf.host.netns_cookie import own_cookie
from tcpstuck_bpf.kernel.layout import cookie_obstacle
from tcpstuck_bpf.model import CROWDED_NETNS, GONE_NETNS
from tcpstuck_bpf.typeinfo.btf import read_running_kernel
from tests.kernel.conftest import summary_of
from tests.kernel.handmade import Client, Site, site, told

pytestmark = pytest.mark.kernel

PLACES = 8
MORE_THAN_FIT = 20
SENT = "SyncookiesSent"
WITH_FEW_PLACES = (
    "import sys; from tcpstuck_bpf import cli; from tcpstuck_bpf.kernel import open_source; "
    f"open_source.MAX_NAMESPACES = open_source.MAX_LISTENERS = {PLACES}; sys.exit(cli.main())"
)


def tracer(*options: str) -> Tracer:
    words = (sys.executable, "-c", WITH_FEW_PLACES, "-p", str(PORT), "--json", *options)
    return Tracer([*words, "--ready-file", READY_PLACEHOLDER])


_numbers = itertools.count()


@contextlib.contextmanager
def namespace_with(connections: int, port: int, syncookies: str) -> Iterator[Namespace]:
    """One in which so many connections were made to a server of its own, and closed."""
    name = f"tcpstuck-{os.getpid()}-many-{next(_numbers)}"
    with contextlib.closing(Namespace(name)) as made:
        made.give_up_number()
        made.command("ip", "link", "set", "lo", "up")
        made.pin({"net/ipv4/tcp_syncookies": syncookies})
        with made.run(socket.create_server, ("127.0.0.1", port)) as listener:
            address = listener.getsockname()
            for _ in range(connections):
                made.run(socket.create_connection, address, patient(COMMAND_S)).close()
        yield made


def come_and_go(number: int, port: int, syncookies: str, at_once: int) -> int:
    """How many cookies the kernel sent in so many namespaces, some of them there at a time.

    One that is there alone mostly has the inode number of the one before.
    """
    sent = 0
    with contextlib.ExitStack() as there:
        for one in range(1, number + 1):
            made = there.enter_context(namespace_with(1 + one % 3, port, syncookies))
            sent += made.counters()[SENT]
            if one % at_once == 0:
                there.close()
    return sent


def tell_a_silent_client(running: Tracer, where: Site) -> FourTuple:
    client = Client(where)
    client.connect()
    told(running, where.netns, client.four_tuple, "ack-missing")
    return client.four_tuple


def traced_cookies(running: Tracer) -> dict[int, tuple[int, bool | None]]:
    """What the summary says of cookies by namespace: how many, and whether that agrees."""
    rows = summary_of(running)["reconciliation"]
    return {
        row["netns"]: (row["traced"] + row["outside_filter"], row["agrees"])
        for row in rows
        if row["counter"] == SENT
    }


@pytest.mark.parametrize("mode", ["fentry", "kprobe"])
@pytest.mark.parametrize("at_once", [1, MORE_THAN_FIT])
def test_a_client_is_told_after_more_namespaces_than_there_are_places(
    mode: str, at_once: int
) -> None:
    with tracer("--probe-mode", mode) as running, site(4) as where:
        running.start()
        sent = come_and_go(MORE_THAN_FIT, PORT, "2", at_once)
        assert sent > MORE_THAN_FIT
        tell_a_silent_client(running, where)
        sent += where.topology.server.counters()[SENT]
        running.stop()
    summary = summary_of(running)
    assert summary["verdicts"]["ack-missing"] == summary["stuck"] == 1
    assert summary["cookies_sent"] == sent
    assert summary["unwatched"] == 0
    cookies = traced_cookies(running)
    assert sum(number for number, _ in cookies.values()) == sent
    # Those without a place are a loss of its own name, and their figures one of their own.
    assert (CROWDED_NETNS in cookies) == (summary["losses"]["namespaces_uncounted"] > 0)
    # Where they cannot be told apart, those with one number have one figure.
    assert (cookies.get(GONE_NETNS, (0, None))[0] > 0) or at_once == 1
    assert all(agrees is not False for _, agrees in cookies.values())


@pytest.mark.parametrize("port", [PORT, PORT + 1])
def test_namespaces_in_which_nothing_happens_take_no_place(port: int) -> None:
    """Ordinary handshakes, inside the filters and outside; outside no listener is known either."""
    with tracer() as running, site(4) as where:
        running.start()
        assert come_and_go(MORE_THAN_FIT, port, "1", MORE_THAN_FIT) == 0
        tell_a_silent_client(running, where)
        running.stop()
    losses = summary_of(running)["losses"]
    assert losses["namespaces_uncounted"] == 0
    if port != PORT:
        assert losses["listeners_unknown"] == 0
    assert traced_cookies(running) == {where.netns: (1, True)}


def test_a_namespace_with_the_number_of_one_that_is_gone_has_counts_of_its_own() -> None:
    if not own_cookie() or cookie_obstacle(read_running_kernel()) is not None:
        pytest.skip("this kernel does not tell two namespaces of one inode number apart")
    with tracer() as running, contextlib.ExitStack() as opened:
        running.start()
        with namespace_with(3, PORT, "2") as first:
            number = first.inode
        sent = 0
        while True:
            again = opened.enter_context(namespace_with(2, PORT, "2"))
            sent += 2
            if again.inode == number:
                break
            assert sent < 100, "no namespace got the number again"
            opened.pop_all().close()
        assert again.counters()[SENT] == 2
        running.stop()
    cookies = traced_cookies(running)
    assert cookies[number] == (2, True)
    assert summary_of(running)["cookies_sent"] == 3 + sent
    assert summary_of(running)["unwatched"] == 0
