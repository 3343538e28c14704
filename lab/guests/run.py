"""Runs a command in a throw-away guest with a real Debian kernel, or natively if possible.

virtme-ng boots the guest over this machine's own file system, under software emulation unless KVM
works. The command's exit status, standard output and standard error come back separately, without
any other output in them.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from selectors import EVENT_READ, DefaultSelector
from typing import ClassVar, TextIO

from lab.ending import sigterm_ends_program
from lab.errors import LabError
from lab.guests import machine
from lab.guests.machine import GuestOptions, Wire
from lab.guests.packages import cached_busybox, cached_kernel
from lab.guests.trial import kvm_works, tracing_refusal

__all__ = ["GuestDiedError", "GuestError", "GuestOptions", "GuestResult", "Wire", "run_in_guest"]

TIMEOUT_STATUS = 124
"""The exit status of a command that was cut off, as in coreutils' timeout."""
HARNESS_STATUS = 125
"""The exit status if the harness failed, not the command, as in coreutils' env."""
_CHUNK_BYTES = 65536
_LOG_TAIL_LINES = 15
_MORTAL = ("setpriv", "--pdeathsig", "ALRM", "timeout", "--signal=KILL", "0")
"""Prefix of a command: when the thread that started the command ends for any reason, `timeout`
kills the command's process group. The limit 0 means no time limit."""
_thread = threading.local()
"""In a thread of `guests_beside`, `stop` holds the descriptor that signals its guest to end."""

Sink = Callable[[bytes], object]
"""Receives each piece of a stream as it arrives."""


class GuestError(LabError):
    """No guest could be started."""

    exit_status: ClassVar[int] = HARNESS_STATUS


class GuestDiedError(GuestError):
    """The guest did not boot, or died or hung before the command ended."""

    def __init__(self, what: str, why: str, console: str) -> None:
        remedy = "increase --timeout or --memory, or try another --kernel"
        super().__init__(what, why, remedy)
        self.console = console
        """All output of the guest's console and of QEMU."""

    def lines(self) -> list[str]:
        """The last lines of the console, then the message."""
        tail = self.console.splitlines()[-_LOG_TAIL_LINES:]
        return [*(f"  console: {line}" for line in tail), *super().lines()]


@dataclass(frozen=True)
class GuestResult:
    """The result of a command."""

    status: int
    """Exit status; 128 + signal number for a signal; TIMEOUT_STATUS if cut off."""
    stdout: bytes
    """Empty if a sink received the output."""
    stderr: bytes
    timed_out: bool
    native: bool
    kernel_log: str
    """Output of the guest's console (warnings and worse) and of QEMU; empty if native."""
    boot_s: float
    """From the start of the harness to the start of the command."""
    total_s: float


def choose_native(options: GuestOptions, refusal: Callable[[], str | None]) -> bool:
    """Whether to run on this machine's kernel. Raises GuestError if options conflict."""
    if options.native == "always":
        if options.needs_guest:
            raise GuestError(
                "cannot run natively",
                "a kernel, a root tree, a wire or an instruction clock needs a guest",
                "leave out --native always",
            )
        return True
    return options.native == "auto" and not options.needs_guest and refusal() is None


def run_in_guest(
    command: Sequence[str],
    *,
    options: GuestOptions | None = None,
    stdout_sink: Sink | None = None,
    stderr_sink: Sink | None = None,
    cwd: Path | None = None,
) -> GuestResult:
    """Run a command to its end or to the time limit, and kill its remaining processes.

    Without sinks, the result contains the output. Raises GuestError, also for a command that has
    hung, or CacheError if there is no kernel to boot.
    """
    options = options or GuestOptions()
    directory = Path.cwd() if cwd is None else cwd
    collected: tuple[list[bytes], list[bytes]] = ([], [])
    sinks = (stdout_sink or collected[0].append, stderr_sink or collected[1].append)
    native = choose_native(options, tracing_refusal)
    run = _run_natively if native else _run_guest
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="tcpstuck-guest-") as scratch:
        outcome = run(command, options, directory, Path(scratch), sinks)
    return GuestResult(
        status=TIMEOUT_STATUS if outcome.status is None else outcome.status,
        stdout=b"".join(collected[0]),
        stderr=b"".join(collected[1]),
        timed_out=outcome.status is None,
        native=native,
        kernel_log=outcome.kernel_log,
        boot_s=outcome.boot_s,
        total_s=time.monotonic() - started,
    )


