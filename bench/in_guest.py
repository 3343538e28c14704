"""Runs inside the guest: interleaved rounds without programs, with empty ones and with ours.

Prints one JSON object. Costs are CPU time, not elapsed time: on one CPU, elapsed time would add the
tool's own work to the kernel's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.loads import Load, all_loads
from bench.tracer import PORT

VARIANTS = (
    ("untraced", None),
    ("empty", "fentry"),
    ("insert", "fentry"),
    ("ours", "fentry"),
    ("why", "fentry"),
    ("empty", "kprobe"),
    ("insert", "kprobe"),
    ("ours", "kprobe"),
    ("why", "kprobe"),
)
ROUNDS = 3
START_LIMIT_S = 300


def _held(what: str, mode: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "bench.tracer", what, mode],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def _measure(loads: dict[str, Load]) -> dict[str, float]:
    return {name: load() for name, load in loads.items()}


def _round(loads: dict[str, Load], found: dict[str, Any]) -> None:
    for what, mode in VARIANTS:
        name = what if mode is None else f"{what} {mode}"
        if mode is None:
            costs = _measure(loads)
        else:
            tracer = _held(what, mode)
            assert tracer.stdin is not None
            assert tracer.stdout is not None
            started = json.loads(tracer.stdout.readline())
            costs = _measure(loads)
            tracer.stdin.close()
            tracer.wait(START_LIMIT_S)
            if what == "ours":
                found["start"].setdefault(mode, []).append(started)
        for load, cost in costs.items():
            found["costs"].setdefault(load, {}).setdefault(name, []).append(cost)


def _own_cost_in_a_flood(loads: dict[str, Load]) -> dict[str, float]:
    """The tool's own CPU seconds during a flood of spoofed SYNs, and its peak memory (KiB)."""
    with tempfile.TemporaryDirectory() as directory:
        ready = Path(directory) / "ready"
        words = ["-p", str(PORT), "--summary", "--json", "--ready-file", str(ready)]
        os.mkfifo(ready)
        process = subprocess.Popen(
            [sys.executable, "-m", "tcpstuck_bpf", *words],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        ready.read_text("ascii")
        before = _cpu_seconds(process.pid)
        begun = time.monotonic()
        per_syn = [loads["spoofed SYN"]() for _ in range(2)]
        spent = _cpu_seconds(process.pid) - before
        elapsed = time.monotonic() - begun
        status = Path(f"/proc/{process.pid}/status").read_text("ascii").splitlines()
        peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
        process.terminate()
        process.wait(START_LIMIT_S)
    return {"cpu_s": spent, "elapsed_s": elapsed, "peak_kib": peak, "kernel_ns": per_syn[-1]}


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text("ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Measure and print."""
    found: dict[str, Any] = {"costs": {}, "start": {}}
    with all_loads() as loads:
        _measure(loads)  # warm-up of caches and neighbour entries; not counted
        for _ in range(ROUNDS):
            _round(loads, found)
        found["flood"] = _own_cost_in_a_flood(loads)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
