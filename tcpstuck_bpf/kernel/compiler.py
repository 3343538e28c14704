"""The compiler: BCC, in a child process that ends with its work. The only module that imports bcc.

LLVM stays in the memory of whatever process has used it, so the process that traces never does.
What comes in on standard input and goes out is described in `compilation`, which starts this.
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

# BCC optimizes what clang hands it, so clang need not do the same before; and nobody debugs the
# programs by their debugging information. A third of the compilation's time, the same code.
_FASTER_COMPILATION = ("-Xclang", "-disable-llvm-passes", "-g0")
_PR_SET_PDEATHSIG = 1
# What BCC's KFUNC_PROBE and KRETFUNC_PROBE name a program; since 0.27 with the module's name.
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
    # Who builds kernels may have ARCH set for make; BCC would read arguments from the registers
    # of that architecture, and none of the programs would notice.
    os.environ.pop("ARCH", None)
    words = [*_FASTER_COMPILATION, f"-I{directory}", *flags]
    if architecture:
        os.environ["ARCH"] = architecture
        # Since 0.37 BCC asks for what only the machine that it was itself built for has.
        words.append("-fcf-protection=none")

    class Bpf(bcc.BPF):  # type: ignore[misc,name-defined]
        """BCC's class, which would load and attach kfunc programs while constructing."""

        def _trace_autoload(self) -> None:
            """Load nothing: that is not the compiler's business."""

    # A file without a name leaves nothing behind, however the process ends.
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
    """The artifact that was asked for.

    Raises CannotTraceError without BCC, and whatever BCC raises where the compiler refuses, or the
    kernel the tables, which BCC makes while it compiles.
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
    """Kernels before 5.11 charge maps to RLIMIT_MEMLOCK (commit 5d9d6e7a9b61's series)."""
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY,) * 2)


def main() -> int:
    """Compile what standard input asks for; the artifact, or three lines, on standard output."""
    # Whoever started this ends it; it must not outlive them, nor speak of an interrupt.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    request = json.load(sys.stdin)
    # Libraries that print something to standard output must not print into the artifact.
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
