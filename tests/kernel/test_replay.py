"""A recorded run replays to the identical JSON, without root's help and without BCC."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lab.records import FourTuple
from tests.kernel.conftest import Traced

pytestmark = pytest.mark.kernel

ROUNDED_MS = 0.001
WITHOUT_BCC = "import sys; sys.modules['bcc'] = None; from tcpstuck_bpf.cli import main; "


def assert_recovered_when_the_clients_closed(run: Traced) -> None:
    """The told delay is from the SYN to the FIN, by the clients' own records.

    The SYN was sent between the call of connect() and its success; the FIN came between the note
    that a client closes and the return of accept(), which it alone makes possible.
    """
    records = {tuple(record.four_tuple): record for record in run.outcome.clients}
    recovered = [line for line in run.verdicts if line["verdict"] == "recovered"]
    assert len(recovered) == len(records)
    for line in recovered:
        who = (line["client_ip"], line["client_port"], line["server_ip"], line["server_port"])
        opened_ns, connected_ns = records[who].opened_ns, records[who].connected_ns
        closed_ns = records[who].closed_ns
        accepted_ns = run.outcome.accepted[FourTuple(*who)]
        assert connected_ns is not None
        assert closed_ns is not None
        assert accepted_ns is not None
        least_ms, most_ms = (
            (closed_ns - connected_ns) / 1_000_000,
            (accepted_ns - opened_ns) / 1_000_000,
        )
        assert least_ms - ROUNDED_MS <= line["delay_ms"] <= most_ms + ROUNDED_MS
        assert line["updates"] == "ack-filtered"


def test_a_recording_replays_identically(traced: Callable[..., Traced], tmp_path: Path) -> None:
    recording = tmp_path / "run.tcpstuck"
    live = traced("late-fin", "--record", str(recording), clients=10)
    assert_recovered_when_the_clients_closed(live)
    live.assert_reconciled()
    call = f"sys.exit(main(['--replay', {str(recording)!r}, '--json']))"
    again = subprocess.run(
        [sys.executable, "-c", WITHOUT_BCC + call],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert again.stderr == ""
    assert [json.loads(line) for line in again.stdout.splitlines()] == [
        *live.verdicts,
        *live.listeners,
        live.summary,
    ]
    assert again.returncode == live.exit_status
