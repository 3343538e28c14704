"""The command: takes options, returns the exit status, and turns errors into messages.

What a run needs is imported by the functions that start it: `--help`, `--version`, `--explain` and
wrong use are answered without.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tcpstuck_bpf import terminal
from tcpstuck_bpf.console import (
    WIDTH_OF_A_PIPE,
    discard,
    open_standard_streams,
    print_lines,
    print_source,
    remark,
    say,
    unforeseen,
)
from tcpstuck_bpf.errors import (
    EXIT_CANNOT_TRACE,
    EXIT_INTERRUPTED,
    EXIT_NOTHING_STUCK,
    TcpstuckError,
    UsageError,
)
from tcpstuck_bpf.judge.rules import CLIENT_RULES
from tcpstuck_bpf.option_values import listener_address, ports_of, ports_text
from tcpstuck_bpf.options import as_written, build_parser
from tcpstuck_bpf.output.explain import explanation, verdict_list

if TYPE_CHECKING:
    from tcpstuck_bpf.analysis import Analysis
    from tcpstuck_bpf.conversions.capture import Capture
    from tcpstuck_bpf.recording.lines import RecordedLines
    from tcpstuck_bpf.recording_part import Wanted

EXIT_BROKEN_PIPE = 128 + signal.SIGPIPE
_OUTPUT_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EAGAIN})
"""Errors of the disk or terminal behind standard output. Other files have messages of their own."""

_REPLAY_OPTIONS = frozenset(
    {"replay", "json", "each", "verbose", "only", "summary", "live"}
    | {"metrics_file", "plot", "pcap", "port", "family", "listener", "netns", "timeout"}
)
_CLIENT_REPLAY_OPTIONS = frozenset(
    {"client", "replay", "json", "each", "verbose", "only", "summary"}
    | {"port", "family", "listener", "netns", "timeout"}
)
_DOCTOR_OPTIONS = frozenset({"doctor", "vmlinux", "against", "json", "verbose"})
_PRINT_OPTIONS = frozenset({"print_bpf", "vmlinux", "rescue", "why", "probe_mode"})
_CLIENT_OPTIONS = frozenset(
    {"client", "pid", "port", "family", "listener", "netns", "timeout", "duration"}
    | {"json", "each", "verbose", "summary", "only", "ready_file", "record"}
    | {"rescue", "rescue_exclude", "rescue_rate", "rescue_late"}
)
_JOIN_OPTIONS = frozenset({"join", "json", "summary"})
_BUILD_OPTIONS = frozenset({"build", "vmlinux", "rescue", "why", "port"})


def _refuse_beside(
    mode: str, allowed: frozenset[str], options: argparse.Namespace, why: str, remedy: str
) -> None:
    """Raises UsageError for an option that a mode would silently ignore."""
    defaults = vars(build_parser().parse_args([]))
    for name, value in vars(options).items():
        if name not in allowed and value != defaults[name]:
            raise UsageError(
                f"{as_written(name, value)} cannot be combined with {mode}", why, remedy
            )


def _replay(options: argparse.Namespace) -> int:
    _refuse_beside(
        "--replay",
        _REPLAY_OPTIONS | _CLIENT_REPLAY_OPTIONS,
        options,
        "the recording determines what was traced, and how",
        "leave it out; -p, -4, -6, --listener, --netns and -t choose what is judged; --json, "
        "--only, --each, -v, --summary and --live choose what is shown; --metrics-file writes "
        "metrics, --plot draws, and --pcap writes packets",
    )
    ports = ports_of(options)
    address = listener_address(options)
    if options.live:
        from tcpstuck_bpf.view.command import refuse_without_terminal

        refuse_without_terminal(options)
    from tcpstuck_bpf.recording.lines import CLIENT, RecordedLines
    from tcpstuck_bpf.recording_part import Wanted

    wanted = Wanted(
        ports=frozenset(ports),
        ports_text=ports_text(ports),
        family=options.family,
        address=address,
        netns=None if options.netns == "all" else options.netns,
        timeout_ns=options.timeout,
    )
    with contextlib.closing(RecordedLines(options.replay)) as lines:
        if lines.side == CLIENT:
            return _replay_client(options, lines, wanted)
        _refuse_client_s_side(options)
        return _replay_server(options, lines, wanted)


def _replay_client(options: argparse.Namespace, lines: RecordedLines, wanted: Wanted) -> int:
    _refuse_beside(
        "a recording of the client's side",
        _CLIENT_REPLAY_OPTIONS,
        options,
        "it has what sock_diag said of this host's sockets, and no packets or queues",
        "leave it out; -p, -4, -6, --listener, --netns and -t choose what is judged, --json, "
        "--only, --each, -v and --summary what is shown",
    )
    from tcpstuck_bpf.client.playback import replay_clients

    return replay_clients(options, lines, wanted)


def _refuse_client_s_side(options: argparse.Namespace) -> None:
    """Raises UsageError for what asks for the client's side of a recording of the server's."""
    if options.client:
        raise UsageError(
            "--client cannot be combined with this recording",
            "it was made on the server's side",
            "leave --client out, or name a recording of --client --record",
        )
    name = _client_verdict(options)
    if name is not None:
        raise UsageError(
            f"--only {name} cannot be combined with this recording",
            "that verdict is given on the client's side, and it was made on the server's",
            "choose another verdict, or name a recording of --client --record",
        )


def _replay_server(options: argparse.Namespace, lines: RecordedLines, wanted: Wanted) -> int:
    from tcpstuck_bpf.analysis import Analysis
    from tcpstuck_bpf.app.playback import run_replay
    from tcpstuck_bpf.ending import Ending
    from tcpstuck_bpf.narrowing import NarrowedReplay
    from tcpstuck_bpf.run import exit_status, exporter_for, output_for, plot_for

    if options.live:
        from tcpstuck_bpf.view.command import replay_view
    replay = NarrowedReplay(options.replay, wanted, lines)
    analysis = Analysis(replay.header)
    output = output_for(options, replay.header)
    exporter = exporter_for(options)
    plot = plot_for(options, analysis)
    capture = _capture_for(options, analysis)
    with Ending(remark) as ending:
        if capture is not None:
            ending.add("the unfinished file of --pcap was not removed", capture.close)
        if options.live:
            output = replay_view(analysis, lambda: output_for(options, replay.header))
            ending.add("the terminal was not given back", output.close)
        if exporter is not None:
            ending.add("the metrics are not those of the end", exporter.close)
            output = exporter.beside_replay(output, analysis)
        converters = [one for one in (plot, capture) if one is not None]
        summary = run_replay(replay, output, analysis, [one.take for one in converters])
        if capture is not None:
            capture.finish()
        if plot is not None:
            plot.draw(summary)
        return exit_status(summary)


def _capture_for(options: argparse.Namespace, analysis: Analysis) -> Capture | None:
    """The capture of --pcap, else None. Raises UsageError where it cannot be written."""
    if options.pcap is None:
        return None
    from tcpstuck_bpf.conversions.capture import Capture

    return Capture(options.pcap, analysis, options.only)


def _refuse_without_replay(options: argparse.Namespace) -> None:
    """Raises UsageError for an option that converts a recording and has none."""
    if options.pcap is not None:
        raise UsageError(
            "--pcap needs --replay",
            "it converts a recording, and a run makes none without --record",
            "record the run (--record FILE), then write --replay FILE --pcap OUT.pcapng",
        )


def _doctor(options: argparse.Namespace) -> int:
    _refuse_beside(
        "--doctor",
        _DOCTOR_OPTIONS,
        options,
        "the doctor examines the kernel and does not trace",
        "leave it out; --vmlinux, --against, --json and -v can be used",
    )
    from tcpstuck_bpf.preflight import refuse_unusable_files

    refuse_unusable_files(options)
    from tcpstuck_bpf.doctor.command import consult
    from tcpstuck_bpf.run import one_vmlinux

    size = shutil.get_terminal_size((WIDTH_OF_A_PIPE, 24))
    able, lines = consult(
        one_vmlinux(options),
        options.against,
        width=size.columns,
        height=size.lines if sys.stdout.isatty() else None,
        json=options.json,
        verbose=options.verbose,
    )
    print_lines(lines)
    return EXIT_NOTHING_STUCK if able else EXIT_CANNOT_TRACE


def _build(options: argparse.Namespace) -> int:
    _refuse_beside(
        "--build",
        _BUILD_OPTIONS,
        options,
        "--build compiles programs for later and does not trace; the programs serve every port",
        "leave it out; --vmlinux, --rescue and --no-why choose what is built",
    )
    from tcpstuck_bpf.preflight import refuse_unusable_files

    refuse_unusable_files(options)
    from tcpstuck_bpf.kernel.attach_plan import AttachRequest
    from tcpstuck_bpf.kernel.builder import build

    request = AttachRequest(rescue=options.rescue is not None, why=options.why)
    print_lines(build(Path(options.build), options.vmlinux or [], request))
    return EXIT_NOTHING_STUCK


def _print_bpf(options: argparse.Namespace) -> int:
    _refuse_beside(
        "--print-bpf",
        _PRINT_OPTIONS,
        options,
        "--print-bpf prints the programs' text and does not trace; the text serves every port",
        "leave it out; --rescue, --no-why, --probe-mode and --vmlinux choose what is compiled",
    )
    from tcpstuck_bpf.preflight import refuse_unusable_files

    refuse_unusable_files(options)
    from tcpstuck_bpf.kernel.printed_text import printed_text
    from tcpstuck_bpf.run import attach_request

    print_source(printed_text(attach_request(options), options.probe_mode))
    return EXIT_NOTHING_STUCK


def _join(options: argparse.Namespace) -> int:
    _refuse_beside(
        "--join",
        _JOIN_OPTIONS,
        options,
        "it compares two recordings as they are",
        "leave it out; --json and --summary choose what is shown, and --replay FILE judges one of "
        "them by itself",
    )
    from tcpstuck_bpf.joining.command import join_recordings

    return join_recordings(options)


def _client(options: argparse.Namespace) -> int:
    _refuse_beside(
        "--client",
        _CLIENT_OPTIONS,
        options,
        "on the client's side the tool lists this host's connections, without BPF",
        "leave it out; -p, -4, -6, --listener, --netns, --pid, -t and -d choose what is watched, "
        "--json, --only, --each, -v and --summary what is shown, --rescue whether to mend, "
        "--record where it is recorded",
    )
    from tcpstuck_bpf.client.command import watch_clients

    return watch_clients(options)


def _client_verdict(options: argparse.Namespace) -> str | None:
    """A verdict of --only that is given on the client's side alone."""
    return next((rule.name for rule in CLIENT_RULES if rule.name in options.only), None)


