"""The metrics of a run on a real kernel, asked for over HTTP while clients are stuck."""

from __future__ import annotations

import re
import socket
import time
from pathlib import Path
from urllib.request import urlopen

import pytest

from lab.patience import COMMAND_S, Deadline, patient
from lab.processes.preloaded import start_tool
from lab.scenarios.catalogue import play
from lab.scenarios.scene import DONE, Stage
from lab.scenarios.tracer import READY_PLACEHOLDER, Tracer
from tests.kernel.conftest import TOOL

pytestmark = pytest.mark.kernel

CLIENTS = 70
POLL_S = 0.2


def _sample(text: str, name: str, **labels: str) -> float | None:
    """The value of the first sample with these labels."""
    for line in text.splitlines():
        found = re.fullmatch(rf"{name}(\{{.*\}})? (\S+)", line)
        if found and all(f'{key}="{value}"' in (found[1] or "") for key, value in labels.items()):
            return float(found[2])
    return None


def _fetched(port: int, stuck: int) -> str:
    """The metrics once they have so many stuck clients. They change about once a second."""
    deadline = Deadline(COMMAND_S)
    while True:
        with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=patient(COMMAND_S)) as answer:
            text: str = answer.read().decode()
        if _sample(text, "tcpstuck_stuck_clients") == stuck:
            return text
        assert not deadline.passed(), text
        time.sleep(POLL_S)


def test_who_scrapes_a_run_gets_what_the_clients_know(tmp_path: Path) -> None:
    """The number of clients that wait, by themselves; and the file of the end says the same."""
    pytest.importorskip("prometheus_client", reason="python3-prometheus-client is not installed")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    file = tmp_path / "tcpstuck.prom"
    metrics = ("--metrics", f"127.0.0.1:{port}", "--metrics-file", str(file))
    fetched = []
    with Tracer([*TOOL, *metrics, "--ready-file", READY_PLACEHOLDER], start_tool) as tracer:

        def after(stage: Stage) -> None:
            if stage.name == DONE:
                tracer.await_reported(stage.expected, stage.netns)
                fetched.append(_fetched(port, len(stage.expected)))
            tracer.after(stage)

        outcome = play("overflow", clients=CLIENTS, after=after)
    stuck = len(outcome.stuck)
    assert stuck > 0
    (text,) = fetched
    assert _sample(text, "tcpstuck_running") == 1
    assert _sample(text, "tcpstuck_cookies_sent_total") == outcome.moved("SyncookiesSent")
    verdict = {"verdict": "accept-queue-full", "port": "3311"}
    assert _sample(text, "tcpstuck_verdicts_total", **verdict) == stuck
    at_the_end = file.read_text()
    assert _sample(at_the_end, "tcpstuck_stuck_clients") == stuck
    assert _sample(at_the_end, "tcpstuck_running") == 0
