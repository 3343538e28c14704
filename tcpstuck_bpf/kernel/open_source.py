"""The start of tracing on the running kernel: compiles, loads, attaches and tries the programs."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import resource
import struct
import time
from collections.abc import Iterator
from pathlib import Path

from tcpstuck_bpf import wire
from tcpstuck_bpf.console import under_way
from tcpstuck_bpf.ending import Ending, close_all
from tcpstuck_bpf.errors import CannotTraceError
from tcpstuck_bpf.kernel import artifact, artifact_store, attach_plan, features, probes, trial
from tcpstuck_bpf.kernel.artifact import Artifact
from tcpstuck_bpf.kernel.artifact_store import BuiltPrograms
from tcpstuck_bpf.kernel.attach_plan import ATTACH_ALL, AttachRequest, ProbeRefusedError
from tcpstuck_bpf.kernel.compilation import (
    Compilation,
    CompilerError,
    compile_in_child,
    decoded,
    require_bcc,
)
from tcpstuck_bpf.kernel.description import describe_running
from tcpstuck_bpf.kernel.kept_files import KeptFiles, cache_directory
from tcpstuck_bpf.kernel.layout import PER_CPU_OFFSET_SYMBOL
from tcpstuck_bpf.kernel.loader import LoadedPrograms, LoadError
from tcpstuck_bpf.kernel.probes import Probe
from tcpstuck_bpf.kernel.ring_buffer import RingBuffer, require_libbpf
from tcpstuck_bpf.kernel.running_kernel import RunningKernel
from tcpstuck_bpf.kernel.softirqs import mode_to_try
from tcpstuck_bpf.kernel.source import EVENT_PAGES, MOST_REPEATS_UNREAD, KernelSource
from tcpstuck_bpf.kernel.tables import Tables
from tcpstuck_bpf.model import Coverage, TraceSettings

MAX_NAMESPACES = 1024
MAX_KNOWN_CLIENTS = 65_536
MAX_LISTENERS = 4096
MAX_CHOSEN = 4096
MAX_STACKS = 1024
MAX_TASKS = 4096
"""Tasks whose softirqs are kept apart, on kernels where softirqs preempt each other."""


def table_entries(capacity: int, *, softirqs_interleave: bool) -> dict[str, int]:
    """Entries of each table whose size the text leaves open; bytes for the ring buffer."""
    entries = {
        "awaiting_ack": capacity,
        "synacks": capacity,
        "counts": MAX_NAMESPACES,
        "listeners": MAX_LISTENERS,
        "events": EVENT_PAGES * resource.getpagesize(),
        "known_clients": MAX_KNOWN_CLIENTS,
        "chosen": MAX_CHOSEN,
        "stacks": MAX_STACKS,
    }
    return {**entries, "scratches": MAX_TASKS} if softirqs_interleave else entries


class Start:
    """One start. It holds what is needed until the programs are attached."""

    def __init__(self, settings: TraceSettings, request: AttachRequest) -> None:
        self._timings: dict[str, float] = {}
        self._notes: list[str] = []
        self._settings = settings
        self._request = request
        self._programs: LoadedPrograms | None = None
        self._ring: RingBuffer | None = None
        self._at_work_on: Probe | None = None
        features.require_privileges()
        require_libbpf()
        self._built = None if request.programs is None else BuiltPrograms(Path(request.programs))
        self._kept = KeptFiles(cache_directory()) if request.keep else None
        self._running = RunningKernel(self._kept)

    def source(self) -> KernelSource:
        """Attach the programs and try them. Called once; raises CannotTraceError."""
        request = self._request
        with self._timed("layout"):
            symbols, table = self._running.symbols(
                [probe.symbol for probe in request.probes], PER_CPU_OFFSET_SYMBOL
            )
            wants_counters = probes.KERNEL_COUNTERS not in request.left_out
            self._kernel = describe_running(
                request.types or self._running, table if wants_counters else None
            )
        drop_reasons = self._kernel.drop_reasons
        layout = self._kernel.layout
        left_out = dict(request.left_out)
        if layout.drop_obstacle is not None:
            left_out.setdefault(probes.KFREE_SKB, layout.drop_obstacle)
        mode, attached, gaps = attach_plan.attach(
            symbols,
            dataclasses.replace(request, types=self._kernel.types, left_out=left_out),
            layout.has_counters,
            self._start,
            self._kernel.softirq_gaps,
        )
        coverage = Coverage(mode, frozenset(probe.function for probe in attached), gaps)
        with self._timed("trial"):
            try:
                self._begin()
            except BaseException:
                self._give_up()
                raise
        self._running.keep()
        if self._kept is not None:
            self._notes += self._kept.notes
        assert self._programs is not None
        assert self._ring is not None
        opened = KernelSource(
            self._programs,
            self._ring,
            self._tables,
            coverage,
            table_capacity=self._settings.max_handshakes,
            drop_reasons=drop_reasons,
            timings=self._timings,
            notes=self._notes,
        )
        # The types take 20 MB. They and the built programs are not needed any more.
        del self._kernel, self._running, self._built, self._request
        _give_memory_back()
        return opened

    @contextlib.contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        begun = time.monotonic()
        yield
        self._timings[what] = time.monotonic() - begun

    def _start(self, wanted: tuple[Probe, ...]) -> str:
        """Compile, load and attach in the requested mode; `auto` falls back to kprobes."""
        gaps = self._kernel.softirq_gaps
        wished = mode_to_try(self._settings.probe_mode, gaps, features.has_kprobes())
        obstacle = None
        if wished != "kprobe":
            obstacle = features.fentry_obstacle() or attach_plan.fentry_obstacle(
                self._kernel.types, wanted
            )
        if obstacle and wished == "fentry":
            raise CannotTraceError(
                "fentry cannot be used on this kernel", obstacle, "use --probe-mode kprobe"
            )
        if wished != "kprobe" and not obstacle:
            try:
                return self._attempt(wanted, "fentry")
            except ProbeRefusedError:
                raise
            except CannotTraceError:
                if wished == "fentry" or not features.has_kprobes():
                    raise
        if not features.has_kprobes():
            raise features.refusal(obstacle or "not asked for", wished)
        return self._attempt(wanted, "kprobe")

    def _attempt(self, wanted: tuple[Probe, ...], mode: str) -> str:
        try:
            self._load(wanted, mode)
        except (LoadError, CompilerError) as error:
            self._give_up()
            refusal = features.refusal(str(error), self._settings.probe_mode)
            if self._at_work_on is not None and not self._at_work_on.required:
                raise ProbeRefusedError(self._at_work_on.function, refusal) from error
            raise refusal from error
        except BaseException:
            self._give_up()
            raise
        return mode

    def _load(self, wanted: tuple[Probe, ...], mode: str) -> None:
        self._at_work_on = None
        allow_locked_memory()
        with self._timed("compile"):
            made = self._artifact(self._kernel.compilation(wanted, mode))
        check_sizes(made)
        entries = table_entries(
            self._settings.max_handshakes, softirqs_interleave=bool(self._kernel.softirq_gaps)
        )
        with self._timed("load"):
            self._programs = programs = LoadedPrograms(made, entries)
            self._configure(programs)
            for probe in probes.of_mode(wanted, mode):
                self._at_work_on = probe
                self._load_probe(programs, probe, mode)
        with self._timed("attach"):
            for probe in attach_plan.attach_order(wanted, mode):
                self._at_work_on = probe
                _attach(programs, probe, mode)
        self._at_work_on = None
        # A batch lookup walks over all empty buckets. Meanwhile the kernel runs no kprobe program
        # on that CPU (bpf_disable_instrumentation), so packets that an interrupt brings would not
        # be seen. Finding the next key does not disable programs.
        self._tables = Tables(
            programs.maps,
            self._settings.max_handshakes,
            in_batches=mode == "fentry",
            rescue=self._request.rescue,
        )
        self._ring = RingBuffer(programs.maps["events"].file)

    def _artifact(self, wanted: Compilation) -> Artifact:
        """The built artifact, the kept one, or one compiled now and kept.

        Raises CompilerError and CannotTraceError.
        """
        if self._built is not None:
            return self._built.find(wanted)
        found = None if self._kept is None else artifact_store.find_kept(self._kept, wanted)
        if found is not None:
            return found
        require_bcc()
        first = "" if self._kept is None else " (first start on this kernel)"
        with under_way(f"compiling the programs{first}"):
            data = compile_in_child(wanted)
        if self._kept is not None:
            artifact_store.keep(self._kept, wanted, data)
        return decoded(data, wanted)

    def _load_probe(self, programs: LoadedPrograms, probe: Probe, mode: str) -> None:
        if probe.raw_tracepoint is not None:
            if not self._load_typed(programs, probe):
                programs.load(artifact.RAW_TRACEPOINT, probe.raw_tracepoint)
        elif mode == "fentry":
            # The number comes from the kernel's own BTF, even if a file describes its structs.
            number = self._running.function(probe.function)
            if number is None:
                raise LoadError(f"{probe.function} is not in the running kernel's BTF")
            if probe.fentry:
                programs.load(artifact.FENTRY, probe.function, number)
            programs.load(artifact.FEXIT, probe.function, number)
        else:
            for name in (probe.kprobe_entry, probe.kprobe_return):
                if name is not None:
                    programs.load(artifact.KPROBE, name)

    def _load_typed(self, programs: LoadedPrograms, probe: Probe) -> bool:
        """Load the tp_btf variant of a tracepoint's program; False where the kernel has none."""
        if probe.typed_tracepoint is None:
            return False
        try:
            number = self._running.tracepoint_type(probe.function)
            if number is None:
                return False
            programs.load(artifact.TYPED_TRACEPOINT, probe.typed_tracepoint, number)
        except (CannotTraceError, LoadError):
            # The kernel has no BTF (a file describes its structs), or no tp_btf programs.
            return False
        return True

    def _configure(self, programs: LoadedPrograms) -> None:
        """Set the ports, and a filter that excludes every packet until `_begin`. They count."""
        self._set_filter(programs, trial.NOBODYS_NETNS)
        for index, bits in wire.port_bits(self._settings.trace_filter.ports).items():
            programs.maps["wanted_ports"].update(_index(index), struct.pack("=Q", bits))

    def _set_filter(self, programs: LoadedPrograms, netns: int | None) -> None:
        wanted = dataclasses.replace(self._settings.trace_filter, netns=netns)
        settings = dataclasses.replace(self._settings, trace_filter=wanted)
        config = wire.encode_config(
            settings, self._kernel.layout.per_cpu_offset_table, MOST_REPEATS_UNREAD
        )
        programs.maps["config"].update(_index(0), config)

    def _begin(self) -> None:
        """Check that the kernel runs the programs, then set the requested filter.

        Raises CannotTraceError where it does not run them.
        """
        assert self._programs is not None
        try:
            netns = trial.cookie_handshake()
        except OSError as error:
            self._notes.append(
                f"could not check that the programs run: no handshake of our own: {error}"
            )
        else:
            # The counts of other namespaces are dropped too: another instance may have made its
            # own handshake meanwhile.
            counted = self._tables.take_counts().get(netns, {})
            trial.require_seen(counted, has_counters=self._kernel.layout.has_counters)
        self._set_filter(self._programs, self._settings.trace_filter.netns)

    def _give_up(self) -> None:
        """Close after a failed attempt. An error here becomes a note, so the first one is shown."""
        with Ending(self._notes.append) as ending:
            ending.add("the programs were not detached cleanly", self._close)

    def _close(self) -> None:
        ring, programs = self._ring, self._programs
        self._ring = self._programs = None
        close_all(one.close for one in (ring, programs) if one is not None)


