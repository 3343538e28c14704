"""The command: options in, exit status out, and the one place where errors become messages."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, TextIO

from tcpstuck_bpf import terminal
from tcpstuck_bpf.analysis import Analysis
from tcpstuck_bpf.app import Live, Output, remove_ready_file, run_replay, write_ready_file
from tcpstuck_bpf.ending import Ending
from tcpstuck_bpf.errors import (
    EXIT_CANNOT_TRACE,
    EXIT_INTERRUPTED,
    EXIT_NOT_KNOWN,
    EXIT_NOTHING_STUCK,
    EXIT_STUCK,
    CannotTraceError,
    TcpstuckError,
    UsageError,
    words_of,
)
from tcpstuck_bpf.host import netns
from tcpstuck_bpf.host.kernel_log import open_kernel_log
from tcpstuck_bpf.host.listening_sockets import ListenerWatch
from tcpstuck_bpf.host.ruleset_reader import read_ruleset
from tcpstuck_bpf.host.ruleset_watch import RulesetWatch
from tcpstuck_bpf.host.wall_clock import RunClock
from tcpstuck_bpf.kernel.drop_names import Namer
from tcpstuck_bpf.kernel.probes import WITHOUT_VARIABLE, AttachRequest, left_out
from tcpstuck_bpf.model import TraceFilter, TraceSettings, address_text, living_of
from tcpstuck_bpf.options import as_written, build_parser
from tcpstuck_bpf.output.explain import explanation, verdict_list
from tcpstuck_bpf.output.render import TableRenderer, watching
from tcpstuck_bpf.output.writers import JsonOutput, Selection, TableOutput
from tcpstuck_bpf.recording.replay import Recorder, Replay
from tcpstuck_bpf.steps import Header
from tcpstuck_bpf.summary import Summary

if TYPE_CHECKING:
    from tcpstuck_bpf.kernel.source import KernelSource
    from tcpstuck_bpf.rescue.rescuer import Rescuing

EXIT_BROKEN_PIPE = 128 + signal.SIGPIPE
WIDTH_OF_A_PIPE = 200
_FRAMES_TOLD = 3
"""How many callers an error that nobody expected is told with."""
_OUTPUT_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EAGAIN})
"""What a disk or terminal behind standard output refuses with; who else meets it says so itself."""

_REPLAY_OPTIONS = frozenset({"replay", "json", "verbose", "only", "summary"})
_DOCTOR_OPTIONS = frozenset({"doctor", "vmlinux", "against", "json", "verbose"})
_BUILD_OPTIONS = frozenset({"build", "vmlinux", "rescue", "why", "port"})


def _refuse_beside(
    mode: str, allowed: frozenset[str], options: argparse.Namespace, why: str, remedy: str
) -> None:
    """Options that a mode would pass over in silence are a mistake."""
    defaults = vars(build_parser().parse_args([]))
    for name, value in vars(options).items():
        if name not in allowed and value != defaults[name]:
            raise UsageError(
                f"{as_written(name, value)} cannot be combined with {mode}", why, remedy
            )


def _settings(options: argparse.Namespace) -> TraceSettings:
    address: bytes | None = options.listener
    family: int | None = options.family
    wanted = TraceFilter(
        ports=tuple(sorted({port for ports in options.port for port in ports})),
        family=family,
        listener_address=address,
        netns=netns.resolve(options.netns),
    )
    if address is not None and family is not None:
        is_ipv4 = ":" not in address_text(address)
        if is_ipv4 != (family == 4):
            raise UsageError(
                f"--listener {address_text(address)} is never reached by IPv{family}",
                f"-{family} asks for IPv{family} packets only",
                f"leave out -{family}",
            )
    return TraceSettings(
        trace_filter=wanted,
        timeout_ns=options.timeout,
        tell_healthy=options.all,
        probe_mode=options.probe_mode,
        max_handshakes=options.max_handshakes,
    )


def _watched(options: argparse.Namespace, wanted: TraceFilter) -> str:
    """What is watched, in words."""
    ports = ", ".join(map(str, wanted.ports))
    words = ["every port" if not ports else f"port{'s' * (len(wanted.ports) > 1)} {ports}"]
    if wanted.listener_address is not None:
        words.append(f"at {address_text(wanted.listener_address)}")
    if wanted.family is not None:
        words.append(f"over IPv{wanted.family}")
    if wanted.netns is not None:
        words.append(f"in network namespace {options.netns}")
    return " ".join(words)


def _output(options: argparse.Namespace, header: Header) -> Output:
    selection = Selection(options.only, options.summary)
    if options.json:
        return JsonOutput(sys.stdout, header.clock, selection)
    terminal = sys.stdout.isatty()
    renderer = TableRenderer(
        clock=header.clock,
        width=shutil.get_terminal_size((WIDTH_OF_A_PIPE, 24)).columns,
        colour=terminal and not os.environ.get("NO_COLOR"),
        verbose=options.verbose,
        own_netns=header.own_netns,
        netns_names=header.netns_names,
    )
    return TableOutput(sys.stdout, renderer, selection)


class Interrupts:
    """SIGINT, SIGTERM and a lost terminal end a run with its summary, a second one at once.

    Nothing is raised while events are read, see `Live.reading`.
    """

    def __init__(self) -> None:
        self.live: Live | None = None
        self.interrupted = False
        self._ignored = False
        signal.signal(signal.SIGINT, self._handle)
        signal.signal(signal.SIGTERM, self._handle)
        # A lost terminal cannot be told from anything else any more, so it is asked for now.
        self._on_terminal = [one for one in (sys.stdout, sys.stderr) if one.isatty()]
        # Under nohup it goes on.
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            signal.signal(signal.SIGHUP, self._handle)

    def ignore(self) -> None:
        """The run is over; what is still to be let go of takes its time."""
        self._ignored = True

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            # The recording still gets its end.
            for stream in self._on_terminal:
                _discard(stream)
        if self._ignored:
            return
        if self.live is None:
            raise KeyboardInterrupt
        if self.live.stop and not self.live.reading:
            raise KeyboardInterrupt
        self.live.abandoned = self.live.stop
        self.live.stop = True
        self.interrupted = number == signal.SIGINT


def _vmlinux(options: argparse.Namespace) -> str | None:
    """The one file of --vmlinux."""
    files: list[str] = options.vmlinux or []
    if len(files) > 1:
        raise UsageError(
            "--vmlinux names more than one kernel",
            "only --build takes several",
            "name one, or two with --doctor: --vmlinux FILE --against FILE",
        )
    return files[0] if files else None


def _attach_request(options: argparse.Namespace) -> AttachRequest:
    if options.against is not None:
        raise UsageError(
            "--against needs --doctor",
            "it compares the kernels in two files",
            "write --doctor --vmlinux FILE --against FILE",
        )
    types, vmlinux = None, _vmlinux(options)
    if vmlinux is not None:
        # Imported where it is used: pyelftools would delay every start.
        from tcpstuck_bpf.typeinfo.vmlinux import types_of_running_kernel

        types = types_of_running_kernel(vmlinux)
    without = left_out(os.environ.get(WITHOUT_VARIABLE, ""))
    return AttachRequest(
        types,
        options.strict,
        without,
        rescue=options.rescue is not None,
        why=options.why,
        keep=options.cache,
        programs=options.programs,
    )


def _open_source(settings: TraceSettings, request: AttachRequest) -> KernelSource:
    from tcpstuck_bpf.kernel.source import open_source

    return open_source(settings, request)


def _rescuing(options: argparse.Namespace, source: KernelSource) -> Rescuing:
    # Imported where it is used: most runs rescue nobody, and it would delay their start by 4 ms.
    from tcpstuck_bpf.rescue.planner import Rescuer
    from tcpstuck_bpf.rescue.policy import RescuePolicy
    from tcpstuck_bpf.rescue.raw_socket import Resender
    from tcpstuck_bpf.rescue.rescuer import Rescuing

    policy = RescuePolicy(
        include_unknown="all" in options.rescue,
        rate=options.rescue_rate,
        excluded=options.rescue_exclude,
        after_expiry=options.rescue_late,
    )
    dry_run = "dry-run" in options.rescue
    return Rescuing(Rescuer(policy), source.tables, Resender(), time.monotonic_ns, dry_run=dry_run)


def _refuse_without_rescue(options: argparse.Namespace) -> None:
    for name in ("rescue_exclude", "rescue_rate", "rescue_late"):
        default = build_parser().get_default(name)
        value = getattr(options, name)
        if options.rescue is None and value != default:
            raise UsageError(
                f"{as_written(name, value)} needs --rescue",
                "nothing is sent to anybody",
                "add --rescue, or leave it out",
            )


def _trace(options: argparse.Namespace) -> int:
    interrupts = Interrupts()
    _refuse_without_rescue(options)
    with contextlib.suppress(OSError):  # where it is to be written, that is refused as well
        remove_ready_file(options.ready_file)
    settings = _settings(options)
    watched = _watched(options, settings.trace_filter)
    source = _open_source(settings, _attach_request(options))
    with Ending(_note) as ending:
        ending.add("the programs were not detached in order", source.close)
        for note in source.notes:
            _note(note)
        if options.dry_run:
            if options.ready_file is not None:
                write_ready_file(options.ready_file)
            _print(
                [f"able to trace: {len(source.coverage.probes)} probes by {source.coverage.mode}"]
            )
            return EXIT_NOTHING_STUCK
        run_clock = RunClock()
        kernel_log, gaps = open_kernel_log()
        if kernel_log is not None:
            ending.add("the kernel's log was not closed", kernel_log.close)
        coverage = replace(source.coverage, gaps=(*source.coverage.gaps, *gaps))
        header = Header(
            settings,
            coverage,
            run_clock.clock,
            watched,
            source.table_capacity,
            netns.own_netns(),
            netns.names(),
        )
        output = _output(options, header)
        recorder = None if options.record is None else Recorder(options.record, header)
        if recorder is not None:
            ending.add("the recording is incomplete", recorder.close)
        if not sys.stdout.isatty():
            _note(watching(watched, source.coverage.mode))
        reader = netns.CounterReader()
        live = Live(source, Analysis(header), output, recorder, reader.read)
        rules = RulesetWatch(read_ruleset, time.monotonic_ns)
        live.name = Namer(source.drop_reasons, source.stack, rules)
        live.describe = ListenerWatch().changed
        live.kernel_log = kernel_log
        live.find_gone = netns.gone
        live.find_living = lambda wanted: living_of(reader.read(wanted))
        live.clock_note = run_clock.note
        if options.rescue is not None:
            live.rescuing = _rescuing(options, source)
            ending.add("the rescue's sockets were not closed", live.rescuing.close)
        ending.add(
            f"the ready file {options.ready_file} was not removed",
            lambda: remove_ready_file(options.ready_file),
        )
        ending.add("the status line stays", output.close)
        # First of all: what ends is not to be interrupted, whoever goes on pressing Ctrl-C.
        ending.add("signals", interrupts.ignore)
        interrupts.live = live
        summary = live.run(options.duration, options.ready_file)
    if live.failure is not None:
        _say(_told(live.failure, "the run ended early"))
        return _exit_status(summary) or EXIT_CANNOT_TRACE
    if interrupts.interrupted and not live.analysis.told:
        return EXIT_INTERRUPTED
    return _exit_status(summary)


def _replay(options: argparse.Namespace) -> int:
    _refuse_beside(
        "--replay",
        _REPLAY_OPTIONS,
        options,
        "a recording holds what was traced, and how",
        "leave it out; --json, --only, -v and --summary choose what is shown",
    )
    replay = Replay(options.replay)
    return _exit_status(run_replay(replay, _output(options, replay.header)))


def _doctor(options: argparse.Namespace) -> int:
    _refuse_beside(
        "--doctor",
        _DOCTOR_OPTIONS,
        options,
        "it looks at the kernel, and traces nothing",
        "leave it out; --vmlinux, --against, --json and -v are for the doctor",
    )
    from tcpstuck_bpf.doctor.command import consult

    width = shutil.get_terminal_size((WIDTH_OF_A_PIPE, 24)).columns
    able, lines = consult(
        _vmlinux(options), options.against, width=width, json=options.json, verbose=options.verbose
    )
    _print(lines)
    return EXIT_NOTHING_STUCK if able else EXIT_CANNOT_TRACE


def _build(options: argparse.Namespace) -> int:
    _refuse_beside(
        "--build",
        _BUILD_OPTIONS,
        options,
        "it compiles programs for later, and traces nothing; they serve every port",
        "leave it out; --vmlinux, --rescue and --no-why choose what is built",
    )
    from tcpstuck_bpf.kernel.builder import build

    request = AttachRequest(rescue=options.rescue is not None, why=options.why)
    _print(build(Path(options.build), options.vmlinux or [], request))
    return EXIT_NOTHING_STUCK


def _explain(options: argparse.Namespace) -> int:
    _refuse_beside(
        "--explain",
        frozenset({"explain"}),
        options,
        "it prints what is known of a verdict, and traces nothing",
        "leave it out",
    )
    verdict: str = options.explain
    width = shutil.get_terminal_size((WIDTH_OF_A_PIPE, 24)).columns
    _print(explanation(verdict, width) if verdict else verdict_list(width))
    return EXIT_NOTHING_STUCK


def _exit_status(summary: Summary) -> int:
    if summary.ever_stuck or summary.data_lost:
        return EXIT_STUCK
    return EXIT_NOT_KNOWN if summary.unwatched else EXIT_NOTHING_STUCK


def _run(options: argparse.Namespace) -> int:
    if options.json:
        terminal.in_utf8(sys.stdout)
    if options.explain is not None:
        return _explain(options)
    if options.doctor:
        return _doctor(options)
    if options.build is not None:
        return _build(options)
    return _trace(options) if options.replay is None else _replay(options)


def _open_standard_streams() -> None:
    """Standard streams that are there, and write whatever they are given.

    Where the caller has closed one, the next file to be opened would take its place.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)
    terminal.never_fail(sys.stdout)
    terminal.never_fail(sys.stderr)


