"""The running kernel as a source of observations. The only module that imports bcc."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import os
import resource
import tempfile
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from tcpstuck_bpf import features, places, probes, typed_tracepoint, wire
from tcpstuck_bpf.bpf_trial import RefusedError, missed_runs
from tcpstuck_bpf.btf import Btf, read_running_kernel
from tcpstuck_bpf.errors import CannotTraceError
from tcpstuck_bpf.kernel_types import KernelTypes
from tcpstuck_bpf.layout import PER_CPU_OFFSET_SYMBOL, find_layout, header_text
from tcpstuck_bpf.model import (
    Coverage,
    Event,
    HandshakeId,
    ListenerFacts,
    NetnsCounts,
    Sweep,
    TraceSettings,
)
from tcpstuck_bpf.probes import ATTACH_ALL, EVERY_PROBE, AttachRequest, Probe, ProbeRefusedError
from tcpstuck_bpf.softirqs import BH_LOCK_OPTION, mode_to_try, softirq_gaps
from tcpstuck_bpf.tables import Tables

EVENT_PAGES = 256
MAX_NAMESPACES = 1024
MAX_KNOWN_CLIENTS = 65_536
MAX_LISTENERS = 4096
MAX_CHOSEN = 4096
MAX_STACKS = 1024
MAX_TASKS = 4096
"""Whose softirqs are kept apart, where they may preempt each other."""
LOSSES = (
    "namespaces_uncounted",
    "cookies_unmatched",
    "listeners_unknown",
    "stacks_unknown",
    "tasks_unknown",
)

# BCC optimizes what clang hands it, so clang need not do the same before; and nobody debugs the
# programs by their debugging information. A third of the compilation's time, the same code.
_FASTER_COMPILATION = ("-Xclang", "-disable-llvm-passes", "-g0")


def program_directory() -> Path:
    """Where the BPF text is: inside the installed package, or beside it in a source tree."""
    package = Path(__file__).resolve().parent
    for candidate in (package / "bpf", package.parent / "bpf"):
        if (candidate / "tcpstuck.bpf.c").is_file():
            return candidate
    raise CannotTraceError(
        "the BPF program text is missing",
        f"neither {package / 'bpf'} nor {package.parent / 'bpf'} has tcpstuck.bpf.c",
        "install tcpstuck-trace again",
    )


def _import_bcc() -> ModuleType:
    try:
        import bcc
    except ImportError as error:
        raise CannotTraceError(
            "BCC's Python module cannot be imported",
            f"import bcc: {error}",
            "install it from the distribution (apt install python3-bpfcc, dnf install python3-bcc) "
            "in an environment that sees system packages; `bcc` on PyPI is another thing",
        ) from error
    if not hasattr(bcc, "BPF"):
        raise CannotTraceError(
            "BCC's Python module is not the one that is imported",
            f"{getattr(bcc, '__file__', 'bcc')} has no BPF class",
            "remove the PyPI package `bcc` and install the distribution's python3-bpfcc",
        )
    module: ModuleType = bcc
    return module


@contextlib.contextmanager
def _compiler_messages() -> Iterator[list[str]]:
    """Collect what libbcc, with the compiler and the verifier, writes to file descriptor 2."""
    messages: list[str] = []
    saved = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield messages
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            file.seek(0)
            messages += file.read().decode("utf-8", "replace").splitlines()


def _problem(error: Exception, messages: list[str]) -> str:
    """One line: what bcc raised, and the most telling line of what libbcc printed."""
    telling = [line for line in messages if "error" in line.lower() or "not permitted" in line]
    return ": ".join([str(error), *(telling or messages)[:1]]).replace("\n", " ")


def bcc_version() -> str:
    """BCC's version and where its module is. Raises CannotTraceError where there is none."""
    bcc = _import_bcc()
    return f"{getattr(bcc, '__version__', 'of unknown version')} ({bcc.__file__})"


