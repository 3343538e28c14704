"""An artifact: the compiled programs and the shapes of their tables, as bytes. Pure.

BCC's child process writes an artifact, and the cache keeps it. Layout: a magic number that includes
the format's version, the head's length, the head in JSON, the programs' bytecode in sequence, and a
SHA-256 of all that. A reader need not trust it: this module checks every length, name and number,
and the kernel's verifier checks the bytecode.

In the bytecode, the table's number in the head stands where the loader puts its file descriptor.
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
"""Largest size of an artifact, in bytes; ours have about 100 KiB."""
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
    """The bytes are not a whole artifact; the text says what is wrong."""


@dataclass(frozen=True)
class Program:
    """One program. An FENTRY or FEXIT program has its function's name, others that in the text."""

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
    """Hash of the inputs, without the compiler; see `Compilation.identity`."""
    made_for: str
    """The target kernel, as text for a person."""
    compiler: str
    mode: str
    architecture: str
    programs: tuple[Program, ...]
    maps: tuple[MapShape, ...]

    def program(self, kind: str, name: str) -> Program | None:
        """The program of this kind and name; None if there is none."""
        wanted = (one for one in self.programs if (one.kind, one.name) == (kind, name))
        return next(wanted, None)


def encode(artifact: Artifact) -> bytes:
    """The artifact as bytes; equal artifacts give equal bytes."""
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
    """Decode what `encode` made. Raises DamagedError for anything else."""
    if not data.startswith(MAGIC):
        raise DamagedError("it does not begin with this version's magic number")
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
        raise DamagedError("its head is not JSON") from error
    return _artifact(head, body[start + length :])


def _artifact(head: Any, code: bytes) -> Artifact:
    if not isinstance(head, dict):
        raise DamagedError("its head is not a JSON object")
    maps = tuple(map(_map_shape, _listed(head, "maps", 6)))
    if len({one.name for one in maps}) != len(maps):
        raise DamagedError("two tables have the same name")
    programs: list[Program] = []
    at = 0
    for kind, name, length in _listed(head, "programs", 3):
        if kind not in KINDS:
            raise DamagedError("a program is of an unknown kind")
        end = at + _number(length, _MOST_INSTRUCTIONS * _INSTRUCTION.size)
        programs.append(Program(kind, _name(name), code[at:end]))
        at = end
    if at != len(code):
        raise DamagedError("the programs' lengths do not add up")
    for one in programs:
        for place in map_places(one.code):
            if _INSTRUCTION.unpack_from(one.code, place)[3] not in range(len(maps)):
                raise DamagedError(f"{one.name} uses a table that does not exist")
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
        raise DamagedError(f"{key} is not a short text")
    return value


def _name(value: Any) -> str:
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise DamagedError("a name is invalid")
    return value


def _number(value: Any, most: int) -> int:
    if type(value) is not int or not 0 <= value <= most:
        raise DamagedError("a number is out of range")
    return value


def _listed(head: Mapping[str, Any], key: str, width: int) -> Sequence[Any]:
    rows = head.get(key)
    if not isinstance(rows, list) or len(rows) > _MOST_OF_A_KIND:
        raise DamagedError(f"{key} is not a short list")
    if not all(isinstance(row, list) and len(row) == width for row in rows):
        raise DamagedError(f"a row of {key} does not have {width} values")
    return rows


def _map_shape(row: Sequence[Any]) -> MapShape:
    name, *numbers = row
    return MapShape(_name(name), *(_number(value, (1 << 32) - 1) for value in numbers))


def map_places(code: bytes) -> list[int]:
    """Offset in bytes of each instruction that holds a table's number.

    Raises DamagedError where the bytes are not bytecode, or need anything but tables from a loader.
    """
    if not code or len(code) % _INSTRUCTION.size:
        raise DamagedError("a program is not a whole number of instructions")
    places = []
    at = 0
    while at < len(code):
        operation, registers, _, _ = _INSTRUCTION.unpack_from(code, at)
        source = registers >> 4
        if operation == _CALL and source:
            raise DamagedError("a program calls a function that a loader would have to find")
        if operation == _LOAD_64:
            if source == _PSEUDO_MAP:
                places.append(at)
            elif source:
                raise DamagedError("a program loads a value that a loader would have to find")
            at += _INSTRUCTION.size
        at += _INSTRUCTION.size
    if at != len(code):
        raise DamagedError("a program ends in the middle of an instruction")
    return places


def with_map_values(code: bytes, values: Mapping[int, int]) -> bytes:
    """The bytecode with each table's number replaced according to `values`.

    Raises DamagedError as `map_places` does, and for a number that `values` does not have.
    """
    changed = bytearray(code)
    for at in map_places(code):
        operation, registers, offset, number = _INSTRUCTION.unpack_from(code, at)
        if number not in values:
            raise DamagedError("a program uses a table that does not exist")
        _INSTRUCTION.pack_into(changed, at, operation, registers, offset, values[number])
    return bytes(changed)
