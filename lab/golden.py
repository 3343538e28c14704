"""`python3 -m lab golden`: record every scenario once, on a real kernel, for tests/golden.

All scenarios run in one guest; a separate tool process records each. A recording is kept only if
the tool's verdicts match the oracle. Review the diff before you commit it.
"""

from __future__ import annotations

import argparse
import functools
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lab.errors import LabError
from lab.golden_files import (
    TRUTH,
    checked_replay,
    expect_again,
    keep,
    kept_file,
    kept_truth,
    truth_text,
)
from lab.guests.kernel_tests import REPOSITORY
from lab.guests.run import GuestDiedError, GuestOptions, run_in_guest, write_through
from lab.network.faults import ack_rule, dropping
from lab.patience import patient
from lab.records import Outcome, compare, reported_verdicts
from lab.scenarios.catalogue import (
    LARGE_BACKLOG,
    SCENARIOS,
    SMALL_BACKLOG,
    Scenario,
    connect_in_one_batch,
    connect_in_vain,
)
from lab.scenarios.play import comparison_text
from lab.scenarios.scene import PORT, Scene, Settings
from lab.scenarios.tracer import READY_PLACEHOLDER, Tracer

if TYPE_CHECKING:
    from lab.guests.packages import Subparsers

FEW = 4
OVERFLOWING = SMALL_BACKLOG + 10
"""More than both queues hold: the last clients get cookies and their ACKs find the accept queue
full."""
LIMIT_S = 600.0
"""For one recording in an emulated guest, even the one that waits two minutes for its cookie to
expire."""
TOOL = (sys.executable, "-m", "tcpstuck_bpf", "-p", str(PORT), "--json")
NOBODY_IS_NAMED = "healthy"
EXIT_REFUSED = 1
DIFFERENCE = (
    "git diff --word-diff --word-diff-regex='[[:alpha:]]*[g-wyzG-WYZ][[:alpha:]]*' tests/golden"
)
"""Compares only words that contain a letter outside a-f, because numbers change with every
recording."""


class Recording(NamedTuple):
    """How to make one recording."""

    scenario: str
    clients: int = FEW
    family: str = "4"
    mode: str = "fentry"
    options: tuple[str, ...] = ()
    """Additional tool options."""


def overflow_rescued(settings: Settings) -> Outcome:
    """As `overflow`, but clients get stuck while the server sleeps, and the tracer rescues them.

    The scenario ends only when every client is greeted, so it needs a tracer with --rescue.
    """
    with Scene("overflow-rescued", settings, syncookies=1) as scene:
        server = scene.greeter(SMALL_BACKLOG)
        scene.ready()
        connect_in_one_batch(scene)
        stuck = scene.forgotten()
        scene.stuck(dict.fromkeys(stuck, "accept-queue-full"))
        server.resume()
        scene.clients.await_counts(greeted=settings.clients)
        return scene.done(dict.fromkeys(stuck, "rescued"), accepted=scene.accepted_by(server))


def ack_dropped_by_rule(settings: Settings) -> Outcome:
    """As `ack-dropped`, but the rule is still loaded when the tracer looks for it."""
    with Scene("ack-dropped-by-rule", settings, syncookies=2) as scene:
        server = scene.greeter(LARGE_BACKLOG)
        server.resume()
        scene.ready()
        with dropping(scene.topology.server, ack_rule(settings.port), scene.ip_version):
            connect_in_vain(scene)
            expected = dict.fromkeys(scene.verified_stuck(), "ack-filtered")
            return scene.done(expected, accepted=scene.accepted_by(server))


PLAYED: Mapping[str, Scenario] = {
    **SCENARIOS,
    "overflow-rescued": Scenario(overflow_rescued, OVERFLOWING),
    "ack-dropped-by-rule": Scenario(ack_dropped_by_rule, FEW),
}
RECORDINGS: Mapping[str, Recording] = {
    **{name: Recording(name) for name in SCENARIOS},
    "mariadb-stall": Recording("mariadb-stall", OVERFLOWING),
    "overflow": Recording("overflow", OVERFLOWING),
    "overflow-ipv6": Recording("overflow", OVERFLOWING, "6"),
    "overflow-rescued": Recording("overflow-rescued", OVERFLOWING, options=("--rescue",)),
    "ack-dropped-by-rule": Recording("ack-dropped-by-rule"),
    "ack-dropped-by-rule-ipv6": Recording("ack-dropped-by-rule", family="6"),
    "ack-dropped-kprobe": Recording("ack-dropped", mode="kprobe"),
    "ack-lost-ipv6": Recording("ack-lost", family="6"),
}


