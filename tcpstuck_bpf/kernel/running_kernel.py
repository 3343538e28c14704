"""The running kernel's types and symbols, with the answers kept for the next start.

To find a dozen offsets, a start reads five megabytes of BTF and all of /proc/kallsyms. That is
nearly half of its time when the programs are already compiled. The answers change only with the
kernel. The cache keeps the raw answers, so another version of the tool can ask its own questions.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tcpstuck_bpf.host import kallsyms
from tcpstuck_bpf.kernel.artifact import DamagedError
from tcpstuck_bpf.kernel.kept_files import FACTS, KeptFiles
from tcpstuck_bpf.typeinfo import btf, graph
from tcpstuck_bpf.typeinfo.btf import Btf, read_running_kernel
from tcpstuck_bpf.typeinfo.graph import MemberPlace, Prototype

_NOTES = Path("/sys/kernel/notes")
_BOOT = Path("/proc/sys/kernel/random/boot_id")
_FORMAT = b"tcpstuck-trace kernel 1"
_NOTE = struct.Struct("=III")
_BUILD_ID = 3
"""NT_GNU_BUILD_ID of elf(5)."""

_AS_IT_WAS: dict[str, Callable[[Any], Any]] = {
    "place": lambda kept: MemberPlace(*kept),
    "prototype": lambda kept: Prototype(str(kept[0]), tuple(kept[1])),
    "enumerators": dict,
    "parameter_count": int,
    "tracepoint_arguments": int,
    "function": int,
    "tracepoint_type": int,
}
"""Decoder of a kept answer's JSON, by the question's name, a method of `Btf`."""

_Question = tuple[str, ...]
"""The question's name and its arguments."""


@dataclass
class _Answers:
    """The kept answers. Types are valid for a kernel build, symbols (addresses) for one boot."""

    boot: str
    types: dict[_Question, Any] = field(default_factory=dict)
    functions: set[str] = field(default_factory=set)
    addresses: dict[str, int] = field(default_factory=dict)

    def encode(self) -> bytes:
        kept = {
            "boot": self.boot,
            "types": [[*question, answer] for question, answer in self.types.items()],
            "functions": sorted(self.functions),
            "addresses": self.addresses,
        }
        body = json.dumps(kept).encode()
        return b"\n".join((_FORMAT, hashlib.sha256(body).hexdigest().encode(), body))

    @classmethod
    def decode(cls, data: bytes) -> _Answers:
        """Decode what `encode` wrote. Raises DamagedError for anything else."""
        head, _, rest = data.partition(b"\n")
        digest, _, body = rest.partition(b"\n")
        if head != _FORMAT or digest != hashlib.sha256(body).hexdigest().encode():
            raise DamagedError("its checksum does not match")
        try:
            kept = json.loads(body)
            types = {}
            for *question, answer in kept["types"]:
                decode = _AS_IT_WAS[question[0]]
                types[tuple(question)] = None if answer is None else decode(answer)
            return cls(kept["boot"], types, set(kept["functions"]), dict(kept["addresses"]))
        except (LookupError, TypeError, ValueError) as error:
            raise DamagedError(f"its content is not understood: {error}") from error


