"""Compiles the tool's programs for a guest's kernel on this machine.

A compilation takes less than a second here, half a minute in an emulated guest, and each guest
starts with an empty cache. Guests with this machine's root have the same BCC, so they find what was
compiled here under the same name (artifact_store.find_kept). What is missing they compile
themselves.
"""

from __future__ import annotations

import itertools
from pathlib import Path

from lab.errors import LabError
from tcpstuck_bpf.errors import TcpstuckError
from tcpstuck_bpf.kernel import artifact_store, builder
from tcpstuck_bpf.kernel.attach_plan import AttachRequest
from tcpstuck_bpf.kernel.compilation import CompilerError, compile_in_child
from tcpstuck_bpf.kernel.kept_files import PROGRAMS, KeptFiles
from tcpstuck_bpf.typeinfo.vmlinux import read_image

PROGRAMS_VARIABLE = "TCPSTUCK_LAB_PROGRAMS"
"""In a guest, the path of the directory of programs that were compiled for its kernel."""


def compile_programs(image: Path, directory: Path) -> list[str]:
    """Keep the programs for this kernel image in a directory; returns why some are missing.

    The directory is created if needed. What is there already is not compiled again.
    """
    files = KeptFiles(directory)
    try:
        kernel = read_image(str(image))
        for rescue, why in itertools.product((False, True), (True, False)):
            for wanted in builder.compilations(kernel, AttachRequest(rescue=rescue, why=why)):
                if artifact_store.find_kept(files, wanted) is None:
                    artifact_store.keep(files, wanted, compile_in_child(wanted))
    except (TcpstuckError, CompilerError) as error:
        return [str(error), *files.notes]
    return files.notes


def hand_over(directory: Path, cache: Path) -> None:
    """Copy compiled programs to the tool's cache of the same user."""
    files = KeptFiles(cache)
    for path in sorted(directory.glob(f"*{PROGRAMS}")):
        files.keep(path.name, path.read_bytes())
    if files.notes:
        raise LabError("the programs cannot be handed over", "; ".join(files.notes), "see above")
