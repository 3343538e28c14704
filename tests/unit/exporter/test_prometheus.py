"""The metrics, the alert rules and the dashboard by a real Prometheus and its promtool.

Debian's package `prometheus`, installed or fetched by `python3 -m lab fetch --prometheus`. It is
none of those that lab/setup.sh installs: 19 MB to download and 95 MB on disk are much for a test.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shutil
import socket
import subprocess
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lab.errors import LabError
from lab.golden_files import LINES, kept_file
from lab.guests.packages import cached_prometheus
from lab.patience import COMMAND_S, patient
from tests.exported import golden_snapshot, needs_prometheus_client
from tests.exposed_documents import ALERTS, alert_names, queries
from tests.unit.exporter.test_exposition import text_of

RECORDING = "overflow"
"""Its clients are left stuck."""
STUCK = "TcpstuckClientsStuck"
STEP_S = 0.25

LISTENER = 'netns="web", address="10.9.0.1", port="3311", owner="python"'
QUIET = f"""
      - series: 'tcpstuck_running{{job="j", instance="i"}}'
        values: '1x40'
      - series: 'tcpstuck_last_update_timestamp_seconds{{job="j", instance="i"}}'
        values: '0+60x40'
      - series: 'tcpstuck_coverage_gaps{{job="j", instance="i"}}'
        values: '0x40'
      - series: 'tcpstuck_unwatched_handshakes{{job="j", instance="i"}}'
        values: '5x40'
      - series: 'tcpstuck_flood_suspected_clients{{job="j", instance="i"}}'
        values: '100x40'
      - series: 'tcpstuck_listener_stuck_clients{{job="j", instance="i", {LISTENER},
          verdict="accept-queue-full", cause="accept-queue"}}'
        values: '0x40'
      - series: 'tcpstuck_listener_acks_refused_total{{job="j", instance="i", {LISTENER}}}'
        values: '7x40'
      - series: 'tcpstuck_listener_syns_refused_total{{job="j", instance="i", {LISTENER}}}'
        values: '9x40'
"""
"""A healthy run: one value each minute for 40 minutes."""
ILL = {
    "TcpstuckClientsStuck": ('cause="accept-queue"', "0x40", "0x5 3x35"),
    "TcpstuckAcceptQueueFull": ("_acks_refused_total", "7x40", "7x5 7+6x35"),
    "TcpstuckSynFlood": ("tcpstuck_flood_suspected", "100x40", "100x5 101x35"),
    "TcpstuckBlind": ("tcpstuck_unwatched", "5x40", "5x5 6x35"),
    "TcpstuckNotTracing": ("tcpstuck_running", "1x40", "1x5 0x35"),
}
"""By alert, the series that makes it fire: a word of it, its quiet values, and others."""
AND_ALSO = {
    "TcpstuckAcceptQueueFull": ("_syns_refused_total", "9x40", "9x5 9+1x35"),
    "TcpstuckBlind": ("tcpstuck_coverage_gaps", "0x40", "0x5 1x35"),
    "TcpstuckNotTracing": ("tcpstuck_last_update", "0+60x40", "0+60x5 300x35"),
}


@pytest.fixture(scope="module")
def programs() -> Path:
    """Where prometheus and promtool are."""
    needs_prometheus_client()
    installed = shutil.which("promtool")
    if installed is not None and shutil.which("prometheus") is not None:
        return Path(installed).parent
    try:
        return cached_prometheus()
    except LabError as error:
        pytest.skip(f"{error.what}: {error.remedy}")


def promtool(programs: Path, *words: str, text: str | None = None) -> tuple[int, str]:
    ended = subprocess.run(
        [str(programs / "promtool"), *words],
        input=text,
        capture_output=True,
        text=True,
        timeout=COMMAND_S,
        check=False,
    )
    return ended.returncode, ended.stdout + ended.stderr


@pytest.mark.parametrize("name", ["overflow-rescued", "spoofed", "ack-dropped-by-rule-ipv6"])
def test_promtool_finds_nothing_wrong_with_the_text(
    programs: Path, tmp_path: Path, name: str
) -> None:
    text = text_of(golden_snapshot(name, tmp_path))
    assert promtool(programs, "check", "metrics", text=text) == (0, "")
    # It would find something.
    assert promtool(programs, "check", "metrics", text=text.replace("_total", "_all"))[0] != 0


def test_promtool_takes_the_alert_rules(programs: Path, tmp_path: Path) -> None:
    path = tmp_path / "rules.yml"
    path.write_text(ALERTS)
    status, said = promtool(programs, "check", "rules", str(path))
    assert (status, f"{len(alert_names())} rules found" in said) == (0, True), said


def played(programs: Path, directory: Path, series: str, firing: str | None) -> tuple[int, str]:
    """promtool's own play of the rules over series of ours; only `firing` is to fire."""
    (directory / "rules.yml").write_text(ALERTS)
    # What labels and annotations a firing alert has is not what is asked here.
    asked = "".join(
        f'      - expr: count(ALERTS{{alertname="{name}", alertstate="firing"}}) or vector(0)\n'
        f"        eval_time: 30m\n"
        f"        exp_samples: [{{labels: '{{}}', value: {int(name == firing)}}}]\n"
        for name in alert_names()
    )
    (directory / "test.yml").write_text(
        "rule_files: [rules.yml]\nevaluation_interval: 1m\ntests:\n"
        f"  - interval: 1m\n    input_series:{series}    promql_expr_test:\n{asked}"
    )
    return promtool(programs, "test", "rules", str(directory / "test.yml"))


def made_ill(word: str, quiet: str, ill: str) -> str:
    """The series of a healthy run, but for one."""
    before, _, after = QUIET.partition(word)
    assert after
    return before + word + after.replace(f"values: '{quiet}'", f"values: '{ill}'", 1)


