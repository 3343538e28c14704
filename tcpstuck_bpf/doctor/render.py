"""Renders the doctor's reports, as tables for people or JSON Lines for programs.

The JSON keys are a public interface, like those of `export`.
"""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from tabulate import tabulate

from tcpstuck_bpf.doctor.machine_report import NO, SYNCOOKIES, MachineReport
from tcpstuck_bpf.host.netns_counters import QUEUE_SETTINGS
from tcpstuck_bpf.json_text import json_text
from tcpstuck_bpf.kernel.kernel_report import Change, KernelReport, place_text
from tcpstuck_bpf.kernel.probes import RESCUE_PROBES, WHY_PROBES, Probe
from tcpstuck_bpf.output.export import FORMAT
from tcpstuck_bpf.terminal import printable

NARROWEST_COLUMN = 10
COLUMN_GAP = 2
HEADER_PADDING = "  "
"""tabulate makes every column wider than its heading by this much."""


def _fitted(
    headers: Sequence[str], rows: Sequence[Sequence[str]], width: int
) -> tuple[list[str], list[list[str]]] | None:
    """Wrap cells so that the table fits. The widest columns shrink first.

    None if it does not fit without breaking words: paths and settings are copied.
    """
    padded = [f"{header}{HEADER_PADDING}" for header in headers]
    widths = [max(map(len, column)) for column in zip(padded, *rows)]
    room = width - COLUMN_GAP * (len(widths) - 1)
    whole = [
        max((len(f"{word}{HEADER_PADDING}") for word in header.split()), default=0)
        for header in headers
    ]
    for row in rows:
        whole = [max(size, *map(len, cell.split(" "))) for size, cell in zip(whole, row)]
    least = [max(NARROWEST_COLUMN, size) for size in whole]
    while sum(widths) > room:
        yielding = [n for n, low in enumerate(least) if widths[n] > low]
        if not yielding:
            return None
        widths[max(yielding, key=lambda n: widths[n])] -= 1
    heading = [
        "\n".join(_wrap(header, size - len(HEADER_PADDING)))
        for header, size in zip(headers, widths)
    ]
    return heading, [
        ["\n".join(_wrap(cell, size)) for cell, size in zip(row, widths)] for row in rows
    ]


def _wrap(text: str, width: int, following: str = "") -> list[str]:
    return textwrap.wrap(text, width, subsequent_indent=following, break_on_hyphens=False)


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> Iterator[str]:
    if not rows:
        return
    headers = [*map(printable, headers)]
    rows = [[*map(printable, row)] for row in rows]
    fitted = _fitted(headers, rows, width)
    if fitted is None:
        yield from _listed(headers, rows, width)
    else:
        table = tabulate(fitted[1], headers=fitted[0], tablefmt="simple", disable_numparse=True)
        yield from (line.rstrip() for line in table.splitlines())
    yield ""


