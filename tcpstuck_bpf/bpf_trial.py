"""What bpf(2) grants this process, found out by asking it: what a version says may be wrong.

Needs no BCC, so that its answers stand apart from BCC's. Everything made here is closed again.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import struct
import sys
from collections.abc import Iterator

_SYSTEM_CALL = {"x86_64": 321, "aarch64": 280}

_MAP_CREATE, _PROG_LOAD, _OBJ_GET_INFO_BY_FD, _MAP_LOOKUP_BATCH = 0, 5, 15, 24
_MAP_TYPE_HASH, _MAP_TYPE_RINGBUF = 1, 27
_PROG_TYPE_KPROBE = 2
_HELPER_PROBE_READ_KERNEL = 113
_ATTRIBUTES_BYTES = 128
_PROGRAM_INFO_BYTES = 256
_RECURSION_MISSES_AT = 208
"""In struct bpf_prog_info of include/uapi/linux/bpf.h, since 5.12."""

_PROBE_READ_KERNEL = b"".join(
    struct.pack("=BBhi", *instruction)
    for instruction in (
        (0xBF, 0xA1, 0, 0),  # r1 = r10
        (0x07, 0x01, 0, -8),  # r1 += -8
        (0xB7, 0x02, 0, 8),  # r2 = 8
        (0xB7, 0x03, 0, 0),  # r3 = 0
        (0x85, 0x00, 0, _HELPER_PROBE_READ_KERNEL),
        (0xB7, 0x00, 0, 0),  # r0 = 0
        (0x95, 0x00, 0, 0),  # exit
    )
)


class RefusedError(Exception):
    """The kernel said no; the text is the error's name and meaning."""

    def __init__(self, number: int) -> None:
        name = errno.errorcode.get(number, str(number))
        super().__init__(f"{name}: {os.strerror(number)}")
        self.number = number


def bpf(command: int, attributes: bytes) -> int:
    """Raises RefusedError, with ENOSYS where the system call's number is not known."""
    number = _SYSTEM_CALL.get(platform.machine())
    if number is None:
        raise RefusedError(errno.ENOSYS)
    libc = ctypes.CDLL(None, use_errno=True)
    union = ctypes.create_string_buffer(attributes, _ATTRIBUTES_BYTES)
    result: int = libc.syscall(number, command, union, _ATTRIBUTES_BYTES)
    if result < 0:
        raise RefusedError(ctypes.get_errno())
    return result


@contextlib.contextmanager
def _map(kind: int, key_bytes: int, value_bytes: int, entries: int) -> Iterator[int]:
    file = bpf(_MAP_CREATE, struct.pack("=IIII", kind, key_bytes, value_bytes, entries))
    try:
        yield file
    finally:
        os.close(file)


def ring_buffer_refusal() -> str | None:
    """Why there can be no ring buffer (BPF_MAP_TYPE_RINGBUF), None where there can."""
    try:
        with _map(_MAP_TYPE_RINGBUF, 0, 0, os.sysconf("SC_PAGE_SIZE")):
            return None
    except RefusedError as error:
        return str(error)


def batch_lookup_refusal() -> str | None:
    """Why a hash table cannot be read in batches (BPF_MAP_LOOKUP_BATCH), None where it can."""
    buffers = [ctypes.create_string_buffer(8) for _ in range(4)]
    addresses = [ctypes.addressof(buffer) for buffer in buffers]
    try:
        with _map(_MAP_TYPE_HASH, 8, 8, 1) as file:
            # First batch (no cursor), an empty table: its end is the right answer.
            bpf(_MAP_LOOKUP_BATCH, struct.pack("=QQQQIIQQ", 0, *addresses[1:], 1, file, 0, 0))
    except RefusedError as error:
        return None if error.number == errno.ENOENT else str(error)
    return None


def tracing_refusal() -> str | None:
    """Why no program may be loaded that reads the kernel's memory, None where one may.

    The program is of kprobe type and attached to nothing. Lockdown's confidentiality mode takes
    the helper bpf_probe_read_kernel away (LOCKDOWN_BPF_READ_KERNEL).
    """
    program = ctypes.create_string_buffer(_PROBE_READ_KERNEL, len(_PROBE_READ_KERNEL))
    licence = ctypes.create_string_buffer(b"GPL")
    addresses = (ctypes.addressof(program), ctypes.addressof(licence))
    instructions = len(_PROBE_READ_KERNEL) // 8
    attributes = struct.pack(
        "=IIQQIIQII", _PROG_TYPE_KPROBE, instructions, *addresses, 0, 0, 0, 0, 0
    )
    try:
        os.close(bpf(_PROG_LOAD, attributes))
    except RefusedError as error:
        return str(error)
    return None


def missed_runs(program: int) -> int:
    """How often the kernel did not run a program because another one was at work on that CPU.

    By its file descriptor. A kernel before 5.12 does not say (0); kprobes count since 6.7 only.
    Raises RefusedError.
    """
    info = ctypes.create_string_buffer(_PROGRAM_INFO_BYTES)
    request = struct.pack("=IIQ", program, _PROGRAM_INFO_BYTES, ctypes.addressof(info))
    bpf(_OBJ_GET_INFO_BY_FD, request)
    return int.from_bytes(info.raw[_RECURSION_MISSES_AT:][:8], sys.byteorder)
