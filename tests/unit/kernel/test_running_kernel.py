"""What one start has learnt of the kernel, and the next one is told."""

from __future__ import annotations

import hashlib
import random
import struct
from pathlib import Path

import pytest

from tcpstuck_bpf.errors import CannotTraceError
from tcpstuck_bpf.host import kallsyms
from tcpstuck_bpf.kernel import running_kernel
from tcpstuck_bpf.kernel.attach_plan import misread
from tcpstuck_bpf.kernel.kept_files import KeptFiles
from tcpstuck_bpf.kernel.layout import find_layout
from tcpstuck_bpf.kernel.probes import PROBES
from tcpstuck_bpf.kernel.running_kernel import RunningKernel
from tcpstuck_bpf.typeinfo import btf
from tcpstuck_bpf.typeinfo.btf import Btf
from tests.btf_writer import add_tracepoint, kernel, with_functions

FUNCTIONS = ("tcp_conn_request", "cookie_v4_check")
TABLE = "__per_cpu_offset"
SYMBOLS = (
    "ffffffff81000000 T tcp_conn_request\n"
    "ffffffff81000010 T cookie_v4_check\n"
    "ffffffff82000000 D __per_cpu_offset\n"
)
TABLE_AT = 0xFFFFFFFF82000000
FLIPS = 10_000


def note(name: bytes, kind: int, value: bytes) -> bytes:
    """As elf(5) has it."""
    padded = (part + bytes(-len(part) % 4) for part in (name, value))
    return struct.pack("=III", len(name), len(value), kind) + b"".join(padded)


class Machine:
    """A kernel with files of its own, and what was read of them."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kept = directory / "cache"
        self.notes = directory / "notes"
        self.boot = directory / "boot_id"
        self.symbols = directory / "kallsyms"
        self.types_read = 0
        types = with_functions(kernel())
        add_tracepoint(types, "kfree_skb", 3)
        self.types = types.btf()
        self.built(b"\x01" * 20)
        self.booted("first")
        self.symbols.write_text(SYMBOLS)
        self.shown_types = directory / "vmlinux"
        self.shown_types.touch()
        monkeypatch.setattr(btf, "RUNNING_KERNEL", str(self.shown_types))
        monkeypatch.setattr(running_kernel, "_NOTES", self.notes)
        monkeypatch.setattr(running_kernel, "_BOOT", self.boot)
        monkeypatch.setattr(kallsyms, "_SYMBOLS", self.symbols)

    def built(self, build_id: bytes) -> None:
        """Give the kernel a build, among other notes."""
        self.notes.write_bytes(
            note(b"Linux\0", 0x101, b"\0") + note(b"GNU\0", 3, build_id) + note(b"Xen\0", 6, b"x")
        )

    def booted(self, name: str) -> None:
        """Begin another boot."""
        self.boot.write_text(f"{name}\n")

    def read(self) -> Btf:
        """The kernel's types."""
        self.types_read += 1
        return self.types

    def start(self, *, keep: bool = True) -> RunningKernel:
        """What a start begins with."""
        return RunningKernel(KeptFiles(self.kept) if keep else None, self.read)

    def file(self) -> Path:
        """The one that was kept."""
        (path,) = self.kept.iterdir()
        return path


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


def everything(types: RunningKernel | Btf) -> list[object]:
    """All that a start asks of a kernel's types."""
    return [
        find_layout(types, TABLE_AT),
        misread(types),
        [types.prototype(probe.function) for probe in PROBES],
        [types.parameter_count(probe.function) for probe in PROBES],
        [types.function(probe.function) for probe in PROBES],
        types.tracepoint_arguments("kfree_skb"),
        types.tracepoint_type("kfree_skb"),
        types.function("there_is_none"),
        types.place("there_is_none", "x"),
    ]


def first_start(machine: Machine) -> None:
    """Ask everything, and keep it."""
    first = machine.start()
    everything(first)
    first.symbols(FUNCTIONS, TABLE)
    first.keep()


def test_a_second_start_reads_neither_types_nor_symbols(machine: Machine) -> None:
    first_start(machine)
    assert machine.types_read == 1
    machine.symbols.unlink()
    second = machine.start()
    assert everything(second) == everything(machine.types)
    assert second.symbols(FUNCTIONS, TABLE) == (frozenset(FUNCTIONS), TABLE_AT)
    assert machine.types_read == 1


def test_a_question_that_nobody_asked_before_is_answered_and_kept(machine: Machine) -> None:
    first = machine.start()
    first.place("sock", "sk_ack_backlog")
    first.keep()
    second = machine.start()
    assert second.enumerators("LINUX_MIB_") == machine.types.enumerators("LINUX_MIB_")
    second.keep()
    assert machine.types_read == 2
    third = machine.start()
    assert third.enumerators("LINUX_MIB_") == machine.types.enumerators("LINUX_MIB_")
    assert third.place("sock", "sk_ack_backlog") == machine.types.place("sock", "sk_ack_backlog")
    assert machine.types_read == 2


