"""`--client --rescue` beside real clients, in network namespaces of its own. Needs root.

The oracle: the clients' own record, what the server accepted, `ss` at both ends and the kernel's
counters. Where two minutes would have to pass, the tool sees every socket older than it is.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from lab.network.faults import ack_rule, dropping, no_syn_rule
from lab.network.readings import parse_netstat
from lab.network.topology import SERVER_ADDRESS, Topology
from lab.patience import COMMAND_S, Deadline
from lab.processes.clients import Clients
from lab.processes.servers import Greeter
from lab.records import FourTuple
from lab.scenarios.tracer import READY_PLACEHOLDER, Tracer
from tcpstuck_bpf.client.socket_reset import kernel_can_end_sockets
from tests.moments import monotonic_ns
from tests.unit.client.test_native import known_to_the_server, told, topology

__all__ = ["topology"]

FAMILIES = pytest.mark.parametrize("family", [4, 6])
STUCK, HEALTHY, SPOKE = 12, 5, 4
TOOL = "import sys; from tcpstuck_bpf.cli import main; sys.exit(main(sys.argv[1:]))"
OLDER = """
from tcpstuck_bpf.client import sockets
parse = sockets.parse
def older(data, netns):
    answer = parse(data, netns)
    return answer._replace(sockets=[
        one._replace(age_ns=one.age_ns + PASSED_NS, last_ack_ns=one.last_ack_ns + PASSED_NS)
        if one.waits else one
        for one in answer.sockets
    ])
sockets.parse = older
"""
"""Runs before the tool: every socket that waits is two minutes older, for polls and before acts."""
PASSED = f"PASSED_NS = {125 * 10**9}\n"

Line = dict[str, Any]


def started(topology: Topology, port: int, *words: str, older: bool = False) -> Tracer:
    """The tool in the clients' namespace, with JSON."""
    text = f"{PASSED}{OLDER}{TOOL}" if older else TOOL
    place = ["--netns", "/proc/self/ns/net"]
    command = [sys.executable, "-c", text, "--client", "-p", str(port), "-t", "1", *place, "--json"]

    def begin(words: list[str], output: int) -> subprocess.Popen[bytes]:
        return topology.client.popen(words, stdout=output, stdin=subprocess.DEVNULL)

    return Tracer([*command, *words, "--ready-file", READY_PLACEHOLDER], begin)


def of_type(lines: Sequence[Any], kind: str) -> list[Any]:
    return [line for line in lines if line["type"] == kind]


def moments_ns(lines: Sequence[Any], key: str) -> dict[FourTuple, int]:
    """What the lines say under a key, by connection, on the clock of the clients' own records."""
    return {
        FourTuple(*(line[name] for name in FourTuple._fields)): monotonic_ns(line[key])
        for line in lines
    }


def connections(clients: Clients) -> set[FourTuple]:
    return {one.four_tuple for one in clients.records()}


def forget(topology: Topology, clients: Clients, number: int, server: Greeter, family: int) -> None:
    """Connect clients whose ACK is lost, so that the server has no record of them."""
    before = topology.server.count_known(server.port)
    with dropping(topology.server, ack_rule(server.port), family):
        clients.connect(number, SERVER_ADDRESS[family], server.port)
        clients.await_counts(connected=number)
    assert topology.server.count_known(server.port) == before


def segments(topology: Topology, port: int) -> dict[tuple[str, int], str]:
    """`ss`'s count of segments in and out of each connection, by the client's address and port."""
    found = {}
    text = topology.client.command("ss", "-tinH", "state", "established", "dport", "=", f":{port}")
    lines = text.splitlines()
    for row, info in zip(lines[::2], lines[1::2]):
        address, _, number = row.split()[2].rpartition(":")
        words = [word for word in info.split() if word.startswith(("segs_", "bytes_"))]
        found[address.strip("[]"), int(number)] = " ".join(words)
    return found


def segments_sent(topology: Topology) -> int:
    """The segments that the clients' host has sent: those with data, those without, and RSTs."""
    counters = parse_netstat(
        topology.client.run(Path("/proc/thread-self/net/snmp").read_text), "Tcp"
    )
    # OutSegs has no repeated segments.
    return sum(counters[name] for name in ("OutSegs", "RetransSegs", "OutRsts"))


@contextlib.contextmanager
def greeter(topology: Topology, family: int, port: int = 0) -> Iterator[Greeter]:
    with Greeter(topology.server, SERVER_ADDRESS[family], port, backlog=64) as made:
        yield made


