"""What is not probed is not known: never a wrong verdict, always a declared gap."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import partial
from unittest import mock

import pytest

from lab.network.syns import FIRST_PORT, ISN_STEP, make_syn, send_syn
from lab.network.topology import Topology
from lab.network.tun import TunClients
from lab.patience import COMMAND_S, Deadline, patient
from lab.records import FourTuple
from lab.scenarios.catalogue import play
from lab.scenarios.scene import PORT, READY, Stage
from lab.scenarios.tracer import READY_PLACEHOLDER, Tracer
from tcpstuck_bpf.kernel.attach_plan import WITHOUT_VARIABLE
from tcpstuck_bpf.kernel.probes import KERNEL_COUNTERS, OPTIONAL, PROBES
from tests.kernel.conftest import TOOL, Traced, summary_of, told_by, tracing
from tests.kernel.handmade import ISN, Client, Site, site, told

pytestmark = pytest.mark.kernel

IPV6_PROBES = ("cookie_v6_init_sequence", "cookie_v6_check")
PAIRS = 80
CPUS = (0, 1)
"""Each receives the ACKs of one client."""
LATER_TURNS = (0, 30, 100, 300, 1000)
"""Turns of an empty loop before the late packet."""


MODES = pytest.mark.parametrize("mode", ["fentry", "kprobe"])


@pytest.fixture(scope="module", params=["fentry", "kprobe"])
def module_tracer(request: pytest.FixtureRequest) -> Iterator[Tracer]:
    """One run of the tool per mode, to which the kernel's counters are not visible."""
    options = ("-p", str(PORT), "--probe-mode", request.param)
    with ExitStack() as opened:
        with mock.patch.dict(os.environ, {WITHOUT_VARIABLE: KERNEL_COUNTERS}):
            (tracer,) = opened.enter_context(tracing(options))
        yield tracer


@pytest.fixture
def without_counters(module_tracer: Tracer) -> Tracer:
    """The same for one test, without what was told before."""
    module_tracer.forget_lines()
    return module_tracer


@MODES
@pytest.mark.parametrize(
    "left_out",
    [
        pytest.param(name, marks=() if name == KERNEL_COUNTERS else pytest.mark.slow)
        for name in OPTIONAL
    ],
)
def test_without_one_probe_no_verdict_is_wrong(
    traced: Callable[..., Traced], monkeypatch: pytest.MonkeyPatch, left_out: str, mode: str
) -> None:
    monkeypatch.setenv(WITHOUT_VARIABLE, left_out)
    run = traced("overflow", "--probe-mode", mode, clients=70)
    gaps = {gap["probe"] for gap in run.summary["coverage_gaps"]}
    expected = set(IPV6_PROBES) if left_out in IPV6_PROBES else {left_out}
    assert gaps == expected - {probe.function for probe in PROBES if not probe.serves(mode)}
    assert run.comparison.agrees, run.comparison
    if left_out == KERNEL_COUNTERS:
        # Any other verdict is none on why an ACK was dropped, such as of a client that recovered.
        told = {(line["verdict"], line["certainty"]) for line in run.verdicts}
        assert ("accept-queue-full", "likely") in told
        assert not told & {("accept-queue-full", "certain"), ("ack-failed", "certain")}
    assert not [row for row in run.summary["reconciliation"] if row["agrees"] is False]


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["ack-dropped", "client-reset", "late-fin", "synack-dropped"])
def test_without_counters_other_verdicts_stay_as_they_are(
    traced: Callable[..., Traced], monkeypatch: pytest.MonkeyPatch, scenario: str
) -> None:
    monkeypatch.setenv(WITHOUT_VARIABLE, KERNEL_COUNTERS)
    run = traced(scenario, clients=20)
    assert len(run.outcome.expected) == 20
    assert run.comparison.agrees, run.comparison
    assert {gap["probe"] for gap in run.summary["coverage_gaps"]} == {KERNEL_COUNTERS}
    assert not [row for row in run.summary["reconciliation"] if row["agrees"] is False]


def test_without_counters_a_dropped_syn_is_not_believed_to_be_queued(
    without_counters: Tracer,
) -> None:
    """Otherwise the handshake would end, and hide the drop of the first SYN-ACK's ACK."""
    with site(4, backlog=0) as where:
        slow, served = Client(where), Client(where)
        slow.connect()
        served.connect()
        served.send(0)
        _await_counter(where, "SyncookiesRecv", 1)
        send_syn(where.topology.client, make_syn(slow.four_tuple, ISN))
        _await_counter(where, "ListenDrops", 1)
        slow.send(0)
        _await_counter(where, "ListenDrops", 2)
        line = told(without_counters, where.netns, slow.four_tuple, "accept-queue-full")
    assert (line["stuck"], line["certainty"], line["syn_count"]) == (True, "likely", 2)


