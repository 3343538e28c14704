"""`python3 -m lab pair`: tests --rescue between two kernels, in two guests joined by a wire.

The client's kernel decides how it answers a retransmitted SYN-ACK, and the server's kernel decides
whether to accept that answer. On one machine both are the same kernel. Here the server and the tool
run on one kernel, the clients on another. `lab.guests.pair_end` runs in the guests. The clients'
own view decides the result.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import socket
from collections.abc import Sequence
from concurrent.futures import wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from tabulate import tabulate

from lab.errors import LabError
from lab.guests import trees
from lab.guests.kernel_tests import REPOSITORY
from lab.guests.packages import cache_directory
from lab.guests.pair_end import CLIENT, FAMILIES, HARDWARE, OPTION_SETS, SERVER
from lab.guests.run import GuestOptions, Sink, Wire, guests_beside, run_and_tell
from lab.guests.trees import ROWS, Row
from lab.patience import COMMAND_S, patient

if TYPE_CHECKING:
    from lab.guests.packages import Subparsers

PAIR_LIMIT_S = 1800.0
"""For both guests of a pair; generous, so that a slow machine does not fail."""
HEADERS = (
    *("server", "kernel", "client", "kernel", "family", "options", "in the SYN-ACK"),
    *("stuck", "rescued/greeted"),
)
UNKNOWN = "?"


class Pair(NamedTuple):
    """The rows that provide the server's and the client's kernel."""

    server: Row
    client: Row


@dataclass
class PairResult:
    """The result that the clients' guest reported."""

    pair: Pair
    tries: list[dict[str, Any]] = field(default_factory=list)
    closing: dict[str, Any] = field(default_factory=dict)
    """The kernel releases, and the final state of the clients that the tool did not trace."""
    trouble: str | None = None

    def take_in(self, said: bytes) -> None:
        """Parse the clients' JSON lines; an incomplete last line is ignored."""
        whole, _, _ = said.rpartition(b"\n")
        for line in map(json.loads, whole.splitlines()):
            if "family" in line:
                self.tries.append(line)
            else:
                self.closing = line

    @property
    def good(self) -> bool:
        """Whether all tries ran, all stuck clients were rescued, and no untraced client was."""
        untraced = self.closing.get("untraced", 0)
        controlled = untraced and untraced == self.closing["waiting"]
        complete = len(self.tries) == len(FAMILIES) * len(OPTION_SETS)
        return bool(controlled and complete) and all(map(is_good, self.tries))


def is_good(one: dict[str, Any]) -> bool:
    """Whether every client of a try was stuck, was rescued and greeted, and got its bytes back."""
    counts = (one["stuck"], one["greeted"], one["equal"], one["rescued"])
    return one["clients"] > 0 and all(count == one["clients"] for count in counts)


def ring(rows: Sequence[Row]) -> list[Pair]:
    """Each row once as server and once as client, paired with the most distant row."""
    half = len(rows) // 2
    return [Pair(row, rows[(at + half) % len(rows)]) for at, row in enumerate(rows)]


def table(results: Sequence[PairResult]) -> str:
    """A table with a line for each try."""
    lines = [
        (
            result.pair.server.suite,
            result.closing.get("server", UNKNOWN),
            result.pair.client.suite,
            result.closing.get("client", UNKNOWN),
            one["family"],
            one["options"],
            one["negotiated"],
            f"{one['stuck']} of {one['clients']}",
            f"{one['rescued']}/{one['greeted']}",
        )
        for result in results
        for one in result.tries
    ]
    return tabulate(lines, HEADERS, disable_numparse=True)


def complaints(results: Sequence[PairResult]) -> list[str]:
    """A line for each problem."""
    lines = []
    for result in results:
        where = f"{result.pair.server.suite} with {result.pair.client.suite}"
        lines += [f"{where}: {result.trouble}"] if result.trouble else []
        lines += [f"{where}: {one}" for one in result.tries if not is_good(one)]
        if not result.good and not result.trouble and all(map(is_good, result.tries)):
            lines.append(f"{where}: {len(result.tries)} tries, {result.closing or 'no end'}")
    return lines


