"""Tracepoint programs that read the tracepoint's arguments by their BTF types (`tp_btf`).

BCC has no name for them: its loader derives what a program is attached to from the program's name,
and knows functions only.
"""

from __future__ import annotations

import ctypes
import struct

from tcpstuck_bpf.bpf_trial import bpf

_PROG_LOAD, _RAW_TRACEPOINT_OPEN = 5, 17
_PROG_TYPE_TRACING = 26
_ATTACH_TYPE_TRACE_RAW_TP = 23
_LOAD = struct.Struct("=IIQQIIQII16sIIIIQIIQII")
"""Of union bpf_attr as far as attach_btf_id: include/uapi/linux/bpf.h, since 5.5."""
_INSTRUCTION_BYTES = 8
_LONGEST_NAME = 15


def load(name: bytes, code: bytes, type_number: int) -> int:
    """The program's file descriptor.

    `type_number` is that of the typedef btf_trace_NAME in the running kernel's BTF. Raises
    RefusedError.
    """
    program = ctypes.create_string_buffer(code, len(code))
    licence = ctypes.create_string_buffer(b"GPL")
    attributes = _LOAD.pack(
        _PROG_TYPE_TRACING,
        len(code) // _INSTRUCTION_BYTES,
        ctypes.addressof(program),
        ctypes.addressof(licence),
        *(0, 0, 0, 0, 0),  # the verifier's log, the kernel's version, flags
        name[:_LONGEST_NAME],
        0,
        _ATTACH_TYPE_TRACE_RAW_TP,
        *(0, 0, 0, 0, 0, 0, 0),  # the program's own BTF
        type_number,
    )
    return bpf(_PROG_LOAD, attributes)


def attach(program: int) -> int:
    """The attachment's file descriptor: closed, it is gone. Raises RefusedError."""
    # Without a name: the program's type has it already.
    return bpf(_RAW_TRACEPOINT_OPEN, struct.pack("=QI", 0, program))
