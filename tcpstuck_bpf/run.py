"""A live run, from the options to the exit status: connects the parts."""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from tcpstuck_bpf.analysis import Analysis
from tcpstuck_bpf.app.interfaces import Output
from tcpstuck_bpf.app.live import Live
from tcpstuck_bpf.app.namespaces import NamespaceWatch
from tcpstuck_bpf.app.printer import Printer
from tcpstuck_bpf.app.ready_file import remove_ready_file, write_ready_file
from tcpstuck_bpf.console import (
    WIDTH_OF_A_PIPE,
    hold,
    print_lines,
    release,
    remark,
    say,
    unforeseen,
)
from tcpstuck_bpf.ending import Ending
from tcpstuck_bpf.errors import (
    EXIT_CANNOT_TRACE,
    EXIT_INTERRUPTED,
    EXIT_NOT_KNOWN,
    EXIT_NOTHING_STUCK,
    EXIT_STUCK,
    UsageError,
)
from tcpstuck_bpf.heartbeat import Heartbeat
from tcpstuck_bpf.host import netns, netns_counters, netns_owners
from tcpstuck_bpf.host.expectations import doubts
from tcpstuck_bpf.host.kernel_log import open_kernel_log
from tcpstuck_bpf.host.listening_sockets import ListenerWatch
from tcpstuck_bpf.host.ruleset_reader import read_ruleset
from tcpstuck_bpf.host.ruleset_watch import RulesetWatch
from tcpstuck_bpf.host.wall_clock import RunClock
from tcpstuck_bpf.interrupts import Interrupts
from tcpstuck_bpf.kernel.attach_plan import WITHOUT_VARIABLE, AttachRequest, left_out
from tcpstuck_bpf.kernel.drop_names import Namer
from tcpstuck_bpf.kernel.features import synproxy_note
from tcpstuck_bpf.model import SECOND_NS, TraceFilter, TraceSettings, address_text, living_of
from tcpstuck_bpf.option_values import listener_address, ports_of, ports_text
from tcpstuck_bpf.output.render import TableRenderer, watching
from tcpstuck_bpf.output.writers import JsonOutput, Selection, TableOutput
from tcpstuck_bpf.preflight import refuse_unusable_files, refuse_without_rescue
from tcpstuck_bpf.recording.replay import Recorder
from tcpstuck_bpf.steps import Header
from tcpstuck_bpf.summary import Summary
from tcpstuck_bpf.terminal import understands_escapes

if TYPE_CHECKING:
    from tcpstuck_bpf.conversions.command import PlotFile
    from tcpstuck_bpf.exporter.export import Exporter
    from tcpstuck_bpf.kernel.source import KernelSource
    from tcpstuck_bpf.rescue.rescuer import Rescuing


WIDTH_OF_A_LOG = 1000
HEARTBEAT_NS = 300 * SECOND_NS
TIMEOUT_NS = 3 * SECOND_NS
"""Default of --timeout."""


def _settings(options: argparse.Namespace) -> TraceSettings:
    wanted = TraceFilter(
        ports=ports_of(options),
        family=options.family,
        listener_address=listener_address(options),
        netns=netns.resolve(options.netns),
    )
    return TraceSettings(
        trace_filter=wanted,
        timeout_ns=TIMEOUT_NS if options.timeout is None else options.timeout,
        tell_healthy=options.all,
        probe_mode=options.probe_mode,
        max_handshakes=options.max_handshakes,
    )


def _watched(options: argparse.Namespace, wanted: TraceFilter) -> str:
    """What is watched, as text."""
    ports = ports_text(wanted.ports)
    words = ["every port" if not ports else f"port{'s' * (len(wanted.ports) > 1)} {ports}"]
    if wanted.listener_address is not None:
        words.append(f"at {address_text(wanted.listener_address)}")
    if wanted.family is not None:
        words.append(f"over IPv{wanted.family}")
    if wanted.netns is not None:
        words.append(f"in network namespace {options.netns}")
    return " ".join(words)


def output_for(options: argparse.Namespace, header: Header) -> Output:
    """The output for a run's or a recording's findings: JSON or a table."""
    selection = Selection(options.only, options.summary or options.live)
    if options.json:
        return JsonOutput(sys.stdout, header.clock, selection)
    size = shutil.get_terminal_size((WIDTH_OF_A_PIPE, 24))
    renderer = TableRenderer(
        clock=header.clock,
        width=size.columns,
        height=size.lines if sys.stdout.isatty() else None,
        colour=understands_escapes(sys.stdout) and not os.environ.get("NO_COLOR"),
        verbose=options.verbose,
        each=options.each,
        own_netns=header.own_netns,
        netns_names=header.netns_names,
    )
    return TableOutput(sys.stdout, renderer, selection)