@FAMILIES
def test_who_is_forgotten_is_greeted_and_nobody_else_is_touched(
    topology: Topology, family: int
) -> None:
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(greeter(topology, family))
        forgotten, greeted, spoke = (
            stack.enter_context(Clients(topology.client)) for _ in range(3)
        )
        server.resume()
        greeted.connect(HEALTHY, SERVER_ADDRESS[family], server.port)
        greeted.await_counts(greeted=HEALTHY)
        server.pause()
        spoke.connect(SPOKE, SERVER_ADDRESS[family], server.port, first_words=b"EHLO me\r\n")
        spoke.await_counts(connected=SPOKE)
        forget(topology, forgotten, STUCK, server, family)
        healthy = {(who[0], who[1]) for who in connections(greeted) | connections(spoke)}
        before = segments(topology, server.port)
        server.resume()
        spoke.await_counts(greeted=SPOKE)
        calm = segments(topology, server.port)
        challenged = topology.client.counters()["TCPChallengeACK"]

        tracer = stack.enter_context(started(topology, server.port, "--rescue"))
        tracer.start()
        forgotten.await_counts(greeted=STUCK)
        assert tracer.await_lines(3 * STUCK)
        tracer.stop()

        lost = connections(forgotten)
        assert told(tracer.lines) == {one: ["greeting-missing", "rescued"] for one in lost}
        assert {(one["action"], one["outcome"]) for one in of_type(tracer.lines, "rescue")} == {
            ("challenge", "sent")
        }
        sent = len(of_type(tracer.lines, "rescue"))
        assert topology.client.counters()["TCPChallengeACK"] - challenged == sent == STUCK
        assert len(server.accepted()) == STUCK + HEALTHY + SPOKE
        assert known_to_the_server(topology, server.port) == {one[:2] for one in lost} | healthy
        after = segments(topology, server.port)
        assert {who: after[who] for who in healthy} == {who: calm[who] for who in healthy}
        assert len(before) == len(after)
    (summary,) = of_type(tracer.lines, "summary")
    assert (summary["verdicts"], summary["stuck"]) == ({"rescued": STUCK}, 0)
    assert summary["rescue"]["challenged"] == STUCK
    assert tracer.exit_status == 1


def restart(topology: Topology, family: int, server: Greeter) -> Greeter:
    """The server anew on the same port; it refuses cookies, as when they are too old."""
    port = server.port
    server.close()
    topology.server.pin({"net/ipv4/tcp_syncookies": "0"})
    return Greeter(topology.server, SERVER_ADDRESS[family], port, backlog=64)


@pytest.fixture
def cookies(topology: Topology) -> Iterator[None]:
    """Cookies again, whatever the test did."""
    yield
    topology.server.pin({"net/ipv4/tcp_syncookies": "2"})


@FAMILIES
@pytest.mark.usefixtures("cookies")
def test_what_the_server_forgot_ends_with_an_error(topology: Topology, family: int) -> None:
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(greeter(topology, family))
        clients = stack.enter_context(Clients(topology.client))
        forget(topology, clients, STUCK, first, family)
        server = stack.enter_context(restart(topology, family, first))
        server.resume()
        tracer = stack.enter_context(started(topology, server.port, "--rescue", older=True))
        tracer.start()
        clients.await_counts(failed=STUCK)
        assert tracer.await_lines(3 * STUCK)
        tracer.stop()
        assert {one.error for one in clients.records()} == {"ECONNRESET"}
        assert server.accepted() == []
        assert told(tracer.lines) == {
            one: ["greeting-missing", "server-forgot"] for one in connections(clients)
        }
    (summary,) = of_type(tracer.lines, "summary")
    assert (summary["verdicts"], summary["closed"]) == ({"server-forgot": STUCK}, 0)
    assert summary["rescue"]["asked"] == STUCK


@FAMILIES
def test_a_server_that_has_them_is_slow_and_the_greetings_come_later(
    topology: Topology, family: int
) -> None:
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(greeter(topology, family))
        clients = stack.enter_context(Clients(topology.client))
        clients.connect(STUCK, SERVER_ADDRESS[family], server.port)
        clients.await_counts(connected=STUCK)
        assert len(known_to_the_server(topology, server.port)) == STUCK
        words = ["--rescue=reset"]
        tracer = stack.enter_context(started(topology, server.port, *words, older=True))
        tracer.start()
        assert tracer.await_lines(3 * STUCK)
        slow = ["greeting-missing", "server-slow"]
        assert told(tracer.lines) == dict.fromkeys(connections(clients), slow)
        assert len(topology.client.sockets("established", "dport", "=", f":{server.port}")) == STUCK
        server.resume()
        clients.await_counts(greeted=STUCK)
        assert tracer.await_lines(4 * STUCK)
        tracer.stop()
    (summary,) = of_type(tracer.lines, "summary")
    assert summary["verdicts"] == {"recovered": STUCK}
    assert summary["rescue"]["outcomes"]["reset"] == {}
    assert len(of_type(tracer.lines, "rescue")) == STUCK