def add_parser(subparsers: Subparsers) -> None:
    """Add the sub-command to the lab's command line."""
    parser = subparsers.add_parser(
        "golden",
        help="record the scenarios for tests/golden",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", metavar="NAME", nargs="*", help="a recording; default: all")
    parser.add_argument(
        "--expect",
        action="store_true",
        help="do not record; replay the kept recordings and rewrite their expected output",
    )
    parser.add_argument("--here", type=Path, metavar="DIR", help=argparse.SUPPRESS)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Record, or only rewrite expected output; returns 1 if a recording was rejected."""
    names: list[str] = arguments.names or list(RECORDINGS)
    unknown = sorted(set(names) - RECORDINGS.keys())
    if unknown:
        known = ", ".join(RECORDINGS)
        raise LabError(f"no recording {', '.join(unknown)}", "no such name", f"one of {known}")
    if arguments.here is not None:
        left = _refused(functools.partial(_record, arguments.here), names)
    elif arguments.expect:
        left = _refused(expect_again, names)
    else:
        left = _left_by_guest(names)
        if left:
            print(f"lab: not recorded; retry: python3 -m lab golden {' '.join(left)}")
    if arguments.here is None:
        print(f"changed words: {DIFFERENCE}")
    return EXIT_REFUSED if left else 0


def _refused(do: Callable[[str], None], names: Sequence[str]) -> list[str]:
    """Call `do` for each name even if others fail; prints and returns the rejected names."""
    refused = []
    for name in names:
        try:
            do(name)
        except LabError as error:
            refused.append(name)
            print(*error.lines(), sep="\n", flush=True)
    return refused


def _left_by_guest(names: Sequence[str]) -> list[str]:
    """Record in a guest and keep its recordings, even if it dies; returns the missing names."""
    with tempfile.TemporaryDirectory(prefix="tcpstuck-golden-") as scratch:
        share = Path(scratch)
        options = GuestOptions(
            shares=(share,),
            timeout_s=patient(LIMIT_S) * (1 + len(names)),
            native="never",
        )
        try:
            result = run_in_guest(
                [sys.executable, "-m", "lab", "golden", "--here", scratch, *names],
                options=options,
                stdout_sink=write_through(sys.stdout),
                stderr_sink=write_through(sys.stderr),
                cwd=REPOSITORY,
            )
            if result.timed_out:
                print(f"lab: the guest was cut off after {options.timeout_s:g} s")
        except GuestDiedError as error:
            print(*error.lines(), sep="\n")
        recorded = [name for name in names if (share / name).exists()]
        refused = _refused(functools.partial(_keep_from, share), recorded)
        return [name for name in names if name not in recorded or name in refused]


def _keep_from(share: Path, name: str) -> None:
    keep(name, (share / name).read_bytes(), kept_truth(name, share))


def _record(share: Path, name: str) -> None:
    """Play a scenario while the tool records; store the recording in `share` unless rejected.

    Raises LabError if the scenario cannot be played or the tool was wrong.
    """
    wanted = RECORDINGS[name]
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="tcpstuck-golden-") as scratch:
        path = Path(scratch) / name
        words = [*TOOL, "--probe-mode", wanted.mode, *wanted.options, "--record", str(path)]
        with Tracer([*words, "--ready-file", READY_PLACEHOLDER]) as tracer:
            settings = Settings(wanted.clients, wanted.family, PORT, tracer.after)
            outcome = PLAYED[wanted.scenario].play(settings)
        against = objections(outcome, tracer.lines)
        if against:
            raise LabError(
                f"the recording {name} is rejected",
                "; ".join(against),
                "record it again, or fix the tool",
            )
        recording = path.read_bytes()
    if checked_replay(name, recording, outcome).decoded() != tracer.lines:
        raise LabError(f"the recording {name} is rejected", "its replay differs", "fix the tool")
    kept_file(name, TRUTH, share).write_text(truth_text(outcome), encoding="ascii")
    (share / name).write_bytes(recording)
    told = Counter(outcome.expected.values()) or {"healthy": len(outcome.healthy)}
    said = ", ".join(f"{number} {verdict}" for verdict, number in sorted(told.items()))
    print(f"{name}: {said}; recorded in {time.monotonic() - began:.0f} s", flush=True)


def objections(outcome: Outcome, lines: Iterable[Mapping[str, Any]]) -> list[str]:
    """Reasons why a recorded run must not become golden; empty if it may."""
    lines = list(lines)
    summary = next((line for line in lines if line["type"] == "summary"), None)
    if summary is None:
        return ["the tool has printed no summary"]
    against = []
    if not outcome.expected and outcome.scenario != NOBODY_IS_NAMED:
        against.append("nothing happened: the oracle expects no verdict")
    comparison = compare(outcome, lines)
    if not comparison.agrees:
        reported = Counter(reported_verdicts(lines, outcome.netns).values())
        against += map(str.strip, comparison_text(comparison, dict(reported)).splitlines())
    against += [
        f"{name}: {summary[name]}" for name in ("lost_events", "untracked") if summary[name]
    ]
    against += [
        f"{row['counter']}: {row['traced']} traced, {row['kernel']} by the kernel"
        for row in summary["reconciliation"]
        if row["netns"] == outcome.netns and not row["agrees"]
    ]
    return against
