"""Stuck clients are mended, nobody else is written to; the clients' sockets and the wire tell."""

from __future__ import annotations

import math
import socket

import pytest

from lab.network.faults import ack_rule, dropping, no_syn_rule
from lab.network.syns import make_syns, send_in_bursts, send_syns
from lab.network.topology import SERVER_ADDRESS, SILENT_SOURCES
from lab.network.watch import Watch
from lab.patience import COMMAND_S, patient
from lab.processes.servers import MariaDb
from lab.records import FourTuple, reported_verdicts
from lab.scenarios.catalogue import LARGE_BACKLOG, SMALL_BACKLOG, connect_in_one_batch
from lab.scenarios.scene import PORT, Scene, Settings
from lab.scenarios.tracer import Tracer
from tcpstuck_bpf.rescue.candidate import DRY_RUN, NOT_KNOWN, SENT_DATA
from tests.kernel.conftest import be_greeted, summary_of
from tests.kernel.rescue import attempts, cookie_server, rescuing, silenced
from tests.moments import monotonic_ns

pytestmark = pytest.mark.kernel

DATA = b"EHLO lab\r\n"
SPOOFED = 100_000
FLOOD_LIMIT_S = 1_500
WITHIN_NS = 2_000_000_000


@pytest.mark.parametrize(
    ("mode", "family"),
    [
        ("fentry", "4"),
        ("kprobe", "6"),
        pytest.param("fentry", "mapped", marks=pytest.mark.slow),
        pytest.param("kprobe", "4", marks=pytest.mark.slow),
    ],
)
def test_clients_whose_ack_was_dropped_are_greeted(mode: str, family: str) -> None:
    with rescuing("--rescue", "--probe-mode", mode) as tracer:
        settings = Settings(100, family)
        with Scene("overflow", settings, syncookies=1) as scene:
            server = scene.greeter(SMALL_BACKLOG)
            scene.ready()
            connect_in_one_batch(scene)
            stuck = scene.forgotten()
            assert stuck
            netns = scene.topology.server.inode
            assert tracer.await_reported(dict.fromkeys(stuck, "accept-queue-full"), netns)
            server.resume()
            scene.clients.await_counts(greeted=settings.clients)
            rescued = dict.fromkeys(stuck, "rescued")
            assert tracer.await_reported(rescued, netns)
            tracer.stop()
            told = reported_verdicts(tracer.lines, netns)
            assert {who for who, verdict in told.items() if verdict == "rescued"} == stuck
            assert set(attempts(tracer)) == stuck
            scene.watch.take_in()
            # The kernel answers a client's only SYN by a cookie, once; the others are ours.
            ours = sum(scene.watch.records[who].synacks - 1 for who in stuck)
            assert len(attempts(tracer)) == ours
            summary = summary_of(tracer)
            assert summary["verdicts"]["rescued"] == len(stuck)
            assert summary["stuck"] == summary["recovered"] == 0
            assert summary["rescue"]["rescued"] == len(stuck)
            assert all(row["agrees"] for row in summary["reconciliation"] if row["netns"] == netns)


def test_who_is_not_known_gets_no_packet_and_can_be_asked_for() -> None:
    with cookie_server() as (topology, listener), rescuing("--rescue") as tracer:
        with Watch(topology.client, PORT) as watch, silenced(topology, 4) as client:
            spoofed = send_syns(
                topology.client, watch, SILENT_SOURCES[4], SERVER_ADDRESS[4], PORT, 100
            )
            silent = {client.four_tuple, *spoofed}
            netns = topology.server.inode
            assert tracer.await_reported(dict.fromkeys(silent, "ack-missing"), netns)
            # One that was told after them gets its SYN-ACK: so would have they by now.
            be_greeted(topology, listener, SERVER_ADDRESS[6])
            with silenced(topology, 6) as known:
                assert tracer.await_reported({known.four_tuple: "ack-missing"}, netns)
            with listener.accept()[0], known.socket:
                assert tracer.await_reported({known.four_tuple: "rescued"}, netns)
            tracer.stop()
            watch.take_in()
            assert {watch.records[who].synacks for who in silent} == {1}
        assert set(attempts(tracer)) == {known.four_tuple}
        assert summary_of(tracer)["rescue"]["left_alone"] == {NOT_KNOWN: len(silent)}
        client.socket.close()


def test_an_address_that_becomes_known_after_the_verdict_is_mended_then() -> None:
    with cookie_server() as (topology, listener), rescuing("--rescue") as tracer:
        with silenced(topology, 4) as client:
            named = {client.four_tuple: "ack-missing"}
            assert tracer.await_reported(named, topology.server.inode)
        assert attempts(tracer) == []
        be_greeted(topology, listener, SERVER_ADDRESS[4])
        with listener.accept()[0], client.socket:
            assert tracer.await_reported({client.four_tuple: "rescued"}, topology.server.inode)


