"""The program text of another architecture, before the verifier of the kernel at hand.

Neither the verifier's rules nor the context of fentry programs depend on the architecture, and
struct pt_regs of arm64 begins within that of x86. Nothing is attached: what the programs read there
is held against the ABI by the unit tests.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace

import pytest

from tcpstuck_bpf.kernel import artifact
from tcpstuck_bpf.kernel.compilation import compile_in_child, decoded
from tcpstuck_bpf.kernel.description import describe_running
from tcpstuck_bpf.kernel.loader import LoadedPrograms
from tcpstuck_bpf.kernel.open_source import table_entries
from tcpstuck_bpf.kernel.probes import EVERY_PROBE, KFREE_SKB
from tcpstuck_bpf.typeinfo.btf import Btf, read_running_kernel

pytestmark = pytest.mark.kernel


@pytest.mark.parametrize("mode", ["fentry", "kprobe"])
def test_the_verifier_accepts_the_programs_for_arm64(mode: str) -> None:
    running = describe_running(read_running_kernel(), None)
    types = running.types
    assert isinstance(types, Btf)
    assert running.layout.counters
    wanted = replace(running.compilation(EVERY_PROBE, mode), compile_for="arm64")
    made = decoded(compile_in_child(wanted), wanted)
    with closing(LoadedPrograms(made, table_entries(64, softirqs_interleave=False))) as loaded:
        for program in made.programs:
            numbers: dict[str, Callable[[str], int | None]] = {
                artifact.FENTRY: types.function,
                artifact.FEXIT: types.function,
                artifact.TYPED_TRACEPOINT: lambda _name: types.tracepoint_type(KFREE_SKB),
            }
            find = numbers.get(program.kind)
            number = 0 if find is None else find(program.name)
            assert number is not None
            loaded.load(program.kind, program.name, number)
        assert loaded.names == {program.name for program in made.programs}
    assert len(made.programs) >= len(EVERY_PROBE)
