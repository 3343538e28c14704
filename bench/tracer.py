"""Attach programs and keep them attached until EOF on standard input.

Usage: `python -m bench.tracer WHAT MODE`. WHAT is `ours`, `why` (ours with --why), `empty` (empty
programs) or `insert` (empty programs with one hash insert per cookie). The process prints its
start-up cost as JSON on standard output, then sleeps. Only the kernel's work is measured meanwhile.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from tcpstuck_bpf.kernel import attach_plan, probes
from tcpstuck_bpf.kernel.compilation import program_directory
from tcpstuck_bpf.kernel.open_source import open_source
from tcpstuck_bpf.model import TraceFilter, TraceSettings

PORT = 3311


def memory_kib() -> dict[str, int]:
    """VmHWM and VmRSS of this process in KiB (proc_pid_status(5))."""
    lines = Path("/proc/self/status").read_text("ascii").splitlines()
    return {
        line.split(":")[0]: int(line.split()[1])
        for line in lines
        if line.startswith(("VmHWM", "VmRSS"))
    }


def _ours(mode: str, *, why: bool) -> Any:
    settings = TraceSettings(trace_filter=TraceFilter(ports=(PORT,)), probe_mode=mode)
    return open_source(settings, attach_plan.AttachRequest(why=why))


def _floor(what: str, mode: str) -> Any:
    import bcc

    os.environ["BCC_KERNEL_SOURCE"] = str(program_directory() / "stub")
    text = (Path(__file__).parent / "empty.bpf.c").read_bytes()
    flags = ["-DTCPSTUCK_FENTRY"] if mode == "fentry" else []
    flags += ["-DONE_INSERT"] if what == "insert" else []
    bpf = bcc.BPF(text=text, cflags=flags)
    if mode == "kprobe":
        for probe in probes.of_mode(probes.PROBES, mode):
            name = probe.function.encode()
            returned = b"cookie_return" if b"init_sequence" in name else b"empty_return"
            bpf.attach_kretprobe(event=name, fn_name=returned)
            bpf.attach_kprobe(event=name, fn_name=b"empty_entry")
    return bpf


def main(what: str, mode: str) -> None:
    """Attach, report, and wait for EOF on standard input."""
    tool = what in ("ours", "why")
    held = _ours(mode, why=what == "why") if tool else _floor(what, mode)
    timings = dict(getattr(held, "timings", {}))
    print(json.dumps({"timings": timings, "memory": memory_kib()}), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
