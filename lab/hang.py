"""`lab/hang`: opens connections at once, and waits on each for the server to speak first.

Clients of MySQL, SMTP, POP3 and IMAP do the same. Prints a line when the numbers change. Ctrl-C
closes the connections, and lists the clients that still wait.

Exit status: 0 if every client was greeted, 1 if not, 2 for wrong usage, 3 for a failure of the lab.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

from lab.arguments import port, positive, seconds
from lab.errors import LabError
from lab.processes.clients import Clients
from lab.records import ClientRecord, FourTuple, endpoint

PORT = 3311
"""The port of the article's MySQL server, and of the lab's."""
CLIENTS = 200
LOOK_S = 0.25
"""How often the clients are counted."""
LISTED = 10
EXIT_NOT_GREETED = 1


class _Here:
    """Starts the clients in our own namespace. Ctrl-C at the terminal reaches only this process."""

    forks_into = None

    def popen(self, words: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
        return subprocess.Popen(words, start_new_session=True, **options)


def counted(clients: Sequence[ClientRecord]) -> str:
    """The clients in numbers: connected, greeted, waiting, and how the others ended."""
    connected = sum(one.connected_ns is not None for one in clients)
    greeted = sum(one.greeted_ns is not None for one in clients)
    waiting = sum(one.waiting for one in clients)
    parts = [f"{connected} connected", f"{greeted} greeted", f"{waiting} wait for a greeting"]
    closed = sum(one.closed_by == "server" for one in clients)
    parts += [f"{closed} closed by the server"] if closed else []
    failed = Counter(one.error for one in clients if one.error is not None)
    parts += [f"{count} failed ({error})" for error, count in sorted(failed.items())]
    return ", ".join(parts)


def listed(clients: Sequence[ClientRecord], now_ns: int, most: int | None = LISTED) -> list[str]:
    """The clients that wait, one line each and at most `most`, with the time that each waits."""
    waiting = [one for one in clients if one.waiting]
    lines = [
        f"  {_direction(one.four_tuple)} for {(now_ns - (one.connected_ns or now_ns)) / 1e9:.1f} s"
        for one in waiting[:most]
    ]
    rest = len(waiting) - len(lines)
    return [*lines, *([f"  and {rest} more; --list shows all"] if rest else [])]


def _direction(who: FourTuple) -> str:
    client, server = who[:2], who[2:]
    return f"{endpoint(*client)} > {endpoint(*server)}"


def resolve(host: str, port: int) -> str:
    """The numeric address of a host. Raises LabError."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        why = error.strerror or str(error)
        raise LabError(f"cannot find the host {host}", why, "name a host or an address") from error
    return str(found[0][4][0])


@contextlib.contextmanager
def _ended_by_signal() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set. An exception would lose the answer of the clients."""
    ended = threading.Event()

    def end(_number: int, _frame: FrameType | None) -> None:
        ended.set()

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, end) for number in numbers]
    try:
        yield ended
    finally:
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)


def run(arguments: argparse.Namespace) -> int:
    """Open the connections and follow them to the end; returns the exit status."""
    address = resolve(arguments.host, arguments.port)
    count = arguments.clients
    with _ended_by_signal() as ended, Clients(_Here()) as clients:
        began = time.monotonic()
        until = began + arguments.for_s if arguments.for_s is not None else float("inf")
        clients.connect(count, address, arguments.port, first_words=arguments.say)
        who = "1 client connects" if count == 1 else f"{count} clients connect"
        print(f"{who} to {endpoint(address, arguments.port)}", flush=True)
        said, all_ended = "", False
        while True:
            over = all_ended or ended.is_set() or time.monotonic() >= until
            records = clients.records()
            if (now := counted(records)) != said:
                said = now
                print(f"{time.monotonic() - began:6.1f} s: {said}", flush=True)
            if over:
                break
            all_ended = clients.reach(min(LOOK_S, max(0.0, until - time.monotonic())), ended=count)
    waiting = sum(one.waiting for one in records)
    if waiting:
        print(f"{waiting} of {count} clients still waited for a greeting:")
        most = None if arguments.list else LISTED
        print(*listed(records, time.monotonic_ns(), most), sep="\n")
    return 0 if all(one.greeted_ns is not None for one in records) else EXIT_NOT_GREETED


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("host", metavar="HOST", help="the server's name or address")
    parser.add_argument(
        "port", metavar="PORT", nargs="?", type=port, default=PORT, help=f"default {PORT}"
    )
    parser.add_argument(
        "-n",
        dest="clients",
        metavar="CLIENTS",
        type=positive,
        default=CLIENTS,
        help=f"number of connections; default {CLIENTS}",
    )
    parser.add_argument(
        "--for",
        dest="for_s",
        metavar="SECONDS",
        type=seconds,
        help="close the connections after this time; default: at Ctrl-C",
    )
    parser.add_argument(
        "--say",
        metavar="LINE",
        type=_line,
        default=b"",
        help="each client speaks first: it sends this line when it is connected",
    )
    parser.add_argument("--list", action="store_true", help="list every client that waits")
    parser.set_defaults(run=run)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the sub-command to the lab's command line."""
    add_arguments(
        subparsers.add_parser(
            "hang",
            help="open connections at once, and wait on each for the server to speak first",
            description=__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
    )


def main() -> int:
    """The command on its own. It needs nothing but Python, so that a client machine can run it."""
    parser = argparse.ArgumentParser(
        prog="hang", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    arguments = parser.parse_args()
    try:
        return run(arguments)
    except LabError as error:
        print(*error.lines(), sep="\n", file=sys.stderr)
        return error.exit_status


def _line(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape") + b"\r\n"
