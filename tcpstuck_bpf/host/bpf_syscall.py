"""bpf(2) and perf_event_open(2): tables, programs, attachments, and what the kernel allows.

The system calls are used directly, because libbpf's functions differ between 0.x (Debian 11) and
1.x. The *_refusal functions try a feature instead of trusting a version number. Attributes follow
union bpf_attr of include/uapi/linux/bpf.h. Returned file descriptors close at exec and when the
process ends, and everything made goes with them. Needs no BCC.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import platform
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

_BPF_CALL = {"x86_64": 321, "aarch64": 280}
_PERF_EVENT_OPEN_CALL = {"x86_64": 298, "aarch64": 241}

_MAP_CREATE, _PROG_LOAD, _OBJ_GET_INFO_BY_FD = 0, 5, 15
_RAW_TRACEPOINT_OPEN, _MAP_LOOKUP_BATCH = 17, 24
_MAP_TYPE_HASH, _MAP_TYPE_RINGBUF = 1, 27
_HELPER_PROBE_READ_KERNEL = 113
_ATTRIBUTES_BYTES = 128
_PROGRAM_INFO_BYTES = 256
_RECURSION_MISSES_AT = 208
"""Offset of recursion_misses in struct bpf_prog_info, since 5.12."""
_MAP_INFO = struct.Struct("=6I")
"""Members of struct bpf_map_info: type, id, key_size, value_size, max_entries, map_flags."""
_INSTRUCTION_BYTES = 8
_LONGEST_NAME = 15
_LICENCE = b"GPL"
_LOAD = struct.Struct("=IIQQIIQII16sIIIIQIIQII")
"""The attributes of BPF_PROG_LOAD up to attach_btf_id (5.5)."""
_LOG_BYTES = 1 << 20
"""Size of the verifier's log. If it is too small the result is ENOSPC, before 6.4 instead of the
verifier's own error."""
_LOG_LINES = 3

PROGRAM_KPROBE, PROGRAM_RAW_TRACEPOINT, PROGRAM_TRACING = 2, 17, 26
"""enum bpf_prog_type."""
ATTACH_TYPED_TRACEPOINT, ATTACH_FENTRY, ATTACH_FEXIT = 23, 24, 25
"""enum bpf_attach_type."""

KPROBE_EVENTS = Path("/sys/bus/event_source/devices/kprobe")
"""The event type that attaches kprobes (sysfs-bus-event_source-devices of Documentation/ABI)."""
_PERF_ATTRIBUTES = struct.Struct("=II5QIIQQ")
"""struct perf_event_attr up to config2 (PERF_ATTR_SIZE_VER1)."""
_PERF_FLAG_FD_CLOEXEC = 8
_IOC_ENABLE, _IOC_SET_BPF = 0x2400, 0x40042408

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

_libc = ctypes.CDLL(None, use_errno=True)


class RefusedError(Exception):
    """The kernel refused a call. The text has the error's name and meaning, and the verifier's."""

    def __init__(self, number: int, verifier: str = "") -> None:
        name = errno.errorcode.get(number, str(number))
        said = f" (verifier: {verifier})" if verifier else ""
        super().__init__(f"{name}: {os.strerror(number)}{said}")
        self.number = number


def system_call(numbers: dict[str, int], *arguments: object) -> int:
    """Make the system call that has these numbers by architecture (`uname -m`).

    Raises RefusedError, with ENOSYS if this architecture's number is unknown.
    """
    number = numbers.get(platform.machine())
    if number is None:
        raise RefusedError(errno.ENOSYS)
    result: int = _libc.syscall(number, *arguments)
    if result < 0:
        raise RefusedError(ctypes.get_errno())
    return result


def bpf(command: int, attributes: bytes) -> int:
    """Make the system call. Raises RefusedError, with ENOSYS if its number is unknown."""
    return _bpf(command, ctypes.create_string_buffer(attributes, _ATTRIBUTES_BYTES))


