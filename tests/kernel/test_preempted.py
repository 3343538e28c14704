"""Packets of one CPU that preempt each other, as softirqs of PREEMPT_RT kernels may.

On every other kernel they come one after the other, and the same must hold.
"""

from __future__ import annotations

import itertools
import os
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from lab.network.syns import FIRST_PORT, ISN_STEP
from lab.network.topology import Topology
from lab.network.tun import TunClients
from lab.patience import LOAD_S, patient
from lab.records import FourTuple
from lab.scenarios.scene import PORT
from lab.scenarios.tracer import Tracer
from tests.kernel.conftest import COUNTERS, summary_of, told_by, tracing

pytestmark = pytest.mark.kernel

HANDSHAKES = 1000
UNANSWERED = 10
"""One in this many handshakes gets no ACK."""
BACKLOG = 4096
PREEMPTING_PRIORITY = 20
PREEMPTING_EVERY_S = 0.003
CPU = 0


class Load:
    """Clients of two devices on one CPU, those of the second preempting those of the first."""

    def __init__(self) -> None:
        self.answered: set[FourTuple] = set()
        self.unanswered: set[FourTuple] = set()
        self._done = threading.Event()

    def steady(self, clients: TunClients) -> None:
        """One handshake after the other, at an ordinary thread's priority."""
        os.sched_setaffinity(0, {CPU})
        try:
            for number in range(HANDSHAKES):
                self._shake_hands(clients, number)
        finally:
            self._done.set()

    def preempting(self, clients: TunClients) -> None:
        """A handshake every few ms, by a real-time thread, until the others are done."""
        os.sched_setaffinity(0, {CPU})
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(PREEMPTING_PRIORITY))
        for number in itertools.count():
            # What is waited for is time itself: the moment of the preemption has to vary.
            if self._done.wait(PREEMPTING_EVERY_S) or number >= HANDSHAKES:
                return
            self._shake_hands(clients, number)

    def _shake_hands(self, clients: TunClients, number: int) -> None:
        answer = number % UNANSWERED != 0
        isn = number * ISN_STEP & 0xFFFF_FFFF
        who = clients.shake_hands(FIRST_PORT + number, PORT, isn, answer)
        (self.answered if answer else self.unanswered).add(who)


def accepted(listener: socket.socket, count: int) -> set[FourTuple]:
    """The clients of so many connections that the server has, each closed at once."""
    found = set()
    for _ in range(count):
        served, (client_ip, client_port, *_) = listener.accept()
        found.add(FourTuple(client_ip, client_port, served.getsockname()[0], PORT))
        served.close()
    return found


def test_clients_whose_packets_preempt_each_other_are_told_apart() -> None:
    load = Load()
    with ExitStack() as opened:
        server = opened.enter_context(Topology()).server
        server.pin({"net/ipv4/tcp_syncookies": "2"})
        listener = opened.enter_context(
            server.run(socket.create_server, ("::", PORT), family=socket.AF_INET6, backlog=BACKLOG)
        )
        listener.settimeout(patient(LOAD_S))
        steady, preempting = (opened.enter_context(TunClients(server, n)) for n in (1, 2))
        tracer: Tracer
        options = ("-p", str(PORT), "--netns", server.name)
        (tracer,) = opened.enter_context(tracing(options))
        before = server.counters()
        with ThreadPoolExecutor(2) as threads:
            played = (
                threads.submit(load.steady, steady),
                threads.submit(load.preempting, preempting),
            )
            for one in played:
                one.result(patient(LOAD_S))
        assert accepted(listener, len(load.answered)) == load.answered
        expected = dict.fromkeys(load.unanswered, "ack-missing")
        tracer.await_reported(expected, server.inode)
        after = server.counters()
        tracer.stop()
        told = {(name, verdict) for _, name, verdict in told_by(tracer, server.inode)}
    assert told == set(expected.items())
    summary = summary_of(tracer)
    moved = {name: after[name] - before[name] for name in COUNTERS if after[name] != before[name]}
    assert moved["SyncookiesSent"] == len(load.answered) + len(load.unanswered)
    assert moved["SyncookiesRecv"] == len(load.answered)
    assert {row["counter"]: row["traced"] for row in summary["reconciliation"]} == moved
    assert all(row["agrees"] for row in summary["reconciliation"])
