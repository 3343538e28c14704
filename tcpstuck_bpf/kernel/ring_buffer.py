"""Reads the events' ring buffer with libbpf, through ctypes.

A pure Python reader has no memory barrier, and arm64 needs one between the kernel's position and
the record. Every distribution with BCC has libbpf; the functions used here have not changed since
0.0.9.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os

from tcpstuck_bpf.errors import CannotTraceError

_LIBRARIES = ("libbpf.so.1", "libbpf.so.0")
_RECORD = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_ENOUGH = -errno.EOVERFLOW
"""Return value of the callback that ends a poll; libbpf has consumed the record by then."""


def _library() -> ctypes.CDLL:
    for name in _LIBRARIES:
        with contextlib.suppress(OSError):
            library = ctypes.CDLL(name, use_errno=True)
            library.ring_buffer__new.restype = ctypes.c_void_p
            library.ring_buffer__new.argtypes = [ctypes.c_int, _RECORD, *(ctypes.c_void_p,) * 2]
            library.ring_buffer__poll.argtypes = [ctypes.c_void_p, ctypes.c_int]
            library.ring_buffer__free.argtypes = [ctypes.c_void_p]
            library.ring_buffer__free.restype = None
            return library
    raise CannotTraceError(
        "libbpf is missing",
        f"it reads the events, and neither {' nor '.join(_LIBRARIES)} can be loaded",
        "install it from the distribution (apt install libbpf1, or libbpf0 on Debian 11)",
    )


def require_libbpf() -> None:
    """Raises CannotTraceError where libbpf cannot be loaded."""
    _library()


class RingBuffer:
    """Reads records of the ring buffer whose file descriptor is `file`.

    Raises CannotTraceError where libbpf is missing or refuses.
    """

    def __init__(self, file: int) -> None:
        self._library = _library()
        self._records: list[bytes] = []
        self._most = 0
        # libbpf does not keep the callback alive.
        self._callback = _RECORD(self._take)
        self._ring = self._library.ring_buffer__new(file, self._callback, None, None)
        if not self._ring:
            raise CannotTraceError(
                "the events cannot be read",
                f"ring_buffer__new: {os.strerror(ctypes.get_errno())}",
                "report it, with the kernel's and libbpf's version",
            )

    def _take(self, _context: int | None, data: int, size: int) -> int:
        self._records.append(ctypes.string_at(data, size))
        return _ENOUGH if len(self._records) >= self._most else 0

    def poll(self, timeout_ms: int, most: int) -> list[bytes]:
        """At most `most` records, waiting up to `timeout_ms` for the first.

        libbpf alone would read until no record is left, which never happens in a flood. A signal
        ends the wait.
        """
        self._most = most
        self._library.ring_buffer__poll(self._ring, timeout_ms)
        records, self._records = self._records, []
        return records

    def close(self) -> None:
        """Free libbpf's reader; the table itself stays."""
        ring, self._ring = self._ring, None
        if ring:
            self._library.ring_buffer__free(ring)
