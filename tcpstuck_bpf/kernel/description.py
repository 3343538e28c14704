"""The facts about a kernel, running or in an image, that the programs' text depends on."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from tcpstuck_bpf.kernel import artifact, drop_names, features, probes
from tcpstuck_bpf.kernel.compilation import Compilation
from tcpstuck_bpf.kernel.layout import Layout, find_layout, header_text
from tcpstuck_bpf.kernel.probes import Probe
from tcpstuck_bpf.kernel.softirqs import BH_LOCK_OPTION, softirq_gaps, tasks_have_softirqs
from tcpstuck_bpf.model import CoverageGap
from tcpstuck_bpf.typeinfo.graph import KernelTypes


@dataclass(frozen=True)
class KernelDescription:
    """A kernel's types, and what was found in them."""

    release: str
    types: KernelTypes
    layout: Layout
    softirq_gaps: tuple[CoverageGap, ...]
    compile_for: str = ""
    """BCC's name of the kernel's architecture; empty if it is this machine's."""

    @property
    def drop_reasons(self) -> Mapping[int, str]:
        """Names of enum skb_drop_reason; empty if skb:kfree_skb has no reason."""
        arguments = self.types.tracepoint_arguments(probes.KFREE_SKB) or 0
        return drop_names.reason_names(self.types) if arguments > probes.REASON_ARGUMENT else {}

    def compilation(self, wanted: Collection[Probe], mode: str) -> Compilation:
        """The compilation that these probes need in a mode."""
        header = header_text(self.layout)
        if self.softirq_gaps:
            header += "#define SOFTIRQS_INTERLEAVE\n"
        header += drop_names.reason_defines(self.drop_reasons)
        kinds = {}
        for probe in wanted:
            if probe.raw_tracepoint is not None:
                kinds[probe.raw_tracepoint] = artifact.RAW_TRACEPOINT
            if probe.typed_tracepoint is not None:
                kinds[probe.typed_tracepoint] = artifact.TYPED_TRACEPOINT
        flags = probes.compiler_flags(wanted)
        return Compilation(header, flags, mode, kinds, self.release, self.compile_for)


def describe_running(types: KernelTypes, per_cpu_offset_table: int | None) -> KernelDescription:
    """Describe the running kernel by these types.

    `per_cpu_offset_table` is the address of __per_cpu_offset; None means it is not used.
    Raises CannotTraceError.
    """
    # Reading the kernel's configuration delays the start, so it is read only where it matters.
    option = features.kernel_option(BH_LOCK_OPTION) if tasks_have_softirqs(types) else None
    return KernelDescription(
        os.uname().release,
        types,
        find_layout(types, per_cpu_offset_table),
        softirq_gaps(types, option),
    )
