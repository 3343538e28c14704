"""`python -m bench`: measure in a guest that counts instructions, and print a table."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from lab.errors import LabError
from lab.guests.machine import GuestOptions
from lab.guests.run import run_in_guest

LIMIT_S = 2400.0
BARS = {
    ("spoofed SYN", "ours fentry"): 1.02,
    ("spoofed SYN", "ours kprobe"): 1.03,
    ("drop elsewhere", "why fentry"): 1.02,
    ("drop elsewhere", "why kprobe"): 1.02,
    ("unrelated segment", "ours fentry"): 1.002,
    ("unrelated segment", "ours kprobe"): 1.002,
}


def cost(values: Sequence[float]) -> float:
    """The minimum of a variant's rounds: instruction counts are exact, and noise only adds."""
    return min(values)


def ratio(costs: Mapping[str, Sequence[float]], variant: str) -> float:
    """A variant's cost divided by the untraced cost of the same run."""
    return cost(costs[variant]) / cost(costs["untraced"])


def spread(values: Sequence[float]) -> float:
    """The worst round's relative excess over the cost."""
    return max(values) / cost(values) - 1


def cost_rows(found: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """The rows of the cost table: load, variant, instructions, ratio, spread, bar."""
    for load, costs in found["costs"].items():
        for variant, values in costs.items():
            of_untraced = ratio(costs, variant)
            bar = BARS.get((load, variant))
            verdict = "" if bar is None else f"{bar} {'met' if of_untraced <= bar else 'NOT MET'}"
            yield (
                load,
                variant,
                f"{cost(values):,.0f}",
                f"{of_untraced:.4f}",
                f"{spread(values):.2%}",
                verdict,
            )


def start_rows(found: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """The rows of the start-up table: mode, part, median seconds of guest time."""
    for mode, starts in found["start"].items():
        for part in starts[0]["timings"]:
            seconds = statistics.median(start["timings"][part] for start in starts)
            yield mode, part, f"{seconds:.3f} s"
        peak = statistics.median(start["memory"]["VmHWM"] for start in starts)
        resident = statistics.median(start["memory"]["VmRSS"] for start in starts)
        yield mode, "peak memory", f"{peak / 1024:.0f} MiB"
        yield mode, "resident memory", f"{resident / 1024:.0f} MiB"


def main() -> int:
    """Measure and print; returns 1 if a bar is not met."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the raw figures to FILE")
    arguments = parser.parse_args()
    try:
        result = run_in_guest(
            [sys.executable, "-m", "bench.in_guest"],
            options=GuestOptions(timeout_s=LIMIT_S, native="never", icount=True),
        )
    except LabError as error:
        print(error, file=sys.stderr)
        return 1
    if result.timed_out:
        print(f"bench: cut off after {LIMIT_S:g} s; run it on an idle machine", file=sys.stderr)
    if result.status:
        sys.stderr.buffer.write(result.stderr)
        return result.status
    found = json.loads(result.stdout)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="ascii")
    rows = list(cost_rows(found))
    headings = ("per", "variant", "instructions", "of untraced", "spread", "bar")
    print(tabulate(rows, headings, disable_numparse=True), end="\n\n")
    print(tabulate(list(start_rows(found)), ("start-up", "part", "median")), end="\n\n")
    flood = found["flood"]
    print(
        f"In a flood the tool itself used {flood['cpu_s']:.2f} s of CPU in {flood['elapsed_s']:.2f}"
        f" s, and at most {flood['peak_kib'] / 1024:.0f} MiB."
    )
    return int(any("NOT MET" in row[-1] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
