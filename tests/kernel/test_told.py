"""What the tool says at its limits: a flood, a table that is full, clients that begin anew.

Each test has its own run of the tool for its own namespaces; they start together, because
starting is what takes long.
"""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from lab.network.faults import dropping, synack_rule
from lab.network.syns import Syn, make_syn, make_syns, send_in_bursts
from lab.network.topology import CLIENT_ADDRESS, SERVER_ADDRESS, SILENT_SOURCES, Topology
from lab.network.watch import Watch
from lab.records import FourTuple
from lab.scenarios.scene import PORT
from lab.scenarios.tracer import Tracer
from tcpstuck_bpf.kernel.tables import READ_AT_ONCE
from tests.kernel.conftest import be_greeted, listening, summary_of, told_by, tracing

pytestmark = pytest.mark.kernel

EXIT_STUCK = 1
SERVER_IP = SERVER_ADDRESS[4]
SILENT = "ack-missing"
MORE_THAN_A_BATCH = READ_AT_ONCE * 17 // 16
CAPACITY = 64
MORE_THAN_FIT = 3 * CAPACITY
GREETED = 5
ONLY_PORT = 20_000
ISN = 0x1234_5678
INSERT = "htab_map_update_elem"
"""The kernel function that inserts into a hash table, also for a program."""
OTHER_INSERTS = 40
"""More than four runs of the tool insert into their other tables meanwhile."""

RUNS: Mapping[str, tuple[str, ...]] = {
    "flood": ("-t", "1"),
    "full": ("-t", "1", "--max-handshakes", str(CAPACITY)),
    "anew by syncookies=1": ("-t", "1"),
    "anew by syncookies=2": ("-t", "1"),
}


@dataclass(frozen=True)
class Stage:
    """A listener that answers every SYN by a cookie, and a run of the tool that watches it."""

    topology: Topology
    listener: socket.socket
    watch: Watch
    tracer: Tracer

    @property
    def netns(self) -> int:
        return self.topology.server.inode

    def send(self, *syns: Syn) -> None:
        send_in_bursts(self.topology.client, self.watch, syns)

    def reported(self) -> Counter[tuple[int, FourTuple, str]]:
        return Counter(told_by(self.tracer))


@pytest.fixture(scope="module")
def stages() -> Iterator[Mapping[str, Stage]]:
    with ExitStack() as opened:
        made = []
        for _ in RUNS:
            topology = opened.enter_context(Topology())
            topology.server.pin({"net/ipv4/tcp_syncookies": "2"})
            (listener,) = opened.enter_context(listening(topology.server))
            watch = opened.enter_context(Watch(topology.client, PORT))
            made.append((topology, listener, watch))
        options = [
            (*run, "-p", str(PORT), "--netns", topology.server.name)
            for run, (topology, _, _) in zip(RUNS.values(), made)
        ]
        tracers = opened.enter_context(tracing(*options))
        yield {name: Stage(*one, tracer) for name, one, tracer in zip(RUNS, made, tracers)}


@contextmanager
def counting_calls(function: str) -> Iterator[Callable[[], int]]:
    """Yields a function that returns how often this kernel function was called since."""
    tracing, name = Path("/sys/kernel/tracing"), "lab_calls"

    def change(command: str) -> None:
        # Open without O_TRUNC, which would remove every probe, and without a seek to the end.
        with os.fdopen(os.open(tracing / "kprobe_events", os.O_WRONLY), "w") as probes:
            probes.write(f"{command}\n")

    def calls() -> int:
        profile = (tracing / "kprobe_profile").read_text().splitlines()
        return next(int(line.split()[1]) for line in profile if line.split()[0] == name)

    change(f"p:{name} {function}")
    enabled = tracing / "events/kprobes" / name / "enable"
    try:
        enabled.write_text("1")
        yield calls
    finally:
        enabled.write_text("0")
        change(f"-:{name}")


