"""An artifact: the compiled programs and the shapes of their tables, as bytes. Pure.

What BCC's child process hands over, and what is kept in a directory. Layout: a magic number that
includes the format's version, the head's length, the head in JSON, the programs' bytecode one after
the other, and a SHA-256 of all that. Whoever reads one need not trust it: every length, name and
number is checked here, and what the bytecode does is the kernel's verifier to judge.

In the bytecode the places of tables' file descriptors hold the table's number in the head.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

FENTRY, FEXIT, KPROBE = "fentry", "fexit", "kprobe"
RAW_TRACEPOINT, TYPED_TRACEPOINT = "raw_tracepoint", "typed_tracepoint"
KINDS = (FENTRY, FEXIT, KPROBE, RAW_TRACEPOINT, TYPED_TRACEPOINT)

MAGIC = b"tcpstuck programs 1\n"
MOST_BYTES = 4 << 20
"""Bytes of a whole artifact; ours have some 100 KiB."""
_MOST_OF_A_KIND = 64
_MOST_INSTRUCTIONS = 1 << 17
_LENGTH = struct.Struct("<I")
_DIGEST_BYTES = 32
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.]{0,127}")
_WORDS = re.compile(r"[\x20-\x7e]{0,200}")

_INSTRUCTION = struct.Struct("<BBhi")
_LOAD_64, _CALL = 0x18, 0x85
_PSEUDO_MAP = 1
"""The source register of a 64-bit load whose value is a table's file descriptor."""


class DamagedError(Exception):
    """The bytes are no artifact, or not a whole one; the text says what is wrong."""


@dataclass(frozen=True)
class Program:
    """One program: for FENTRY and FEXIT by the kernel's function, else by its name in the text."""

    kind: str
    name: str
    code: bytes


@dataclass(frozen=True)
class MapShape:
    """A table: `kind` is of enum bpf_map_type, sizes are in bytes, flags are BPF_F_*."""

    name: str
    kind: int
    key_bytes: int
    value_bytes: int
    entries: int
    flags: int = 0


@dataclass(frozen=True)
class Artifact:
    """Programs of one mode, and their tables in the order in which the bytecode numbers them."""

    identity: str
    """What it was made from, without the compiler; see `compilation.identity`."""
    made_for: str
    """The kernel, in words for a person."""
    compiler: str
    mode: str
    architecture: str
    programs: tuple[Program, ...]
    maps: tuple[MapShape, ...]

    def program(self, kind: str, name: str) -> Program | None:
        """That program, None where there is none."""
        wanted = (one for one in self.programs if (one.kind, one.name) == (kind, name))
        return next(wanted, None)


def encode(artifact: Artifact) -> bytes:
    """The artifact as bytes, always the same ones."""
    head = {
        "identity": artifact.identity,
        "made_for": artifact.made_for,
        "compiler": artifact.compiler,
        "mode": artifact.mode,
        "architecture": artifact.architecture,
        "programs": [[one.kind, one.name, len(one.code)] for one in artifact.programs],
        "maps": [
            [one.name, one.kind, one.key_bytes, one.value_bytes, one.entries, one.flags]
            for one in artifact.maps
        ],
    }
    text = json.dumps(head, sort_keys=True, separators=(",", ":")).encode("ascii")
    code = b"".join(one.code for one in artifact.programs)
    body = MAGIC + _LENGTH.pack(len(text)) + text + code
    return body + hashlib.sha256(body).digest()


def decode(data: bytes) -> Artifact:
    """Raises DamagedError for whatever `encode` does not make."""
    if not data.startswith(MAGIC):
        raise DamagedError("it does not begin as one of this version does")
    if len(data) > MOST_BYTES:
        raise DamagedError(f"it has {len(data)} bytes, more than {MOST_BYTES}")
    start = len(MAGIC) + _LENGTH.size
    if len(data) < start + _DIGEST_BYTES:
        raise DamagedError("it is cut off")
    body, digest = data[:-_DIGEST_BYTES], data[-_DIGEST_BYTES:]
    if hashlib.sha256(body).digest() != digest:
        raise DamagedError("its checksum does not match")
    (length,) = _LENGTH.unpack_from(data, len(MAGIC))
    try:
        head = json.loads(body[start : start + length].decode("ascii"))
    except (ValueError, RecursionError) as error:
        raise DamagedError("its head is no JSON") from error
    return _artifact(head, body[start + length :])


