"""Joining loses no connection and counts none twice, whatever both sides reported."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from tcpstuck_bpf.analysis import Analysis
from tcpstuck_bpf.client.facts import NOBODY
from tcpstuck_bpf.joining.match import TOLERATED_NS, Joined, difference_of, distance_ns, join
from tcpstuck_bpf.joining.result import Result, Span
from tcpstuck_bpf.joining.sides import ClientConnection, ServerHandshake, ServerSide
from tcpstuck_bpf.joining.words import how_they_fit
from tcpstuck_bpf.judge.verdict import judge
from tcpstuck_bpf.model import SECOND_NS
from tcpstuck_bpf.steps import Advanced
from tests.builders import at, four_tuple, handshake, header, reports, sweep
from tests.unit.client.world import client_socket

(REPORT,) = reports([sweep(at(4), handshake())], at(4))
FINDING = judge(REPORT, header().coverage)
SECONDS = st.integers(0, 30).map(lambda number: number * SECOND_NS)


def handshake_of(number: int, who: int, begun_ns: int, repeated_ns: int) -> ServerHandshake:
    assert FINDING is not None
    finding = FINDING._replace(four_tuple=four_tuple(who), client_isn=number)
    return ServerHandshake(finding, begun_ns, begun_ns + repeated_ns, True)


def connection_of(number: int, who: int, established_ns: int, young: bool) -> ClientConnection:
    socket = client_socket()._replace(four_tuple=four_tuple(who)._replace(netns=7), cookie=number)
    verdict = None if young else "greeting-missing"
    return ClientConnection(socket, NOBODY, established_ns, 1, True, verdict, verdict and "likely")


servers = st.lists(
    st.tuples(st.integers(1, 3), SECONDS, st.integers(0, 8).map(lambda n: n * 10**9))
)
clients = st.lists(st.tuples(st.integers(1, 3), SECONDS, st.booleans()))


def both(
    at_server: Iterable[tuple[int, int, int]], at_client: Iterable[tuple[int, int, bool]]
) -> tuple[list[ServerHandshake], list[ClientConnection]]:
    return (
        [handshake_of(number, *facts) for number, facts in enumerate(at_server)],
        [connection_of(number, *facts) for number, facts in enumerate(at_client)],
    )


def pairs_of(joined: Iterable[Joined]) -> Counter[tuple[int | None, int | None]]:
    return Counter(
        (
            None if one.server is None else one.server.finding.client_isn,
            None if one.client is None else one.client.socket.cookie,
        )
        for one in joined
    )


def test_a_suspected_flood_is_counted_and_takes_no_memory() -> None:
    assert FINDING is not None
    side, step = ServerSide(Analysis(header())), Advanced(at(4))
    side.take(step, [FINDING])
    assert [one.finding for one in side.handshakes()] == [FINDING]
    side.take(step, [FINDING._replace(flood_suspected=True)])
    assert [*side.handshakes()] == []
    result = Result((), Span(0, 1), Span(0, 1), 3, ())
    assert [*how_they_fit(result)][-1] == (
        "3 silent clients of the server that look like a SYN flood's are left out"
    )


@given(servers, clients)
def test_every_one_is_there_once(
    at_server: list[tuple[int, int, int]], at_client: list[tuple[int, int, bool]]
) -> None:
    handshakes, connections = both(at_server, at_client)
    joined = join(handshakes, connections)
    found_servers = Counter(one.server.finding.client_isn for one in joined if one.server)
    found_clients = Counter(one.client.socket.cookie for one in joined if one.client)
    assert found_servers == Counter(range(len(handshakes)))
    reported = {n for n, one in enumerate(connections) if one.verdict is not None}
    assert set(found_clients.values()) <= {1}
    assert reported <= set(found_clients)
    alone = {one.client.socket.cookie for one in joined if one.client and not one.server}
    assert alone <= reported


@given(servers, clients)
def test_only_what_is_near_is_joined_and_nothing_near_is_left_apart(
    at_server: list[tuple[int, int, int]], at_client: list[tuple[int, int, bool]]
) -> None:
    handshakes, connections = both(at_server, at_client)
    joined = join(handshakes, connections)
    for one in joined:
        if one.server is not None and one.client is not None:
            assert one.server.ends == one.client.ends
            assert distance_ns(one.server, one.client) <= TOLERATED_NS
    for server in (one.server for one in joined if one.server and not one.client):
        for client in (one.client for one in joined if one.client and not one.server):
            assert server.ends != client.ends or distance_ns(server, client) > TOLERATED_NS
    difference = difference_of(joined)
    differences = [one.difference_ns for one in joined if one.difference_ns is not None]
    assert (difference is None) == (not differences)
    if difference is not None:
        assert (difference.least, difference.most) == (min(differences), max(differences))


@given(servers, clients, st.randoms(use_true_random=False))
def test_the_order_in_which_they_were_reported_does_not_matter(
    at_server: list[tuple[int, int, int]], at_client: list[tuple[int, int, bool]], random: Random
) -> None:
    """Where no two are equally near."""
    handshakes, connections = both(
        {facts[:2]: facts for facts in at_server}.values(), {f[:2]: f for f in at_client}.values()
    )
    spread = [
        one._replace(established_ns=one.established_ns + number)
        for number, one in enumerate(connections, 1)
    ]
    apart = [
        one._replace(last_syn_ns=one.last_syn_ns + 1000 * number * number)
        for number, one in enumerate(handshakes, 1)
    ]
    before = pairs_of(join(apart, spread))
    random.shuffle(apart)
    random.shuffle(spread)
    assert pairs_of(join(apart, spread)) == before
