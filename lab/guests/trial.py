"""Tests whether this machine can trace and whether KVM works, by trying both."""

from __future__ import annotations

import functools
import os
import struct
import subprocess
from pathlib import Path

from tcpstuck_bpf.host import bpf_syscall

KVM_LIMIT_S = 10.0
"""With working KVM, a kernel without a root file system panics about 1 s after power-on."""

_RETURN_0 = struct.pack("=BBhiBBhi", 0xB7, 0, 0, 0, 0x95, 0, 0, 0)
_PROBED = "tcp_conn_request"


@functools.cache
def tracing_refusal() -> str | None:
    """The reason why this kernel cannot be traced, in one line; None if it can.

    The test loads an empty program, attaches it to a function by kprobe, and detaches it at once.
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
    """Whether QEMU can boot this kernel image with KVM on this machine.

    On a machine with broken nested virtualization, /dev/kvm may still open, create virtual CPUs and
    run a few instructions. The test therefore boots the kernel without a root file system. If KVM
    works, the kernel panics for lack of a root and resets, and QEMU ends with status 0.
    """
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return False
    machine = ["-machine", "accel=kvm", "-cpu", "host", "-m", "512M"]
    quiet = ["-nodefaults", "-display", "none", "-no-reboot"]
    # If KVM is broken, QEMU may run forever; it must not outlive us.
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
