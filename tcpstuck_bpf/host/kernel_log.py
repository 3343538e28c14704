"""Reads the kernel's own warnings of full SYN queues from its log.

tcp_syn_flood_action (net/ipv4/tcp_input.c) writes "Possible SYN flooding on port 3311. Sending
cookies." once for each listener until it calls listen() again, and no more often than
net.core.message_cost allows. The text has no network namespace, and before 6.2 no address.

The log is /dev/kmsg (Documentation/ABI/testing/dev-kmsg); pyroute2 does not read it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Callable

from tcpstuck_bpf.model import CoverageGap, KernelWarning, address_bytes

PATH = "/dev/kmsg"
RECORD_BYTES = 8192
"""Buffer size: CONSOLE_EXT_LOG_MAX of include/linux/printk.h. A read with less room fails."""
RECORDS_AT_ONCE = 1000
"""Largest number of records per call, so that a flood of records does not block the run."""

_RECORD = re.compile(
    rb"\d+,\d+,(?P<stamp>\d+),[^;]*;"
    rb"[^\n]*?(?P<text>Possible SYN flooding on port "
    rb"(?:\[?(?P<address>[0-9a-fA-F.:]+?)\]?:)?(?P<port>\d+)\. [^\n]*)"
)


class KernelLog:
    """The kernel log, from its current end on. Raises OSError where it may not be read.

    `clock_ns` reads CLOCK_MONOTONIC.
    """

    def __init__(self, clock_ns: Callable[[], int], path: str = PATH) -> None:
        self.overruns = 0
        """Number of failed reads, mostly because records were overwritten before."""
        self._clock_ns = clock_ns
        self._log = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            self._at_end_ns = clock_ns()
            os.lseek(self._log, 0, os.SEEK_END)
        except BaseException:
            os.close(self._log)
            raise

    def warnings(self) -> tuple[KernelWarning, ...]:
        """The warnings since the last call."""
        found = []
        for _ in range(RECORDS_AT_ONCE):
            begun_ns = self._clock_ns()
            try:
                record = os.read(self._log, RECORD_BYTES)
            except BlockingIOError:
                self._at_end_ns = begun_ns
                break
            except OSError as error:
                self.overruns += 1
                if error.errno != errno.EPIPE:
                    break
                continue
            warning = warning_of(record, self._at_end_ns, self._clock_ns())
            if warning is not None:
                found.append(warning)
        return tuple(found)

    def close(self) -> None:
        """Close the log."""
        os.close(self._log)


def open_kernel_log(
    clock_ns: Callable[[], int], path: str = PATH
) -> tuple[KernelLog | None, tuple[CoverageGap, ...]]:
    """The log, or None and the coverage gap."""
    try:
        return KernelLog(clock_ns, path), ()
    except OSError as error:
        why = f"{path}: {error.strerror}"
        return None, (CoverageGap("kernel log", why, "the kernel's warnings of full SYN queues"),)


def warning_of(record: bytes, since_ns: int, until_ns: int) -> KernelWarning | None:
    """Parse a record of /dev/kmsg; None if it is not a warning of a full SYN queue.

    The record was written between `since_ns` and `until_ns` of CLOCK_MONOTONIC. The kernel stamps
    records in µs by local_clock(), which is close to CLOCK_MONOTONIC but is not slewed as that is.
    A stamp outside of that span has drifted, so the nearer end of the span is closer to the truth.
    """
    match = _RECORD.match(record)
    if match is None:
        return None
    address = None
    if match["address"] is not None:
        with contextlib.suppress(ValueError):
            address = address_bytes(match["address"].decode("ascii"))
    return KernelWarning(
        time_ns=min(max(int(match["stamp"]) * 1000, since_ns), until_ns),
        port=int(match["port"]),
        address=address,
        text=match["text"].decode("utf-8", "backslashreplace").strip(),
    )
