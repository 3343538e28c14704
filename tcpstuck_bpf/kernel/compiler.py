"""The compiler: BCC, in a short-lived child process. The only module that imports bcc.

LLVM stays in the memory of a process that has used it, so the tracing process never does.
`compilation` starts this module, and describes its standard input and output.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tcpstuck_bpf.errors import CannotTraceError, TcpstuckError
from tcpstuck_bpf.host.bpf_syscall import map_shape
from tcpstuck_bpf.kernel import artifact
from tcpstuck_bpf.kernel.artifact import Artifact, MapShape, Program
from tcpstuck_bpf.kernel.compilation import REFUSED_STATUS, program_text

# BCC optimizes clang's output, so clang need not optimize first; and nobody uses the programs'
# debug information. This saves a third of the compile time and gives the same code.
_FASTER_COMPILATION = ("-Xclang", "-disable-llvm-passes", "-g0")
_PR_SET_PDEATHSIG = 1
# Prefixes that BCC's KFUNC_PROBE and KRETFUNC_PROBE give a name; since 0.27 with the module's.
_TRACING_PREFIXES = (
    ("kfunc__vmlinux__", artifact.FENTRY),
    ("kretfunc__vmlinux__", artifact.FEXIT),
    ("kfunc__", artifact.FENTRY),
    ("kretfunc__", artifact.FEXIT),
)


def _import_bcc() -> Any:
    try:
        import bcc
    except ImportError as error:
        raise CannotTraceError(
            "BCC's Python module cannot be imported",
            f"import bcc: {error}",
            "install the distribution's package again (apt install --reinstall python3-bpfcc)",
        ) from error
    if not hasattr(bcc, "BPF"):
        raise CannotTraceError(
            "BCC's Python module is not the one that is imported",
            f"{getattr(bcc, '__file__', 'bcc')} has no BPF class",
            "remove the PyPI package `bcc` and install the distribution's python3-bpfcc",
        )
    return bcc


def _compile(directory: Path, header: str, flags: Iterable[str], architecture: str) -> Any:
    """BCC's object with the text compiled and its tables made; no program is loaded."""
    bcc = _import_bcc()
    # BCC looks for kernel headers here instead of in /lib/modules.
    os.environ["BCC_KERNEL_SOURCE"] = str(directory / "stub")
    # ARCH may be set for kernel builds. BCC would then read arguments from the registers of that
    # architecture, without any error.
    os.environ.pop("ARCH", None)
    words = [*_FASTER_COMPILATION, f"-I{directory}", *flags]
    if architecture:
        os.environ["ARCH"] = architecture
        # Since 0.37 BCC passes a flag that only its own architecture supports.
        words.append("-fcf-protection=none")

    class Bpf(bcc.BPF):  # type: ignore[misc,name-defined]
        """BCC's class, without loading and attaching kfunc programs in the constructor."""

        def _trace_autoload(self) -> None:
            """Load nothing; the compiler only compiles."""

    # A memfd leaves no file behind, however the process ends.
    with os.fdopen(os.memfd_create("kernel_layout.h"), "w", encoding="ascii") as file:
        file.write(header)
        file.flush()
        words.append(f'-DKERNEL_LAYOUT_H="/proc/self/fd/{file.fileno()}"')
        return Bpf(text=program_text(directory), cflags=words)


def _programs(bpf: Any, library: Any, numbers: Mapping[int, int], kinds: Mapping[str, str]) -> Any:
    for index in range(library.bpf_num_functions(bpf.module)):
        name = library.bpf_function_name(bpf.module, index)
        code = artifact.with_map_values(bpf.dump_func(name), numbers)
        plain = name.decode("ascii")
        for prefix, kind in _TRACING_PREFIXES:
            if plain.startswith(prefix):
                yield Program(kind, plain[len(prefix) :], code)
                break
        else:
            yield Program(kinds.get(plain, artifact.KPROBE), plain, code)


def compile_artifact(request: Mapping[str, Any]) -> bytes:
    """Compile the requested artifact.

    Raises CannotTraceError without BCC. Raises BCC's exceptions where the compiler fails, or where
    the kernel refuses the tables that BCC makes while it compiles.
    """
    bpf = _compile(
        Path(request["directory"]), request["header"], request["flags"], request["compile_for"]
    )
    bcc = _import_bcc()
    library = bcc.libbcc.lib
    library.bpf_table_name.restype = ctypes.c_char_p
    library.bpf_table_name.argtypes = [ctypes.c_void_p, ctypes.c_ulonglong]
    shapes, numbers = [], {}
    for index in range(library.bpf_num_tables(bpf.module)):
        file = library.bpf_table_fd_id(bpf.module, index)
        name = library.bpf_table_name(bpf.module, index).decode("ascii")
        numbers[file] = index
        shapes.append(MapShape(name, *map_shape(file)))
    programs = tuple(_programs(bpf, library, numbers, request["kinds"]))
    compiler = f"BCC {getattr(bcc, '__version__', 'of unknown version')}"
    made = Artifact(
        request["identity"],
        request["made_for"],
        compiler,
        request["mode"],
        request["architecture"],
        programs,
        tuple(shapes),
    )
    return artifact.encode(made)


def _allow_locked_memory() -> None:
    """Lift RLIMIT_MEMLOCK: kernels before 5.11 charge maps to it (5d9d6e7a9b61's series)."""
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY,) * 2)


def main() -> int:
    """Compile standard input's request; write the artifact or an error's three lines."""
    # The parent ends this process. It must not outlive the parent, nor report an interrupt.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    request = json.load(sys.stdin)
    # Output of libraries must not get into the artifact, so descriptor 1 becomes standard error.
    with os.fdopen(os.dup(1), "wb") as result:
        os.dup2(2, 1)
        _allow_locked_memory()
        try:
            result.write(compile_artifact(request))
        except TcpstuckError as error:
            result.write(json.dumps([error.what, error.why, error.remedy]).encode("ascii"))
            return REFUSED_STATUS
        except Exception as error:  # BCC raises nothing more specific
            print(error, file=sys.stderr)
            return 1
    return 0