@FAMILIES
@pytest.mark.parametrize("older", [False, True])
def test_a_dry_run_sends_nothing(topology: Topology, family: int, older: bool) -> None:
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(greeter(topology, family))
        server.resume()
        clients = stack.enter_context(Clients(topology.client))
        forget(topology, clients, STUCK, server, family)
        before, counters = segments(topology, server.port), topology.client.counters()
        sent = segments_sent(topology)
        words = ["--rescue=dry-run"]
        tracer = stack.enter_context(started(topology, server.port, *words, older=older))
        tracer.start()
        assert tracer.await_lines(2 * STUCK)
        tracer.stop()
        assert segments(topology, server.port) == before
        assert segments_sent(topology) == sent
        after = topology.client.counters()
        for name in ("TCPChallengeACK", "TCPWinProbe", "TCPKeepAlive"):
            assert after.get(name) == counters.get(name), name
        assert server.accepted() == []
        clients.close_sockets(reset=True)
    kind = "question" if older else "challenge"
    assert {(one["action"], one["outcome"]) for one in of_type(tracer.lines, "rescue")} == {
        (kind, "would")
    }
    (summary,) = of_type(tracer.lines, "summary")
    assert (summary["verdicts"], summary["stuck"]) == ({"greeting-missing": STUCK}, STUCK)


@FAMILIES
@pytest.mark.parametrize("mode", ["--rescue", "--rescue=reset"])
def test_what_stays_silent_is_ended_where_that_was_asked_for(
    topology: Topology, family: int, mode: str
) -> None:
    """The server's host drops all that comes; healthy connections to it live on."""
    if mode == "--rescue=reset" and not kernel_can_end_sockets():
        pytest.skip("the kernel lacks CONFIG_INET_DIAG_DESTROY")
    number = 4
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(greeter(topology, family))
        server.resume()
        healthy, clients = (stack.enter_context(Clients(topology.client)) for _ in range(2))
        healthy.connect(HEALTHY, SERVER_ADDRESS[family], server.port)
        healthy.await_counts(greeted=HEALTHY)
        forget(topology, clients, number, server, family)
        stack.enter_context(dropping(topology.server, no_syn_rule(server.port), family))
        tracer = stack.enter_context(started(topology, server.port, mode, older=True))
        tracer.start()
        if mode == "--rescue":
            assert tracer.await_lines(2 * number)
            assert topology.client.sockets("established", "dport", "=", f":{server.port}")
        else:
            clients.await_counts(failed=number)
            assert tracer.await_lines(4 * number)
        tracer.stop()
        errors = {one.error for one in clients.records()}
        left = topology.client.sockets("established", "dport", "=", f":{server.port}")
        assert {(row.local_ip, row.local_port) for row in left} >= {
            one[:2] for one in connections(healthy)
        }
        assert {one.error for one in healthy.records()} == {None}
    (summary,) = of_type(tracer.lines, "summary")
    asked = [one for one in of_type(tracer.lines, "rescue") if one["action"] == "question"]
    assert {(one["outcome"], one["reason"]) for one in asked} == {
        ("no-answer", "no segment came within 3 s")
    }
    if mode == "--rescue":
        assert errors == {None}
        assert summary["verdicts"] == {"greeting-missing": number}
    else:
        assert errors == {"ECONNABORTED"}
        assert summary["verdicts"] == {"reset": number}
        assert summary["stuck"] == 0


def test_an_excluded_server_is_left_alone(topology: Topology) -> None:
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(greeter(topology, 4))
        server.resume()
        clients = stack.enter_context(Clients(topology.client))
        forget(topology, clients, STUCK, server, 4)
        before = segments(topology, server.port)
        words = ["--rescue", "--rescue-exclude", f"{SERVER_ADDRESS[4]}/32", "-d", "3"]
        tracer = stack.enter_context(started(topology, server.port, *words))
        tracer.start()
        assert tracer.await_lines(STUCK + 1)
        assert segments(topology, server.port) == before
        clients.close_sockets(reset=True)
    (summary,) = of_type(tracer.lines, "summary")
    assert summary["rescue"]["left_alone"] == {"excluded": STUCK}
    assert of_type(tracer.lines, "rescue") == []


def test_a_run_that_is_ended_awaits_its_questions_and_changes_nothing(topology: Topology) -> None:
    """Ctrl-C while the server is silent: the questions under way end with the run."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(greeter(topology, 4))
        clients = stack.enter_context(Clients(topology.client))
        forget(topology, clients, 4, server, 4)
        stack.enter_context(dropping(topology.server, no_syn_rule(server.port), 4))
        tracer = stack.enter_context(started(topology, server.port, "--rescue", older=True))
        asked = topology.client.counters()["TCPWinProbe"] + 4
        tracer.start()
        deadline = Deadline(COMMAND_S)
        while topology.client.counters()["TCPWinProbe"] < asked:
            assert not deadline.passed()
        tracer.stop()
        timers = topology.client.command("ss", "-tnoH", "dport", "=", f":{server.port}")
        assert len(timers.splitlines()) == 4
        assert "keepalive" not in timers
        clients.close_sockets(reset=True)
    (summary,) = of_type(tracer.lines, "summary")
    assert summary["rescue"]["outcomes"]["question"] == {"no-answer": 4}
    assert (summary["stuck"], tracer.exit_status) == (4, 1)
