"""What is not probed is not known: never a wrong verdict, always a declared gap."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from lab.patience import COMMAND_S, Deadline
from lab.scenarios import play
from lab.scene import PORT, READY, Stage
from lab.syns import make_syn, send_syn
from lab.tracer import READY_PLACEHOLDER, Tracer
from tcpstuck_bpf.probes import KERNEL_COUNTERS, OPTIONAL, PROBES, WITHOUT_VARIABLE
from tests.kernel.conftest import TOOL, Traced, tracing
from tests.kernel.handmade import ISN, Client, Site, site, told

pytestmark = pytest.mark.kernel

IPV6_PROBES = ("cookie_v6_init_sequence", "cookie_v6_check")


MODES = pytest.mark.parametrize("mode", ["fentry", "kprobe"])


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
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It would end the handshake, and hide that the ACK of the first SYN-ACK is dropped as well."""
    monkeypatch.setenv(WITHOUT_VARIABLE, KERNEL_COUNTERS)
    with site(4, backlog=0) as where, tracing(["-p", str(PORT), "--timeout", "1"]) as (tracer,):
        slow, served = Client(where), Client(where)
        slow.connect()
        served.connect()
        served.send(0)
        _await_counter(where, "SyncookiesRecv", 1)
        send_syn(where.topology.client, make_syn(slow.four_tuple, ISN))
        _await_counter(where, "ListenDrops", 1)
        slow.send(0)
        _await_counter(where, "ListenDrops", 2)
        line = told(tracer, where.netns, slow.four_tuple, "accept-queue-full")
    assert (line["stuck"], line["certainty"], line["syn_count"]) == (True, "likely", 2)


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
    (summary,) = tracer.lines
    assert {gap["probe"] for gap in summary["coverage_gaps"]} == set(IPV6_PROBES)
    assert summary["ever_stuck"] == 0
    assert outcome.moved("SyncookiesSent")
    assert not [row for row in summary["reconciliation"] if row["agrees"] is False]