def test_a_dry_run_sends_nothing() -> None:
    with cookie_server() as (topology, _), rescuing("--rescue=all,dry-run") as tracer:
        with Watch(topology.client, PORT) as watch, silenced(topology, 4) as client:
            named = {client.four_tuple: "ack-missing"}
            assert tracer.await_reported(named, topology.server.inode)
            watch.until(lambda: bool(attempts(tracer, "would send")), "an attempt to be told")
            tracer.stop()
            watch.take_in()
            assert watch.records[client.four_tuple].synacks == 1
        assert attempts(tracer) == []
        totals = summary_of(tracer)["rescue"]
        assert totals["left_alone"] == {DRY_RUN: 1}
        assert totals["sent"] == totals["rescued"] == 0
        assert totals["would_send"] == len(attempts(tracer, "would send"))
        client.socket.close()


def test_a_client_that_sends_data_is_not_touched_and_not_harmed() -> None:
    """The client speaks first; its ACK and its data find a full accept queue."""
    with rescuing("--rescue=all") as tracer:
        settings = Settings(100)
        with Scene("overflow", settings, syncookies=1) as scene:
            server = scene.greeter(SMALL_BACKLOG)
            scene.ready()
            # It sees all of a client, its data too, before it judges any, however long that takes.
            tracer.pause()
            connect_in_one_batch(scene)
            stuck = scene.forgotten()
            assert stuck
            overflows = scene.moved("ListenOverflows")
            scene.clients.send(DATA)
            scene.watch.until(
                lambda: (
                    all(scene.watch.records[who].acks > 1 for who in stuck)
                    and scene.moved("ListenOverflows") >= overflows + len(stuck)
                ),
                "the data of each stuck client to meet the full accept queue",
            )
            tracer.resume()
            netns = scene.topology.server.inode
            assert tracer.await_reported(dict.fromkeys(stuck, "accept-queue-full"), netns)
            server.resume()
            scene.clients.await_counts(greeted=settings.clients)
            assert tracer.await_reported(dict.fromkeys(stuck, "recovered"), netns)
            tracer.stop()
            scene.watch.take_in()
            assert {scene.watch.records[who].synacks for who in stuck} == {1}
            assert sum(record.server_resets for record in scene.watch.records.values()) == 0
            assert [record.error for record in scene.clients.records() if record.error] == []
    assert attempts(tracer) == []
    assert summary_of(tracer)["rescue"]["left_alone"] == {}


def test_all_asks_for_every_silent_client_but_not_for_one_whose_data_this_host_drops() -> None:
    """One client speaks first, and a rule drops its ACK and data. The others are unknown."""
    server = (SERVER_ADDRESS[4], PORT)
    with cookie_server() as (topology, listener), rescuing("--rescue=all") as tracer:
        netns = topology.server.inode
        with silenced(topology, 4) as first:
            assert tracer.await_reported({first.four_tuple: "ack-missing"}, netns)
        with listener.accept()[0], first.socket:
            assert tracer.await_reported({first.four_tuple: "rescued"}, netns)
        with (
            Watch(topology.client, PORT) as watch,
            dropping(topology.server, no_syn_rule(PORT), 4),
            topology.client.run(socket.create_connection, server, patient(COMMAND_S)) as sender,
        ):
            sender.sendall(DATA)
            who = FourTuple._make((*sender.getsockname()[:2], *server))
            assert tracer.await_reported({who: "ack-filtered"}, netns)
            # One that is told after it gets its SYN-ACK: so would have it by now.
            with silenced(topology, 6) as silent:
                assert tracer.await_reported({silent.four_tuple: "ack-missing"}, netns)
            with silent.socket, listener.accept()[0]:
                assert tracer.await_reported({silent.four_tuple: "rescued"}, netns)
            tracer.stop()
            watch.take_in()
            assert watch.records[who].synacks == 1
        assert set(attempts(tracer)) == {first.four_tuple, silent.four_tuple}
        assert summary_of(tracer)["rescue"]["left_alone"] == {SENT_DATA: 1}


@pytest.mark.slow
def test_equal_addresses_in_two_namespaces_are_two_clients() -> None:
    with (
        rescuing("--rescue") as tracer,
        cookie_server() as (one, listener),
        cookie_server() as (other, _),
    ):
        be_greeted(one, listener, SERVER_ADDRESS[4])
        with Watch(other.client, PORT) as watch, silenced(other, 4) as twin:
            named = {twin.four_tuple: "ack-missing"}
            assert tracer.await_reported(named, other.server.inode)
            with silenced(one, 4, port=twin.four_tuple.client_port) as client:
                assert client.four_tuple == twin.four_tuple
                assert tracer.await_reported(named, one.server.inode)
            with listener.accept()[0], client.socket:
                rescued = {client.four_tuple: "rescued"}
                assert tracer.await_reported(rescued, one.server.inode)
            watch.take_in()
            assert watch.records[twin.four_tuple].synacks == 1
        twin.socket.close()
        tracer.stop()
        sent_to = {line["netns"] for line in tracer.lines if line["type"] == "rescue"}
        assert sent_to == {one.server.inode}