def _listed(headers: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> Iterator[str]:
    """A table that is too wide, one cell below the other: only a word wider than a line breaks."""
    for first, *others in rows:
        yield from _wrap(f"{headers[0]}: {first}", width, "    ")
        for header, cell in zip(headers[1:], others):
            if cell:
                text = _wrap(f"{header}: {cell}", width - 2, "    ")
                yield from (f"  {line}" for line in text)


def _wrapped(text: str, width: int, following: str = "  ") -> Iterator[str]:
    yield from _wrap(printable(text), width, following)


def in_sight(lines: Iterable[str], height: int | None) -> Iterator[str]:
    """The lines. The answer, up to the first empty line, comes again if it has scrolled off.

    `height`: number of lines of the terminal; None if the lines do not go to one.
    """
    shown = [*lines]
    yield from shown
    if height is not None and len(shown) >= height:
        yield from itertools.takewhile(bool, shown)


def machine_lines(report: MachineReport, width: int, verbose: bool) -> Iterator[str]:
    """The report on this machine, the answer first."""
    yield from _answer(report, width)
    for gap in report.gaps:
        yield from _wrapped(f"gap: no {gap.probe} ({gap.why}): {gap.lost}", width)
    yield ""
    checks = [
        (check.what, f"{check.level}: {check.state}", check.why, check.remedy)
        for check in report.checks
    ]
    yield from _table(("what", "state", "why it matters", "remedy"), checks, width)
    namespaces = [
        (
            report.names.get(inode, str(inode)),
            *(str(settings.get(name, "?")) for name in QUEUE_SETTINGS),
            SYNCOOKIES.get(settings.get("ipv4.tcp_syncookies", -1), "cannot be read"),
        )
        for inode, settings in report.namespaces.items()
    ]
    short = [name.split(".")[1] for name in QUEUE_SETTINGS]
    yield from _table(("netns", *short, "that is"), namespaces, width)
    yield from _kernel_tables(report, width, verbose)


def _answer(report: MachineReport, width: int) -> Iterator[str]:
    """Whether it can trace; if not, why, and what all the obstacles together ask for."""
    worked = [mode for mode, trial in report.trials.items() if not trial.problem]
    if worked:
        yield f"this machine can trace, {_by(worked)}"
        return
    yield "this machine cannot trace"
    problems: dict[str, list[str]] = {}
    for mode, trial in report.trials.items():
        problems.setdefault(trial.problem, []).append(mode)
    why = "; ".join(f"{_by(modes)}: {problem}" for problem, modes in problems.items())
    yield from _wrapped(f"  why: {why}", width, "    ")
    # What the attempts to attach advise is to look at the other rows.
    attempts = {f"attaching by {mode}" for mode in report.trials}
    remedies = dict.fromkeys(
        check.remedy for check in report.checks if check.level == NO and check.what not in attempts
    )
    remedy = "; ".join(filter(None, remedies)) or "the kernel log (dmesg) may say more"
    yield from _wrapped(f"  remedy: {remedy}", width, "    ")
    if report.client_side:
        hint = "on a client's host no tracing is needed: tcpstuck-trace --client -p PORT"
        yield from _wrapped(f"  {hint}", width, "    ")


def _by(modes: Sequence[str]) -> str:
    return " and ".join(f"by {mode}" for mode in modes)


def _kernel_tables(
    report: MachineReport | KernelReport, width: int, verbose: bool
) -> Iterator[str]:
    machine = report if isinstance(report, MachineReport) else None
    kernel = report.kernel if isinstance(report, MachineReport) else report
    functions = []
    for fact in kernel.functions:
        state = fact.trouble or "ok"
        if machine is not None and fact.probe not in RESCUE_PROBES:
            modes = [m for m, t in machine.trials.items() if fact.probe.function in t.attached]
            state += f"; attaches by {', '.join(modes) or 'neither mode'}"
        functions.append((_need(fact.probe), fact.declaration, fact.symbol, state))
    yield from _table(("needed", "function", "symbol", "state"), functions, width)
    if machine is None or verbose:
        members = [(m.name, place_text(m.place), m.trouble or "ok") for m in kernel.members]
        yield from _table(("member", "place", "state"), members, width)
        counters = [(name, str(index)) for name, index in kernel.counters.items()]
        yield from _table(("counter", "index"), counters, width)
    reasons = kernel.drop_reasons
    if verbose:
        drops = [(name, str(value)) for name, value in reasons.items()]
        yield from _table(("drop reason", "value"), drops, width)
    elif machine is None:
        yield f"{len(reasons)} drop reasons" + (": -v or --json lists them" if reasons else "")


def _need(probe: Probe) -> str:
    need = "required" if probe.required else "optional"
    return f"{need} for --rescue" if probe in RESCUE_PROBES else need


def kernel_lines(report: KernelReport, width: int, verbose: bool) -> Iterator[str]:
    """The report on a kernel in a file, the answer first."""
    able = "cannot" if report.trouble else "can"
    kernel = f"Linux {report.release}, types from {report.source}"
    yield from _wrapped(f"this kernel {able} be traced: {kernel}", width)
    if report.trouble:
        yield from _wrapped(f"  why: {report.trouble}", width, "    ")
    for gap in report.gaps:
        yield from _wrapped(f"gap: no {gap.probe} ({gap.why}): {gap.lost}", width)
    yield ""
    yield from _kernel_tables(report, width, verbose)


def change_lines(
    before: KernelReport, after: KernelReport, changes: Sequence[Change], width: int
) -> Iterator[str]:
    """What is not the same in two kernels, how much first."""
    plural = "change" if len(changes) == 1 else "changes"
    number = (
        f"{len(changes)} {plural}" if changes else "nothing that tcpstuck-trace uses has changed"
    )
    yield from _wrapped(f"Linux {before.release} -> {after.release}: {number}", width)
    yield ""
    yield from _table(("what", before.release, after.release), changes, width)


def _line(kind: str, values: Mapping[str, Any]) -> str:
    return json_text({"type": kind, **values})


def _kernel_json(kernel: KernelReport) -> Iterator[str]:
    yield _line("kernel", {"format": FORMAT, "release": kernel.release, "source": kernel.source})
    for fact in kernel.functions:
        yield _line(
            "function",
            {
                "function": fact.probe.function,
                "required": fact.probe.required,
                "for_rescue": fact.probe in RESCUE_PROBES,
                "for_why": fact.probe in WHY_PROBES,
                "prototype": None if fact.prototype is None else fact.declaration,
                "parameters": None if fact.prototype is None else len(fact.prototype.parameters),
                "expected_parameters": fact.probe.parameters,
                "symbol": fact.symbol,
                "trouble": fact.trouble,
            },
        )
    for member in kernel.members:
        place = None if member.place is None else member.place._asdict()
        yield _line("member", {"member": member.name, "place": place, "trouble": member.trouble})
    yield _line("counters", {"indices": dict(kernel.counters)})
    yield _line("drop_reasons", {"values": dict(kernel.drop_reasons)})


def machine_json(report: MachineReport) -> Iterator[str]:
    """The report on this machine, the answer last."""
    yield from _kernel_json(report.kernel)
    for check in report.checks:
        yield _line("check", check._asdict())
    for inode, settings in report.namespaces.items():
        name = report.names.get(inode)
        yield _line("netns", {"netns": inode, "name": name, "settings": dict(settings)})
    modes = {
        mode: {"able": not trial.problem, "probes": sorted(trial.attached), "why": trial.problem}
        for mode, trial in report.trials.items()
    }
    gaps = [gap.__dict__ for gap in report.gaps]
    yield _line("doctor", {"able": report.able, "modes": modes, "coverage_gaps": gaps})


def kernel_json(report: KernelReport) -> Iterator[str]:
    """The report on a kernel image, the answer last."""
    yield from _kernel_json(report)
    gaps = [gap.__dict__ for gap in report.gaps]
    able = not report.trouble
    yield _line("doctor", {"able": able, "why": report.trouble, "coverage_gaps": gaps})


def change_json(
    before: KernelReport, after: KernelReport, changes: Sequence[Change]
) -> Iterator[str]:
    """The differences between two kernels."""
    for change in changes:
        yield _line("change", change._asdict())
    releases = {"before": before.release, "after": after.release}
    yield _line("changes", {"format": FORMAT, **releases, "changes": len(changes)})