def _artifact(head: Any, code: bytes) -> Artifact:
    if not isinstance(head, dict):
        raise DamagedError("its head is no JSON object")
    maps = tuple(map(_map_shape, _listed(head, "maps", 6)))
    if len({one.name for one in maps}) != len(maps):
        raise DamagedError("two tables have one name")
    programs: list[Program] = []
    at = 0
    for kind, name, length in _listed(head, "programs", 3):
        if kind not in KINDS:
            raise DamagedError("a program is of no kind that is known")
        end = at + _number(length, _MOST_INSTRUCTIONS * _INSTRUCTION.size)
        programs.append(Program(kind, _name(name), code[at:end]))
        at = end
    if at != len(code):
        raise DamagedError("the programs' lengths do not add up")
    for one in programs:
        for place in map_places(one.code):
            if _INSTRUCTION.unpack_from(one.code, place)[3] not in range(len(maps)):
                raise DamagedError(f"{one.name} uses a table that is not there")
    return Artifact(
        identity=_text(head, "identity"),
        made_for=_text(head, "made_for"),
        compiler=_text(head, "compiler"),
        mode=_text(head, "mode"),
        architecture=_text(head, "architecture"),
        programs=tuple(programs),
        maps=maps,
    )


def _text(head: Mapping[str, Any], key: str) -> str:
    value = head.get(key)
    if not isinstance(value, str) or not _WORDS.fullmatch(value):
        raise DamagedError(f"{key} is no short text")
    return value


def _name(value: Any) -> str:
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise DamagedError("a name is none")
    return value


def _number(value: Any, most: int) -> int:
    if type(value) is not int or not 0 <= value <= most:
        raise DamagedError("a number is out of its range")
    return value


def _listed(head: Mapping[str, Any], key: str, width: int) -> Sequence[Any]:
    rows = head.get(key)
    if not isinstance(rows, list) or len(rows) > _MOST_OF_A_KIND:
        raise DamagedError(f"{key} is no short list")
    if not all(isinstance(row, list) and len(row) == width for row in rows):
        raise DamagedError(f"a row of {key} does not have {width} values")
    return rows


def _map_shape(row: Sequence[Any]) -> MapShape:
    name, *numbers = row
    return MapShape(_name(name), *(_number(value, (1 << 32) - 1) for value in numbers))


def map_places(code: bytes) -> list[int]:
    """Bytes from the start of a program to each instruction that holds a table's number.

    Raises DamagedError where the bytes are no bytecode, or refer to anything else that a loader has
    to put in: there is nothing else.
    """
    if not code or len(code) % _INSTRUCTION.size:
        raise DamagedError("a program is no whole number of instructions")
    places = []
    at = 0
    while at < len(code):
        operation, registers, _, _ = _INSTRUCTION.unpack_from(code, at)
        source = registers >> 4
        if operation == _CALL and source:
            raise DamagedError("a program calls what a loader has to find")
        if operation == _LOAD_64:
            if source == _PSEUDO_MAP:
                places.append(at)
            elif source:
                raise DamagedError("a program loads what a loader has to find")
            at += _INSTRUCTION.size
        at += _INSTRUCTION.size
    if at != len(code):
        raise DamagedError("a program ends in the middle of an instruction")
    return places


def with_map_values(code: bytes, values: Mapping[int, int]) -> bytes:
    """The bytecode with other numbers in the places of tables, by those that stand there now.

    Raises DamagedError as `map_places` does, and for a number that `values` does not have.
    """
    changed = bytearray(code)
    for at in map_places(code):
        operation, registers, offset, number = _INSTRUCTION.unpack_from(code, at)
        if number not in values:
            raise DamagedError("a program uses a table that is not there")
        _INSTRUCTION.pack_into(changed, at, operation, registers, offset, values[number])
    return bytes(changed)
