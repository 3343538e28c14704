"""What this machine can do, found out by doing it, not by looking for files or versions."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

STUB_TREE = Path(__file__).resolve().parent.parent / "bpf" / "stub"
TRIAL_LIMIT_S = 300.0
KVM_LIMIT_S = 10.0
"""A kernel without a root file system panics about 1 s after power-on where KVM works."""

_TRACING_TRIAL = """
from bcc import BPF
program = BPF(text="int trial(void *ctx) { return 0; }")
program.attach_kprobe(event="tcp_conn_request", fn_name="trial")
"""


@functools.cache
def tracing_refusal() -> str | None:
    """Why this kernel will not let us trace, in one line; None if it will.

    The trial compiles, loads and attaches an empty kprobe in a child process, because BCC keeps
    its compiler in memory and writes its complaints to standard error.
    """
    if os.geteuid() != 0:
        return "not root"
    try:
        trial = subprocess.run(
            [sys.executable, "-c", _TRACING_TRIAL],
            env={**os.environ, "BCC_KERNEL_SOURCE": str(STUB_TREE)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TRIAL_LIMIT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"the trial did not end: {error}"
    if trial.returncode == 0:
        return None
    return (trial.stderr.strip().splitlines() or [f"status {trial.returncode}"])[-1]


@functools.cache
def kvm_works(kernel: Path) -> bool:
    """Whether QEMU can boot this kernel image with KVM here.

    /dev/kvm may exist, open, make virtual CPUs and even run a few instructions on a machine whose
    nested virtualization then fails, so the kernel itself is booted without a root file system:
    it gets as far as its panic about that, and resets, which ends QEMU with status 0.
    """
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return False
    machine = ["-machine", "accel=kvm", "-cpu", "host", "-m", "512M"]
    quiet = ["-nodefaults", "-display", "none", "-no-reboot"]
    # Where it does not work it may run for ever; it must not outlive us.
    mortal = ("setpriv", "--pdeathsig", "KILL", "qemu-system-x86_64")
    try:
        trial = subprocess.run(
            [*mortal, *machine, *quiet, "-kernel", str(kernel), "-append", "panic=-1"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=KVM_LIMIT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return trial.returncode == 0
