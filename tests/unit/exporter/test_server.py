"""The HTTP side: who hangs, and who sends rubbish, costs nobody anything."""

from __future__ import annotations

import contextlib
import http.client
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tcpstuck_bpf.errors import UsageError
from tcpstuck_bpf.options import build_parser, metrics_address
from tcpstuck_bpf.output.metric_families import BUILD, STUCK, Sample, Samples, Snapshot
from tests.exported import needs_prometheus_client

LIMIT_S = 30.0
SHORT_S = 0.2


@pytest.fixture(autouse=True)
def _library() -> None:
    needs_prometheus_client()


def snapshot(number: int = 0) -> Snapshot:
    return (Samples(BUILD, (Sample(("9",), 1),)), Samples(STUCK, (Sample((), number),)))


class Served:
    """A server at a port of its own, and its exposition."""

    def __init__(self, ip: str = "127.0.0.1", limit_s: float = LIMIT_S) -> None:
        from tcpstuck_bpf.exporter.exposition import Exposition
        from tcpstuck_bpf.exporter.server import Address, MetricsServer

        self.exposition = Exposition()
        self.server = MetricsServer(Address(ip, 0), self.exposition, limit_s)
        self.address = self.server.address

    def get(self, path: str = "/metrics", method: str = "GET") -> tuple[int, str]:
        client = http.client.HTTPConnection(*self.address, timeout=LIMIT_S)
        with contextlib.closing(client):
            client.request(method, path)
            answer = client.getresponse()
            return answer.status, answer.read().decode()

    def connected(self) -> socket.socket:
        return socket.create_connection(self.address, LIMIT_S)


@pytest.fixture
def served() -> Iterator[Served]:
    one = Served()
    one.exposition.replace(snapshot())
    one.server.start()
    yield one
    one.server.close()


def test_the_latest_snapshot_is_served(served: Served) -> None:
    for number in (3, 4):
        served.exposition.replace(snapshot(number))
        status, body = served.get()
        assert status == 200
        assert f"\ntcpstuck_stuck_clients {number}.0\n" in body
    assert served.get("/metrics?name[]=x")[0] == 200
    assert served.get(method="HEAD") == (200, "")


def test_what_is_not_there_is_said(served: Served) -> None:
    assert served.get("/")[0] == 404
    assert served.get("/metrics/x")[0] == 404
    assert served.get(method="POST")[0] == 501


def test_before_tracing_begins_it_is_said() -> None:
    one = Served()
    one.server.start()
    assert one.get()[0] == 503
    one.server.close()


def test_a_port_that_is_taken_is_told_with_its_remedy(served: Served) -> None:
    from tcpstuck_bpf.exporter.exposition import Exposition
    from tcpstuck_bpf.exporter.server import Address, MetricsServer

    for address in (served.address, Address("192.0.2.1", 0)):
        with pytest.raises(UsageError) as refused:
            MetricsServer(address, Exposition())
        assert str(address) in refused.value.what
        assert "--metrics" in refused.value.remedy


def test_ipv6_is_served() -> None:
    try:
        one = Served("::1")
    except UsageError as error:
        pytest.skip(f"no IPv6 here: {error.why}")
    one.exposition.replace(snapshot(5))
    one.server.start()
    assert "tcpstuck_stuck_clients 5.0" in one.get()[1]
    assert str(one.address).startswith("[::1]:")
    one.server.close()


RUBBISH = (
    b"\x00\xff" * 5000 + b"\n\n",
    b"GET /metrics HTTP/9.9\r\n\r\n",
    b"GET /" + b"x" * 100_000,
    b"GET /metrics HTTP/1.1\r\n" + b"a: b\r\n" * 10_000 + b"\r\n",
    b"\r\n\r\n",
    b"GET /metrics HTTP/1.1\r\n",
    b"",
)


def test_rubbish_is_answered_with_no_metrics_and_forgotten(
    served: Served, capfd: pytest.CaptureFixture[str]
) -> None:
    for rubbish in RUBBISH:
        with served.connected() as client:
            with contextlib.suppress(OSError):
                client.sendall(rubbish)
                client.shutdown(socket.SHUT_WR)
            answer = b""
            with contextlib.suppress(ConnectionError):
                while some := client.recv(65_536):
                    answer += some
        assert b"tcpstuck_stuck_clients" not in answer or rubbish.startswith(b"GET /metrics HTTP/")
        assert served.get()[0] == 200
    assert capfd.readouterr() == ("", "")