def test_every_spoofed_client_is_told_once(stages: Mapping[str, Stage]) -> None:
    stage = stages["flood"]
    syns = list(make_syns(SILENT_SOURCES[4], SERVER_IP, PORT, MORE_THAN_A_BATCH))
    stage.send(*syns)
    expected = {syn.four_tuple: SILENT for syn in syns}
    assert stage.tracer.await_reported(expected, stage.netns)
    stage.tracer.stop()
    assert stage.reported() == Counter((stage.netns, name, SILENT) for name in expected)
    summary = summary_of(stage.tracer)
    assert summary["verdicts"] == {SILENT: len(syns), "completed": 0}
    assert summary["stuck"] == len(syns)


def test_what_a_full_table_cannot_hold_is_counted_and_never_accused(
    stages: Mapping[str, Stage],
) -> None:
    stage = stages["full"]
    before = stage.topology.server.counters()
    syns = list(make_syns(SILENT_SOURCES[4], SERVER_IP, PORT, MORE_THAN_FIT))
    # Once judged, entries may be given back, and the table would take more than its capacity.
    stage.tracer.pause()
    with counting_calls(INSERT) as inserts:
        stage.send(*syns)
        for _ in range(GREETED):
            be_greeted(stage.topology, stage.listener, SERVER_IP)
        tried = inserts()
    stage.tracer.resume()
    # One failed insert says that the table is full; no SYN after it costs another one.
    assert CAPACITY < tried <= CAPACITY + OTHER_INSERTS
    tracked = {syn.four_tuple: SILENT for syn in syns[:CAPACITY]}
    assert stage.tracer.await_reported(tracked, stage.netns)
    after = stage.topology.server.counters()
    stage.tracer.stop()

    sent = after["SyncookiesSent"] - before["SyncookiesSent"]
    assert sent == MORE_THAN_FIT + GREETED
    assert stage.reported() == Counter((stage.netns, name, SILENT) for name in tracked)
    summary = summary_of(stage.tracer)
    assert summary["untracked"] == sent - CAPACITY
    assert summary["unseen_syn"] == GREETED
    assert summary["cookies_sent"] == sent
    assert summary["verdicts"] == {SILENT: CAPACITY, "completed": GREETED}
    assert summary["lost_events"] == 0
    assert stage.tracer.exit_status == EXIT_STUCK
    agreeing = {
        row["counter"]: row["traced"]
        for row in summary["reconciliation"]
        if row["netns"] == stage.netns and row["agrees"]
    }
    assert agreeing == {
        "SyncookiesSent": sent,
        "SyncookiesRecv": after["SyncookiesRecv"] - before["SyncookiesRecv"],
    }


@pytest.mark.parametrize("syncookies", ["1", "2"])
def test_a_client_that_begins_anew_has_not_recovered(
    stages: Mapping[str, Stage], syncookies: str
) -> None:
    """Its first SYN-ACK is lost; later a real client has the same 4-tuple, and is greeted."""
    stage = stages[f"anew by syncookies={syncookies}"]
    client = FourTuple(CLIENT_ADDRESS[4], ONLY_PORT, SERVER_IP, PORT)
    with dropping(stage.topology.client, synack_rule(PORT), 4):
        stage.send(make_syn(client, ISN))
    assert stage.tracer.await_reported({client: SILENT}, stage.netns)
    stage.topology.server.pin({"net/ipv4/tcp_syncookies": syncookies})
    # It is no verdict on the second handshake if this machine takes longer for it than -t.
    stage.tracer.pause()
    assert be_greeted(stage.topology, stage.listener, SERVER_IP, ONLY_PORT) == client
    stage.tracer.resume()
    assert stage.watch.records[client].client_isn == ISN
    stage.watch.take_in()
    assert stage.watch.records[client].client_isn != ISN
    assert stage.topology.server.counters()["SyncookiesSent"] == int(syncookies)
    stage.tracer.stop()

    assert stage.reported() == {(stage.netns, client, SILENT): 1}
    summary = summary_of(stage.tracer)
    assert summary["recovered"] == 0
    assert summary["ever_stuck"] == 1
    assert stage.tracer.exit_status == EXIT_STUCK
    assert summary["superseded"] == 1
    assert summary["stuck"] == 0
