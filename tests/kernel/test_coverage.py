"""What is not probed is not known: never a wrong verdict, always a declared gap."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from lab.scenarios import play
from lab.scene import READY, Stage
from lab.tracer import READY_PLACEHOLDER, Tracer
from tcpstuck_bpf.probes import KERNEL_COUNTERS, OPTIONAL, WITHOUT_VARIABLE
from tests.kernel.conftest import TOOL, Traced

pytestmark = pytest.mark.kernel

IPV6_PROBES = ("cookie_v6_init_sequence", "cookie_v6_check")


@pytest.mark.parametrize(
    "left_out",
    [
        pytest.param(name, marks=() if name == KERNEL_COUNTERS else pytest.mark.slow)
        for name in OPTIONAL
    ],
)
def test_without_one_probe_no_verdict_is_wrong(
    traced: Callable[..., Traced], monkeypatch: pytest.MonkeyPatch, left_out: str
) -> None:
    monkeypatch.setenv(WITHOUT_VARIABLE, left_out)
    run = traced("overflow", clients=70)
    gaps = {gap["probe"] for gap in run.summary["coverage_gaps"]}
    assert gaps == (set(IPV6_PROBES) if left_out in IPV6_PROBES else {left_out})
    assert run.comparison.agrees, run.comparison
    if left_out == KERNEL_COUNTERS:
        assert {line["certainty"] for line in run.verdicts} == {"likely"}
    assert not [row for row in run.summary["reconciliation"] if row["agrees"] is False]


@pytest.mark.slow
@pytest.mark.parametrize("left_out", IPV6_PROBES)
def test_without_a_probe_of_ipv6_nobody_is_accused_there(
    monkeypatch: pytest.MonkeyPatch, left_out: str
) -> None:
    monkeypatch.setenv(WITHOUT_VARIABLE, left_out)
    with Tracer([*TOOL, "--timeout", "1", "--ready-file", READY_PLACEHOLDER]) as tracer:

        def only_start(stage: Stage) -> None:
            if stage.name == READY:
                tracer.start()

        outcome = play("overflow", clients=70, family="6", after=only_start)
        tracer.stop()
    assert outcome.stuck
    (summary,) = tracer.lines
    assert {gap["probe"] for gap in summary["coverage_gaps"]} == set(IPV6_PROBES)
    assert summary["ever_stuck"] == 0