def compile_programs(
    header: str, wanted: Collection[Probe], mode: str, capacity: int, architecture: str = ""
) -> Any:
    """BCC's object with our text compiled and its tables made; no program is loaded.

    `header` is kernel_layout.h, `capacity` the entries of the awaiting-ACK table, `architecture`
    BCC's name, such as `arm64`, of another one than this machine's. Raises CannotTraceError
    without BCC, and whatever BCC raises where the kernel or the compiler refuses.
    """
    bcc, directory = _import_bcc(), program_directory()
    # BCC looks for kernel headers here instead of in /lib/modules.
    os.environ["BCC_KERNEL_SOURCE"] = str(directory / "stub")
    # Who builds kernels may have ARCH set for make; BCC would read arguments from the registers
    # of that architecture, and none of the programs would notice.
    os.environ.pop("ARCH", None)
    if architecture:
        os.environ["ARCH"] = architecture

    class Bpf(bcc.BPF):  # type: ignore[misc,name-defined]
        """BCC's class, which would load and attach kfunc programs while constructing."""

        def _trace_autoload(self) -> None:
            """Attach nothing: compile, load and attach are separate steps here."""

    with tempfile.TemporaryDirectory(prefix="tcpstuck-") as generated:
        Path(generated, "kernel_layout.h").write_text(header, encoding="ascii")
        flags = [
            *_FASTER_COMPILATION,
            f"-I{generated}",
            f"-I{directory}",
            f"-DMAX_HANDSHAKES={capacity}",
            f"-DMAX_NAMESPACES={MAX_NAMESPACES}",
            f"-DEVENT_PAGES={EVENT_PAGES}",
            f"-DMAX_KNOWN_CLIENTS={MAX_KNOWN_CLIENTS}",
            f"-DMAX_LISTENERS={MAX_LISTENERS}",
            f"-DMAX_CHOSEN={MAX_CHOSEN}",
            f"-DMAX_STACKS={MAX_STACKS}",
            f"-DMAX_TASKS={MAX_TASKS}",
            *probes.compiler_flags(wanted),
        ]
        if mode == "fentry":
            flags.append("-DTCPSTUCK_FENTRY")
        if architecture:
            # Since 0.37 BCC asks for what only the machine that it was itself built for has.
            flags.append("-fcf-protection=none")
        return Bpf(text=(directory / "tcpstuck.bpf.c").read_bytes(), cflags=flags)