def _refuse_without_client(options: argparse.Namespace) -> None:
    """Raises UsageError for an option that has no effect without --client."""
    if options.pid is not None:
        raise UsageError(
            "--pid needs --client",
            "a server's handshakes belong to no process yet",
            "add --client, or leave it out",
        )
    name = _client_verdict(options)
    if name is not None:
        raise UsageError(
            f"--only {name} needs --client",
            "that verdict is given on the client's side",
            "add --client, or choose another verdict",
        )


def _explain(options: argparse.Namespace) -> int:
    _refuse_beside(
        "--explain",
        frozenset({"explain", "port"}),
        options,
        "--explain prints text and does not trace",
        "leave it out; -p PORT fills the port in",
    )
    verdict: str = options.explain
    ports = ports_of(options)
    if len(ports) > 1 or (ports and not verdict):
        raise UsageError(
            "--explain fills one port into the commands of a verdict",
            f"{len(ports)} ports are named" if verdict else "no verdict is named",
            "write --explain accept-queue-full -p 3306",
        )
    width = shutil.get_terminal_size((WIDTH_OF_A_PIPE, 24)).columns
    port = ports[0] if ports else None
    print_lines(explanation(verdict, width, port) if verdict else verdict_list(width))
    return EXIT_NOTHING_STUCK


