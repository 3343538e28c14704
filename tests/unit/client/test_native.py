"""`--client` beside real clients, in network namespaces of its own. Needs root, no tracing.

The server forgets clients as in the story: every SYN gets a cookie (tcp_syncookies=2), and a rule
drops the ACK. The oracle: the clients' own record, and `ss` at both ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lab.errors import LabError
from lab.network.faults import ack_rule, dropping, no_syn_rule
from lab.network.topology import SERVER_ADDRESS, Namespace, Topology
from lab.patience import COMMAND_S, patient
from lab.processes.clients import WAITING, Clients
from lab.processes.servers import Greeter
from lab.records import FourTuple
from lab.scenarios.tracer import READY_PLACEHOLDER, Tracer
from tcpstuck_bpf.client.sockets import LOOK_NS, SocketReader, Wanted
from tcpstuck_bpf.host import netns

TOOL = [sys.executable, "-m", "tcpstuck_bpf", "--client"]
FORGOTTEN, UNSERVED, GREETED, SPOKE = 5, 4, 7, 3

Line = dict[str, Any]


@pytest.fixture(scope="module")
def topology() -> Iterator[Topology]:
    if os.geteuid() != 0:
        pytest.skip("making a network namespace takes root")
    with contextlib.ExitStack() as stack:
        try:
            made = stack.enter_context(Topology())
            made.server.pin({"net/ipv4/tcp_syncookies": "2"})
            for family in (4, 6):
                with dropping(made.server, ack_rule(1), family):
                    pass
        except LabError as error:
            pytest.skip(f"the namespaces cannot be made here: {error}")
        yield made


def started(topology: Topology, *words: str, outside: bool = False) -> Tracer:
    """The tool with JSON, in the clients' namespace or outside of it."""
    place = ["--netns", topology.client.name if outside else "/proc/self/ns/net"]
    command = [*TOOL, *words, *place, "--json", "--ready-file", READY_PLACEHOLDER]

    def begin(words: list[str], output: int) -> subprocess.Popen[bytes]:
        if outside:
            return subprocess.Popen(words, stdout=output, stdin=subprocess.DEVNULL)
        return topology.client.popen(words, stdout=output, stdin=subprocess.DEVNULL)

    return Tracer(command, begin)


def told(lines: list[Any]) -> dict[FourTuple, list[str]]:
    """Each connection's verdicts, in their order."""
    found: dict[FourTuple, list[str]] = {}
    for line in lines:
        if line["type"] == "verdict":
            key = FourTuple(*(line[name] for name in FourTuple._fields))
            found.setdefault(key, []).append(line["verdict"])
    return found


def known_to_the_server(topology: Topology, port: int) -> set[tuple[str, int]]:
    rows = topology.server.sockets("established", "sport", "=", f":{port}")
    return {(row.peer_ip, row.peer_port) for row in rows}


def owners_by_ss(topology: Topology, port: int) -> dict[int, tuple[int, int]]:
    """Process and descriptor of each client's socket, by its port."""
    text = topology.client.command("ss", "-tnpH", "state", "established", "dport", "=", f":{port}")
    found = {}
    for line in text.splitlines():
        owner = re.search(r"pid=(\d+),fd=(\d+)", line)
        assert owner is not None, line
        found[int(line.split()[2].rpartition(":")[2])] = (int(owner[1]), int(owner[2]))
    return found


