"""The kernel's warning of a full SYN queue, as dmesg has it, in the timelines it concerns."""

from __future__ import annotations

import re
import subprocess
import time
from pathlib import Path

import pytest

from lab.patience import COMMAND_S, patient
from lab.scenarios.catalogue import play
from lab.scenarios.scene import PORT, READY, Stage
from lab.scenarios.tracer import Tracer

pytestmark = pytest.mark.kernel

WARNING = "Possible SYN flooding on port "
MARK = "tcpstuck-trace tests: a look at the clock"
ROUNDED_NS = 1_000_000
DRIFTED_MEANWHILE_NS = 100_000_000
"""Largest change of the clocks' difference during a test."""


def logged(text: str) -> list[tuple[int, str]]:
    """Lines of the kernel's log from this text on, each with its time (local_clock, ns)."""
    shown = subprocess.run(
        ["dmesg"], check=True, capture_output=True, text=True, timeout=patient(COMMAND_S)
    ).stdout
    found = re.findall(rf"^\[ *(\d+)\.(\d{{6}})\].*?({re.escape(text)}.*)$", shown, re.MULTILINE)
    return [(int(seconds + micros) * 1000, line.strip()) for seconds, micros, line in found]


def drift_ns() -> int:
    """How far local_clock, which stamps the log, is from CLOCK_MONOTONIC at most."""
    before_ns = time.monotonic_ns()
    Path("/dev/kmsg").write_text(f"{MARK}\n")
    after_ns = time.monotonic_ns()
    (*_, (stamp_ns, _)) = logged(MARK)
    return max(abs(stamp_ns - before_ns), abs(stamp_ns - after_ns))


@pytest.mark.parametrize("family", ["4", "6"])
def test_it_stands_in_the_timeline_of_each_stuck_client(either_tracer: Tracer, family: str) -> None:
    before = logged(WARNING)
    drifts_ns = [drift_ns()]

    def hook(stage: Stage) -> None:
        if stage.name != READY:
            either_tracer.await_reported(stage.expected, stage.netns)

    outcome = play("overflow", clients=100, family=family, after=hook)
    ((stamp_ns, warning),) = logged(WARNING)[len(before) :]
    drifts_ns.append(drift_ns())
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
    # A drifted stamp is told as a time between the stamp and the truth.
    within_ns = max(drifts_ns) + DRIFTED_MEANWHILE_NS + ROUNDED_NS
    clients = {client.four_tuple.client_port: client for client in outcome.clients}
    for line in stuck:
        client = clients[line["client_port"]]
        assert client.connected_ns is not None
        # The first SYN, to which times are relative, was sent while the client connected. There may
        # be other warnings: the kernel does not say of which namespace the listener is.
        assert any(
            client.opened_ns - within_ns
            <= stamp_ns - entry["time_ms"] * 1_000_000
            <= client.connected_ns + within_ns
            for entry in line["timeline"]
            if (entry["what"], entry["detail"]) == ("kernel's log", warning)
        )
