"""`--join`: from two recordings to the exit status."""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
from collections.abc import Iterator

from tcpstuck_bpf.analysis import Analysis
from tcpstuck_bpf.client import summary as client_summary
from tcpstuck_bpf.client.analysis import ClientAnalysis
from tcpstuck_bpf.client.recording import ClientReplay
from tcpstuck_bpf.client.steps import WatchEnded
from tcpstuck_bpf.client.summary import ClientSummary
from tcpstuck_bpf.console import WIDTH_OF_A_PIPE, print_lines
from tcpstuck_bpf.errors import EXIT_NOT_KNOWN, EXIT_NOTHING_STUCK, EXIT_STUCK, UsageError
from tcpstuck_bpf.joining.export import joined_line, joined_summary_line
from tcpstuck_bpf.joining.match import join
from tcpstuck_bpf.joining.result import Result, Span, ordered
from tcpstuck_bpf.joining.sides import (
    ClientConnection,
    ClientSide,
    ServerHandshake,
    ServerSide,
)
from tcpstuck_bpf.joining.words import lines
from tcpstuck_bpf.output.page import Page
from tcpstuck_bpf.recording.lines import CLIENT, SERVER, RecordedLines
from tcpstuck_bpf.recording.replay import Replay
from tcpstuck_bpf.run import exit_status
from tcpstuck_bpf.steps import Ended
from tcpstuck_bpf.summary import Summary
from tcpstuck_bpf.terminal import understands_escapes


def _refuse_other_sides(server: str, client: str) -> None:
    """Raises UsageError unless the recordings' sides are these."""
    if (server, client) == (SERVER, CLIENT):
        return
    if (server, client) == (CLIENT, SERVER):
        raise UsageError(
            "the recordings of --join are in the wrong order",
            "the first one was made on the client's side, the second one on the server's",
            "write --join SERVER CLIENT",
        )
    raise UsageError(
        "--join needs a recording of each side",
        f"both were made on the {server}'s side",
        "record the server with --record FILE, and the client with --client -p PORT --record FILE",
    )


def join_recordings(options: argparse.Namespace) -> int:
    """Join the two recordings of --join, and print what they say. Returns the exit status.

    Raises UsageError unless there is one of each side, and RecordingError if one is damaged.
    """
    of_server, of_client = options.join
    with contextlib.ExitStack() as stack:
        opened = [
            stack.enter_context(contextlib.closing(RecordedLines(path)))
            for path in (of_server, of_client)
        ]
        _refuse_other_sides(*(one.side for one in opened))
        server, client = Replay(opened[0]), ClientReplay(opened[1])
        handshakes, server_span, server_sum = _read_server(server)
        connections, client_span, client_sum = _read_client(client)
    result = Result(
        ordered(join(handshakes, connections)),
        server_span,
        client_span,
        server_sum.flood_suspected,
        (
            *(f"server's side: {note}" for note in server_sum.notes),
            *(f"client's side: {note}" for note in client_sum.notes),
        ),
    )
    print_lines(_printed(options, result, client))
    both = {exit_status(server_sum), client_summary.exit_status(client_sum)}
    return next(one for one in (EXIT_STUCK, EXIT_NOT_KNOWN, EXIT_NOTHING_STUCK) if one in both)


def _read_server(replay: Replay) -> tuple[list[ServerHandshake], Span, Summary]:
    analysis = Analysis(replay.header)
    side = ServerSide(analysis)
    for step in replay.steps():
        side.take(step, analysis.take(step))
        if isinstance(step, Ended):
            replay.refuse_without_counters(analysis.tallied)
            realtime = replay.header.clock.realtime
            span = Span(realtime(analysis.begun_ns), realtime(step.now_ns))
            return [*side.handshakes()], span, analysis.summary(step)
    raise AssertionError("the last step must be Ended")


def _read_client(replay: ClientReplay) -> tuple[list[ClientConnection], Span, ClientSummary]:
    analysis = ClientAnalysis(replay.header)
    side = ClientSide(analysis)
    for step in replay.steps():
        side.take(analysis.take(step))
        if isinstance(step, WatchEnded):
            replay.refuse_without_polls(analysis.polls)
            clock = replay.header.clock
            span = Span(clock.realtime_ns, clock.realtime(step.now_ns))
            return [*side.connections(step.now_ns)], span, analysis.summary(step)
    raise AssertionError("the last step must be WatchEnded")


def _printed(options: argparse.Namespace, result: Result, client: ClientReplay) -> Iterator[str]:
    """What is printed: JSON Lines or text."""
    if options.json:
        yield from map(joined_line, () if options.summary else result.joined)
        yield joined_summary_line(result)
        return
    header = client.header
    page = Page(
        clock=header.clock,
        width=shutil.get_terminal_size((WIDTH_OF_A_PIPE, 24)).columns,
        colour=understands_escapes(sys.stdout) and not os.environ.get("NO_COLOR"),
        own_netns=header.own_netns,
        netns_names=header.netns_names,
    )
    yield from lines(result, page, rows=not options.summary)