@pytest.mark.parametrize(
    ("family", "outside"),
    [(4, False), (6, False), (6, True)],
    ids=["ipv4-inside", "ipv6-inside", "ipv6-outside"],
)
def test_who_waits_is_told_and_nobody_else(topology: Topology, family: int, outside: bool) -> None:
    address = SERVER_ADDRESS[family]
    with contextlib.ExitStack() as stack:
        speaks = stack.enter_context(Greeter(topology.server, address, 0, backlog=64))
        silent = stack.enter_context(Greeter(topology.server, address, 0, backlog=64))
        speaks.resume()
        forgotten, greeted, unserved, spoke = (
            stack.enter_context(Clients(topology.client)) for _ in range(4)
        )
        with dropping(topology.server, ack_rule(speaks.port), family):
            forgotten.connect(FORGOTTEN, address, speaks.port)
            forgotten.await_counts(connected=FORGOTTEN)
        greeted.connect(GREETED, address, speaks.port)
        greeted.await_counts(greeted=GREETED)
        unserved.connect(UNSERVED, address, silent.port)
        unserved.await_counts(connected=UNSERVED)
        spoke.connect(SPOKE, address, silent.port, first_words=b"EHLO me\r\n")
        spoke.await_counts(connected=SPOKE)
        lost = {one.four_tuple for one in forgotten.records()}
        late = {one.four_tuple for one in unserved.records()}
        # Nobody who is to be told was greeted, and the server has no record of the forgotten ones.
        assert all(one.greeted_ns is None for one in (*forgotten.records(), *unserved.records()))
        known = known_to_the_server(topology, speaks.port)
        assert len(known) == GREETED
        assert not known & {one[:2] for one in lost}
        assert len(known_to_the_server(topology, silent.port)) == UNSERVED + SPOKE
        owners = owners_by_ss(topology, speaks.port) | owners_by_ss(topology, silent.port)

        ports = ["-p", f"{speaks.port},{silent.port}", "-t", "1"]
        tracer = stack.enter_context(started(topology, *ports, outside=outside))
        tracer.start()
        assert tracer.await_lines(FORGOTTEN + UNSERVED)
        assert told(tracer.lines) == {one: ["greeting-missing"] for one in lost | late}
        for line in tracer.lines:
            (owner,) = line["owners"]
            assert (owner["pid"], owner["fd"]) == owners[line["client_port"]]
            assert line["netns"] == topology.client.inode
            assert line["age_ms"] >= 1_000

        silent.resume()
        unserved.await_counts(greeted=UNSERVED)
        assert tracer.await_lines(FORGOTTEN + 2 * UNSERVED)
        with dropping(topology.server, no_syn_rule(speaks.port), family):
            forgotten.send(b"x", WAITING)
            assert tracer.await_lines(2 * FORGOTTEN + 2 * UNSERVED)
        tracer.stop()
    (summary,) = (line for line in tracer.lines if line["type"] == "summary")
    assert told(tracer.lines) == {
        **{one: ["greeting-missing", "client-spoke"] for one in lost},
        **{one: ["greeting-missing", "recovered"] for one in late},
    }
    assert summary["verdicts"] == {"recovered": UNSERVED, "client-spoke": FORGOTTEN}
    assert (summary["stuck"], summary["ever_stuck"], tracer.exit_status) == (0, UNSERVED, 1)
    assert (summary["losses"], summary["unread_namespaces"]) == ({}, [])


def test_one_that_is_closed_is_counted_and_a_time_out_of_its_own_holds(topology: Topology) -> None:
    with contextlib.ExitStack() as stack:
        address = SERVER_ADDRESS[4]
        silent = stack.enter_context(Greeter(topology.server, address, 0, backlog=64))
        clients = stack.enter_context(Clients(topology.client))
        clients.connect(3, address, silent.port)
        clients.await_counts(connected=3)
        port = str(silent.port)
        patient_one = stack.enter_context(started(topology, "-p", port, "-t", "1h"))
        patient_one.start()
        tracer = stack.enter_context(started(topology, "-p", port, "-t", "10ms"))
        tracer.start()
        assert tracer.await_lines(3)
        clients.close_sockets(reset=True)
        assert topology.client.sockets("established", "dport", "=", f":{port}") == []
        for one in (tracer, patient_one):
            one.stop()
    (line,) = patient_one.lines
    assert (line["verdicts"], line["pending"], line["saw_nothing"]) == ({}, 0, False)
    assert patient_one.exit_status == 130  # Ctrl-C before any verdict
    *verdicts, summary = tracer.lines
    assert [one["verdict"] for one in verdicts] == ["greeting-missing"] * 3
    assert (summary["stuck"], summary["closed"], summary["ever_stuck"]) == (0, 3, 3)
    assert tracer.exit_status == 1


