"""`--print-bpf`: the C text that would be compiled for this machine, as text.

A run decides in the same way, but also tries what it decided: if the kernel refuses a program, a
run compiles another text. Needs neither privileges nor BCC.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from tcpstuck_bpf import __version__
from tcpstuck_bpf.errors import CannotTraceError
from tcpstuck_bpf.kernel import attach_plan, features, probes
from tcpstuck_bpf.kernel.attach_plan import AttachRequest
from tcpstuck_bpf.kernel.compilation import Compilation, program_directory, program_text
from tcpstuck_bpf.kernel.description import KernelDescription, describe_running
from tcpstuck_bpf.kernel.layout import PER_CPU_OFFSET_SYMBOL
from tcpstuck_bpf.kernel.probes import Probe
from tcpstuck_bpf.kernel.running_kernel import RunningKernel
from tcpstuck_bpf.kernel.softirqs import mode_to_try

_WIDTH = 96


def printed_text(request: AttachRequest, probe_mode: str) -> Iterator[str]:
    """The lines of the generated header and of the program text, with comments on both.

    Raises CannotTraceError where the program text is missing.
    """
    text = program_text(program_directory()).decode("ascii")
    try:
        compilation = _compilation(request, probe_mode)
    except CannotTraceError as error:
        yield from _comment(f"tcpstuck-trace {__version__}, for a kernel that is not known")
        yield from _comment(f"KERNEL_LAYOUT_H is missing: {error.what}: {error.why}")
    else:
        flags = " ".join(compilation.all_flags)
        yield from _comment(
            f"tcpstuck-trace {__version__}, for Linux {compilation.made_for} by {compilation.mode}"
        )
        yield from _comment(f"compiler flags: {flags}")
        yield from _comment("KERNEL_LAYOUT_H, generated from the kernel's type information:")
        yield from compilation.header.splitlines()
    yield from _comment("the program text:")
    yield from text.splitlines()


def _comment(text: str) -> list[str]:
    # The kernel's or a file's words must not end the comment.
    return textwrap.wrap(
        f"/* {text.replace('*/', '* /')} */",
        _WIDTH,
        subsequent_indent="   ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _compilation(request: AttachRequest, probe_mode: str) -> Compilation:
    """What a run would compile first. Raises CannotTraceError where the kernel cannot be known."""
    running = RunningKernel(None)
    symbols, _ = running.symbols([probe.symbol for probe in request.probes], PER_CPU_OFFSET_SYMBOL)
    kernel = describe_running(request.types or running, None)
    refused = {**attach_plan.misread(kernel.types, request.probes), **request.left_out}
    if kernel.layout.drop_obstacle is not None:
        refused.setdefault(probes.KFREE_SKB, kernel.layout.drop_obstacle)
    wanted, _ = attach_plan.plan(symbols, refused, request.probes)
    return kernel.compilation(wanted, _mode(probe_mode, kernel, wanted))


def _mode(wished: str, kernel: KernelDescription, wanted: tuple[Probe, ...]) -> str:
    tried = mode_to_try(wished, kernel.softirq_gaps, features.has_kprobes())
    if tried != "auto":
        return tried
    obstacle = features.fentry_obstacle() or attach_plan.fentry_obstacle(kernel.types, wanted)
    return "kprobe" if obstacle else "fentry"