def _run(options: argparse.Namespace) -> int:
    if options.json:
        terminal.in_utf8(sys.stdout)
    if options.explain is not None:
        return _explain(options)
    if options.doctor:
        return _doctor(options)
    if options.build is not None:
        return _build(options)
    if options.print_bpf:
        return _print_bpf(options)
    if options.join is not None:
        return _join(options)
    if options.replay is not None:
        return _replay(options)
    if options.client:
        return _client(options)
    _refuse_without_client(options)
    _refuse_without_replay(options)
    from tcpstuck_bpf.run import trace

    return trace(options)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit status; see docs/design.md."""
    open_standard_streams()
    try:
        status = _run(build_parser().parse_args(arguments))
        # Short output is still in the buffer. Flush it now, so that a closed pipe raises here and
        # not at exit.
        sys.stdout.flush()
        return status
    except TcpstuckError as error:
        return say(error)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        discard(sys.stdout)
        return EXIT_BROKEN_PIPE
    except OSError as error:
        if error.errno not in _OUTPUT_ERRORS:
            return say(unforeseen(error))
        discard(sys.stdout)
        return say(
            UsageError(
                "the output cannot be written",
                str(error.strerror),
                "write it to a disk with free space",
            )
        )
    except Exception as error:  # a traceback's exit status 1 would mean a stuck client
        return say(unforeseen(error))


if __name__ == "__main__":
    sys.exit(main())
