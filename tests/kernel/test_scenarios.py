"""Whole runs: each scenario's verdicts equal the oracle, and the counters reconcile exactly."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

import pytest

from lab.records import Comparison, Outcome
from lab.scenarios.catalogue import SMALL_BACKLOG, connect_in_one_batch
from lab.scenarios.scene import Scene, Settings
from lab.scenarios.tracer import Tracer
from tcpstuck_bpf.kernel.tables import READ_AT_ONCE
from tests.kernel.conftest import Traced

pytestmark = pytest.mark.kernel
EXIT_STUCK = 1
REQUEST_LIFE_S = 7.5
"""More than a request lives in a SYN queue that is more than half full: it is given up instead of
being answered a third time, 1 + 2 + 4 s after its SYN (reqsk_timer_handler)."""

SPOOFED = 2 * READ_AT_ONCE + READ_AT_ONCE // 2
"""A sweep reads them in three batches, and more than one is judged in several parts."""
MODES = pytest.mark.parametrize("mode", ["fentry", "kprobe"])
CORE = pytest.mark.core
"""Marks the scenarios of `lab test --core` and `lab matrix --core`."""


def assert_told(run: Traced, verdict: str) -> None:
    """Each 4-tuple of the oracle has that verdict at the end, no other any; nothing is lost."""
    assert set(run.outcome.expected.values()) == {verdict}
    assert run.comparison.agrees, run.comparison
    assert run.summary["verdicts"][verdict] == len(run.outcome.expected)
    assert run.summary["lost_events"] == 0
    assert run.summary["untracked"] == 0
    run.assert_reconciled()


@pytest.mark.parametrize(
    ("scenario", "clients", "family", "verdict"),
    [
        pytest.param("ack-dropped", 50, "4", "ack-filtered", marks=CORE),
        pytest.param("ack-dropped", 20, "6", "ack-filtered", marks=CORE),
        pytest.param("ack-lost", 20, "4", "ack-missing", marks=CORE),
        pytest.param("ack-lost", 20, "6", "ack-missing", marks=CORE),
        pytest.param("client-reset", 50, "4", "client-reset", marks=CORE),
        ("synack-dropped", 20, "4", "synack-missing"),
        pytest.param("overflow", 120, "4", "accept-queue-full", marks=CORE),
        pytest.param("overflow", 100, "6", "accept-queue-full", marks=CORE),
        pytest.param("overflow", 100, "mapped", "accept-queue-full", marks=CORE),
        ("late-fin", 20, "4", "recovered"),
        pytest.param("spoofed", SPOOFED, "4", "ack-missing", marks=pytest.mark.leaves_many),
    ],
)
def test_every_client_gets_its_verdict(
    compared: Callable[..., tuple[Outcome, Comparison]],
    scenario: str,
    clients: int,
    family: str,
    verdict: str,
) -> None:
    outcome, comparison = compared(scenario, clients, family)
    assert set(outcome.expected.values()) == {verdict}
    assert comparison.agrees, comparison


@pytest.mark.parametrize("family", ["4", "6"])
def test_clients_whose_answer_is_held_back_for_long_repeat_no_syn(
    compared: Callable[..., tuple[Outcome, Comparison]],
    monkeypatch: pytest.MonkeyPatch,
    family: str,
) -> None:
    """As on a slow machine: nothing is let go before each client's kernel wanted to repeat it."""
    answered = Scene.syns_answered

    def answered_late(scene: Scene) -> int:
        repeats = scene.topology.client.counters()["TCPSynRetrans"]
        return answered(scene) if repeats >= scene.settings.clients else 0

    monkeypatch.setattr(Scene, "syns_answered", answered_late)
    outcome, comparison = compared("overflow", 100, family)
    assert set(outcome.expected.values()) == {"accept-queue-full"}
    assert {record.syns for record in outcome.wire.values()} == {1}
    assert comparison.agrees, comparison


def test_clients_may_take_longer_to_open_than_a_request_lives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = Settings(100)
    with Scene("overflow", settings, syncookies=1) as scene:
        connect = scene.connect

        def connect_slowly() -> None:
            connect()
            scene.clients.await_counts(opened=settings.clients)
            # What must not matter is time itself: nothing tells that it has passed.
            time.sleep(REQUEST_LIFE_S)

        monkeypatch.setattr(scene, "connect", connect_slowly)
        scene.greeter(SMALL_BACKLOG)
        scene.ready()
        connect_in_one_batch(scene)
        assert len(scene.waiting()) == settings.clients
        assert scene.moved("ListenOverflows") > 0


@CORE
@pytest.mark.parametrize(("family", "mss"), [("4", 1460), ("6", 1440)])
def test_the_mss_that_the_cookie_keeps(
    compared: Callable[..., tuple[Outcome, Comparison]],
    shared_tracer: Tracer,
    family: str,
    mss: int,
) -> None:
    """Ethernet's 1500 bytes without the headers of IP and TCP; the kernel's tables have both."""
    outcome, comparison = compared("ack-dropped", 2, family)
    assert comparison.agrees, comparison
    told = {
        (line["client_port"], *re.findall(r"\(MSS (.*?)\)", str(line["evidence"])))
        for line in shared_tracer.lines
        if line["type"] == "verdict" and line["netns"] == outcome.netns
    }
    # A client may be told twice: the firewall's rules are read beside it.
    assert told == {(client.client_port, str(mss)) for client in outcome.expected}
    assert len(told) == 2


def test_a_paused_mariadb(traced: Callable[..., Traced]) -> None:
    run = traced("mariadb-stall")
    assert_told(run, "accept-queue-full")
    assert run.outcome.stuck
    assert run.summary["stuck"] == len(run.outcome.stuck)
    assert run.exit_status == EXIT_STUCK


@pytest.mark.slow
@pytest.mark.parametrize("time", range(5))
def test_a_paused_mariadb_again_and_again(traced: Callable[..., Traced], time: int) -> None:
    run = traced("mariadb-stall", "--probe-mode", ("fentry", "kprobe")[time % 2])
    assert_told(run, "accept-queue-full")


@CORE
@MODES
def test_thousands_of_healthy_connections(traced: Callable[..., Traced], mode: str) -> None:
    run = traced("healthy", "--probe-mode", mode, clients=5000)
    assert run.verdicts == []
    assert run.summary["stuck"] == run.summary["ever_stuck"] == 0
    assert run.summary["lost_events"] == run.summary["untracked"] == 0
    # Not the number of 4-tuples: a port is used again where its connection is long closed.
    greeted = sum(client.greeted_ns is not None for client in run.outcome.clients)
    assert greeted == 5000
    # So that a failure tells where one was left.
    lost = {name: count for name, count in run.summary["losses"].items() if count}
    assert run.summary["verdicts"] == {"completed": greeted}, f"{lost} {run.reconciled()}"
    run.assert_reconciled()


@pytest.mark.slow
def test_an_expired_cookie_is_rejected(traced: Callable[..., Traced]) -> None:
    run = traced("cookie-expired")
    assert_told(run, "cookie-rejected")
