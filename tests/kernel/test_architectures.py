"""The program text of another architecture, before the verifier of the kernel at hand.

Neither the verifier's rules nor the context of fentry programs depend on the architecture, and
struct pt_regs of arm64 begins within that of x86. Nothing is attached: what the programs read there
is held against the ABI by the unit tests.
"""

from __future__ import annotations

import os

import pytest

from tcpstuck_bpf import features, typed_tracepoint
from tcpstuck_bpf.btf import read_running_kernel
from tcpstuck_bpf.layout import PER_CPU_OFFSET_SYMBOL, find_layout, header_text
from tcpstuck_bpf.probes import EVERY_PROBE
from tcpstuck_bpf.source import compile_programs

pytestmark = pytest.mark.kernel


@pytest.mark.parametrize("mode", ["fentry", "kprobe"])
def test_the_verifier_accepts_the_programs_for_arm64(
    monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    from bcc import BPF
    from bcc.libbcc import lib

    for name in ("ARCH", "BCC_KERNEL_SOURCE"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    _, per_cpu_offsets = features.read_symbols((), PER_CPU_OFFSET_SYMBOL)
    types = read_running_kernel()
    layout = find_layout(types, per_cpu_offsets)
    assert layout.has_counters
    bpf = compile_programs(header_text(layout), EVERY_PROBE, mode, 64, "arm64")
    try:
        names = [
            lib.bpf_function_name(bpf.module, number)
            for number in range(lib.bpf_num_functions(bpf.module))
        ]
        raw = [probe.raw_tracepoint.encode() for probe in EVERY_PROBE if probe.raw_tracepoint]
        kinds = dict.fromkeys(names, BPF.TRACING if mode == "fentry" else BPF.KPROBE)
        kinds.update(dict.fromkeys(raw, BPF.RAW_TRACEPOINT))
        assert list(kinds) == names
        for probe in EVERY_PROBE:
            if probe.typed_tracepoint is None:
                continue
            name, number = probe.typed_tracepoint.encode(), types.tracepoint_type(probe.function)
            assert number is not None
            os.close(typed_tracepoint.load(name, bpf.dump_func(name), number))
            del kinds[name]
        assert [bpf.load_func(name, kind).name for name, kind in kinds.items()] == list(kinds)
        assert len(kinds) >= len(EVERY_PROBE)
    finally:
        bpf.cleanup()
