"""Compiles the tool's programs for a guest's kernel on this machine.

A compilation takes less than a second here, half a minute in an emulated guest, and each guest
starts with an empty cache. A guest finds what was compiled here under the same name if its BCC is
the same (artifact_store.find_kept): this machine's, or that of the guest's own root tree, which
then compiled it here. What is missing, guests compile themselves.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

from lab.errors import LabError
from lab.guests.in_tree import run_in_tree
from lab.guests.packages import CacheError
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


def compile_in_tree(tree: Path, image: Path, directory: Path, repository: Path) -> list[str]:
    """Like compile_programs, with the Python and the BCC of a root tree."""
    directory.mkdir(mode=0o700, exist_ok=True)
    command = ["python3", "-m", __name__, str(image), str(directory)]
    readable = (repository, image.parent)
    try:
        said = run_in_tree(tree, command, readable=readable, writable=(directory,), cwd=repository)
    except CacheError as error:
        return [str(error)]
    return said.splitlines()


def hand_over(directory: Path, cache: Path) -> None:
    """Copy compiled programs to the tool's cache of the same user."""
    files = KeptFiles(cache)
    for path in sorted(directory.glob(f"*{PROGRAMS}")):
        files.keep(path.name, path.read_bytes())
    if files.notes:
        raise LabError("the programs cannot be handed over", "; ".join(files.notes), "see above")


if __name__ == "__main__":
    for why_missing in compile_programs(Path(sys.argv[1]), Path(sys.argv[2])):
        print(why_missing)
