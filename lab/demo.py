"""`python3 -m lab demo`: clients of a paused MariaDB get stuck, and the tracer lists them.

The demo runs on this machine's own kernel if that can be traced, otherwise in a guest.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from typing import BinaryIO

from lab.guests.machine import GuestOptions
from lab.guests.run import run_in_guest
from lab.guests.trial import tracing_refusal
from lab.patience import COMMAND_S, patient
from lab.records import FourTuple, Outcome, reported_verdicts
from lab.scenarios.catalogue import SCENARIOS, play
from lab.scenarios.scene import PORT, READY, Stage
from lab.scenarios.tracer import READY_PLACEHOLDER, Tracer

SCENARIO = "mariadb-stall"
LIMIT_S = 280.0
"""Time limit of the guest, within the five minutes that the documentation promises."""
EXIT_NOT_ALL_NAMED = 1


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the sub-command to the lab's command line."""
    parser = subparsers.add_parser(
        "demo",
        help="pause a MariaDB, connect 200 clients, and list the stuck ones with the tracer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--here", action="store_true", help="run on this kernel without a check")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Play the demo; returns 0 if the tracer listed every stuck client."""
    if arguments.here:
        return _play_here()
    refusal = tracing_refusal()
    if refusal is None:
        return _play_here()
    _say(f"This kernel cannot be traced ({refusal}); starting a guest.")
    result = run_in_guest(
        [sys.executable, "-m", "lab", "demo", "--here"],
        options=GuestOptions(
            timeout_s=LIMIT_S,
            native="never",
            environment={"COLUMNS": str(shutil.get_terminal_size((80, 24)).columns)},
        ),
        stdout_sink=partial(_pass_on, sys.stdout.buffer),
        stderr_sink=partial(_pass_on, sys.stderr.buffer),
    )
    if result.timed_out:
        _say(
            f"The guest was cut off after {LIMIT_S:.0f} s, before the demo ended: the machine is "
            "slow or busy.\nRun the demo again on an idle machine, or as root on a kernel that can "
            "be traced:\npython3 -m lab demo --here"
        )
    return result.status


def _play_here() -> int:
    command = [sys.executable, "-m", "tcpstuck_bpf.cli"]
    _say(f"$ tcpstuck-trace -p {PORT}")
    with tempfile.TemporaryDirectory(prefix="tcpstuck-demo-") as directory:
        recording = f"{directory}/recording"
        words = [*command, "-p", str(PORT), "--record", recording]
        with Tracer([*words, "--ready-file", READY_PLACEHOLDER]) as tracer:
            outcome = play(SCENARIO, after=partial(_tell, tracer))
        named = _named(outcome, [*command, "--replay", recording, "--json"])
    _say(_clients_view(outcome))
    _say(f"Of {len(outcome.stuck)} stuck clients, the tracer listed {named}.")
    return 0 if named == len(outcome.stuck) else EXIT_NOT_ALL_NAMED


def _named(outcome: Outcome, replay: list[str]) -> int:
    """The number of stuck clients in the recording; the table shows them in one group line."""
    lines = subprocess.run(
        replay, capture_output=True, text=True, timeout=patient(COMMAND_S)
    ).stdout
    reported = reported_verdicts(map(json.loads, lines.splitlines()), outcome.netns)
    return len(outcome.stuck & reported.keys())


def _tell(tracer: Tracer, stage: Stage) -> None:
    if stage.name == READY:
        _say(
            f"MariaDB listens on port {PORT} with a backlog of 50 and is paused (SIGSTOP). When "
            f"the tracer is ready,\n{SCENARIOS[SCENARIO].clients} clients connect at once; then "
            "MariaDB resumes (SIGCONT)."
        )
    tracer.after(stage)


def _clients_view(outcome: Outcome) -> str:
    connected = sum(record.connected_ns is not None for record in outcome.clients)
    first: FourTuple | None = min(outcome.stuck, default=None)
    example = f", such as port {first.client_port}" if first else ""
    return (
        f"The clients' own view: {connected} connected, {len(outcome.healthy)} greeted, "
        f"{len(outcome.stuck)} wait forever{example}.\n"
        f"MariaDB has {len(outcome.accepted)} connections (ss on the server)."
    )


def _say(text: str) -> None:
    print(text, flush=True)


def _pass_on(stream: BinaryIO, piece: bytes) -> None:
    stream.write(piece)
    stream.flush()