class BccSource:
    """Our programs in the running kernel; see `app.Source` for what each method promises."""

    def __init__(self, settings: TraceSettings, request: AttachRequest = ATTACH_ALL) -> None:
        self.timings: dict[str, float] = {}
        self.table_capacity = settings.max_handshakes
        self._settings = settings
        self._rescue = request.rescue
        self._events: list[Event] = []
        self._undecodable = 0
        features.require_privileges()
        with self._timed("import"):
            self._bcc = _import_bcc()
        with self._timed("layout"):
            types = request.types or read_running_kernel()
            symbols, table = features.read_symbols(
                [probe.symbol for probe in request.probes], PER_CPU_OFFSET_SYMBOL
            )
            wants_counters = probes.KERNEL_COUNTERS not in request.left_out
            layout = find_layout(types, table if wants_counters else None)
        self._header = header_text(layout)
        if len(settings.trace_filter.ports) == 1:
            self._header += f"#define ONLY_WANTED_PORT {settings.trace_filter.ports[0]}\n"
        has_reasons = (types.tracepoint_arguments(probes.KFREE_SKB) or 0) > probes.REASON_ARGUMENT
        self.drop_reasons = places.reason_names(types) if has_reasons else {}
        self._softirq_gaps = softirq_gaps(types, features.kernel_option(BH_LOCK_OPTION))
        if self._softirq_gaps:
            self._header += "#define SOFTIRQS_INTERLEAVE\n"
        self._reason_defines = places.reason_defines(self.drop_reasons)
        left_out = dict(request.left_out)
        if layout.drop_obstacle is not None:
            left_out.setdefault(probes.KFREE_SKB, layout.drop_obstacle)
        self._tracepoint_types = tracepoint_types(types)
        mode, attached, gaps = probes.attach(
            symbols,
            dataclasses.replace(request, types=types, left_out=left_out),
            layout.has_counters,
            lambda wanted: self._start(types, wanted),
            self._softirq_gaps,
        )
        self.coverage = Coverage(mode, frozenset(probe.function for probe in attached), gaps)

    @contextlib.contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        begun = time.monotonic()
        yield
        self.timings[what] = time.monotonic() - begun

    def _start(self, types: KernelTypes, wanted: tuple[Probe, ...]) -> str:
        """Compile, load and attach in the wished mode; `auto` falls back to kprobes."""
        self._probes = wanted
        wished = mode_to_try(self._settings.probe_mode, self._softirq_gaps, features.has_kprobes())
        obstacle = None
        if wished != "kprobe":
            obstacle = features.fentry_obstacle() or probes.fentry_obstacle(types, wanted)
        if obstacle and wished == "fentry":
            raise CannotTraceError(
                "fentry cannot be used on this kernel", obstacle, "use --probe-mode kprobe"
            )
        if wished != "kprobe" and not obstacle:
            try:
                return self._attempt("fentry")
            except ProbeRefusedError:
                raise
            except CannotTraceError:
                if wished == "fentry" or not features.has_kprobes():
                    raise
        if not features.has_kprobes():
            raise features.refusal(obstacle or "not asked for", wished)
        return self._attempt("kprobe")

    def _attempt(self, mode: str) -> str:
        with _compiler_messages() as messages:
            try:
                self._load(mode)
                return mode
            except CannotTraceError:
                raise
            except Exception as error:  # bcc raises nothing more specific
                failure = error
        self.close()
        refusal = features.refusal(_problem(failure, messages), self._settings.probe_mode)
        if self._at_work_on is not None and not self._at_work_on.required:
            raise ProbeRefusedError(self._at_work_on.function, refusal) from failure
        raise refusal from failure

    def _load(self, mode: str) -> None:
        self._at_work_on: Probe | None = None
        _allow_locked_memory()
        with self._timed("compile"):
            header = self._header
            header += self._reason_defines
            self._bpf = compile_programs(header, self._probes, mode, self.table_capacity)
        self._check_sizes()
        self._configure()
        with self._timed("load"):
            self._load_programs(mode)
        with self._timed("attach"):
            for probe in probes.attach_order(self._probes, mode):
                self._at_work_on = probe
                self._attach(probe, mode)
        self._at_work_on = None
        # While it looks a batch up, which takes a walk over all empty buckets, the kernel runs no
        # kprobe program on that CPU (bpf_disable_instrumentation): packets that an interrupt
        # brings meanwhile would pass unseen. To find the next key it does not.
        self.tables = Tables(
            self._bpf,
            self._bcc.libbcc.lib,
            self.table_capacity,
            in_batches=mode == "fentry",
            rescue=self._rescue,
        )
        self._bpf[b"events"].open_ring_buffer(self._on_event)

    def _load_programs(self, mode: str) -> None:
        self._typed_programs: dict[str, int] = {}
        for probe in probes.of_mode(self._probes, mode):
            self._at_work_on = probe
            if self._load_typed(probe):
                continue
            if probe.raw_tracepoint is not None:
                names = [probe.raw_tracepoint.encode()]
                kind = self._bcc.BPF.RAW_TRACEPOINT
            elif mode == "fentry":
                names = [self._tracing_program("kfunc", probe)] if probe.fentry else []
                names += [self._tracing_program("kretfunc", probe)]
                kind = self._bcc.BPF.TRACING
            else:
                wanted = (probe.kprobe_entry, probe.kprobe_return)
                names = [name.encode() for name in wanted if name]
                kind = self._bcc.BPF.KPROBE
            for name in names:
                self._bpf.load_func(name, kind)

    def _load_typed(self, probe: Probe) -> bool:
        """Load the variant that knows its arguments' types; False where the kernel has no such."""
        number = self._tracepoint_types.get(probe.function)
        if probe.typed_tracepoint is None or number is None:
            return False
        name = probe.typed_tracepoint.encode()
        try:
            file = typed_tracepoint.load(name, self._bpf.dump_func(name), number)
        except RefusedError:
            return False
        self._typed_programs[probe.function] = file
        # BCC closes what is among its own.
        self._bpf.funcs[name] = self._bcc.BPF.Function(self._bpf, name, file)
        return True

    def _tracing_program(self, kind: str, probe: Probe) -> bytes:
        """The name BCC's macro gave to a program: since 0.27 it also has the module's name."""
        library, module = self._bcc.libbcc.lib, self._bpf.module
        names = (f"{kind}__vmlinux__{probe.function}", f"{kind}__{probe.function}")
        known = {
            library.bpf_function_name(module, i) for i in range(library.bpf_num_functions(module))
        }
        return next((name.encode() for name in names if name.encode() in known), names[-1].encode())

    def _attach(self, probe: Probe, mode: str) -> None:
        if probe.function in self._typed_programs:
            attached = typed_tracepoint.attach(self._typed_programs[probe.function])
            self._bpf.raw_tracepoint_fds[probe.function.encode()] = attached
            return
        if probe.raw_tracepoint is not None:
            self._bpf.attach_raw_tracepoint(
                tp=probe.function.encode(), fn_name=probe.raw_tracepoint.encode()
            )
            return
        if mode == "fentry":
            # The return first: until its entry runs, it finds an empty scratch and does nothing.
            self._bpf.attach_kretfunc(fn_name=self._tracing_program("kretfunc", probe))
            if probe.fentry:
                self._bpf.attach_kfunc(fn_name=self._tracing_program("kfunc", probe))
            return
        name = probe.function.encode()
        # Without maxactive, for which BCC would go through tracefs: what is made there stays when
        # the process is killed. The kernel's own number is enough, since all probed functions
        # run with bottom halves off.
        returned = str(probe.kprobe_return).encode()
        self._bpf.attach_kretprobe(event=name, fn_name=returned)
        if probe.kprobe_entry:
            self._bpf.attach_kprobe(event=name, fn_name=probe.kprobe_entry.encode())

    def _check_sizes(self) -> None:
        table, counts = self._bpf[b"awaiting_ack"], self._bpf[b"counts"]
        sizes = [
            (ctypes.sizeof(table.Key), wire.KEY.size),
            (ctypes.sizeof(table.Leaf), wire.HANDSHAKE.size),
            (ctypes.sizeof(self._bpf[b"config"].Leaf), wire.CONFIG.size),
            (ctypes.sizeof(counts.sLeaf), wire.COUNTS.size),
            (ctypes.sizeof(self._bpf[b"listeners"].Leaf), wire.LISTENER_FACTS.size),
        ]
        if self._rescue:
            sizes += [
                (ctypes.sizeof(self._bpf[b"synacks"].Leaf), wire.SYNACK.size),
                (ctypes.sizeof(self._bpf[b"known_clients"].Key), wire.KNOWN_CLIENT.size),
            ]
        if any(kernel != ours for kernel, ours in sizes):
            raise CannotTraceError(
                "the BPF text and the Python code do not belong together",
                f"sizes of their structs differ: {sizes}",
                "install tcpstuck-trace again",
            )

    def _configure(self) -> None:
        config = self._bpf[b"config"]
        config[0] = config.Leaf.from_buffer_copy(wire.encode_config(self._settings))
        for index, bits in wire.port_bits(self._settings.trace_filter.ports).items():
            self._bpf[b"wanted_ports"][index] = ctypes.c_ulonglong(bits)

    def _on_event(self, _context: Any, data: int, size: int) -> None:
        # An exception must not travel through ctypes: it would be printed and lost.
        try:
            self._events.append(wire.decode_event(ctypes.string_at(data, size)))
        except Exception:
            self._undecodable += 1

    def poll(self, timeout_ns: int) -> list[Event]:
        """Events that came, waiting at most `timeout_ns` for the first."""
        self._bpf.ring_buffer_poll(max(0, timeout_ns) // 1_000_000)
        events, self._events = self._events, []
        return events

    def sweep(self) -> Iterator[Sweep]:
        """The whole awaiting-ACK table in batches; all have the time of the sweep's begin."""
        return self.tables.sweep()

    def chosen(self) -> Sweep:
        """The entries that the rescue may be for; see `Tables.chosen`."""
        return self.tables.chosen()

    def forget(self, handshakes: Iterable[HandshakeId]) -> None:
        """Remove entries, where they are still of that handshake; one that is gone is no error."""
        self.tables.forget(handshakes)

    def stack(self, number: int) -> tuple[int, ...]:
        """The addresses of an entry's `filter_stack`, the innermost first; empty if unknown."""
        return self.tables.stack(number)

    def counts(self) -> NetnsCounts:
        """What the programs counted since they were attached, all CPUs together."""
        return self.tables.counts()

    def listeners(self) -> tuple[ListenerFacts, ...]:
        """How the queues of each listener fared since the programs were attached."""
        return self.tables.listeners()

    def losses(self) -> Mapping[str, int]:
        """Losses that belong to no namespace, by name."""
        table = self._bpf[b"losses"]
        named = {name: int(sum(table[index])) for index, name in enumerate(LOSSES)}
        missed = 0
        for function in self._bpf.funcs.values():
            with contextlib.suppress(RefusedError):
                missed += missed_runs(function.fd)
        return {**named, "undecodable_events": self._undecodable, "programs_not_run": missed}

    def loaded_programs(self) -> frozenset[str]:
        """The programs' names in our text."""
        return frozenset(name.decode() for name in self._bpf.funcs)

    def close(self) -> None:
        """Detach and unload. The kernel does the same when the process dies."""
        bpf = self.__dict__.pop("_bpf", None)
        if bpf is not None:
            bpf.cleanup()


def tracepoint_types(types: KernelTypes) -> dict[str, int]:
    """By name, of the tracepoints that are traced; empty where the kernel has no BTF itself."""
    if not isinstance(types, Btf):
        return {}
    names = [probe.function for probe in EVERY_PROBE if probe.typed_tracepoint is not None]
    numbers = {name: types.tracepoint_type(name) for name in names}
    return {name: number for name, number in numbers.items() if number is not None}


def _allow_locked_memory() -> None:
    """Kernels before 5.11 charge maps to RLIMIT_MEMLOCK (commit 5d9d6e7a9b61's series)."""
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY,) * 2)


def open_source(settings: TraceSettings, request: AttachRequest = ATTACH_ALL) -> BccSource:
    """Trace the running kernel. Raises CannotTraceError where it cannot be done."""
    return BccSource(settings, request)
