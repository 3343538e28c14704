"""bpf(2) and perf_event_open(2): tables, programs, attachments, and what the kernel grants of them.

Own code because the functions for this in libbpf 0.x (Debian 11) and 1.x differ, the system calls
do not. What the kernel grants is found out by asking it: what a version says may be wrong.
Attributes follow union bpf_attr of include/uapi/linux/bpf.h. File descriptors that are returned
close at exec and at the process's end, and with them everything that was made: nothing stays
behind. Needs no BCC.
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
"""In struct bpf_prog_info, since 5.12."""
_MAP_INFO = struct.Struct("=6I")
"""Members of struct bpf_map_info: type, id, key_size, value_size, max_entries, map_flags."""
_INSTRUCTION_BYTES = 8
_LONGEST_NAME = 15
_LICENCE = b"GPL"
_LOAD = struct.Struct("=IIQQIIQII16sIIIIQIIQII")
"""As far as attach_btf_id, since 5.5."""
_LOG_BYTES = 1 << 20
"""The verifier ends a log that does not fit with ENOSPC, before 6.4 in place of its own answer."""
_LOG_LINES = 3

PROGRAM_KPROBE, PROGRAM_RAW_TRACEPOINT, PROGRAM_TRACING = 2, 17, 26
"""enum bpf_prog_type."""
ATTACH_TYPED_TRACEPOINT, ATTACH_FENTRY, ATTACH_FEXIT = 23, 24, 25
"""enum bpf_attach_type."""

KPROBE_EVENTS = Path("/sys/bus/event_source/devices/kprobe")
"""The event type that attaches kprobes (sysfs-bus-event_source-devices of Documentation/ABI)."""
_PERF_ATTRIBUTES = struct.Struct("=II5QIIQQ")
"""struct perf_event_attr as far as config2 (PERF_ATTR_SIZE_VER1)."""
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
    """The kernel said no; the text is the error's name and meaning, and what the verifier said."""

    def __init__(self, number: int, verifier: str = "") -> None:
        name = errno.errorcode.get(number, str(number))
        said = f" (verifier: {verifier})" if verifier else ""
        super().__init__(f"{name}: {os.strerror(number)}{said}")
        self.number = number


def _system_call(numbers: dict[str, int], *arguments: object) -> int:
    number = numbers.get(platform.machine())
    if number is None:
        raise RefusedError(errno.ENOSYS)
    result: int = _libc.syscall(number, *arguments)
    if result < 0:
        raise RefusedError(ctypes.get_errno())
    return result


def bpf(command: int, attributes: bytes) -> int:
    """Raises RefusedError, with ENOSYS where the system call's number is not known."""
    return _bpf(command, ctypes.create_string_buffer(attributes, _ATTRIBUTES_BYTES))


def bpf_answering(command: int, attributes: bytes) -> tuple[bytes, RefusedError | None]:
    """The attributes as the kernel left them, and what it refused, after which they still count."""
    union = ctypes.create_string_buffer(attributes, _ATTRIBUTES_BYTES)
    try:
        _bpf(command, union)
    except RefusedError as error:
        return union.raw, error
    return union.raw, None


def _bpf(command: int, union: ctypes.Array[ctypes.c_char]) -> int:
    return _system_call(_BPF_CALL, command, union, len(union))


def create_map(kind: int, key_bytes: int, value_bytes: int, entries: int, flags: int = 0) -> int:
    """A table's file descriptor; `kind` of enum bpf_map_type. Raises RefusedError."""
    return bpf(_MAP_CREATE, struct.pack("=5I", kind, key_bytes, value_bytes, entries, flags))


def map_shape(file: int) -> tuple[int, int, int, int, int]:
    """Kind, bytes of a key and of a value, entries and flags. Raises RefusedError."""
    info = ctypes.create_string_buffer(_MAP_INFO.size)
    bpf(_OBJ_GET_INFO_BY_FD, struct.pack("=IIQ", file, _MAP_INFO.size, ctypes.addressof(info)))
    kind, _, *rest = _MAP_INFO.unpack(info.raw)
    key_bytes, value_bytes, entries, flags = rest
    return kind, key_bytes, value_bytes, entries, flags


def load_program(
    kind: int, name: str, code: bytes, attach_type: int = 0, type_number: int = 0
) -> int:
    """A program's file descriptor; `kind` of enum bpf_prog_type.

    What PROGRAM_TRACING is attached to is part of it: `attach_type`, and the number of the
    function's or the tracepoint's type in the running kernel's BTF. Raises RefusedError, with what
    the verifier said last.
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
    # Once more for its reasons alone: keeping a log takes the verifier several times as long.
    log = ctypes.create_string_buffer(_LOG_BYTES)
    with contextlib.suppress(RefusedError):
        return attempt(log)
    raise RefusedError(refused.number, last_lines(log.value.decode("utf-8", "backslashreplace")))


def last_lines(log: str) -> str:
    """What a verifier's log says in the end, in one line: without its figures, which come last."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    while lines and lines[-1].startswith(("processed ", "verification time ", "stack depth ")):
        lines.pop()
    return "; ".join(lines[-_LOG_LINES:])


def attach_tracing(program: int) -> int:
    """The attachment of a PROGRAM_TRACING: closed, it is gone. Raises RefusedError."""
    # Without a name: the program's type has it already.
    return bpf(_RAW_TRACEPOINT_OPEN, struct.pack("=QI", 0, program))


def attach_raw_tracepoint(program: int, tracepoint: str) -> int:
    """The attachment of a PROGRAM_RAW_TRACEPOINT: closed, it is gone. Raises RefusedError."""
    name = ctypes.create_string_buffer(tracepoint.encode())
    return bpf(_RAW_TRACEPOINT_OPEN, struct.pack("=QI", ctypes.addressof(name), program))


def attach_kprobe(program: int, function: str, *, at_return: bool) -> int:
    """The attachment of a PROGRAM_KPROBE: closed, it is gone. Raises RefusedError.

    As a perf event and not through tracefs, where what is made stays when the process is killed.
    So there is no choice of maxactive; the kernel's own number is enough, since all probed
    functions run with bottom halves off.
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
    event = _system_call(
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
    """How often the kernel did not run a program because another one was at work on that CPU.

    By its file descriptor. A kernel before 5.12 does not say (0); kprobes count since 6.7 only.
    Raises RefusedError.
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
    """Why there can be no ring buffer (BPF_MAP_TYPE_RINGBUF), None where there can."""
    try:
        with _trial_map(_MAP_TYPE_RINGBUF, 0, 0, os.sysconf("SC_PAGE_SIZE")):
            return None
    except RefusedError as error:
        return str(error)


def batch_lookup_refusal() -> str | None:
    """Why a hash table cannot be read in batches (BPF_MAP_LOOKUP_BATCH), None where it can."""
    buffers = [ctypes.create_string_buffer(8) for _ in range(4)]
    addresses = [ctypes.addressof(buffer) for buffer in buffers]
    try:
        with _trial_map(_MAP_TYPE_HASH, 8, 8, 1) as file:
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
    try:
        os.close(load_program(PROGRAM_KPROBE, "trial", _PROBE_READ_KERNEL))
    except RefusedError as error:
        return str(error)
    return None
