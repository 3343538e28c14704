"""`python3 -m lab`: the lab's command line."""

from __future__ import annotations

import argparse
import sys

from lab import checks, demo, golden, hang
from lab.deb import build as deb
from lab.exercises import play as exercises
from lab.guests import guest_command, matrix, packages, pair, trees
from lab.pages import build as pages
from lab.scenarios import play
from tcpstuck_bpf.errors import EXIT_INTERRUPTED, TcpstuckError


def main() -> int:
    """Run one sub-command and return its exit status."""
    parser = argparse.ArgumentParser(prog="python3 -m lab", description=__doc__)
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in (
        play,
        demo,
        hang,
        exercises,
        guest_command,
        packages,
        checks,
        trees,
        matrix,
        pair,
        golden,
        pages,
        deb,
    ):
        module.add_parser(subparsers)
    arguments = parser.parse_args()
    try:
        return int(arguments.run(arguments))
    except TcpstuckError as error:
        print(*error.lines(), sep="\n", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