def run_and_tell(
    command: Sequence[str], options: GuestOptions, says: Sink, complains: Sink, cwd: Path
) -> int:
    """Run a command, and write guest errors to `complains`; returns the exit status of either."""
    try:
        result = run_in_guest(
            command, options=options, stdout_sink=says, stderr_sink=complains, cwd=cwd
        )
    except LabError as error:
        complains("".join(f"{line}\n" for line in error.lines()).encode())
        return error.exit_status
    if result.timed_out:
        complains(f"lab: cut off after {options.timeout_s:g} s: {command[0]}\n".encode())
    return result.status


@contextlib.contextmanager
def guests_beside(count: int) -> Iterator[ThreadPoolExecutor]:
    """Threads for `count` guests at a time; when the block ends for any reason, all guests end."""
    stop, held = os.pipe()
    pool = ThreadPoolExecutor(count, initializer=setattr, initargs=(_thread, "stop", (stop,)))
    with sigterm_ends_program():
        try:
            yield pool
        finally:
            os.close(held)
            pool.shutdown(cancel_futures=True)
            # Not reached if a second signal interrupts the wait: the threads still use `stop`.
            os.close(stop)


class _SilentError(Exception):
    """A process printed nothing for longer than it may."""


@dataclass(frozen=True)
class _Outcome:
    status: int | None
    """None if the time limit passed."""
    kernel_log: str = ""
    boot_s: float = 0.0