def _index(number: int) -> bytes:
    """The key of an array map."""
    return struct.pack("=I", number)


def _attach(programs: LoadedPrograms, probe: Probe, mode: str) -> None:
    function, typed, raw = probe.function, probe.typed_tracepoint, probe.raw_tracepoint
    if typed is not None and programs.has(artifact.TYPED_TRACEPOINT, typed):
        programs.attach(artifact.TYPED_TRACEPOINT, typed)
    elif raw is not None:
        programs.attach(artifact.RAW_TRACEPOINT, raw, function)
    elif mode == "fentry":
        # The fexit program first: until the fentry program runs it finds an empty scratch and does
        # nothing.
        programs.attach(artifact.FEXIT, function)
        if probe.fentry:
            programs.attach(artifact.FENTRY, function)
    else:
        assert probe.kprobe_return is not None
        programs.attach(artifact.KPROBE, probe.kprobe_return, function, at_return=True)
        if probe.kprobe_entry is not None:
            programs.attach(artifact.KPROBE, probe.kprobe_entry, function)


_SIZES = {
    "awaiting_ack": (wire.KEY.size, wire.HANDSHAKE.size),
    "config": (4, wire.CONFIG.size),
    "repeats": (4, 4),
    "counts": (wire.NETNS_KEY.size, wire.COUNTS.size),
    "crowded_out": (4, wire.COUNTS.size),
    "listeners": (wire.LISTENER_KEY.size, wire.LISTENER_FACTS.size),
    "synacks": (wire.KEY.size, wire.SYNACK.size),
    "known_clients": (wire.KNOWN_CLIENT.size, 8),
    "chosen": (wire.KEY.size, 1),
    "losses": (4, 8),
}


def check_sizes(made: Artifact) -> None:
    """Raises CannotTraceError where key and value sizes of the tables differ from `wire`'s."""
    sizes = {one.name: (one.key_bytes, one.value_bytes) for one in made.maps}
    differing = {
        name: (sizes[name], ours) for name, ours in _SIZES.items() if sizes.get(name, ours) != ours
    }
    if differing:
        raise CannotTraceError(
            "the BPF text and the Python code are of different versions",
            f"sizes of their structs differ: {differing}",
            "install tcpstuck-trace again",
        )


def _give_memory_back() -> None:
    """Return freed memory to the kernel, where the C library can: 6 MB of the types."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))


def allow_locked_memory() -> None:
    """Lift RLIMIT_MEMLOCK: kernels before 5.11 charge maps to it (5d9d6e7a9b61's series)."""
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY,) * 2)


def open_source(settings: TraceSettings, request: AttachRequest = ATTACH_ALL) -> KernelSource:
    """Trace the running kernel. Raises CannotTraceError where it cannot be traced."""
    return Start(settings, request).source()
