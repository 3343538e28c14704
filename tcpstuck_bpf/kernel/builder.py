"""`--build`: programs for this kernel or for kernel images, for machines without a compiler.

The builder decides what to compile as a tracing machine does. The only difference is where it looks
up the kernel's functions and options.
"""

from __future__ import annotations

import platform
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from tcpstuck_bpf.errors import CannotTraceError, UsageError
from tcpstuck_bpf.files import write_whole
from tcpstuck_bpf.host import kallsyms
from tcpstuck_bpf.kernel import attach_plan, features, probes
from tcpstuck_bpf.kernel.attach_plan import AttachRequest
from tcpstuck_bpf.kernel.compilation import (
    Compilation,
    CompilerError,
    compile_in_child,
)
from tcpstuck_bpf.kernel.description import KernelDescription, describe_running
from tcpstuck_bpf.kernel.kept_files import PROGRAMS
from tcpstuck_bpf.kernel.kernel_report import describe
from tcpstuck_bpf.kernel.layout import PER_CPU_OFFSET_SYMBOL, find_layout
from tcpstuck_bpf.kernel.probes import Probe
from tcpstuck_bpf.kernel.softirqs import softirq_gaps
from tcpstuck_bpf.typeinfo.btf import read_running_kernel
from tcpstuck_bpf.typeinfo.vmlinux import KernelImage, read_image

MODES = ("fentry", "kprobe")
_COMPILERS_NAMES = {"x86_64": "x86", "aarch64": "arm64"}
"""BCC's name of an architecture, by uname(2)'s."""


def build(directory: Path, images: Sequence[str], request: AttachRequest) -> Iterator[str]:
    """Write programs for each image, or for the running kernel; yield a line for each file.

    Raises UsageError for a file that is not a kernel or a directory that cannot be written, and
    CannotTraceError where a kernel cannot be traced or there is no compiler.
    """
    features.require_privileges()
    _make(directory)
    if not images:
        types = request.types or read_running_kernel()
        symbols, _ = kallsyms.read_symbols(
            [probe.symbol for probe in request.probes], PER_CPU_OFFSET_SYMBOL
        )
        yield from _build(directory, [describe_running(types, None)], symbols, request)
    for path in images:
        image = read_image(path)
        yield from _build(directory, _variants(image), _symbols(image), request)


def _make(directory: Path) -> None:
    try:
        directory.mkdir(mode=0o755, parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"cannot make the directory {directory}",
            str(error.strerror),
            "name a directory that you may write to",
        ) from error


def _symbols(image: KernelImage) -> frozenset[str]:
    """The functions that can be probed, as far as the image shows."""
    report = describe(image.release, image.path, image.types, image.symbols)
    return frozenset(fact.probe.symbol for fact in report.functions if fact.there)


def _variants(image: KernelImage) -> list[KernelDescription]:
    """The kernel in an image, twice where an option matters that the image does not show."""
    if image.architecture not in _COMPILERS_NAMES:
        raise CannotTraceError(
            f"nothing can be built for {image.path}",
            f"its architecture ({image.architecture or 'unknown'}) is not one of "
            f"{', '.join(_COMPILERS_NAMES)}",
            "name a kernel of one of these",
        )
    foreign = image.architecture != platform.machine()
    compile_for = _COMPILERS_NAMES[image.architecture] if foreign else ""
    layout = find_layout(image.types, None)
    # BH_LOCK_OPTION unknown, and set.
    kinds = dict.fromkeys(softirq_gaps(image.types, option) for option in (None, "y"))
    return [
        KernelDescription(image.release, image.types, layout, gaps, compile_for) for gaps in kinds
    ]


def compilations(image: KernelImage, request: AttachRequest) -> Iterator[Compilation]:
    """All that a machine with this kernel may have to compile for a request, in both modes.

    Raises CannotTraceError where the kernel cannot be traced.
    """
    variants = _variants(image)
    wanted = _planned(variants[0], _symbols(image), request)
    for mode in MODES:
        if _obstacle(variants[0], wanted, mode) is None:
            yield from (variant.compilation(wanted, mode) for variant in variants)


def _obstacle(kernel: KernelDescription, wanted: Collection[Probe], mode: str) -> str | None:
    """Why this mode is impossible on a kernel; None if it is not."""
    return attach_plan.fentry_obstacle(kernel.types, wanted) if mode == "fentry" else None


def _build(
    directory: Path,
    variants: Sequence[KernelDescription],
    symbols: Collection[str],
    request: AttachRequest,
) -> Iterator[str]:
    release = variants[0].release
    wanted = _planned(variants[0], symbols, request)
    for mode in MODES:
        obstacle = _obstacle(variants[0], wanted, mode)
        if obstacle is not None:
            yield f"{release}: no fentry programs: {obstacle}"
            continue
        for number, variant in enumerate(variants):
            words = [release, mode]
            words += ["rescue"] if request.rescue else []
            words += [] if request.why else ["no-why"]
            words += ["bh-lock"] if number else []
            path = directory / ("-".join(words) + PROGRAMS)
            size = _write(path, variant.compilation(wanted, mode))
            yield f"{path}: {size} bytes"


def _planned(
    kernel: KernelDescription, symbols: Collection[str], request: AttachRequest
) -> tuple[Probe, ...]:
    """The probes that the tracing machine will request. Raises CannotTraceError."""
    refused = attach_plan.misread(kernel.types, request.probes)
    if kernel.layout.drop_obstacle is not None:
        refused.setdefault(probes.KFREE_SKB, kernel.layout.drop_obstacle)
    wanted, _ = attach_plan.plan(symbols, refused, request.probes)
    return wanted


def _write(path: Path, wanted: Compilation) -> int:
    try:
        data = compile_in_child(wanted)
    except CompilerError as error:
        raise CannotTraceError(
            f"the programs for {wanted.made_for} cannot be compiled",
            str(error),
            "report it, with the kernel's and BCC's version",
        ) from error
    try:
        write_whole(str(path), data)
    except OSError as error:
        raise UsageError(
            f"cannot write {path}", str(error.strerror), "make room, or name another directory"
        ) from error
    return len(data)
