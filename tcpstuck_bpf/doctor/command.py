"""Runs `--doctor` on this machine, on a kernel image, or on two images."""

from __future__ import annotations

from collections.abc import Iterable

from tcpstuck_bpf.doctor import machine_report, render
from tcpstuck_bpf.errors import UsageError
from tcpstuck_bpf.kernel.kernel_report import KernelReport, changes, describe


def consult(
    vmlinux: str | None,
    against: str | None,
    *,
    width: int,
    height: int | None,
    json: bool,
    verbose: bool,
) -> tuple[bool, Iterable[str]]:
    """Whether tracing is possible on the machine or kernel, and the lines to print.

    `width` and `height` are the terminal's, in columns and lines; `height` is None for a pipe.

    Raises UsageError for a file that is not a kernel, CannotTraceError for one that cannot be read.
    """
    if vmlinux is None:
        if against is not None:
            raise UsageError(
                "--against needs --vmlinux",
                "it compares two kernel images",
                "write --doctor --vmlinux FILE --against FILE",
            )
        able, lines = _this_machine(width, json, verbose)
        return able, lines if json else render.in_sight(lines, height)
    first = _described(vmlinux)
    if against is None:
        lines = render.kernel_json(first) if json else render.kernel_lines(first, width, verbose)
        return not first.trouble, lines if json else render.in_sight(lines, height)
    second = _described(against)
    found = changes(first, second)
    lines = (
        render.change_json(first, second, found)
        if json
        else render.change_lines(first, second, found, width)
    )
    able = not (first.trouble or second.trouble)
    return able, lines if json else render.in_sight(lines, height)


def _this_machine(width: int, json: bool, verbose: bool) -> tuple[bool, Iterable[str]]:
    from tcpstuck_bpf.kernel.compilation import require_bcc
    from tcpstuck_bpf.kernel.open_source import open_source

    report = machine_report.examine(open_source, require_bcc)
    lines = render.machine_json(report) if json else render.machine_lines(report, width, verbose)
    return report.able, lines


def _described(path: str) -> KernelReport:
    # Imported only where it is used: the machine itself needs no pyelftools.
    from tcpstuck_bpf.typeinfo.vmlinux import read_image

    image = read_image(path)
    packing = "" if image.packing == "none" else f", {image.packing}"
    source = f"{path} ({image.types.form}{packing})"
    return describe(image.release, source, image.types, image.symbols)