def test_without_counters_a_queue_that_another_cpu_fills_is_seen_full(
    without_counters: Tracer,
) -> None:
    """The accept queue had room when the ACK came, but not when the kernel checked right after."""
    if len(os.sched_getaffinity(0)) < len(CPUS):
        pytest.skip("it takes a CPU for each of the two clients")
    tracer = without_counters
    refused: set[FourTuple] = set()
    with ExitStack() as opened:
        server = opened.enter_context(Topology()).server
        server.pin({"net/ipv4/tcp_syncookies": "2"})
        listen = partial(socket.create_server, family=socket.AF_INET6, backlog=0)
        listener = opened.enter_context(server.run(listen, ("::", PORT)))
        clients = [opened.enter_context(TunClients(server, number)) for number in (1, 2)]
        threads = opened.enter_context(ThreadPoolExecutor(len(clients)))
        for number in range(PAIRS):
            refused |= _refused_of_two_at_once(listener, clients, threads, number)
        dropped = server.counters()["ListenOverflows"]
        reported = tracer.await_reported(dict.fromkeys(refused, "accept-queue-full"), server.inode)
        told = [(name, verdict) for _, name, verdict in told_by(tracer, server.inode)]
    assert dropped == len(refused) > 0
    assert reported, told
    assert sorted(told) == sorted((name, "accept-queue-full") for name in refused)


def _refused_of_two_at_once(
    listener: socket.socket, clients: list[TunClients], threads: ThreadPoolExecutor, number: int
) -> set[FourTuple]:
    """The ACKs of two clients, each received by a CPU of its own; the server accepts whom it has.

    One is a little later, by more from pair to pair: how long the kernel's way is nobody knows.
    """
    together = threading.Barrier(len(clients))
    later = number // 2 % len(LATER_TURNS)

    def answer(which: int) -> FourTuple:
        os.sched_setaffinity(0, {CPUS[which]})
        isn = number * ISN_STEP & 0xFFFF_FFFF
        who, ack = clients[which].connect(FIRST_PORT + number, PORT, isn)
        together.wait(patient(COMMAND_S))
        for _ in range(LATER_TURNS[later] if which == number % 2 else 0):
            pass
        clients[which].send(ack)
        return who

    both = set(threads.map(answer, range(len(clients))))
    listener.setblocking(False)
    known = set()
    with suppress(BlockingIOError):
        while True:
            served, (client_ip, client_port, *_) = listener.accept()
            known.add(FourTuple(client_ip, client_port, served.getsockname()[0], PORT))
            served.close()
    return both - known


def _await_counter(where: Site, name: str, value: int) -> None:
    deadline = Deadline(COMMAND_S)
    while where.topology.server.counters()[name] < value:
        assert not deadline.passed(), name


@MODES
@pytest.mark.slow
@pytest.mark.parametrize("left_out", IPV6_PROBES)
def test_without_a_probe_of_ipv6_nobody_is_accused_there(
    monkeypatch: pytest.MonkeyPatch, left_out: str, mode: str
) -> None:
    monkeypatch.setenv(WITHOUT_VARIABLE, left_out)
    options = ("--timeout", "1", "--probe-mode", mode)
    with Tracer([*TOOL, *options, "--ready-file", READY_PLACEHOLDER]) as tracer:

        def only_start(stage: Stage) -> None:
            if stage.name == READY:
                tracer.start()

        outcome = play("overflow", clients=70, family="6", after=only_start)
        tracer.stop()
    assert outcome.stuck
    summary = summary_of(tracer)
    assert {line["type"] for line in tracer.lines} == {"listener", "summary"}
    (listener,) = (line for line in tracer.lines if line.get("port") == PORT)
    for probe in IPV6_PROBES:
        assert any(probe in sentence for sentence in listener["working"]), listener
    assert {gap["probe"] for gap in summary["coverage_gaps"]} == set(IPV6_PROBES)
    assert summary["ever_stuck"] == 0
    assert outcome.moved("SyncookiesSent")
    assert not [row for row in summary["reconciliation"] if row["agrees"] is False]