def _discard(stream: TextIO) -> None:
    """The interpreter must not complain when it flushes at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _say(error: TcpstuckError) -> int:
    _complain(error.lines())
    return error.exit_status


def _note(text: str) -> None:
    """Something beside the answer, for whoever reads standard error."""
    _complain([f"tcpstuck-trace: {text}"])


def _print(lines: Iterable[str]) -> None:
    """Lines of the answer as they come, where it is neither the table nor verdicts in JSON."""
    for line in lines:
        sys.stdout.write(terminal.line(line))
        sys.stdout.flush()


def _complain(lines: Iterable[str]) -> None:
    """Nobody who reads it is no reason to end otherwise."""
    try:
        sys.stderr.write("".join(map(terminal.line, lines)))
        sys.stderr.flush()
    except OSError:  # most often the same full disk that is to be told of
        _discard(sys.stderr)


def _told(error: Exception, what: str = "it failed in a way that nobody foresaw") -> TcpstuckError:
    """Any exception as three lines; the exit status of a traceback would mean a stuck client."""
    if isinstance(error, TcpstuckError):
        return error
    # Imported where it is used: it would delay every start.
    import traceback

    frames = reversed(traceback.extract_tb(error.__traceback__)[-_FRAMES_TOLD:])
    where = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames)
    return CannotTraceError(
        what,
        f"{type(error).__name__}: {words_of(error)} (at {where})",
        "report these lines, with what --version and --doctor say",
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status of DESIGN.md's contract."""
    _open_standard_streams()
    try:
        status = _run(build_parser().parse_args(arguments))
        # What is short waits in the buffer until here: a closed pipe must not show at exit.
        sys.stdout.flush()
        return status
    except TcpstuckError as error:
        return _say(error)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        _discard(sys.stdout)
        return EXIT_BROKEN_PIPE
    except OSError as error:
        if error.errno not in _OUTPUT_ERRORS:
            return _say(_told(error))
        _discard(sys.stdout)
        return _say(
            UsageError(
                "the output cannot be written",
                str(error.strerror),
                "send it to where there is room",
            )
        )
    except Exception as error:  # no traceback: its exit status is that of a stuck client
        return _say(_told(error))


if __name__ == "__main__":
    sys.exit(main())