def _heartbeat_interval(options: argparse.Namespace) -> int | None:
    """Time between two heartbeat lines; None for no heartbeat.

    The default is a heartbeat in logs only. A terminal has the status line or shows other progress,
    and a program that reads JSON needs no heartbeat.
    """
    asked_for: int | None = options.heartbeat
    if asked_for is not None:
        return asked_for or None
    terminals = any(one.isatty() for one in (sys.stdout, sys.stderr))
    return None if options.json or terminals else HEARTBEAT_NS


def _with_heartbeat(output: Output, header: Header, interval_ns: int | None) -> Output:
    if interval_ns is None:
        return output
    renderer = TableRenderer(
        clock=header.clock,
        width=WIDTH_OF_A_LOG,
        colour=False,
        verbose=False,
        own_netns=header.own_netns,
        netns_names=header.netns_names,
    )
    return Heartbeat(output, interval_ns, renderer.status, remark)


def exporter_for(options: argparse.Namespace) -> Exporter | None:
    """The exporter if metrics are wanted, else None. Raises UsageError or CannotTraceError."""
    if options.dry_run or (options.metrics is None and options.metrics_file is None):
        return None
    # Imported only where it is used: many machines lack prometheus_client.
    from tcpstuck_bpf.exporter.export import Exporter

    return Exporter(options.metrics, options.metrics_file)


def plot_for(options: argparse.Namespace, analysis: Analysis) -> PlotFile | None:
    """The plot of a replay if one is wanted, else None. Raises UsageError or CannotTraceError."""
    if options.plot is None:
        return None
    # Imported only where it is used: many machines lack matplotlib.
    from tcpstuck_bpf.conversions.command import PlotFile

    return PlotFile(options.plot, analysis, options.only)


def one_vmlinux(options: argparse.Namespace) -> str | None:
    """The only file of --vmlinux; None without the option. Raises UsageError for several files."""
    files: list[str] = options.vmlinux or []
    if len(files) > 1:
        raise UsageError(
            "--vmlinux names more than one kernel",
            "only --build accepts several",
            "name one, or two with --doctor: --vmlinux FILE --against FILE",
        )
    return files[0] if files else None


def attach_request(options: argparse.Namespace) -> AttachRequest:
    """How to attach by the options. Raises UsageError."""
    if options.against is not None:
        raise UsageError(
            "--against needs --doctor",
            "it compares two kernel images",
            "write --doctor --vmlinux FILE --against FILE",
        )
    types, vmlinux = None, one_vmlinux(options)
    if vmlinux is not None:
        # Imported only where it is used: pyelftools would delay every start.
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
    from tcpstuck_bpf.kernel.open_source import open_source

    return open_source(settings, request)


def _rescuing(options: argparse.Namespace, source: KernelSource) -> Rescuing:
    # Imported only where it is used: it would delay runs without --rescue by 4 ms.
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


def refuse_without_replay(options: argparse.Namespace) -> None:
    """Raises UsageError for an option that needs --replay."""
    if options.plot is not None:
        raise UsageError(
            "--plot needs --replay",
            "it draws a recording",
            "trace with --record FILE; then write --replay FILE --plot OUT.svg",
        )