def _run_natively(
    command: Sequence[str],
    options: GuestOptions,
    cwd: Path,
    scratch: Path,
    sinks: tuple[Sink, Sink],
) -> _Outcome:
    script = scratch / machine.SCRIPT_FILE
    script.write_text(machine.native_script(command, options.environment))
    with _session(["/bin/bash", str(script)], cwd=cwd, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        streams = {process.stdout.fileno(): sinks[0], process.stderr.fileno(): sinks[1]}
        try:
            ended = _pump(process.pid, streams, options)
        except _SilentError as error:
            raise GuestError("the command hung", str(error), "look at its output") from None
    if not ended:
        return _Outcome(None)
    return _Outcome(process.returncode if process.returncode >= 0 else 128 - process.returncode)


def _run_guest(
    command: Sequence[str],
    options: GuestOptions,
    cwd: Path,
    control: Path,
    sinks: tuple[Sink, Sink],
) -> _Outcome:
    arguments = _prepare(command, options, cwd, control)
    log = bytearray()
    pipes = [control / machine.STDOUT_PIPE, control / machine.STDERR_PIPE]
    began = time.time()
    with contextlib.ExitStack() as stack:
        streams: dict[int, Sink] = {}
        for pipe, sink in zip(pipes, sinks):
            os.mkfifo(pipe)
            reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
            stack.callback(os.close, reader)
            streams[reader] = sink
        environment = {**os.environ, "TMPDIR": str(control)}
        environment["PATH"] = f"{environment.get('PATH', '')}:/usr/sbin:/sbin"
        wire = () if options.wire is None else (options.wire.descriptor,)
        process = stack.enter_context(
            _session(arguments, cwd=Path("/"), env=environment, pass_fds=wire)
        )
        assert process.stdout is not None
        streams[process.stdout.fileno()] = log.extend
        try:
            ended = _pump(process.pid, streams, options)
        except _SilentError as error:
            console = log.decode(errors="replace")
            raise GuestDiedError("the guest hung", str(error), console) from None
    text = log.decode(errors="replace")
    marker = control / machine.STARTED_FILE
    if not marker.exists():
        why = "QEMU ended early" if ended else f"not within the limit of {options.timeout_s:g} s"
        raise GuestDiedError("the guest did not boot", why, text)
    boot_s = marker.stat().st_mtime - began
    return _Outcome(_status(control, text) if ended else None, text, boot_s)


def _prepare(command: Sequence[str], options: GuestOptions, cwd: Path, control: Path) -> list[str]:
    """Write the guest's script, and return the command line that boots the guest."""
    virtme = shutil.which("virtme-run", path=f"{Path(sys.executable).parent}:{os.defpath}")
    if virtme is None or shutil.which("qemu-system-x86_64") is None:
        missing = "virtme-ng" if virtme is None else "qemu-system-x86_64"
        raise GuestError("cannot boot a guest", f"{missing} is missing", "run `make setup`")
    for directory in (options.root, *options.shares, *options.views):
        if not directory.is_dir():
            why = f"{directory} is not a directory"
            raise GuestError("cannot export a directory", why, "name an existing one")
    kernel = cached_kernel() if options.kernel is None else options.kernel
    if not kernel.is_file():
        raise GuestError("cannot boot a guest", f"{kernel} is not a file", "name a kernel image")
    (control / machine.SCRIPT_FILE).write_text(machine.boot_script(command, options, cwd))
    use_kvm = not options.icount and kvm_works(kernel)
    arguments = machine.virtme_arguments(
        options, kernel=kernel, busybox=cached_busybox(), control=control, use_kvm=use_kvm
    )
    return [virtme, *arguments]


def _status(control: Path, console: str) -> int:
    """The command's exit status, as recorded by the guest."""
    written = control / machine.STATUS_FILE
    digits = written.read_text().strip() if written.exists() else ""
    if not digits.isdigit():
        raise GuestDiedError(
            "the guest died before the command ended", "it left no exit status", console
        )
    return int(digits)


@contextlib.contextmanager
def _session(
    arguments: list[str],
    *,
    cwd: Path,
    stderr: int = subprocess.STDOUT,
    env: dict[str, str] | None = None,
    pass_fds: Sequence[int] = (),
) -> Iterator[subprocess.Popen[bytes]]:
    """A process in its own session; when the block ends, the process group is killed."""
    with sigterm_ends_program():
        process = subprocess.Popen(
            [*_MORTAL, *arguments],
            cwd=cwd,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            start_new_session=True,
            pass_fds=pass_fds,
        )
        try:
            yield process
        finally:
            # Kill before the wait: until the leader is reaped, the group's id cannot be reused.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            for stream in (process.stdout, process.stderr):
                if stream is not None:
                    stream.close()


def _pump(pid: int, streams: dict[int, Sink], options: GuestOptions) -> bool:
    """Pass output to the sinks until the process ends; returns False at the limit or at `stop`.

    Raises _SilentError.
    """
    heard = time.monotonic()
    deadline = heard + options.timeout_s
    silence_s = math.inf if options.silence_s is None else options.silence_s
    exited, stop = os.pidfd_open(pid), getattr(_thread, "stop", ())
    with DefaultSelector() as selector, contextlib.closing(os.fdopen(exited, "rb", 0)):
        for watched in (exited, *stop, *streams):
            selector.register(watched, EVENT_READ)
        for stream in streams:
            os.set_blocking(stream, False)
        while True:
            wait_s = min(deadline, heard + silence_s) - time.monotonic()
            ready = {key.fd for key, _ in selector.select(max(0.0, wait_s))}
            for stream in ready & streams.keys():
                if _hand_on(stream, streams[stream]) is False:
                    selector.unregister(stream)
            if exited in ready:
                _hand_on_the_rest(streams)
                return True
            now = time.monotonic()
            if ready.intersection(stop) or now >= deadline:
                return False
            heard = now if ready else heard
            if now >= heard + silence_s:
                raise _SilentError(f"it printed nothing for {silence_s:g} s")


def _hand_on_the_rest(streams: dict[int, Sink]) -> None:
    for stream, sink in streams.items():
        while _hand_on(stream, sink):
            pass


def _hand_on(stream: int, sink: Sink) -> bool | None:
    """Pass one piece to the sink; returns None if none is available now, False at EOF."""
    try:
        piece = os.read(stream, _CHUNK_BYTES)
    except BlockingIOError:
        return None
    if piece:
        sink(piece)
    return bool(piece)


def write_through(stream: TextIO) -> Sink:
    """A sink that writes each piece to a standard stream at once."""

    def write(piece: bytes) -> None:
        stream.buffer.write(piece)
        stream.buffer.flush()

    return write
