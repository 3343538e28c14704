"""A client holds a cookie's SYN-ACK, and a SYN it repeated before gets a place in the SYN queue.

It happens where SYN-ACKs are slower than the client's patience. The request in the SYN queue has an
ISN that the client, established, will never acknowledge; its ACKs go on to cookie_vX_check.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from lab.network.syns import make_syn, send_syn
from lab.patience import COMMAND_S, Deadline
from lab.scenarios.scene import PORT
from lab.scenarios.tracer import Tracer
from tests.kernel.conftest import summary_of, tracing
from tests.kernel.handmade import ISN, Client, Site, site, told

pytestmark = pytest.mark.kernel

BACKLOG = 1
"""The accept queue holds one more."""


class Crowd:
    """The clients of one server: one that repeats its SYN, and as many others as fill its queue."""

    def __init__(self, where: Site) -> None:
        self._where = where
        self.slow = Client(where)
        self.others = [Client(where) for _ in range(BACKLOG + 1)]
        for client in (self.slow, *self.others):
            client.connect()

    def take_over(self) -> None:
        """The repeated SYN of the slow one arrives; cookies are sent only where the queue is full.

        It stays so: a cookie that was sent before is still valid.
        """
        server = self._where.topology.server
        server.pin({"net/ipv4/tcp_syncookies": "1"})
        send_syn(self._where.topology.client, make_syn(self.slow.four_tuple, ISN))
        self._until(lambda: len(server.sockets("syn-recv", f"sport = :{PORT}")) == 1)

    def fill_accept_queue(self) -> None:
        """The others connect, and nobody accepts."""
        for client in self.others:
            client.send(0)
        self.await_cookies(len(self.others))

    def await_cookies(self, valid: int) -> None:
        """Wait until `valid` ACKs had a valid cookie."""
        self._await_counter("SyncookiesRecv", valid)

    def drain_accept_queue(self) -> None:
        """The server accepts them, and closes."""
        for _ in self.others:
            self._where.listener.accept()[0].close()

    def drop_ack(self) -> None:
        """The ACK of the slow one meets the full accept queue."""
        self.slow.send(0)
        self._await_counter("ListenOverflows", 1)
        assert self.slow.port not in self._where.known_to_server()

    def outlive_request(self) -> None:
        """The server repeats the SYN-ACK of the request no more, and forgets it."""
        server = self._where.topology.server
        server.pin({"net/ipv4/tcp_synack_retries": "0"})
        self._until(lambda: not server.sockets("syn-recv", f"sport = :{PORT}"))

    def _await_counter(self, name: str, value: int) -> None:
        self._until(lambda: self._where.topology.server.counters()[name] >= value)

    @staticmethod
    def _until(condition: Callable[[], bool]) -> None:
        deadline = Deadline(COMMAND_S)
        while not condition():
            assert not deadline.passed()


def test_it_is_stuck_where_its_ack_is_dropped_then(shared_tracer: Tracer) -> None:
    with site(4, BACKLOG) as where:
        crowd = Crowd(where)
        crowd.take_over()
        crowd.fill_accept_queue()
        crowd.drop_ack()
        # The earlier it goes the shorter its next wait for an ACK; its client's cookie lives 60 s.
        crowd.outlive_request()
        line = told(shared_tracer, where.netns, crowd.slow.four_tuple, "accept-queue-full")
        assert (line["stuck"], line["certainty"]) == (True, "certain")
        crowd.drain_accept_queue()
        crowd.slow.send(0)
        line = told(shared_tracer, where.netns, crowd.slow.four_tuple, "recovered")
        assert crowd.slow.port in where.known_to_server()
    assert line["updates"] == "accept-queue-full"


def test_its_own_request_may_refuse_its_ack(shared_tracer: Tracer) -> None:
    """Two sockets of one 4-tuple: tcp_v4_syn_recv_sock gives the second up, and says nothing."""
    with site(4) as where:
        crowd = Crowd(where)
        crowd.take_over()
        crowd.slow.send(0)
        crowd.await_cookies(1)
        if crowd.slow.port in where.known_to_server():
            pytest.skip("this kernel connects it: it has no found_dup_sk")
        line = told(shared_tracer, where.netns, crowd.slow.four_tuple, "ack-failed")
        assert where.topology.server.counters()["ListenOverflows"] == 0
    assert line["stuck"]
    assert any("got a place in the SYN queue" in sentence for sentence in line["evidence"])


def test_it_is_stuck_where_its_ack_is_filtered_then(shared_tracer: Tracer) -> None:
    with site(4) as where:
        crowd = Crowd(where)
        crowd.take_over()
        crowd.slow.lose((0, b""))
        line = told(shared_tracer, where.netns, crowd.slow.four_tuple, "ack-filtered")
    assert line["stuck"]


def test_it_stays_stuck_where_its_ack_was_faster_than_its_syn() -> None:
    with site(4, BACKLOG) as where, tracing(["-p", str(PORT)]) as (tracer,):
        crowd = Crowd(where)
        crowd.fill_accept_queue()
        crowd.drop_ack()
        crowd.drain_accept_queue()
        crowd.take_over()
        told(tracer, where.netns, crowd.slow.four_tuple, "accept-queue-full")
        tracer.stop()
    summary = summary_of(tracer)
    assert (summary["stuck"], summary["ever_stuck"]) == (1, 1)
    assert summary["verdicts"]["accept-queue-full"] == 1
