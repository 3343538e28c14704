"""What this machine can do, found out by doing it, not by looking for files or versions."""

from __future__ import annotations

import functools
import os
import struct
import subprocess
from pathlib import Path

from tcpstuck_bpf.host import bpf_syscall

KVM_LIMIT_S = 10.0
"""A kernel without a root file system panics about 1 s after power-on where KVM works."""

_RETURN_0 = struct.pack("=BBhiBBhi", 0xB7, 0, 0, 0, 0x95, 0, 0, 0)
_PROBED = "tcp_conn_request"


@functools.cache
def tracing_refusal() -> str | None:
    """Why this kernel will not let us trace, in one line; None if it will.

    An empty program is loaded and attached to a function by kprobe, and goes at once.
    """
    if os.geteuid() != 0:
        return "not root"
    try:
        program = bpf_syscall.load_program(bpf_syscall.PROGRAM_KPROBE, "trial", _RETURN_0)
        try:
            os.close(bpf_syscall.attach_kprobe(program, _PROBED, at_return=False))
        finally:
            os.close(program)
    except bpf_syscall.RefusedError as error:
        return str(error)
    return None


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
