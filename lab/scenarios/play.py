"""`python3 -m lab play`: plays one scenario, with a tracer if one is given."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tabulate import tabulate

from lab.arguments import port, positive
from lab.errors import LabError
from lab.records import Comparison, FourTuple, Outcome, compare, endpoint, reported_verdicts
from lab.scenarios.catalogue import SCENARIOS, play
from lab.scenarios.scene import FAMILIES, PORT
from lab.scenarios.tracer import Tracer

COUNTERS_SHOWN = ("SyncookiesSent", "SyncookiesRecv", "SyncookiesFailed", "ListenOverflows")
NAMED_AT_MOST = 10
EXIT_DIFFERS = 1


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the sub-command to the lab's command line."""
    names = "\n".join(
        f"  {name:15} {scenario.summary}{' (takes minutes)' if scenario.slow else ''}"
        for name, scenario in SCENARIOS.items()
    )
    parser = subparsers.add_parser(
        "play",
        help="play a scenario and print the outcome",
        description=f"Play a scenario in two network namespaces (needs root).\n\n{names}",
        epilog="The words after --tracer are the command of a tracer to run during the scenario. "
        "In it, {ready}\nbecomes the path of a file that the tracer creates once it traces. With "
        "--json in the command,\nthe tracer's verdicts are compared with the clients' own view.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("scenario", choices=sorted(SCENARIOS))
    parser.add_argument("--clients", type=positive, help="number of clients or SYNs")
    parser.add_argument("--family", choices=FAMILIES, default="4")
    parser.add_argument("--port", type=port, default=PORT, help="the server's TCP port")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the outcome to FILE")
    parser.add_argument(
        "--tracer", nargs=argparse.REMAINDER, metavar="WORD", help="a tracer's command; comes last"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Play the scenario; returns 1 if the tracer and the oracle differ."""
    with contextlib.ExitStack() as stack:
        tracer = stack.enter_context(Tracer(arguments.tracer)) if arguments.tracer else None
        hook = {} if tracer is None else {"after": tracer.after}
        outcome = play(
            arguments.scenario,
            clients=arguments.clients,
            family=arguments.family,
            port=arguments.port,
            **hook,
        )
    compared = tracer is not None and "--json" in arguments.tracer
    lines = tracer.lines if tracer is not None and compared else []
    comparison = compare(outcome, lines) if compared else None
    print(outcome_text(outcome))
    if comparison is not None:
        reported = Counter(reported_verdicts(lines, outcome.netns).values())
        print(comparison_text(comparison, dict(reported)))
    if arguments.json is not None:
        _write(arguments.json, outcome, comparison)
    return EXIT_DIFFERS if comparison is not None and not comparison.agrees else 0


def outcome_text(outcome: Outcome) -> str:
    """The outcome as text, from the clients and the kernel's counters."""
    verdicts = Counter(outcome.expected.values())
    rows: list[tuple[str, int]] = [
        ("clients", len(outcome.clients)),
        ("connected", sum(record.connected_ns is not None for record in outcome.clients)),
        ("greeted", sum(record.greeted_ns is not None for record in outcome.clients)),
        ("failed", sum(record.error is not None for record in outcome.clients)),
        ("accepted by the server", len(outcome.accepted)),
        *((f"truly {verdict}", count) for verdict, count in sorted(verdicts.items())),
        *((f"kernel: {name}", outcome.moved(name)) for name in COUNTERS_SHOWN),
    ]
    title = f"{outcome.scenario}, family {outcome.family}, server's netns {outcome.netns}"
    return f"{title}\n{tabulate(rows, tablefmt='plain')}"


def comparison_text(comparison: Comparison, reported: dict[str, int]) -> str:
    """The tracer's verdicts, and each connection where the oracle differs."""
    said = ", ".join(f"{count} {verdict}" for verdict, count in sorted(reported.items()))
    lines = [
        f"tracer: {said or 'nothing'}",
        f"stuck: {comparison.stuck_expected} according to the clients, "
        f"{comparison.stuck_reported} according to the tracer",
    ]
    lines += _named("missing", comparison.missing)
    lines += _named("extra", comparison.extra)
    different = {
        key: f"{truth}, reported as {report}"
        for key, (truth, report) in comparison.different.items()
    }
    lines += _named("different", different)
    lines.append("tracer and oracle agree" if comparison.agrees else "tracer and oracle DIFFER")
    return "\n".join(lines)


def _named(what: str, connections: Mapping[FourTuple, str]) -> list[str]:
    lines = [
        f"  {what}: {endpoint(key.client_ip, key.client_port)} {verdict}"
        for key, verdict in sorted(connections.items())[:NAMED_AT_MOST]
    ]
    if len(connections) > NAMED_AT_MOST:
        lines.append(f"  {what}: {len(connections) - NAMED_AT_MOST} more")
    return lines


def outcome_json(outcome: Outcome, comparison: Comparison | None) -> dict[str, Any]:
    """The outcome as JSON values; 4-tuples become lists, greetings become hexadecimal text."""
    clients = []
    for record in outcome.clients:
        client = dataclasses.asdict(record)
        client["greeting"] = record.greeting.hex()
        client["four_tuple"] = list(record.four_tuple)
        clients.append(client)
    return {
        "scenario": outcome.scenario,
        "family": outcome.family,
        "netns": outcome.netns,
        "clients": clients,
        "wire": [[*key, dataclasses.asdict(record)] for key, record in outcome.wire.items()],
        "expected": [[*key, verdict] for key, verdict in outcome.expected.items()],
        "accepted": sorted(outcome.accepted),
        "counters_before": dict(outcome.counters_before),
        "counters_after": dict(outcome.counters_after),
        "agrees": None if comparison is None else comparison.agrees,
    }


def _write(path: Path, outcome: Outcome, comparison: Comparison | None) -> None:
    try:
        path.write_text(json.dumps(outcome_json(outcome, comparison)) + "\n")
    except OSError as error:
        raise LabError(f"cannot write {path}", str(error), "name another file") from error