def test_who_hangs_is_let_go_of_and_others_are_served_meanwhile() -> None:
    from tcpstuck_bpf.exporter.server import MOST_CLIENTS

    one = Served(limit_s=SHORT_S)
    one.exposition.replace(snapshot())
    one.server.start()
    hanging = [one.connected() for _ in range(MOST_CLIENTS - 1)]
    assert one.get()[0] == 200
    for client in hanging:
        # The server ends it: there is something to read, namely the end.
        with client, contextlib.suppress(ConnectionError):
            assert client.recv(1) == b""
    one.server.close()


def test_what_trickles_has_one_limit_for_all_of_it() -> None:
    from tcpstuck_bpf.exporter.server import request_head

    waited: list[float] = []

    def trickle(_most: int, limit_s: float) -> bytes:
        waited.append(limit_s)
        time.sleep(SHORT_S / 10)
        return b"x"

    with pytest.raises(TimeoutError):
        request_head(trickle, SHORT_S)
    assert waited == sorted(waited, reverse=True)
    assert waited[0] <= SHORT_S


def test_no_more_clients_than_places_and_the_places_come_back() -> None:
    from tcpstuck_bpf.exporter.server import MOST_CLIENTS

    one = Served()
    one.exposition.replace(snapshot())
    one.server.start()
    hanging = [one.connected() for _ in range(MOST_CLIENTS)]
    with one.connected() as surplus, contextlib.suppress(ConnectionError):
        assert surplus.recv(1) == b""
    for client in hanging:
        client.close()
    until = time.monotonic() + LIMIT_S
    status = 0
    while status != 200 and time.monotonic() < until:
        with contextlib.suppress(ConnectionError, http.client.HTTPException):
            status = one.get()[0]
    assert status == 200
    one.server.close()


def test_the_tracing_thread_waits_for_nobody(served: Served) -> None:
    """Clients that hang hold nothing that `replace` would need."""
    hanging = [served.connected() for _ in range(3)]
    begun = time.process_time()
    for number in range(1000):
        served.exposition.replace(snapshot(number))
    assert time.process_time() - begun < LIMIT_S
    assert "tcpstuck_stuck_clients 999.0" in served.get()[1]
    for client in hanging:
        client.close()


def test_its_threads_take_no_signal_and_end_with_the_process(served: Served) -> None:
    client = served.connected()
    until = time.monotonic() + LIMIT_S
    blocked: dict[str, int] = {}
    while len(blocked) < 2 and time.monotonic() < until:
        for one in threading.enumerate():
            if one.name in ("metrics", "metrics-client"):
                assert one.daemon
                # It may not have begun, or have ended: another one is looked at then.
                with contextlib.suppress(OSError):
                    status = Path(f"/proc/self/task/{one.native_id}/status").read_text()
                    blocked[one.name] = int(status.split("SigBlk:")[1].split()[0], 16)
    assert blocked.keys() == {"metrics", "metrics-client"}
    for mask in blocked.values():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            assert mask & 1 << number - 1
    client.close()


@pytest.mark.parametrize(
    ("text", "where"),
    [
        (":9435", ("127.0.0.1", 9435)),
        ("localhost:9435", ("127.0.0.1", 9435)),
        ("0.0.0.0:1", ("0.0.0.0", 1)),
        ("[::1]:9435", ("::1", 9435)),
        ("[::]:9435", ("::", 9435)),
        ("10.0.0.7:0", ("10.0.0.7", 0)),
    ],
)
def test_an_address_is_explicit_or_that_of_localhost(text: str, where: tuple[str, int]) -> None:
    assert metrics_address(text) == where


@pytest.mark.parametrize(
    "text", ["9435", "", ":", "host:9435", "10.0.0.7", "10.0.0.7:x", ":65536", ":-1", "*:9435"]
)
def test_what_is_no_address_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        build_parser().parse_args(["--metrics", text])
    assert refused.value.code == 2
    assert "--metrics" in capsys.readouterr().err
