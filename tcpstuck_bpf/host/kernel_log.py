"""The kernel's own warnings of full SYN queues, from its log.

tcp_syn_flood_action (net/ipv4/tcp_input.c) writes "Possible SYN flooding on port 3311. Sending
cookies." once for each listener, until that listens anew, and no more often than
net.core.message_cost allows. It names no network namespace, and before 6.2 no address.

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
"""A read of less than a record fails; CONSOLE_EXT_LOG_MAX of include/linux/printk.h."""
RECORDS_AT_ONCE = 1000
"""More than that wait for the next time: a kernel that does not stop talking holds nobody up."""
CLOCKS_AGREE_NS = SECOND_NS
"""A record is read at once; where its stamp is further from that, its clock has drifted."""

_RECORD = re.compile(
    rb"\d+,\d+,(?P<stamp>\d+),[^;]*;"
    rb"[^\n]*?(?P<text>Possible SYN flooding on port "
    rb"(?:\[?(?P<address>[0-9a-fA-F.:]+?)\]?:)?(?P<port>\d+)\. [^\n]*)"
)


class KernelLog:
    """The warnings as they come. Raises OSError where the log may not be read."""

    def __init__(self, path: str = PATH) -> None:
        self.overruns = 0
        """Times that records could not be read, mostly because they were overwritten before."""
        self._log = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            os.lseek(self._log, 0, os.SEEK_END)
        except BaseException:
            os.close(self._log)
            raise

    def warnings(self, now_ns: int) -> tuple[KernelWarning, ...]:
        """What has come since it was asked last; `now_ns` of CLOCK_MONOTONIC is when."""
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
        """Nothing more is to be read."""
        os.close(self._log)


def open_kernel_log(path: str = PATH) -> tuple[KernelLog | None, tuple[CoverageGap, ...]]:
    """The log, or what is not known without it."""
    try:
        return KernelLog(path), ()
    except OSError as error:
        why = f"{path}: {error.strerror}"
        return None, (CoverageGap("kernel log", why, "the kernel's warnings of full SYN queues"),)


def warning_of(record: bytes, now_ns: int) -> KernelWarning | None:
    """A record of /dev/kmsg that is such a warning; None for any other.

    The kernel stamps records by a clock of its own, in µs, which runs beside CLOCK_MONOTONIC.
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
