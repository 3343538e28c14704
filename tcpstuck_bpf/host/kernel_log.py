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

from tcpstuck_bpf.model import SECOND_NS, CoverageGap, KernelWarning, address_bytes

PATH = "/dev/kmsg"
RECORD_BYTES = 8192
"""Buffer size: CONSOLE_EXT_LOG_MAX of include/linux/printk.h. A read with less room fails."""
RECORDS_AT_ONCE = 1000
"""Largest number of records per call, so that a flood of records does not block the run."""
CLOCKS_AGREE_NS = SECOND_NS
"""Records are read at once, so a stamp further away than this shows that its clock has drifted."""

_RECORD = re.compile(
    rb"\d+,\d+,(?P<stamp>\d+),[^;]*;"
    rb"[^\n]*?(?P<text>Possible SYN flooding on port "
    rb"(?:\[?(?P<address>[0-9a-fA-F.:]+?)\]?:)?(?P<port>\d+)\. [^\n]*)"
)


class KernelLog:
    """The kernel log, from its current end on. Raises OSError where it may not be read."""

    def __init__(self, path: str = PATH) -> None:
        self.overruns = 0
        """Number of failed reads, mostly because records were overwritten before."""
        self._log = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            os.lseek(self._log, 0, os.SEEK_END)
        except BaseException:
            os.close(self._log)
            raise

    def warnings(self, now_ns: int) -> tuple[KernelWarning, ...]:
        """The warnings since the last call. `now_ns` is the current CLOCK_MONOTONIC."""
        found = []
        for _ in range(RECORDS_AT_ONCE):
            try:
                record = os.read(self._log, RECORD_BYTES)
            except BlockingIOError:
                break
            except OSError as error:
                self.overruns += 1
                if error.errno != errno.EPIPE:
                    break
                continue
            warning = warning_of(record, now_ns)
            if warning is not None:
                found.append(warning)
        return tuple(found)

    def close(self) -> None:
        """Close the log."""
        os.close(self._log)


def open_kernel_log(path: str = PATH) -> tuple[KernelLog | None, tuple[CoverageGap, ...]]:
    """The log, or None and the coverage gap."""
    try:
        return KernelLog(path), ()
    except OSError as error:
        why = f"{path}: {error.strerror}"
        return None, (CoverageGap("kernel log", why, "the kernel's warnings of full SYN queues"),)


def warning_of(record: bytes, now_ns: int) -> KernelWarning | None:
    """Parse a record of /dev/kmsg; None if it is not a warning of a full SYN queue.

    The kernel stamps records in µs by a clock of its own, close to CLOCK_MONOTONIC.
    """
    match = _RECORD.match(record)
    if match is None:
        return None
    address = None
    if match["address"] is not None:
        with contextlib.suppress(ValueError):
            address = address_bytes(match["address"].decode("ascii"))
    stamp_ns = int(match["stamp"]) * 1000
    return KernelWarning(
        time_ns=stamp_ns if abs(now_ns - stamp_ns) <= CLOCKS_AGREE_NS else now_ns,
        port=int(match["port"]),
        address=address,
        text=match["text"].decode("utf-8", "backslashreplace").strip(),
    )
