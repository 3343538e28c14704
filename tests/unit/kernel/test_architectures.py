"""The program text for each architecture: what the compiled programs read of their context.

BCC compiles for another architecture where it is told to, so that arm64 needs no such machine. The
programs are not run. Where the registers lie is from the kernel and the ABI; which
arguments are read is from the attach plan, which the kernel's own prototypes are held against.
"""

from __future__ import annotations

import platform
import struct

import pytest

from tcpstuck_bpf.host import bpf_syscall
from tcpstuck_bpf.kernel import artifact, compilation
from tcpstuck_bpf.kernel.artifact import Program
from tcpstuck_bpf.kernel.compilation import Compilation, compile_in_child, decoded
from tcpstuck_bpf.kernel.layout import find_layout, header_text
from tcpstuck_bpf.kernel.probes import PROBES, compiler_flags
from tests.btf_writer import kernel

WORD = 8
X86_ORDER = (
    *("r15", "r14", "r13", "r12", "bp", "bx", "r11", "r10", "r9", "r8"),
    *("ax", "cx", "dx", "si", "di", "orig_ax", "ip", "cs", "flags", "sp", "ss"),
)
"""struct pt_regs (arch/x86/include/asm/ptrace.h)."""
ARGUMENTS = {
    "x86": [WORD * X86_ORDER.index(name) for name in ("di", "si", "dx", "cx", "r8", "r9")],
    # struct pt_regs begins with x0 to x30 (arch/arm64/include/asm/ptrace.h).
    "arm64": [WORD * number for number in range(8)],
}
"""Bytes from the start of struct pt_regs to each argument (System V ABI; AAPCS64)."""
RESULT = {"x86": WORD * X86_ORDER.index("ax"), "arm64": 0}
_INSTRUCTION = struct.Struct("=BBhi")
_CALL, _MOVE, _ADD = 0x85, 0xBF, 0x07
_LOADS = (0x61, 0x69, 0x71, 0x79)
_STORE_CLASSES = (2, 3, 5, 6)
"""Stores and jumps: classes of instructions that write no register, but for calls."""


def context_read(code: bytes) -> set[int]:
    """Offsets in the context that a program reads itself or takes the address of."""
    found: set[int] = set()
    places = {1: 0}
    for at in range(0, len(code), _INSTRUCTION.size):
        operation, registers, offset, immediate = _INSTRUCTION.unpack_from(code, at)
        target, source = registers & 15, registers >> 4
        if operation in _LOADS and source in places:
            found.add(places[source] + offset)
        if operation == _CALL:
            # An address that a helper was given.
            found |= {places[number] for number in range(1, 6) if places.get(number)}
            places = {number: place for number, place in places.items() if number > 5}
        elif operation == _MOVE and source in places:
            places[target] = places[source]
        elif operation == _ADD and target in places:
            places[target] += immediate
        elif operation & 7 not in _STORE_CLASSES:
            places.pop(target, None)
    return found


@pytest.fixture
def header() -> str:
    """KERNEL_LAYOUT_H; skips where BCC cannot compile."""
    if compilation.bcc_version() == compilation.NO_BCC:
        pytest.skip("BCC is not installed")
    refusal = bpf_syscall.ring_buffer_refusal()
    if refusal is not None:
        pytest.skip(f"BCC makes the programs' tables while it compiles, and may not: {refusal}")
    return header_text(find_layout(kernel().btf(), 4096))


@pytest.fixture(params=["x86", "arm64"])
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def compile_text(header: str, mode: str, architecture: str = "") -> list[Program]:
    wanted = Compilation(header, compiler_flags(PROBES), mode, {}, "a test", architecture)
    return list(decoded(compile_in_child(wanted), wanted).programs)


def test_kprobe_programs_read_the_registers_that_hold_the_arguments(
    header: str, architecture: str
) -> None:
    compiled = compile_text(header, "kprobe", architecture)
    found = {program.name: context_read(program.code) for program in compiled}
    expected: dict[str, set[int]] = {}
    for probe in PROBES:
        if probe.kprobe_entry:
            expected[probe.kprobe_entry] = {ARGUMENTS[architecture][n] for n in probe.arguments}
        result = {RESULT[architecture]} if probe.parameters is not None else set()
        if probe.kprobe_return:
            expected[probe.kprobe_return] = result
    assert found == expected
    assert {program.kind for program in compiled} == {artifact.KPROBE}


def test_fentry_programs_read_arguments_by_their_place(header: str, architecture: str) -> None:
    compiled = compile_text(header, "fentry", architecture)
    found = {(program.kind, program.name): context_read(program.code) for program in compiled}
    for probe in PROBES:
        arguments = {WORD * number for number in probe.arguments}
        if probe.fentry:
            assert found[artifact.FENTRY, probe.function] == arguments
        result = found.get((artifact.FEXIT, probe.function))
        assert (result is not None) == probe.fexit
        if result is None:
            continue
        if probe.parameters is not None:
            assert WORD * probe.parameters in result
            result = result - {WORD * probe.parameters}
        assert result <= arguments
    assert len(found) == sum(probe.fentry + probe.fexit for probe in PROBES)


def test_a_kernel_builder_s_environment_chooses_no_other_registers(
    monkeypatch: pytest.MonkeyPatch, header: str
) -> None:
    own = {"x86_64": "x86", "aarch64": "arm64"}.get(platform.machine())
    if own is None:
        pytest.skip(f"the ABI of {platform.machine()} is not written down here")
    monkeypatch.setenv("ARCH", "arm64" if own == "x86" else "x86")
    (program,) = (p for p in compile_text(header, "kprobe") if p.name == "cookie_check_entry")
    assert context_read(program.code) == set(ARGUMENTS[own][:2])


def test_the_same_text_compiles_to_the_same_bytes(header: str) -> None:
    wanted = Compilation(header, compiler_flags(PROBES), "fentry", {}, "a test")
    assert compile_in_child(wanted) == compile_in_child(wanted)