# One run asks apt only once for the newest packages.
_place_of = functools.lru_cache(trees.prepare)


def options_for(row: Row, part: str, descriptor: int) -> GuestOptions:
    """The options of the guest for a part, with its end of the wire. Raises CacheError."""
    place = _place_of(row)
    return GuestOptions(
        kernel=place.kernel,
        root=place.root,
        cpus=1,
        memory="1500M",
        views=(REPOSITORY, place.kernel.parent),
        wire=Wire(descriptor, HARDWARE[part]),
        environment={"PYTHONPATH": str(REPOSITORY)},
        timeout_s=patient(PAIR_LIMIT_S),
    )


def command_for(part: str) -> list[str]:
    """The command of a part's guest, with the distribution's Python."""
    return ["/usr/bin/python3", "-m", "lab.guests.pair_end", part]


def run_pair(pair: Pair, log: IO[bytes]) -> PairResult:
    """Boot both guests and collect the clients' report; a LabError becomes part of the result."""
    result = PairResult(pair)
    said = bytearray()

    def hear(piece: bytes) -> None:
        said.extend(piece)
        log.write(piece)

    def play(part: str, options: GuestOptions, says: Sink) -> int:
        return run_and_tell(command_for(part), options, says, log.write, REPOSITORY)

    with contextlib.ExitStack() as stack:
        ends = [stack.enter_context(end) for end in socket.socketpair()]
        pool = stack.enter_context(guests_beside(1))
        try:
            # Prepare both guests' files before one guest waits for the other.
            ours = options_for(pair.server, SERVER, ends[0].fileno())
            theirs = options_for(pair.client, CLIENT, ends[1].fileno())
        except LabError as error:
            result.trouble = str(error)
            return result
        server = pool.submit(play, SERVER, ours, log.write)
        status = play(CLIENT, theirs, hear)
        wait([server], patient(COMMAND_S) if status == 0 else 0)
        served = server.result() if server.done() else "not ended"
    if (status, served) != (0, 0):
        result.trouble = f"client's guest: status {status}; server's guest: {served}"
    result.take_in(bytes(said))
    return result


def _pair_command(arguments: argparse.Namespace) -> int:
    named = [bool(arguments.server), bool(arguments.client)]
    if any(named) if arguments.all else not all(named):
        raise LabError("no pairs selected", "name rows for both parts, or use --all", "see --help")
    chosen = [Pair(server, client) for server in arguments.server for client in arguments.client]
    results = []
    for pair in ring(ROWS) if arguments.all else chosen:
        path = cache_directory() / "pair" / f"{pair.server.suite}_{pair.client.suite}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb", buffering=0) as log:
            results.append(run_pair(pair, log))
        state = "good" if results[-1].good else f"BAD, see {path}"
        print(f"{pair.server.suite} with {pair.client.suite}: {state}", flush=True)
    print(table(results), *complaints(results), sep="\n", flush=True)
    if arguments.json is not None:
        told = [[*(row.suite for row in one.pair), one.tries, one.closing] for one in results]
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(told, indent=2) + "\n")
    return 0 if all(result.good for result in results) else 1


def add_parser(subparsers: Subparsers) -> None:
    """Add the `pair` command."""
    parser = subparsers.add_parser("pair", help="test --rescue between two kernels")
    suites = ", ".join(row.suite for row in ROWS)
    for part in (SERVER, CLIENT):
        parser.add_argument(
            f"--{part}",
            metavar="ROW",
            nargs="+",
            default=[],
            type=trees.row_named,
            help=f"one of {suites}",
        )
    parser.add_argument("--all", action="store_true", help="use each row in both parts")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the figures to FILE")
    parser.set_defaults(run=_pair_command)
