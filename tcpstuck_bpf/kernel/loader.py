"""Brings an artifact into the kernel: makes its tables, loads and attaches programs, by bpf(2)."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Mapping

from tcpstuck_bpf.ending import close_all
from tcpstuck_bpf.host import bpf_syscall
from tcpstuck_bpf.host.bpf_syscall import RefusedError
from tcpstuck_bpf.kernel import artifact
from tcpstuck_bpf.kernel.artifact import Artifact, Program
from tcpstuck_bpf.kernel.maps import BpfMap

_PROGRAM_TYPES = {
    artifact.FENTRY: bpf_syscall.PROGRAM_TRACING,
    artifact.FEXIT: bpf_syscall.PROGRAM_TRACING,
    artifact.TYPED_TRACEPOINT: bpf_syscall.PROGRAM_TRACING,
    artifact.RAW_TRACEPOINT: bpf_syscall.PROGRAM_RAW_TRACEPOINT,
    artifact.KPROBE: bpf_syscall.PROGRAM_KPROBE,
}
_ATTACH_TYPES = {
    artifact.FENTRY: bpf_syscall.ATTACH_FENTRY,
    artifact.FEXIT: bpf_syscall.ATTACH_FEXIT,
    artifact.TYPED_TRACEPOINT: bpf_syscall.ATTACH_TYPED_TRACEPOINT,
}


class LoadError(Exception):
    """The kernel refused a step; the text names the step and the kernel's error."""


class LoadedPrograms:
    """The tables of an artifact, and the programs loaded from it.

    `entries` has the sizes of tables that differ from the text's. Raises LoadError where the
    kernel refuses a table, and leaves nothing behind then.
    """

    def __init__(self, made: Artifact, entries: Mapping[str, int]) -> None:
        self.maps: dict[str, BpfMap] = {}
        self._made = made
        self._programs: dict[tuple[str, str], int] = {}
        self._links: list[int] = []
        for shape in made.maps:
            shape = dataclasses.replace(shape, entries=entries.get(shape.name, shape.entries))
            try:
                file = bpf_syscall.create_map(
                    shape.kind, shape.key_bytes, shape.value_bytes, shape.entries, shape.flags
                )
            except RefusedError as error:
                with contextlib.suppress(OSError):
                    self.close()
                raise LoadError(f"the map {shape.name}: {error}") from error
            self.maps[shape.name] = BpfMap(file, shape)
        self._files = {number: self.maps[one.name].file for number, one in enumerate(made.maps)}

    def has(self, kind: str, name: str) -> bool:
        """Whether the program of this kind and name is loaded."""
        return (kind, name) in self._programs

    def load(self, kind: str, name: str, type_number: int = 0) -> None:
        """Load a program, unless it is loaded. Raises LoadError, also if the artifact lacks it.

        A tracing program is loaded with its target: `type_number`, the function's or tracepoint's
        type in the running kernel's BTF.
        """
        if self.has(kind, name):
            return
        program = self._made.program(kind, name)
        if program is None:
            raise LoadError(f"the compiled programs have no {name} ({kind})")
        code = artifact.with_map_values(program.code, self._files)
        try:
            self._programs[kind, name] = bpf_syscall.load_program(
                _PROGRAM_TYPES[kind], name, code, _ATTACH_TYPES.get(kind, 0), type_number
            )
        except RefusedError as error:
            raise LoadError(f"loading {_words(program)}: {error}") from error

    def attach(self, kind: str, name: str, target: str = "", *, at_return: bool = False) -> None:
        """Attach a loaded program. Raises LoadError.

        `target` is the function or tracepoint; a tracing program has it already.
        """
        file = self._programs[kind, name]
        try:
            if kind == artifact.KPROBE:
                link = bpf_syscall.attach_kprobe(file, target, at_return=at_return)
            elif kind == artifact.RAW_TRACEPOINT:
                link = bpf_syscall.attach_raw_tracepoint(file, target)
            else:
                link = bpf_syscall.attach_tracing(file)
        except RefusedError as error:
            raise LoadError(f"attaching {name} ({kind}): {error}") from error
        self._links.append(link)

    @property
    def names(self) -> frozenset[str]:
        """The names of all loaded programs."""
        return frozenset(name for _, name in self._programs)

    def missed_runs(self) -> int:
        """Number of times that the kernel skipped a program, over all programs."""
        missed = 0
        for file in self._programs.values():
            with contextlib.suppress(RefusedError):
                missed += bpf_syscall.missed_runs(file)
        return missed

    def close(self) -> None:
        """Detach, unload, and free the tables. The kernel does the same when the process dies.

        Every step is tried; then OSError is raised if one failed.
        """
        files = [*self._links, *self._programs.values()]
        tables = [*self.maps.values()]
        self._links, self._programs, self.maps = [], {}, {}
        closings = [functools.partial(os.close, file) for file in files]
        close_all([*closings, *(table.close for table in tables)])


def _words(program: Program) -> str:
    return f"{program.name} ({program.kind})"
