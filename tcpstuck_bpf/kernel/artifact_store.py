"""Artifacts in directories: kept for the next start, or built for other machines."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from tcpstuck_bpf.errors import CannotTraceError
from tcpstuck_bpf.kernel import artifact, compilation
from tcpstuck_bpf.kernel.artifact import Artifact, DamagedError
from tcpstuck_bpf.kernel.compilation import Compilation
from tcpstuck_bpf.kernel.kept_files import (
    OTHERS_MAY_WRITE,
    PROGRAMS,
    KeptFiles,
    UnsafeError,
    names,
    open_directory,
    read_file,
)

MOST_BUILT = 256
"""Largest number of files read in a directory: both modes of a hundred kernels."""


def _name(wanted: Compilation) -> str:
    made_by = f"{wanted.identity()} {compilation.bcc_version()}"
    return hashlib.sha256(made_by.encode()).hexdigest() + PROGRAMS


def find_kept(files: KeptFiles, wanted: Compilation) -> Artifact | None:
    """The kept artifact of exactly this compilation; None if there is no usable one."""
    return files.find(_name(wanted), lambda data: compilation.decoded(data, wanted))


def keep(files: KeptFiles, wanted: Compilation, data: bytes) -> None:
    """Keep an artifact for the next start."""
    files.keep(_name(wanted), data)


class BuiltPrograms:
    """A directory of artifacts that were built elsewhere (`--build`), for a machine without BCC.

    Raises CannotTraceError where the directory cannot be read, or where anybody but root and our
    own user could write to it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._artifacts: list[Artifact] = []
        self._unusable: list[str] = []
        try:
            directory = open_directory(path, OTHERS_MAY_WRITE)
        except UnsafeError as error:
            raise self._refused(f"{path}: {error}") from error
        except OSError as error:
            raise self._refused(f"{path}: {error.strerror}") from error
        try:
            found = sorted(name for name in names(directory) if name.endswith(PROGRAMS))
            for name in found[:MOST_BUILT]:
                self._take(directory, name)
            if len(found) > MOST_BUILT:
                self._unusable.append(f"{len(found) - MOST_BUILT} more were not read")
        finally:
            os.close(directory)

    def _take(self, directory: int, name: str) -> None:
        try:
            self._artifacts.append(artifact.decode(read_file(directory, name)))
        except (DamagedError, UnsafeError) as error:
            self._unusable.append(f"{name}: {error}")
        except OSError as error:
            self._unusable.append(f"{name}: {error.strerror}")

    @staticmethod
    def _refused(why: str) -> CannotTraceError:
        return CannotTraceError(
            "the built programs cannot be used",
            why,
            "name a directory that --build has filled, owned by root and writable by nobody else",
        )

    def find(self, wanted: Compilation) -> Artifact:
        """The artifact that fits this kernel. Raises CannotTraceError, listing what is there."""
        identity = wanted.identity()
        for one in self._artifacts:
            if one.identity == identity:
                return one
        there = [f"{one.made_for}, {one.mode}" for one in self._artifacts]
        listed = "; ".join([*dict.fromkeys(there), *self._unusable]) or "nothing"
        raise CannotTraceError(
            f"no programs in {self.path} fit this kernel by {wanted.mode}",
            f"this is {wanted.made_for}; there is: {listed}",
            "build them from this kernel's image with the same version of tcpstuck-trace and the "
            "same options: --build DIR --vmlinux FILE",
        )