@pytest.mark.parametrize("alert", [None, *alert_names()])
def test_an_alert_fires_when_it_should_and_only_then(
    programs: Path, tmp_path: Path, alert: str | None
) -> None:
    if alert is None:
        status, said = played(programs, tmp_path, QUIET, None)
        assert status == 0, said
        return
    for one in filter(None, (ILL[alert], AND_ALSO.get(alert))):
        status, said = played(programs, tmp_path, made_ill(*one), alert)
        assert status == 0, said


# A real one, which scrapes.


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


class Scraping:
    """Prometheus, asked over its HTTP API."""

    def __init__(self, port: int) -> None:
        self._port = port

    def ask(self, path: str, **words: str) -> dict[str, Any]:
        client = http.client.HTTPConnection("127.0.0.1", self._port, timeout=COMMAND_S)
        with contextlib.closing(client):
            client.request("GET", f"/api/v1/{path}?{urllib.parse.urlencode(words)}")
            found: dict[str, Any] = json.loads(client.getresponse().read())
            return found

    def query(self, expression: str) -> list[Any]:
        answer = self.ask("query", query=expression.replace("$__rate_interval", "1m"))
        assert answer["status"] == "success", (expression, answer)
        found: list[Any] = answer["data"]["result"]
        return found

    def alerts(self) -> list[dict[str, Any]]:
        """Those that fire."""
        with contextlib.suppress(OSError, ValueError, http.client.HTTPException):
            found = self.ask("alerts")["data"]["alerts"]
            return [one for one in found if one["state"] == "firing"]
        return []

    def firing(self, name: str) -> bool:
        return name in {one["labels"]["alertname"] for one in self.alerts()}


CONFIGURATION = """
global:
  scrape_interval: 1s
  evaluation_interval: 1s
rule_files: [rules.yml]
scrape_configs:
  - job_name: tcpstuck
    static_configs:
      - targets: ["{target}"]
"""


@pytest.fixture(scope="module")
def scraping(programs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scraping]:
    """It scrapes a server that tells the end of a recording, and judges it at once."""
    from tcpstuck_bpf.exporter.exposition import Exposition
    from tcpstuck_bpf.exporter.server import Address, MetricsServer

    directory = tmp_path_factory.mktemp("prometheus")
    exposition = Exposition()
    exposition.replace(golden_snapshot(RECORDING, directory))
    server = MetricsServer(Address("127.0.0.1", 0), exposition)
    server.start()
    (directory / "rules.yml").write_text(re.sub(r"for: \d+m", "for: 0s", ALERTS))
    (directory / "prometheus.yml").write_text(CONFIGURATION.format(target=server.address))
    port = free_port()
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(
            [
                str(programs / "prometheus"),
                f"--config.file={directory / 'prometheus.yml'}",
                f"--storage.tsdb.path={directory / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, "GOMAXPROCS": "1"},
        )
    try:
        found = Scraping(port)
        until = time.monotonic() + patient(30)
        while not found.firing(STUCK) and time.monotonic() < until and process.poll() is None:
            time.sleep(STEP_S)
        assert found.firing(STUCK), (directory / "log").read_text()
        yield found
    finally:
        process.terminate()
        process.wait(COMMAND_S)
        server.close()


def kept_summary() -> dict[str, Any]:
    lines = kept_file(RECORDING, LINES).read_text(encoding="utf-8").splitlines()
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def test_prometheus_scrapes_it_and_the_alert_fires(scraping: Scraping) -> None:
    (target,) = scraping.ask("targets", state="active")["data"]["activeTargets"]
    assert (target["health"], target["lastError"]) == ("up", "")
    by_name = {one["labels"]["alertname"]: one for one in scraping.alerts()}
    # The recording has ended: nothing traces.
    assert set(by_name) == {STUCK, "TcpstuckNotTracing"}
    stuck = by_name[STUCK]
    assert float(stuck["value"]) == kept_summary()["stuck"] > 0
    assert stuck["labels"]["verdict"] == "accept-queue-full"
    assert "of python at 10.9.0.1:3311 are stuck" in stuck["annotations"]["summary"]


def test_prometheus_has_the_figures_and_the_meanings(scraping: Scraping) -> None:
    kept = kept_summary()
    for expression, expected in (
        ("sum(tcpstuck_stuck_clients)", kept["stuck"]),
        ("sum(tcpstuck_listener_stuck_clients)", kept["stuck"]),
        ("tcpstuck_cookies_sent_total", kept["cookies_sent"]),
        ("tcpstuck_running", 0),
    ):
        (found,) = scraping.query(expression)
        assert float(found["value"][1]) == expected, expression
    meant = scraping.ask("metadata")["data"]
    # As OpenMetrics has it, which Prometheus asks for: a counter's family lacks the ending.
    assert meant["tcpstuck_verdicts"][0]["type"] == "counter"
    assert meant["tcpstuck_stuck_clients"][0]["help"] == "Clients that are stuck now."


def test_every_query_of_the_dashboard_is_answered(scraping: Scraping) -> None:
    until = time.monotonic() + patient(30)
    # A rate needs two scrapes.
    while not scraping.query("rate(tcpstuck_cookies_sent_total[1m])") and time.monotonic() < until:
        time.sleep(STEP_S)
    silent = {expression for expression, _ in queries() if not scraping.query(expression)}
    # Nothing was lost, nobody was rescued, and every probe attached.
    assert {re.findall(r"tcpstuck_[a-z]+", one)[0] for one in silent} <= {
        "tcpstuck_losses",
        "tcpstuck_rescue",
        "tcpstuck_coverage",
    }
    assert len(silent) < len(list(queries())) / 3
