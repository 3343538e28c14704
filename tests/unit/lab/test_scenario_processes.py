"""The lab's processes, on the loopback interface: clients, server, a tracer beside them."""

from __future__ import annotations

import errno
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from lab import patience
from lab.errors import LabError, LabTimeoutError
from lab.processes.clients import WAITING, Clients
from lab.processes.servers import GREETING, Greeter
from lab.records import (
    FourTuple,
    reported_verdicts,
)
from lab.scenarios import tracer
from lab.scenarios.scene import DONE, READY, Stage
from lab.scenarios.tracer import Tracer

NETNS = 4_026_531_999
LOOPBACK = "127.0.0.1"
ROUNDS_S = 0.3
"""Long enough for the loopback to show what should not happen."""


def line_of(key: FourTuple, verdict: str) -> dict[str, Any]:
    return {"type": "verdict", "netns": NETNS, "verdict": verdict, **key._asdict()}


class ThisMachine:
    """Stands in for a Namespace: processes start where the test runs."""

    forks_into = None

    def popen(self, words: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
        return subprocess.Popen(words, **options)


@pytest.fixture
def clients() -> Iterator[Clients]:
    with Clients(ThisMachine()) as started:
        yield started


@pytest.fixture
def greeter() -> Iterator[Greeter]:
    with Greeter(ThisMachine(), LOOPBACK, 0, backlog=64) as started:
        yield started


class TestProcesses:
    def test_clients_wait_until_the_server_speaks(self, clients: Clients, greeter: Greeter) -> None:
        clients.connect(20, LOOPBACK, greeter.port)
        clients.await_counts(connected=20)
        assert all(record.waiting for record in clients.records())
        assert greeter.accepted() == []
        greeter.resume()
        greeter.await_accepted(20)
        clients.await_counts(greeted=20)
        records = clients.records()
        assert not any(record.waiting for record in records)
        assert {record.greeting for record in records} == {GREETING}
        assert {(record.four_tuple[:2]) for record in records} == {
            (peer.peer_ip, peer.peer_port) for peer in greeter.accepted()
        }
        for record in records:
            assert record.connected_ns is not None
            assert record.greeted_ns is not None
            assert record.opened_ns <= record.connected_ns < record.greeted_ns

    def test_at_most_so_many_in_flight(self, clients: Clients, greeter: Greeter) -> None:
        clients.connect(10, LOOPBACK, greeter.port, in_flight=3, then_close=True)
        clients.await_counts(connected=3)
        assert not clients.reach(ROUNDS_S, opened=4)
        greeter.resume()
        clients.await_counts(ended=10)
        assert {record.closed_by for record in clients.records()} == {"client"}

    def test_a_paused_server_stays_silent(self, clients: Clients, greeter: Greeter) -> None:
        greeter.resume()
        clients.connect(2, LOOPBACK, greeter.port)
        clients.await_counts(greeted=2)
        greeter.pause()
        clients.connect(3, LOOPBACK, greeter.port)
        clients.await_counts(connected=5)
        assert not clients.reach(ROUNDS_S, greeted=3)
        clients.close_sockets(WAITING)
        assert [record.closed_by for record in clients.records()] == [None] * 2 + ["client"] * 3

    def test_a_refusal_is_named(self, clients: Clients, greeter: Greeter) -> None:
        greeter.close()
        clients.connect(1, LOOPBACK, greeter.port)
        clients.await_counts(settled=1, ended=1)
        (record,) = clients.records()
        assert (record.error, record.connected_ns, record.waiting) == ("ECONNREFUSED", None, False)

    def test_a_reset_and_a_close_of_the_server_are_told_apart(self, clients: Clients) -> None:
        with socket.create_server((LOOPBACK, 0)) as listener:
            port = listener.getsockname()[1]
            clients.connect(1, LOOPBACK, port)
            closing, _ = listener.accept()
            clients.connect(1, LOOPBACK, port)
            resetting, _ = listener.accept()
            clients.await_counts(connected=2)
            closing.close()
            resetting.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, bytes([1, 0, 0, 0] + [0] * 4))
            resetting.close()
            clients.await_counts(ended=2)
        closed, reset = clients.records()
        assert (closed.closed_by, closed.error) == ("server", None)
        assert (reset.closed_by, reset.error) == (None, "ECONNRESET")

    def test_our_reset_reaches_the_server(self, clients: Clients) -> None:
        with socket.create_server((LOOPBACK, 0)) as listener:
            clients.connect(1, LOOPBACK, listener.getsockname()[1])
            connection, _ = listener.accept()
            clients.await_counts(connected=1)
            clients.close_sockets(reset=True)
            with connection, pytest.raises(ConnectionResetError):
                connection.recv(1)

    def test_data_goes_only_to_the_chosen(self, clients: Clients) -> None:
        with socket.create_server((LOOPBACK, 0)) as listener:
            clients.connect(1, LOOPBACK, listener.getsockname()[1])
            greeted, _ = listener.accept()
            clients.connect(1, LOOPBACK, listener.getsockname()[1])
            waiting, _ = listener.accept()
            with greeted, waiting:
                greeted.send(b"hello")
                clients.await_counts(greeted=1, connected=2)
                clients.send(b"data", WAITING)
                waiting.settimeout(patience.COMMAND_S)
                assert waiting.recv(10) == b"data"
                assert select.select([greeted], [], [], ROUNDS_S)[0] == []

    def test_waiting_in_vain_says_where_things_stand(
        self, clients: Clients, greeter: Greeter
    ) -> None:
        clients.connect(2, LOOPBACK, greeter.port)
        clients.await_counts(connected=2)
        with pytest.raises(LabTimeoutError) as caught:
            clients.await_counts(ROUNDS_S, greeted=1)
        assert "2 connected, 0 greeted" in caught.value.why

    def test_a_port_in_use_is_an_error(self, greeter: Greeter) -> None:
        with pytest.raises(LabError) as caught:
            Greeter(ThisMachine(), LOOPBACK, greeter.port, backlog=1)
        assert os.strerror(errno.EADDRINUSE) in caught.value.why

    def test_a_child_ends_with_its_parents_end_of_the_channel(self, clients: Clients) -> None:
        clients.close()
        assert clients.exit_status == 0
        with pytest.raises(LabError, match="has ended"):
            clients.records()