def bpf_answering(command: int, attributes: bytes) -> tuple[bytes, RefusedError | None]:
    """Make the system call; return the attributes as the kernel left them, and its error or None.

    The attributes are valid even after an error.
    """
    union = ctypes.create_string_buffer(attributes, _ATTRIBUTES_BYTES)
    try:
        _bpf(command, union)
    except RefusedError as error:
        return union.raw, error
    return union.raw, None


def _bpf(command: int, union: ctypes.Array[ctypes.c_char]) -> int:
    return system_call(_BPF_CALL, command, union, len(union))


def create_map(kind: int, key_bytes: int, value_bytes: int, entries: int, flags: int = 0) -> int:
    """Create a table and return its file descriptor; `kind` is of enum bpf_map_type.

    Raises RefusedError.
    """
    return bpf(_MAP_CREATE, struct.pack("=5I", kind, key_bytes, value_bytes, entries, flags))


def map_shape(file: int) -> tuple[int, int, int, int, int]:
    """A table's kind, bytes of a key and of a value, entries and flags. Raises RefusedError."""
    info = ctypes.create_string_buffer(_MAP_INFO.size)
    bpf(_OBJ_GET_INFO_BY_FD, struct.pack("=IIQ", file, _MAP_INFO.size, ctypes.addressof(info)))
    kind, _, *rest = _MAP_INFO.unpack(info.raw)
    key_bytes, value_bytes, entries, flags = rest
    return kind, key_bytes, value_bytes, entries, flags


def load_program(
    kind: int, name: str, code: bytes, attach_type: int = 0, type_number: int = 0
) -> int:
    """Load a program and return its file descriptor; `kind` is of enum bpf_prog_type.

    A PROGRAM_TRACING is loaded with its target: `attach_type`, and the number of the function's or
    tracepoint's type in the running kernel's BTF. Raises RefusedError, with the last lines of the
    verifier's log.
    """
    program = ctypes.create_string_buffer(code, len(code))
    licence = ctypes.create_string_buffer(_LICENCE)

    def attempt(log: ctypes.Array[ctypes.c_char] | None) -> int:
        attributes = _LOAD.pack(
            kind,
            len(code) // _INSTRUCTION_BYTES,
            ctypes.addressof(program),
            ctypes.addressof(licence),
            *((0, 0, 0) if log is None else (1, len(log), ctypes.addressof(log))),
            *(0, 0),  # the kernel's version, flags
            name.encode()[:_LONGEST_NAME],
            0,
            attach_type,
            *(0, 0, 0, 0, 0, 0, 0),  # the program's own BTF
            type_number,
        )
        return bpf(_PROG_LOAD, attributes)

    try:
        return attempt(None)
    except RefusedError as error:
        refused = error
    # Load again to get the log. Writing it takes the verifier several times as long.
    log = ctypes.create_string_buffer(_LOG_BYTES)
    with contextlib.suppress(RefusedError):
        return attempt(log)
    raise RefusedError(refused.number, last_lines(log.value.decode("utf-8", "backslashreplace")))