class RunningKernel:
    """The running kernel's own types (`graph.KernelTypes`) and symbols.

    Every method that asks the kernel raises CannotTraceError where the kernel cannot answer.
    """

    form = Btf.form

    def __init__(
        self, files: KeptFiles | None, read_types: Callable[[], Btf] = read_running_kernel
    ) -> None:
        self._files = files
        self._read_types = read_types
        self._types: Btf | None = None
        self._learnt = False
        self._name = None if files is None else _file_name()
        boot = _boot()
        kept = files.find(self._name, _Answers.decode) if files and self._name else None
        self._answers = kept or _Answers(boot)
        if not boot or self._answers.boot != boot:
            self._answers = _Answers(boot, self._answers.types)
        if not Path(btf.RUNNING_KERNEL).is_file():
            # A kernel that no longer shows its types is refused, even if answers were kept.
            self._answers.types.clear()

    def _answer(self, *question: str) -> Any:
        if question not in self._answers.types:
            if self._types is None:
                self._types = self._read_types()
            method, *arguments = question
            self._answers.types[question] = getattr(self._types, method)(*arguments)
            self._learnt = True
        return self._answers.types[question]

    def place(self, struct_name: str, path: str) -> MemberPlace | None:
        """See KernelTypes."""
        found: MemberPlace | None = self._answer("place", struct_name, path)
        return found

    def parameter_count(self, function: str) -> int | None:
        """See KernelTypes."""
        found: int | None = self._answer("parameter_count", function)
        return found

    def prototype(self, function: str) -> Prototype | None:
        """See KernelTypes."""
        found: Prototype | None = self._answer("prototype", function)
        return found

    def tracepoint_arguments(self, tracepoint: str) -> int | None:
        """See KernelTypes."""
        found: int | None = self._answer("tracepoint_arguments", tracepoint)
        return found

    def enumerators(self, prefix: str) -> dict[str, int]:
        """See KernelTypes."""
        found: dict[str, int] = self._answer("enumerators", prefix)
        return found

    def function(self, name: str) -> int | None:
        """See `Btf.function`."""
        found: int | None = self._answer("function", name)
        return found

    def tracepoint_type(self, tracepoint: str) -> int | None:
        """See `Btf.tracepoint_type`."""
        found: int | None = self._answer("tracepoint_type", tracepoint)
        return found

    def symbols(
        self, functions: Collection[str], data_symbol: str
    ) -> tuple[frozenset[str], int | None]:
        """See `kallsyms.read_symbols`.

        Symbols that were missing are looked up again: a module may have been loaded since, or the
        address may have been hidden from the user who asked before.
        """
        known = self._answers
        if not known.functions.issuperset(functions) or data_symbol not in known.addresses:
            found, address = kallsyms.read_symbols(functions, data_symbol)
            self._learnt |= not known.functions.issuperset(found)
            known.functions |= found
            if address is not None:
                self._learnt |= data_symbol not in known.addresses
                known.addresses[data_symbol] = address
        return frozenset(known.functions.intersection(functions)), known.addresses.get(data_symbol)

    def keep(self) -> None:
        """Keep the new answers, and free the types."""
        self._types = None
        if self._files is not None and self._name is not None and self._learnt:
            self._files.keep(self._name, self._answers.encode())
        self._learnt = False


def _file_name() -> str | None:
    """Name of the kept file, from the kernel's build ID and the readers' source text.

    None where either is unknown.
    """
    build = _build_id()
    if build is None:
        return None
    digest = hashlib.sha256(_FORMAT + build + os.uname().release.encode())
    try:
        for module in (btf, graph):
            digest.update(Path(str(module.__file__)).read_bytes())
    except OSError:
        return None
    return digest.hexdigest() + FACTS


def _build_id() -> bytes | None:
    """The running kernel's build ID, the linker's hash of the whole kernel with its BTF.

    Source: the ELF notes in /sys/kernel/notes (kernel/ksysfs.c). None where there is none.
    """
    try:
        notes = _NOTES.read_bytes()
    except OSError:
        return None
    place = 0
    while place + _NOTE.size <= len(notes):
        name_bytes, length, kind = _NOTE.unpack_from(notes, place)
        name = place + _NOTE.size
        value = name + -(-name_bytes // 4) * 4
        if kind == _BUILD_ID and notes[name : name + name_bytes] == b"GNU\0":
            return notes[value : value + length]
        place = value + -(-length // 4) * 4
    return None


def _boot() -> str:
    """The ID of this boot; empty if unknown."""
    try:
        return _BOOT.read_text(encoding="ascii").strip()
    except OSError:
        return ""