TRACER = """
import json, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
print(sys.argv[2], flush=True)
open(sys.argv[1], "w").close()
signal.sigwait([signal.SIGINT])
print(json.dumps({"type": "summary"}))
sys.exit(1)
"""
KEY = FourTuple("10.9.0.2", 40_000, "10.9.0.1", 3311)


def tracer_words(says: str, *more: str) -> list[str]:
    return [sys.executable, "-c", TRACER, tracer.READY_PLACEHOLDER, says, *more]


class TestTracer:
    def test_it_is_awaited_heard_and_ended(self) -> None:
        says = json.dumps(line_of(KEY, "ack-missing"))
        with Tracer(tracer_words(says, "--json")) as beside:
            beside.after(Stage(READY, {}, NETNS))
            beside.after(Stage(DONE, {KEY: "ack-missing"}, NETNS))
        assert beside.exit_status == 1
        assert reported_verdicts(beside.lines, NETNS) == {KEY: "ack-missing"}
        assert beside.lines[-1] == {"type": "summary"}

    def test_a_paused_one_does_nothing_until_it_is_resumed(self) -> None:
        with Tracer(tracer_words(json.dumps({}), "--json")) as beside:
            beside.pause()
            beside.start()
            assert beside._process is not None
            beside.pause()
            beside._process.send_signal(signal.SIGINT)
            state = Path(f"/proc/{beside._process.pid}/stat").read_text().rpartition(")")[2]
            assert state.split()[0] == "T"
            assert {"type": "summary"} not in beside.lines
            beside.resume()
            beside.stop()
        assert beside.lines[-1] == {"type": "summary"}

    def test_text_is_passed_on_and_searched(self, capfdbinary: Any) -> None:
        with Tracer(tracer_words("10.9.0.2:40000 hangs")) as beside:
            beside.start()
            assert beside.await_reported({KEY: "ack-missing"}, NETNS)
            beside.stop()
            assert not beside.names(KEY._replace(client_port=4000))
        assert b"10.9.0.2:40000 hangs" in capfdbinary.readouterr().out

    def test_of_a_table_of_groups_the_last_row_of_each_counts(self) -> None:
        table = (
            "time      verdict           clients from                   at\n"
            "22:14:06 !accept-queue-full       8 10.9.0.2               10.9.0.1:3311\n"
            "          ACK came, dropped: accept queue full; ports 46330, 46340 ...\n"
            "22:14:16 !accept-queue-full   1 037 2 addresses            10.9.0.1:3311  1 029 more\n"
            "22:14:16 !ack-missing             1 [2001:db8::2]:40012    [2001:db8::1]:25\n"
            "22:14:17  rescued                 5 10.9.0.2               10.9.0.1:3311\n"
        )
        assert tracer.clients_in_groups(table) == 1037 + 1

    def test_a_silent_tracer_is_not_waited_for_for_ever(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(tracer, "REPORT_S", ROUNDS_S)
        with Tracer(tracer_words("{}", "--json")) as beside:
            beside.start()
            assert not beside.await_reported({KEY: "ack-missing"}, NETNS)
            beside.stop()

    def test_what_will_be_told_again_is_waited_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tracer, "REPORT_S", ROUNDS_S)
        for to_be_updated in (True, False):
            says = json.dumps({**line_of(KEY, "ack-filtered"), "to_be_updated": to_be_updated})
            with Tracer(tracer_words(says, "--json")) as beside:
                beside.start()
                found = beside.await_reported({KEY: "ack-filtered"}, NETNS)
                beside.stop()
            assert found != to_be_updated

    def test_what_was_said_before_it_was_forgotten_does_not_count(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(tracer, "REPORT_S", ROUNDS_S)
        with Tracer(tracer_words(json.dumps(line_of(KEY, "ack-missing")), "--json")) as beside:
            beside.start()
            assert beside.await_reported({KEY: "ack-missing"}, NETNS)
            beside.forget_lines()
            assert not beside.await_reported({KEY: "ack-missing"}, NETNS)
            beside.stop()

    def test_output_that_is_not_json_is_an_error(self) -> None:
        with Tracer(tracer_words("Traceback", "--json")) as beside:
            beside.start()
            with pytest.raises(LabError) as caught:
                beside.stop()
        assert caught.value.why == "Traceback"

    def test_one_that_ends_before_it_traces_is_an_error(self) -> None:
        words = [sys.executable, "-c", "raise SystemExit(3)", tracer.READY_PLACEHOLDER]
        with Tracer(words) as beside, pytest.raises(LabError) as caught:
            beside.start()
        assert caught.value.why == "exit status 3"

    def test_one_that_is_not_there_is_an_error(self) -> None:
        with Tracer(["/nowhere/tracer"]) as beside, pytest.raises(LabError, match="cannot start"):
            beside.start()