def last_lines(log: str) -> str:
    """The last lines of a verifier's log, joined to one, without the closing statistics."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    while lines and lines[-1].startswith(("processed ", "verification time ", "stack depth ")):
        lines.pop()
    return "; ".join(lines[-_LOG_LINES:])


def attach_tracing(program: int) -> int:
    """Attach a PROGRAM_TRACING; closing the descriptor detaches it. Raises RefusedError."""
    # No name is needed, because the program was loaded with its target.
    return bpf(_RAW_TRACEPOINT_OPEN, struct.pack("=QI", 0, program))


def attach_raw_tracepoint(program: int, tracepoint: str) -> int:
    """Attach a PROGRAM_RAW_TRACEPOINT; closing the descriptor detaches it.

    Raises RefusedError.
    """
    name = ctypes.create_string_buffer(tracepoint.encode())
    return bpf(_RAW_TRACEPOINT_OPEN, struct.pack("=QI", ctypes.addressof(name), program))


def attach_kprobe(program: int, function: str, *, at_return: bool) -> int:
    """Attach a PROGRAM_KPROBE; closing the descriptor detaches it. Raises RefusedError.

    It is a perf event, because a probe made through tracefs stays when the process is killed. A
    perf event cannot set maxactive. The kernel's default is enough, because all probed functions
    run with bottom halves off.
    """
    try:
        event_type = int((KPROBE_EVENTS / "type").read_text("ascii"))
        # `config:0`
        bit = int((KPROBE_EVENTS / "format" / "retprobe").read_text("ascii").split(":")[1])
    except OSError as error:
        raise RefusedError(error.errno or errno.ENODEV) from error
    name = ctypes.create_string_buffer(function.encode())
    attributes = ctypes.create_string_buffer(
        _PERF_ATTRIBUTES.pack(
            event_type,
            _PERF_ATTRIBUTES.size,
            int(at_return) << bit,
            *(0, 0, 0, 0),  # no sampling, no flags
            *(0, 0),  # no wake-ups, no breakpoint
            ctypes.addressof(name),
            0,  # at the function's first instruction
        )
    )
    every_process, first_cpu, no_group = -1, 0, -1
    event = system_call(
        _PERF_EVENT_OPEN_CALL,
        attributes,
        every_process,
        first_cpu,
        no_group,
        _PERF_FLAG_FD_CLOEXEC,
    )
    try:
        fcntl.ioctl(event, _IOC_SET_BPF, program)
        fcntl.ioctl(event, _IOC_ENABLE, 0)
    except OSError as error:
        os.close(event)
        raise RefusedError(error.errno or errno.EINVAL) from error
    return event


def missed_runs(program: int) -> int:
    """Number of times that the kernel skipped a program because another one ran on that CPU.

    `program` is its file descriptor. Kernels before 5.12 report 0, and kprobes are counted only
    since 6.7. Raises RefusedError.
    """
    info = ctypes.create_string_buffer(_PROGRAM_INFO_BYTES)
    request = struct.pack("=IIQ", program, _PROGRAM_INFO_BYTES, ctypes.addressof(info))
    bpf(_OBJ_GET_INFO_BY_FD, request)
    return int.from_bytes(info.raw[_RECURSION_MISSES_AT:][:8], sys.byteorder)


@contextlib.contextmanager
def _trial_map(kind: int, key_bytes: int, value_bytes: int, entries: int) -> Iterator[int]:
    file = create_map(kind, key_bytes, value_bytes, entries)
    try:
        yield file
    finally:
        os.close(file)


def ring_buffer_refusal() -> str | None:
    """Why a ring buffer (BPF_MAP_TYPE_RINGBUF) cannot be created; None if it can."""
    try:
        with _trial_map(_MAP_TYPE_RINGBUF, 0, 0, os.sysconf("SC_PAGE_SIZE")):
            return None
    except RefusedError as error:
        return str(error)


def batch_lookup_refusal() -> str | None:
    """Why a hash table cannot be read in batches (BPF_MAP_LOOKUP_BATCH); None if it can."""
    buffers = [ctypes.create_string_buffer(8) for _ in range(4)]
    addresses = [ctypes.addressof(buffer) for buffer in buffers]
    try:
        with _trial_map(_MAP_TYPE_HASH, 8, 8, 1) as file:
            # This is the first batch (no cursor) of an empty table, so ENOENT is the right answer.
            bpf(_MAP_LOOKUP_BATCH, struct.pack("=QQQQIIQQ", 0, *addresses[1:], 1, file, 0, 0))
    except RefusedError as error:
        return None if error.number == errno.ENOENT else str(error)
    return None


def tracing_refusal() -> str | None:
    """Why a program that reads kernel memory cannot be loaded; None if it can.

    The test program has the kprobe type and is not attached. Lockdown's confidentiality mode
    removes the helper bpf_probe_read_kernel (LOCKDOWN_BPF_READ_KERNEL).
    """
    try:
        os.close(load_program(PROGRAM_KPROBE, "trial", _PROBE_READ_KERNEL))
    except RefusedError as error:
        return str(error)
    return None