def verdict_times_ns(tracer: Tracer, verdict: str) -> dict[FourTuple, int]:
    """When each client came to have a verdict, on the clock of the clients' own records."""
    return {
        FourTuple(*(line[name] for name in FourTuple._fields)): monotonic_ns(line["verdict_time"])
        for line in tracer.lines
        if line["type"] == "verdict" and line["verdict"] == verdict
    }


@pytest.mark.slow
@pytest.mark.parametrize("run", range(20))
def test_the_clients_of_a_stalled_mariadb_get_their_greeting(run: int) -> None:
    """A paused MariaDB; without rescue all these clients wait for ever (test_scenarios)."""
    mode = ("fentry", "kprobe")[run % 2]
    settings = Settings(200)
    with (
        rescuing("--rescue", "-t", "3", "--probe-mode", mode) as tracer,
        Scene("mariadb-stall", settings, syncookies=1) as scene,
        MariaDb(scene.topology.server, scene.listen_ip, PORT, backlog=SMALL_BACKLOG) as server,
    ):
        server.pause()
        scene.ready()
        connect_in_one_batch(scene)
        server.resume()
        scene.clients.await_counts(greeted=settings.clients)
        # What is told last was told of by the end.
        tracer.stop()
        told_ns = verdict_times_ns(tracer, "accept-queue-full")
        told = reported_verdicts(tracer.lines, scene.topology.server.inode)
        assert {told[who] for who in told_ns} == {"rescued"}
        greeted_ns = {r.four_tuple: r.greeted_ns for r in scene.clients.records()}
    assert told_ns.keys() == set(attempts(tracer))
    assert len(told_ns) >= settings.clients // 2
    delays_ns = [(greeted_ns[who] or math.inf) - when_ns for who, when_ns in told_ns.items()]
    in_time = sum(delay_ns <= WITHIN_NS for delay_ns in delays_ns)
    print(f"{in_time} of {len(delays_ns)}, the last after {max(delays_ns) / 1e9:.2f} s")
    assert in_time >= 0.99 * len(delays_ns)


@pytest.mark.slow
@pytest.mark.timeout(FLOOD_LIMIT_S)
def test_real_clients_in_a_flood_are_mended_and_spoofed_addresses_left_alone() -> None:
    """Amid spoofed SYNs, 50 clients of a known address whose ACKs are lost."""
    settings = Settings(50)
    with (
        rescuing("--rescue", "-t", "5") as tracer,
        Scene("flood", settings, syncookies=2) as scene,
    ):
        server = scene.greeter(LARGE_BACKLOG)
        server.resume()
        scene.ready()
        scene.clients.connect(1, scene.server_ip, PORT)
        scene.clients.await_counts(greeted=1)
        syns = list(make_syns(SILENT_SOURCES[4], scene.server_ip, PORT, SPOOFED))
        send_in_bursts(scene.topology.client, scene.watch, syns[: SPOOFED // 2])
        with dropping(scene.topology.client, ack_rule(PORT), 4, "OUTPUT"):
            scene.connect()
            scene.clients.await_counts(settled=1 + settings.clients)
            stuck = scene.verified_stuck()
        assert len(stuck) == settings.clients
        send_in_bursts(scene.topology.client, scene.watch, syns[SPOOFED // 2 :])
        scene.clients.await_counts(greeted=1 + settings.clients)
        netns = scene.topology.server.inode
        # A verdict on each, one more on each real client, and what was sent to it.
        assert tracer.await_lines(SPOOFED + 3 * settings.clients, FLOOD_LIMIT_S)
        tracer.stop()
        scene.watch.take_in()
        # More than one SYN-ACK to one of these addresses could only be ours.
        assert {scene.watch.records[syn.four_tuple].synacks for syn in syns} == {1}
    assert set(attempts(tracer)) == stuck
    expected = {
        **{syn.four_tuple: "ack-missing" for syn in syns},
        **dict.fromkeys(stuck, "rescued"),
    }
    assert reported_verdicts(tracer.lines, netns) == expected
    summary = summary_of(tracer)
    assert summary["rescue"]["left_alone"] == {NOT_KNOWN: SPOOFED}
    assert (summary["untracked"], summary["lost_events"]) == (0, 0)
