"""Writes BTF byte by byte (Documentation/bpf/btf.rst), and with it kernels that do not exist."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from tcpstuck_bpf.kernel.layout import (
    COOKIE_MEMBER,
    COUNTER_MEMBER,
    COUNTERS,
    DROP_MEMBERS,
    REQUIRED_MEMBERS,
    SOCKET_MEMBERS,
    Member,
)
from tcpstuck_bpf.kernel.probes import EVERY_PROBE, REASON_ARGUMENT
from tcpstuck_bpf.typeinfo.btf import Btf

INT, POINTER, STRUCT, UNION, ENUM, TYPEDEF, FUNC, FUNC_PROTO = 1, 2, 4, 5, 6, 8, 12, 13


class Types:
    """Writes BTF (Documentation/bpf/btf.rst)."""

    def __init__(self) -> None:
        self._strings = b"\0"
        self._types = b""
        self.count = 0

    def name(self, text: str) -> int:
        """Where a name is."""
        if not text:
            return 0
        self._strings += text.encode() + b"\0"
        return len(self._strings) - len(text) - 1

    def add(self, kind: int, name: str, size: int, tail: bytes = b"", members: int = 0) -> int:
        info = kind << 24 | members
        self._types += struct.pack("=III", self.name(name), info, size) + tail
        self.count += 1
        return self.count

    def struct(self, name: str, *members: tuple[str, int, int], kind: int = STRUCT) -> int:
        tail = b"".join(struct.pack("=III", self.name(n), t, 8 * o) for n, t, o in members)
        return self.add(kind, name, 4096, tail, len(members))

    def data(self) -> bytes:
        """The file."""
        types = len(self._types)
        header = struct.pack("=HBBIIIII", 0xEB9F, 1, 0, 24, 0, types, types, len(self._strings))
        return header + self._types + self._strings

    def btf(self) -> Btf:
        """The BTF, as the tool's reader parses it."""
        return Btf(self.data(), "the test")


# Struct by struct: the programs read several members of one at once. Some are asked for twice.
_MEMBERS = {
    (member.kernel_struct, member.path): member
    for member in sorted(
        (*DROP_MEMBERS, *REQUIRED_MEMBERS, *SOCKET_MEMBERS, COOKIE_MEMBER, COUNTER_MEMBER),
        key=lambda member: member.kernel_struct,
    )
}


def kernel(
    without: Member | None = None,
    counters: Sequence[int] = (2, 3, 21, 22),
    sizes: Mapping[Member, int] = MappingProxyType({}),
) -> Types:
    """A kernel with every member we ask for, each at an offset of its own.

    `sizes` gives members another size in bytes than the one we expect.
    """
    types = Types()
    numbers = {
        size: types.add(INT, f"u{8 * size}", size, struct.pack("=I", 8 * size))
        for size in (1, 2, 4, 8)
    }
    structs: dict[str, dict[str, Any]] = {}
    for number, member in enumerate(_MEMBERS.values()):
        if member != without:
            place = structs.setdefault(member.kernel_struct, {})
            *outer, last = member.path.split(".")
            for step in outer:
                place = place.setdefault(step, {})
            place[last] = (64 + 8 * number, numbers[sizes.get(member, member.size)])

    def write(name: str, members: dict[str, Any]) -> int:
        fields = []
        for member_name, inner in members.items():
            if isinstance(inner, dict):
                fields.append((member_name, write("", inner), 0))
            else:
                # In an anonymous union each, as many of the kernel's members are.
                offset, kind = inner
                union = types.struct("", (member_name, kind, 0), kind=UNION)
                fields.append(("", union, offset))
        return types.struct(name, *fields)

    structs.get("socket_alloc", {})["socket"] = (0, numbers[8])
    for name, members in structs.items():
        write(name, members)
    if counters:
        values = [
            struct.pack("=II", types.name(f"LINUX_MIB_{c}"), n) for c, n in zip(COUNTERS, counters)
        ]
        types.add(ENUM, "", 4, b"".join(values), len(values))
    return types


def with_members(types: Types, *members: str) -> Types:
    """More structs, each of one member: `STRUCT.MEMBER`."""
    word = types.add(INT, "int", 4, struct.pack("=I", 32))
    for name, member in (member.split(".") for member in members):
        types.struct(name, (member, word, 0))
    return types


RT = ("task_struct.softirq_disable_cnt", "softirq_ctrl.lock")
"""What a PREEMPT_RT kernel has whose softirqs never interleave on a CPU."""
RT_INTERLEAVED = (*RT, "tasklet_sync_callback.cb_lock")


def add_tracepoint(types: Types, name: str, arguments: int) -> None:
    """A typedef as in include/trace/bpf_probe.h: the first parameter is not the tracepoint's."""
    word = types.add(INT, "int", 4, struct.pack("=I", 32))
    tail = struct.pack("=II", 0, word) * (arguments + 1)
    prototype = types.add(FUNC_PROTO, "", 0, tail, arguments + 1)
    types.add(TYPEDEF, f"btf_trace_{name}", types.add(POINTER, "", prototype))


def with_functions(types: Types, changed: Mapping[str, Sequence[str]] | None = None) -> Types:
    """The probed functions as we expect them; those that are `changed` with these parameters.

    A parameter is what it points to, `int` for one that is no pointer.
    """
    word = types.add(INT, "int", 4, struct.pack("=I", 32))
    pointed = {"": word}
    for kind in ("sock", "sk_buff", "request_sock_ops"):
        pointed[f"struct {kind}"] = types.struct(kind)
    numbers = {name: types.add(POINTER, "", kind) for name, kind in pointed.items()}
    numbers["int"] = word
    for probe in EVERY_PROBE:
        if probe.raw_tracepoint is not None:
            add_tracepoint(types, probe.function, REASON_ARGUMENT + 1)
            continue
        count = probe.parameters or 4
        expected = [probe.arguments.get(place, "struct request_sock_ops") for place in range(count)]
        parameters = (changed or {}).get(probe.function, expected)
        name = types.name("value")
        tail = b"".join(struct.pack("=II", name, numbers[kind]) for kind in parameters)
        prototype = types.add(FUNC_PROTO, "", word, tail, len(parameters))
        types.add(FUNC, probe.function, prototype)
    return types


def expected_offset(member: Member) -> int:
    return 64 + 8 * list(_MEMBERS).index((member.kernel_struct, member.path))