def test_a_person_reads_who_waits_for_what(topology: Topology) -> None:
    with contextlib.ExitStack() as stack:
        address = SERVER_ADDRESS[6]
        silent = stack.enter_context(Greeter(topology.server, address, 0, backlog=64))
        clients = stack.enter_context(Clients(topology.client))
        clients.connect(12, address, silent.port)
        clients.await_counts(connected=12)
        command = [*TOOL, "-p", str(silent.port), "-t", "10ms", "-d", "10ms"]
        done = topology.client.run(
            subprocess.run,
            [*command, "--netns", "/proc/self/ns/net"],
            capture_output=True,
            text=True,
            timeout=patient(COMMAND_S),
            env={**os.environ, "COLUMNS": "80"},
        )
        (pid,) = {pid for pid, _ in owners_by_ss(topology, silent.port).values()}
    assert done.returncode == 1
    assert max(map(len, done.stdout.splitlines())) <= 80
    text = " ".join(done.stdout.split())
    assert re.search(
        rf"12 connections of \S+ \(pid {pid}\) to \[{address}\]:{silent.port} wait for the "
        r"server's first byte, the oldest for \d",
        text,
    )


def test_a_replay_prints_what_the_run_printed(topology: Topology, tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        address = SERVER_ADDRESS[4]
        silent = stack.enter_context(Greeter(topology.server, address, 0, backlog=64))
        clients, late = (stack.enter_context(Clients(topology.client)) for _ in range(2))
        for some in (clients, late):
            some.connect(3, address, silent.port)
            some.await_counts(connected=3)
        words = ["-p", str(silent.port), "-t", "10ms", "--record", str(tmp_path / "run")]
        tracer = stack.enter_context(started(topology, *words))
        tracer.start()
        assert tracer.await_lines(6)
        late.close_sockets(reset=True)
        silent.resume()
        clients.await_counts(greeted=3)
        assert tracer.await_lines(9)
        tracer.stop()
    assert {line.get("verdict") for line in tracer.lines} == {
        *("greeting-missing", "recovered"),
        None,
    }
    command = [sys.executable, "-m", "tcpstuck_bpf", "--replay", str(tmp_path / "run"), "--json"]
    replayed = subprocess.run(command, capture_output=True, timeout=patient(COMMAND_S), check=False)
    assert (replayed.returncode, replayed.stderr) == (tracer.exit_status, b"")
    assert [json.loads(line) for line in replayed.stdout.splitlines()] == tracer.lines


def test_a_namespace_that_is_removed_ends_what_waited_in_it() -> None:
    if os.geteuid() != 0:
        pytest.skip("making a network namespace takes root")
    try:
        gone = Namespace(f"tcpstuck-{os.getpid()}-gone")
    except LabError as error:
        pytest.skip(f"the namespaces cannot be made here: {error}")
    now_ns = 0
    wanted = Wanted((25,), netns=gone.inode, way=netns.way(gone.name))
    reader = SocketReader(wanted, lambda: now_ns)
    assert reader.read(lambda _socket: True).namespaces == {gone.inode}
    gone.give_up_number()
    gone.close()
    now_ns += LOOK_NS
    poll = reader.read(lambda _socket: True)
    assert (poll.namespaces, poll.gone, dict(poll.failures)) == (frozenset(), {gone.inode}, {})


def test_a_namespace_that_may_not_be_entered_is_no_all_clear(topology: Topology) -> None:
    """As another user, who may not enter the clients' namespace, but sees its name."""
    words = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *TOOL]
    done = subprocess.run(
        [*words, "-p", "1", "-d", "10ms", "--json"],
        capture_output=True,
        text=True,
        timeout=patient(COMMAND_S),
    )
    if "Permission denied" in done.stderr or "No module" in done.stderr:
        pytest.skip("another user may not read this tree")
    summary = json.loads(done.stdout)
    assert topology.client.inode in {one["netns"] for one in summary["unread_namespaces"]}
    assert (summary["stuck"], done.returncode) == (0, 4)
