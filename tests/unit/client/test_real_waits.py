"""Connections that have hung for two minutes of real time before the tool starts. Needs root.

Nothing is older than it seems here: the servers send real cookies, which have really expired. All
connections wait at the same time. The oracle: the clients' own record, and `ss` at the server.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from lab.network.faults import dropping
from lab.network.topology import SERVER_ADDRESS, Topology
from lab.patience import patient
from lab.processes.clients import Clients
from lab.processes.servers import Greeter
from tests.unit.client.test_native import known_to_the_server, told, topology
from tests.unit.client.test_rescue_native import (
    FAMILIES,
    connections,
    forget,
    greeter,
    moments_ns,
    of_type,
    started,
)
from tests.unit.client.test_twenty_rounds import WITHIN_NS

__all__ = ["topology"]

EACH = 10
HUNG_NS = 122_000_000_000
"""The tool asks from an age of 121 s on."""
LIMIT_S = 600

pytestmark = [pytest.mark.slow, pytest.mark.timeout(LIMIT_S)]


class Hanging(NamedTuple):
    """Two servers of one family, and the clients that wait for them."""

    restarted: Greeter
    forgotten: Clients
    """Their ACK was dropped: the first server never knew them."""
    lost: Clients
    """The first server had them in its accept queue, and its RSTs at its end were dropped."""
    paused: Greeter
    waiting: Clients


def hung(topology: Topology, family: int, stack: contextlib.ExitStack) -> Hanging:
    forgotten, lost, waiting = (stack.enter_context(Clients(topology.client)) for _ in range(3))
    address = SERVER_ADDRESS[family]
    with greeter(topology, family) as first:
        port = first.port
        lost.connect(EACH, address, port)
        lost.await_counts(connected=EACH)
        assert len(known_to_the_server(topology, port)) == EACH
        forget(topology, forgotten, EACH, first, family)
        with dropping(topology.client, ("-p", "tcp", "--sport", str(port)), family):
            first.close()
            assert known_to_the_server(topology, port) == set()
    restarted = stack.enter_context(greeter(topology, family, port))
    restarted.resume()
    paused = stack.enter_context(greeter(topology, family))
    waiting.connect(EACH, address, paused.port)
    waiting.await_counts(connected=EACH)
    assert len(known_to_the_server(topology, paused.port)) == EACH
    return Hanging(restarted, forgotten, lost, paused, waiting)


@pytest.fixture(scope="module")
def both(topology: Topology) -> Iterator[dict[int, Hanging]]:
    """The clients of each family, after two minutes without a byte or an error."""
    with contextlib.ExitStack() as stack:
        found = {family: hung(topology, family, stack) for family in (4, 6)}
        crowds = [
            one for each in found.values() for one in (each.forgotten, each.lost, each.waiting)
        ]
        youngest_ns = max(one.connected_ns or 0 for each in crowds for one in each.records())
        # Time itself is what is waited for: nothing happens meanwhile.
        time.sleep(max(0, youngest_ns + HUNG_NS - time.monotonic_ns()) / 10**9)
        assert all(one.waiting for each in crowds for one in each.records())
        yield found


@FAMILIES
def test_a_server_that_was_restarted_forgot_and_the_application_is_told(
    topology: Topology, both: dict[int, Hanging], family: int
) -> None:
    one = both[family]
    clients = (one.forgotten, one.lost)
    with started(topology, one.restarted.port, "--rescue") as tracer:
        tracer.start()
        for each in clients:
            each.await_counts(failed=EACH)
        assert tracer.await_lines(3 * 2 * EACH)
        tracer.stop()
    records = {record.four_tuple: record for each in clients for record in each.records()}
    assert {record.error for record in records.values()} == {"ECONNRESET"}
    assert one.restarted.accepted() == []
    assert told(tracer.lines) == {who: ["greeting-missing", "server-forgot"] for who in records}
    asked_ns = moments_ns(of_type(tracer.lines, "rescue"), "time")
    assert asked_ns.keys() == records.keys()
    for who, record in records.items():
        assert 0 < (record.closed_ns or 0) - asked_ns[who] <= patient(WITHIN_NS)


@FAMILIES
def test_a_paused_server_is_slow_and_every_greeting_comes_when_it_goes_on(
    topology: Topology, both: dict[int, Hanging], family: int
) -> None:
    one = both[family]
    known = known_to_the_server(topology, one.paused.port)
    with started(topology, one.paused.port, "--rescue") as tracer:
        tracer.start()
        assert tracer.await_lines(3 * EACH)
        slow = ["greeting-missing", "server-slow"]
        assert told(tracer.lines) == dict.fromkeys(connections(one.waiting), slow)
        assert all(record.waiting for record in one.waiting.records())
        assert known_to_the_server(topology, one.paused.port) == known
        resumed_ns = time.monotonic_ns()
        one.paused.resume()
        one.waiting.await_counts(greeted=EACH)
        assert tracer.await_lines(4 * EACH)
        tracer.stop()
    records = one.waiting.records()
    assert all((record.greeted_ns or 0) > resumed_ns for record in records)
    assert {(record.error, record.closed_by) for record in records} == {(None, None)}
    accepted = {(peer.peer_ip, peer.peer_port) for peer in one.paused.accepted()}
    assert accepted == {record.four_tuple[:2] for record in records}
    assert {each[-1] for each in told(tracer.lines).values()} == {"recovered"}
    (summary,) = of_type(tracer.lines, "summary")
    assert summary["verdicts"] == {"recovered": EACH}
