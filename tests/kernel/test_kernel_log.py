"""The kernel's warning of a full SYN queue, as dmesg has it, in the timelines it concerns."""

from __future__ import annotations

import subprocess

import pytest

from lab.patience import COMMAND_S, patient
from lab.scenarios.catalogue import play
from lab.scenarios.scene import PORT, READY, Stage
from lab.scenarios.tracer import Tracer

pytestmark = pytest.mark.kernel

WARNING = "Possible SYN flooding on port "
CLOCKS_MS = 1000
"""The kernel's log has a clock of its own (local_clock), which is not slewed as the others are."""


def warnings_of_the_kernel() -> list[str]:
    """The kernel's warnings about all listeners since boot, the oldest first."""
    shown = subprocess.run(
        ["dmesg", "--notime"],
        check=True,
        capture_output=True,
        text=True,
        timeout=patient(COMMAND_S),
    ).stdout
    return [line[line.index(WARNING) :].strip() for line in shown.splitlines() if WARNING in line]


@pytest.mark.parametrize("family", ["4", "6"])
def test_it_stands_in_the_timeline_of_each_stuck_client(either_tracer: Tracer, family: str) -> None:
    before = warnings_of_the_kernel()

    def hook(stage: Stage) -> None:
        if stage.name != READY:
            either_tracer.await_reported(stage.expected, stage.netns)

    outcome = play("overflow", clients=100, family=family, after=hook)
    (warning,) = warnings_of_the_kernel()[len(before) :]
    assert str(PORT) in warning
    stuck = [
        line
        for line in either_tracer.lines
        if line["type"] == "verdict"
        and line["netns"] == outcome.netns
        and line["verdict"] == "accept-queue-full"
    ]
    assert {line["client_port"] for line in stuck} >= {who.client_port for who in outcome.stuck}
    assert stuck
    opened_ns = [client.opened_ns for client in outcome.clients]
    batch_ms = (max(opened_ns) - min(opened_ns)) / 1_000_000
    for line in stuck:
        logged = [entry for entry in line["timeline"] if entry["what"] == "kernel's log"]
        # It is written at the listener's first cookie, and the clients connect in one batch.
        # There may be others: the kernel does not say of which namespace the listener is.
        times_ms = [entry["time_ms"] for entry in logged if entry["detail"] == warning]
        assert min(map(abs, times_ms)) < batch_ms + CLOCKS_MS
