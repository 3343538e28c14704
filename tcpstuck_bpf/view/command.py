"""Puts the live view together: for a run, and for a recording."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from tcpstuck_bpf.analysis import Analysis
from tcpstuck_bpf.app.interfaces import Output
from tcpstuck_bpf.console import hold
from tcpstuck_bpf.errors import UsageError
from tcpstuck_bpf.host.listening_sockets import accept_queues
from tcpstuck_bpf.model import ListenerFacts, ListenerId, NetnsCounts
from tcpstuck_bpf.options import as_written, build_parser
from tcpstuck_bpf.output.page import Page
from tcpstuck_bpf.recording.lines import STANDARD_INPUT
from tcpstuck_bpf.steps import Header
from tcpstuck_bpf.summary import Summary
from tcpstuck_bpf.terminal import understands_escapes

if TYPE_CHECKING:
    from tcpstuck_bpf.view.frame import Frames

_WITHOUT_EFFECT = ("json", "each", "verbose", "only", "summary", "heartbeat")
"""Options that choose what is printed."""


def refuse_without_terminal(options: argparse.Namespace) -> None:
    """Raises UsageError if --live cannot be used with these options, or here."""
    for name in _WITHOUT_EFFECT:
        value = getattr(options, name)
        if value != build_parser().get_default(name):
            raise UsageError(
                f"{as_written(name, value)} cannot be combined with --live",
                "the view shows everything, and prints the summary when it ends",
                "leave one of them out",
            )
    if options.replay == STANDARD_INPUT:
        raise UsageError(
            "--live cannot show a recording from standard input",
            "that is where the view reads its keys",
            "name the file",
        )
    for stream, name in ((sys.stdout, "standard output"), (sys.stdin, "standard input")):
        if stream is None or not stream.isatty():
            raise UsageError(
                "--live needs a terminal",
                f"{name} is not one",
                "leave --live out for plain lines",
            )
    _refuse_unknown_terminal()


def _refuse_unknown_terminal() -> None:
    name = os.environ.get("TERM", "")
    remedy = "leave --live out, or set TERM to the terminal's type, for example xterm"
    if not understands_escapes(sys.stdout):
        raise UsageError("--live needs a terminal", f"TERM is {name or 'not set'}", remedy)
    try:
        # Imported only where it is used, and missing where Python was built without ncurses.
        import curses
    except ImportError as error:
        raise UsageError(
            "--live needs Python's curses module", str(error), "use the distribution's python3"
        ) from error
    try:
        curses.setupterm(name, sys.stdout.fileno())
    except curses.error as error:
        raise UsageError(f"--live cannot use TERM={name}", str(error), remedy) from error


def live_view(
    analysis: Analysis,
    counts: Callable[[], NetnsCounts],
    losses: Callable[[], Mapping[str, int]],
    afterwards: Callable[[], Output],
    end: Callable[[], None],
) -> Output:
    """The view of a run. `end` asks the run to end; `afterwards` makes the summary's output."""
    from tcpstuck_bpf.view.output import LiveView
    from tcpstuck_bpf.view.screen import Screen
    from tcpstuck_bpf.view.snapshot import Book

    def so_far(now_ns: int) -> Summary:
        return analysis.so_far(counts(), now_ns, losses())

    return LiveView(
        Screen(_frames(analysis.header), end, colour=not os.environ.get("NO_COLOR")),
        Book(analysis.is_stuck, accept_queues),
        so_far,
        afterwards,
        hold(),
        time.monotonic_ns,
    )


def replay_view(analysis: Analysis, afterwards: Callable[[], Output]) -> Output:
    """The view of a recording's end. SIGINT, SIGTERM and SIGHUP quit it too."""
    from tcpstuck_bpf.view.output import ReplayView
    from tcpstuck_bpf.view.screen import Screen
    from tcpstuck_bpf.view.snapshot import Book

    quitted = threading.Event()

    def wait() -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda _number, _frame: quitted.set())
        quitted.wait()

    return ReplayView(
        Screen(_frames(analysis.header), quitted.set, colour=not os.environ.get("NO_COLOR")),
        Book(analysis.is_stuck, _no_queues),
        lambda summary: analysis.begun_ns + summary.duration_ns,
        afterwards,
        hold(),
        wait,
    )


def _no_queues(_listeners: Iterable[ListenerFacts]) -> dict[ListenerId, int]:
    """A recording has no present lengths."""
    return {}


def _frames(header: Header) -> Frames:
    from tcpstuck_bpf.view.frame import Frames

    def page(width: int) -> Page:
        return Page(
            clock=header.clock,
            width=width,
            colour=False,
            own_netns=header.own_netns,
            netns_names=header.netns_names,
        )

    return Frames(page)
