"""`--client`: from the options to the exit status."""

from __future__ import annotations

import argparse
import contextlib
import socket
import sys
import time
from typing import TYPE_CHECKING

from tcpstuck_bpf.app.ready_file import remove_ready_file
from tcpstuck_bpf.client.analysis import ClientAnalysis
from tcpstuck_bpf.client.owners import owners_of
from tcpstuck_bpf.client.printing import output_for, refuse_other_verdicts
from tcpstuck_bpf.client.recording import ClientRecorder
from tcpstuck_bpf.client.sockets import SocketReader, Wanted, refuse_unless_readable
from tcpstuck_bpf.client.steps import ClientHeader
from tcpstuck_bpf.client.summary import exit_status
from tcpstuck_bpf.client.watch import Watch
from tcpstuck_bpf.console import remark, say, unforeseen
from tcpstuck_bpf.ending import Ending
from tcpstuck_bpf.errors import (
    EXIT_CANNOT_TRACE,
    EXIT_INTERRUPTED,
    CannotTraceError,
    UsageError,
    as_root_remedy,
    words_of,
)
from tcpstuck_bpf.host import netns, netns_owners
from tcpstuck_bpf.host.wall_clock import RunClock
from tcpstuck_bpf.interrupts import Interrupts
from tcpstuck_bpf.model import SECOND_NS, TraceFilter, address_text
from tcpstuck_bpf.option_values import listener_address, ports_of, ports_text
from tcpstuck_bpf.preflight import refuse_unusable_files, refuse_without_rescue
from tcpstuck_bpf.steps import WallClock
from tcpstuck_bpf.terminal import understands_escapes

if TYPE_CHECKING:
    from tcpstuck_bpf.client.mender import Mender

TIMEOUT_NS = 3 * SECOND_NS
"""Default of --timeout."""


def _refuse(options: argparse.Namespace) -> None:
    """Raises UsageError for options that fit no run on the client's side."""
    if not options.port:
        raise UsageError(
            "--client needs -p",
            "only the port says in which connections the server speaks first",
            "write for example --client -p 3306",
        )
    refuse_other_verdicts(options.only, "--client")
    refuse_without_rescue(options)
    if options.rescue and "all" in options.rescue:
        raise UsageError(
            "--rescue=all cannot be combined with --client",
            "on the client's side the connections are this host's own, so all are known",
            "write --rescue, --rescue=reset or --rescue=dry-run",
        )


def _refuse_unless_able(mode: frozenset[str]) -> None:
    """Raises CannotTraceError where this process or kernel cannot mend. A dry run needs nothing."""
    if "dry-run" in mode:
        return
    try:
        socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW).close()
    except PermissionError as error:
        raise CannotTraceError(
            "--rescue may not send packets",
            f"a raw socket takes root or CAP_NET_RAW: {words_of(error)}",
            f"{as_root_remedy()}; without --rescue, or with --rescue=dry-run, the tool lists the "
            "waiting connections without root",
        ) from error
    if "reset" in mode:
        # Imported only where it is used: runs without --rescue need none of it.
        from tcpstuck_bpf.client.socket_reset import kernel_can_end_sockets

        if not kernel_can_end_sockets():
            raise CannotTraceError(
                "--rescue=reset cannot end connections here",
                "this kernel lacks CONFIG_INET_DIAG_DESTROY",
                "write --rescue, which mends and asks without it; restarting a process ends its "
                "connections",
            )


def _mender(options: argparse.Namespace, reader: SocketReader) -> Mender:
    """What --rescue stands for on the client's side."""
    # Imported only where it is used: runs without --rescue need none of it.
    from tcpstuck_bpf.client.mender import Mender
    from tcpstuck_bpf.client.planner import PER_SERVER, MendPolicy, Planner
    from tcpstuck_bpf.rescue.policy import RescuePolicy
    from tcpstuck_bpf.rescue.raw_socket import Resender

    limits = RescuePolicy(
        rate=options.rescue_rate,
        rate_per_address=PER_SERVER,
        excluded=options.rescue_exclude,
        after_expiry=options.rescue_late,
    )
    return Mender(
        Planner(MendPolicy(limits, reset="reset" in options.rescue)),
        reader.again,
        Resender(),
        time.monotonic_ns,
        dry_run="dry-run" in options.rescue,
        late=options.rescue_late,
    )


def _wanted(options: argparse.Namespace) -> Wanted:
    return Wanted(
        ports_of(options),
        options.family,
        listener_address(options),
        netns.resolve(options.netns),
        None if options.netns == "all" else netns.way(options.netns),
        options.pid,
    )


def _watched(options: argparse.Namespace, wanted: Wanted) -> str:
    """What is watched, as text."""
    words = [f"port{'s' * (len(wanted.ports) > 1)} {ports_text(wanted.ports)}"]
    if wanted.address is not None:
        words.append(f"of {address_text(wanted.address)}")
    if wanted.family is not None:
        words.append(f"over IPv{wanted.family}")
    if wanted.netns is not None:
        words.append(f"in network namespace {options.netns}")
    if wanted.pid is not None:
        words.append(f"by process {wanted.pid}")
    return " ".join(words)


def _header(options: argparse.Namespace, wanted: Wanted, clock: WallClock) -> ClientHeader:
    return ClientHeader(
        TraceFilter(
            ports=wanted.ports,
            family=wanted.family,
            listener_address=wanted.address,
            netns=wanted.netns,
        ),
        TIMEOUT_NS if options.timeout is None else options.timeout,
        clock,
        _watched(options, wanted),
        wanted.pid,
        netns.own_netns(),
        netns_owners.KnownNames(),
    )


def watch_clients(options: argparse.Namespace) -> int:
    """Watch the client's side by the options. Returns the exit status.

    Raises UsageError or CannotTraceError if the run cannot begin.
    """
    interrupts = Interrupts()
    _refuse(options)
    with contextlib.suppress(OSError):  # writing it later fails for the same reason
        remove_ready_file(options.ready_file)
    refuse_unusable_files(options)
    wanted = _wanted(options)
    refuse_unless_readable(wanted)
    if options.rescue is not None:
        _refuse_unless_able(options.rescue)
    reader = SocketReader(wanted)
    with Ending(remark) as ending:
        ending.add("files were not closed", reader.close)
        clock = RunClock()
        header = _header(options, wanted, clock.clock)
        output = output_for(options, header)
        recorder = None if options.record is None else ClientRecorder(options.record, header)
        if recorder is not None:
            ending.add("the recording is incomplete", recorder.close)
        ending.add(
            f"the ready file {options.ready_file} was not removed",
            lambda: remove_ready_file(options.ready_file),
        )
        ending.add("the status line was not cleared", output.close)
        if not understands_escapes(sys.stdout):
            remark(f"watching connections to {header.watched}; Ctrl-C ends with a summary")
        mender = None if options.rescue is None else _mender(options, reader)
        if mender is not None:
            ending.add("the rescue's sockets were not closed", mender.close)
        watch = Watch(
            reader,
            ClientAnalysis(header),
            output,
            owners_of,
            recorder=recorder,
            clock_note=clock.note,
            mending=mender,
        )
        # Added last, so called first: further Ctrl-C must not interrupt the ending.
        ending.add("signals", interrupts.ignore)
        interrupts.live = watch
        summary = watch.run(options.duration, options.ready_file)
    if watch.failure is not None:
        say(unforeseen(watch.failure, "the run ended early"))
        return exit_status(summary) or EXIT_CANNOT_TRACE
    if interrupts.interrupted and not summary.verdicts:
        return EXIT_INTERRUPTED
    return exit_status(summary)
