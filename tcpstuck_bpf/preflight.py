"""Checks the files named by options, and options that need another, before the machine.

A mistyped directory is a usage error even on a machine that cannot trace. Errors that this check
cannot find are reported when the file is read or written.
"""

from __future__ import annotations

import argparse
import os
import stat
from pathlib import Path

from tcpstuck_bpf.errors import UsageError
from tcpstuck_bpf.files import directory_obstacle, obstacle
from tcpstuck_bpf.options import as_written, build_parser


def refuse_without_rescue(options: argparse.Namespace) -> None:
    """Raises UsageError for an option that has no effect without --rescue."""
    for name in ("rescue_exclude", "rescue_rate", "rescue_late"):
        default = build_parser().get_default(name)
        value = getattr(options, name)
        if options.rescue is None and value != default:
            raise UsageError(
                f"{as_written(name, value)} needs --rescue",
                "without it the tool sends nothing",
                "add --rescue, or leave it out",
            )


def refuse_unusable_files(options: argparse.Namespace) -> None:
    """Raises UsageError if an option's file or directory is unusable for it."""
    for option, path in (("--record", options.record), ("--ready-file", options.ready_file)):
        why = None if path is None else obstacle(path)
        if path == "-":
            why = "a file of that name is rarely meant, and standard output is for the verdicts"
        if why is not None:
            raise UsageError(
                f"{option} {path} cannot be written",
                why,
                "name a file in a directory that you may write to",
            )
    why = None if options.build is None else directory_obstacle(options.build)
    if why is not None:
        raise UsageError(
            f"--build {options.build} cannot be written",
            why,
            "name a directory that you may write to; it need not be there yet",
        )
    for path in (*(options.vmlinux or ()), *filter(None, [options.against])):
        _refuse_unreadable_kernel(path)
    if options.programs is not None:
        _refuse_directory_without_programs(options.programs)


def _refuse_unreadable_kernel(path: str) -> None:
    remedy = "name a vmlinux or vmlinuz that you may read"
    try:
        # Only regular files are opened: opening a named pipe would wait for its other end.
        if not stat.S_ISREG(Path(path).stat().st_mode):
            raise UsageError(f"{path} is not a kernel", "it is no regular file", remedy)
        with Path(path).open("rb"):
            return
    except OSError as error:
        raise UsageError(f"cannot read {path}", str(error.strerror), remedy) from error


def _refuse_directory_without_programs(path: str) -> None:
    # Imported only where it is used: it imports the hash modules.
    from tcpstuck_bpf.kernel.kept_files import PROGRAMS

    remedy = "name a directory that --build has filled"
    try:
        with os.scandir(path) as entries:
            if any(entry.name.endswith(PROGRAMS) for entry in entries):
                return
    except OSError as error:
        raise UsageError(
            f"--programs {path} cannot be read", str(error.strerror), remedy
        ) from error
    raise UsageError(
        f"--programs {path} holds no programs", f"no file there ends with {PROGRAMS}", remedy
    )
