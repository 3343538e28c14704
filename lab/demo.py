"""`python3 -m lab demo`: clients of a paused MariaDB get stuck under the tracer, step by step.

It runs where tracing works: on this machine's own kernel, or in a guest.
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
"""The guest is cut off before the five minutes that a reader was promised."""
EXIT_NOT_ALL_NAMED = 1


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the sub-command to the lab's command line."""
    parser = subparsers.add_parser(
        "demo",
        help="a paused MariaDB, 200 clients, and the tracer that names the stuck ones",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--here", action="store_true", help="on this kernel, whatever it allows")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Play the demo; 0 where the tracer named every stuck client."""
    if arguments.here:
        return _play_here()
    refusal = tracing_refusal()
    if refusal is None:
        return _play_here()
    _say(f"This kernel does not let us trace ({refusal}), so a guest is started.")
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
            f"The guest was cut off after {LIMIT_S:.0f} s, before the demo had ended: the machine "
            "is too slow,\nor busy. Run it again with less beside it, or as root where tracing "
            "works: python3 -m lab demo --here"
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
    _say(f"Of the {len(outcome.stuck)} stuck clients the tracer named {named}.")
    return 0 if named == len(outcome.stuck) else EXIT_NOT_ALL_NAMED


def _named(outcome: Outcome, replay: list[str]) -> int:
    """How many of the stuck clients the recording names: the table has one line for all."""
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
            "MariaDB goes on (SIGCONT)."
        )
    tracer.after(stage)


def _clients_view(outcome: Outcome) -> str:
    connected = sum(record.connected_ns is not None for record in outcome.clients)
    first: FourTuple | None = min(outcome.stuck, default=None)
    example = f", such as port {first.client_port}" if first else ""
    return (
        f"The clients' own view: {connected} connected, {len(outcome.healthy)} greeted, "
        f"{len(outcome.stuck)} wait for ever{example}.\n"
        f"MariaDB knows {len(outcome.accepted)} connections (ss at its end)."
    )


def _say(text: str) -> None:
    print(text, flush=True)


def _pass_on(stream: BinaryIO, piece: bytes) -> None:
    stream.write(piece)
    stream.flush()
