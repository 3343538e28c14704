"""`python3 -m lab guest`: runs a command in a throw-away guest, or natively if possible."""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lab.guests.run import (
    HARNESS_STATUS,
    TIMEOUT_STATUS,
    GuestError,
    GuestOptions,
    run_in_guest,
    write_through,
)

if TYPE_CHECKING:
    from lab.guests.packages import Subparsers


def _memory_size(text: str) -> str:
    if not re.fullmatch(r"[1-9][0-9]*[MG]", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 512M or 2G")
    return text


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number


def _cpu_count(text: str) -> int:
    if not re.fullmatch(r"[1-9][0-9]?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of CPUs from 1 to 99")
    return int(text)


def _assignment(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value


def options_from(arguments: argparse.Namespace) -> GuestOptions:
    """The guest options from the `guest` command's arguments."""
    return GuestOptions(
        kernel=arguments.kernel.resolve() if arguments.kernel else None,
        root=arguments.root.resolve(),
        cpus=arguments.cpus,
        memory=arguments.memory,
        icount=arguments.icount,
        shares=tuple(share.resolve() for share in arguments.share),
        views=tuple(view.resolve() for view in arguments.view),
        environment=dict(arguments.env),
        timeout_s=arguments.timeout,
        native=arguments.native,
    )


def _guest_command(arguments: argparse.Namespace) -> int:
    command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    if not command:
        raise GuestError("nothing to run", "no command was given", "put a command after --")
    options = options_from(arguments)
    try:
        result = run_in_guest(
            command,
            options=options,
            stdout_sink=write_through(sys.stdout),
            stderr_sink=write_through(sys.stderr),
        )
    except BrokenPipeError:
        # The reader of our output is gone; Python must not flush the rest at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    if result.timed_out:
        print(f"lab: cut off after {options.timeout_s:g} s: {command[0]}", file=sys.stderr)
    if arguments.verbose:
        place = "natively" if result.native else f"in a guest booted in {result.boot_s:.1f} s"
        print(f"lab: ran {place}; {result.total_s:.1f} s in all", file=sys.stderr)
    return result.status


def add_parser(subparsers: Subparsers) -> None:
    """Add the `guest` command."""
    parser = subparsers.add_parser(
        "guest",
        help="run a command on a real Debian kernel in a throw-away guest",
        epilog=f"Exit status: the command's; {TIMEOUT_STATUS} if cut off by --timeout; "
        f"{HARNESS_STATUS} if no guest can run.",
    )
    defaults = GuestOptions()
    parser.add_argument("--kernel", metavar="IMAGE", type=Path, help="default: the cached one")
    parser.add_argument(
        "--root", metavar="TREE", type=Path, default=defaults.root, help="default: this machine's"
    )
    parser.add_argument("--cpus", metavar="N", type=_cpu_count, default=defaults.cpus)
    parser.add_argument("--memory", metavar="SIZE", type=_memory_size, default=defaults.memory)
    parser.add_argument(
        "--icount", action="store_true", help="the guest's clock counts instructions; one CPU"
    )
    parser.add_argument(
        "--share", metavar="DIR", type=Path, action="append", default=[], help="writable"
    )
    parser.add_argument(
        "--view", metavar="DIR", type=Path, action="append", default=[], help="read-only"
    )
    parser.add_argument(
        "--env", metavar="NAME=VALUE", type=_assignment, action="append", default=[]
    )
    parser.add_argument("--timeout", metavar="SECONDS", type=_positive, default=defaults.timeout_s)
    parser.add_argument(
        "--native",
        choices=("auto", "always", "never"),
        default=defaults.native,
        help="use this machine's own kernel; auto: if it can be traced",
    )
    parser.add_argument(
        "--verbose", action="store_true", help="print where the command ran and how long"
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND...")
    parser.set_defaults(run=_guest_command)