def trace(options: argparse.Namespace) -> int:
    """Trace according to the options. Returns the exit status.

    Raises UsageError or CannotTraceError if tracing cannot begin.
    """
    interrupts = Interrupts()
    refuse_without_rescue(options)
    if options.rescue and "reset" in options.rescue:
        raise UsageError(
            "--rescue=reset needs --client",
            "it ends connections of the host that the tool runs on, from the client's side",
            "write --rescue, or add --client",
        )
    refuse_without_replay(options)
    with contextlib.suppress(OSError):  # writing it later fails for the same reason
        remove_ready_file(options.ready_file)
    refuse_unusable_files(options)
    if options.live and not options.dry_run:
        from tcpstuck_bpf.view.command import refuse_without_terminal

        refuse_without_terminal(options)
    settings = _settings(options)
    watched = _watched(options, settings.trace_filter)
    exporter = exporter_for(options)
    source = _open_source(settings, attach_request(options))
    with Ending(remark) as ending:
        ending.add("the programs were not detached cleanly", source.close)
        if options.live and not options.dry_run:
            # The view shows the remarks from here on.
            ending.add("what was held back was not written", release)
            hold()
        for text in source.notes:
            remark(text)
        if options.dry_run:
            return _able(options, source)
        live = _live(options, settings, watched, source, ending, exporter, interrupts)
        # Added last, so called first: further Ctrl-C must not interrupt the ending.
        ending.add("signals", interrupts.ignore)
        interrupts.live = live
        summary = live.run(options.duration, options.ready_file)
    if live.failure is not None:
        say(unforeseen(live.failure, "the run ended early"))
        return exit_status(summary) or EXIT_CANNOT_TRACE
    if interrupts.interrupted and not live.analysis.reported:
        return EXIT_INTERRUPTED
    return exit_status(summary)


def _able(options: argparse.Namespace, source: KernelSource) -> int:
    """Print a dry run's answer."""
    if options.ready_file is not None:
        write_ready_file(options.ready_file)
    coverage = source.coverage
    print_lines([f"able to trace: {len(coverage.probes)} probes by {coverage.mode}"])
    return EXIT_NOTHING_STUCK


def _live(
    options: argparse.Namespace,
    settings: TraceSettings,
    watched: str,
    source: KernelSource,
    ending: Ending,
    exporter: Exporter | None,
    interrupts: Interrupts,
) -> Live:
    """A run with all its parts; everything that must be closed is added to `ending`."""
    run_clock = RunClock()
    kernel_log, gaps = open_kernel_log(time.monotonic_ns)
    if kernel_log is not None:
        ending.add("the kernel's log was not closed", kernel_log.close)
    header = Header(
        settings,
        replace(source.coverage, gaps=(*source.coverage.gaps, *gaps)),
        run_clock.clock,
        watched,
        source.table_capacity,
        netns.own_netns(),
        netns_owners.KnownNames(),
    )
    analysis = Analysis(header)
    output = output_for(options, header)
    if options.live:
        from tcpstuck_bpf.view.command import live_view

        output = live_view(
            analysis,
            source.counts,
            source.losses,
            lambda: output_for(options, header),
            interrupts.end,
        )
    else:
        output = _with_heartbeat(output, header, _heartbeat_interval(options))
    if exporter is not None:
        ending.add("the last metrics were not written", exporter.close)
        output = exporter.beside_live(output, analysis, source.counts, source.losses)
    recorder = None if options.record is None else Recorder(options.record, header)
    if recorder is not None:
        ending.add("the recording is incomplete", recorder.close)
    if not understands_escapes(sys.stdout):
        remark(watching(watched, source.coverage.mode))
    rescuing = None if options.rescue is None else _rescuing(options, source)
    if rescuing is not None:
        ending.add("the rescue's sockets were not closed", rescuing.close)
    ending.add(
        f"the ready file {options.ready_file} was not removed",
        lambda: remove_ready_file(options.ready_file),
    )
    ending.add("the status line was not cleared", output.close)
    elsewhere = synproxy_note()
    if elsewhere:
        remark(elsewhere)
    for doubt in doubts(settings.trace_filter):
        remark(doubt)
    reader = netns_counters.CounterReader()
    rules = RulesetWatch(read_ruleset, time.monotonic_ns)
    namespaces = NamespaceWatch(
        source, netns.gone, lambda wanted: living_of(reader.read(wanted)), time.monotonic_ns
    )
    return Live(
        source,
        analysis,
        Printer(output),
        recorder,
        reader.read,
        rescuing=rescuing,
        name=Namer(source.drop_reasons, source.stack, rules),
        describe=ListenerWatch().changed,
        kernel_log=kernel_log,
        namespaces=namespaces,
        notes=(elsewhere,) if elsewhere else (),
        doubts=lambda: doubts(settings.trace_filter),
        clock_note=run_clock.note,
    )


def exit_status(summary: Summary) -> int:
    """The exit status for a summary, as listed in README.md."""
    if summary.ever_stuck or summary.data_lost:
        return EXIT_STUCK
    known = not (summary.unwatched or summary.nothing_judged)
    return EXIT_NOTHING_STUCK if known else EXIT_NOT_KNOWN