def test_symbols_are_of_one_boot_types_of_one_build(machine: Machine) -> None:
    first_start(machine)
    machine.booted("second")
    machine.symbols.write_text(SYMBOLS.replace("ffffffff82", "ffffffff92"))
    second = machine.start()
    assert second.symbols(FUNCTIONS, TABLE)[1] == TABLE_AT + 0x10000000
    everything(second)
    assert machine.types_read == 1
    machine.built(b"\x02" * 20)
    everything(machine.start())
    assert machine.types_read == 2


def test_a_boot_without_a_name_reads_the_symbols(machine: Machine) -> None:
    machine.boot.unlink()
    first_start(machine)
    machine.symbols.write_text(SYMBOLS.replace("ffffffff82", "ffffffff92"))
    assert machine.start().symbols(FUNCTIONS, TABLE)[1] == TABLE_AT + 0x10000000


def test_types_that_the_kernel_does_not_show_any_more_are_not_known(machine: Machine) -> None:
    first_start(machine)
    machine.shown_types.unlink()
    machine.start().place("sock", "sk_ack_backlog")
    assert machine.types_read == 2


def test_a_kernel_without_a_build_id_keeps_nothing(machine: Machine) -> None:
    for notes in (b"", note(b"Linux\0", 3, b"x"), note(b"GNU\0", 3, b"y")[:8]):
        machine.notes.write_bytes(notes)
        first_start(machine)
        assert not machine.kept.exists()
    machine.notes.unlink()
    first_start(machine)
    assert not machine.kept.exists()


def test_nothing_is_kept_where_it_is_not_wanted(machine: Machine) -> None:
    unkept = machine.start(keep=False)
    assert everything(unkept) == everything(machine.types)
    unkept.keep()
    assert not machine.kept.exists()


def test_what_was_missing_is_looked_for_again(machine: Machine) -> None:
    """IPv6 may be a module that comes later, and an address be hidden from who lacks CAP_SYSLOG."""
    machine.symbols.write_text("0000000000000000 T tcp_conn_request\n")
    first = machine.start()
    assert first.symbols(FUNCTIONS, TABLE) == (frozenset({"tcp_conn_request"}), None)
    first.keep()
    machine.symbols.write_text(SYMBOLS)
    assert machine.start().symbols(FUNCTIONS, TABLE) == (frozenset(FUNCTIONS), TABLE_AT)


def test_a_hidden_address_is_not_kept(machine: Machine) -> None:
    machine.symbols.write_text(SYMBOLS.replace("ffffffff82000000", "0000000000000000"))
    first_start(machine)
    machine.symbols.write_text(SYMBOLS)
    assert machine.start().symbols(FUNCTIONS, TABLE)[1] == TABLE_AT


def test_damaged_answers_are_said_and_asked_for_anew(machine: Machine) -> None:
    first_start(machine)
    path = machine.file()
    whole = path.read_bytes()
    chance = random.Random(20)
    head = whole[: whole.index(b"{")]
    damaged = [b"", whole[:-1], whole + b" ", head, head + b"{}", b"\0" * 40]
    for _ in range(FLIPS):
        place = chance.randrange(len(whole))
        damaged.append(
            whole[:place] + bytes([whole[place] ^ 1 << chance.randrange(8)]) + whole[place + 1 :]
        )
    for data in damaged:
        with pytest.raises(running_kernel.DamagedError):
            running_kernel._Answers.decode(data)
    path.write_bytes(damaged[-1])
    files = KeptFiles(machine.kept)
    assert everything(RunningKernel(files, machine.read)) == everything(machine.types)
    assert [path.name in one for one in files.notes] == [True]


@pytest.mark.parametrize(
    "told",
    [
        "[]",
        "{}",
        '{"boot": "b", "types": [[]], "functions": [], "addresses": {}}',
        '{"boot": "b", "types": [["call", "x", 1]], "functions": [], "addresses": {}}',
        '{"boot": "b", "types": [["place", "x", "y", [1]]], "functions": [], "addresses": {}}',
        '{"boot": "b", "types": [], "functions": 5, "addresses": {}}',
    ],
)
def test_what_was_written_by_others_is_not_believed(told: str) -> None:
    digest = hashlib.sha256(told.encode()).hexdigest()
    data = b"\n".join((running_kernel._FORMAT, digest.encode(), told.encode()))
    with pytest.raises(running_kernel.DamagedError):
        running_kernel._Answers.decode(data)


def test_a_kernel_without_types_says_so_at_each_question(machine: Machine) -> None:
    def read() -> Btf:
        raise CannotTraceError("this kernel provides no BTF", "it has none", "another")

    kernel_without = RunningKernel(KeptFiles(machine.kept), read)
    for _ in range(2):
        with pytest.raises(CannotTraceError):
            kernel_without.place("sock", "sk_ack_backlog")
    kernel_without.keep()
    assert not machine.kept.exists()
