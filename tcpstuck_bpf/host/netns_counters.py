"""The kernel's own TCP counters in each network namespace, and the settings of its queues."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection
from pathlib import Path

from tcpstuck_bpf.errors import CannotTraceError
from tcpstuck_bpf.host import netns
from tcpstuck_bpf.host.netns_cookie import own_cookie
from tcpstuck_bpf.model import NETNS_COOKIE, KernelCounters

COUNTERS = ("SyncookiesSent", "SyncookiesRecv", "SyncookiesFailed", "ListenOverflows")
QUEUE_SETTINGS = ("ipv4.tcp_syncookies", "ipv4.tcp_max_syn_backlog", "core.somaxconn")
"""Settings below /proc/sys/net that each namespace has for itself (ip-sysctl.rst)."""


def parse_netstat(text: str) -> dict[str, int]:
    """The TcpExt counters in a /proc/net/netstat, which has pairs of lines: names, then values."""
    found: dict[str, int] = {}
    lines = text.splitlines()
    for heading, values in zip(lines[::2], lines[1::2]):
        if heading.startswith("TcpExt:"):
            found.update(zip(heading.split()[1:], map(int, values.split()[1:])))
    return {name: found[name] for name in COUNTERS if name in found}


def _own_counters() -> dict[str, int]:
    """The counters of the calling thread's namespace, with its cookie."""
    counters = parse_netstat(Path("/proc/thread-self/net/netstat").read_text("ascii"))
    return {**counters, NETNS_COOKIE: own_cookie()} if counters else {}


def own_queue_settings() -> dict[str, int]:
    """The calling thread's namespace's QUEUE_SETTINGS. A missing setting is left out."""
    found = {}
    for name in QUEUE_SETTINGS:
        path = Path("/proc/sys/net") / name.replace(".", "/")
        with contextlib.suppress(OSError, ValueError):
            found[name] = int(path.read_text("ascii"))
    return found


def _read_inside(path: Path, read_own: Callable[[], dict[str, int]], inode: int) -> dict[str, int]:
    """Call `read_own` in another namespace; empty if the namespace cannot be entered."""
    try:
        return netns.inside(path, read_own, inode)
    except (OSError, ValueError):
        return {}


def read_queue_settings() -> dict[int, dict[str, int]]:
    """QUEUE_SETTINGS of every namespace found, by inode number.

    A namespace that cannot be entered (that takes CAP_SYS_ADMIN) has no settings.
    """
    paths = {
        inode: [Path(f"/proc/{pid}/ns/net") for pid in pids]
        for inode, pids in netns.pids_by_namespace().items()
    }
    for inode, path in netns.with_names().items():
        paths.setdefault(inode, []).append(path)
    own = netns.own_netns()
    found = {}
    for inode, ways in paths.items():
        settings = own_queue_settings() if inode == own else {}
        for way in ways:
            settings = settings or _read_inside(way, own_queue_settings, inode)
        found[inode] = settings
    return found


def _counters_by_process(pid: int, inode: int) -> dict[str, int]:
    """Counters of a process's namespace; empty if it has ended or is no longer in `inode`.

    They lack the cookie if the namespace cannot be entered.
    """
    with contextlib.suppress(OSError, ValueError):
        return netns.inside(Path(f"/proc/{pid}/ns/net"), _own_counters, inode)
    try:
        counters = parse_netstat(Path(f"/proc/{pid}/net/netstat").read_text("ascii"))
        return counters if Path(f"/proc/{pid}/ns/net").stat().st_ino == inode else {}
    except (OSError, ValueError):
        return {}


class CounterReader:
    """Reads the kernel's TcpExt counters of network namespaces.

    Finding all namespaces takes a look at every process. So the process through which a namespace
    was read is remembered, to make frequent reads of a few namespaces cheap.
    """

    def __init__(self) -> None:
        self._processes: dict[int, int] = {}

    def read(self, wanted: Collection[int] | None = None) -> KernelCounters:
        """Counters by inode number, of the `wanted` namespaces or of all that can be reached.

        A namespace that cannot be reached is left out; the reconciliation names it as unknown.
        Raises CannotTraceError where not even our own can be read (no /proc).
        """
        if wanted is None:
            return self._read_all()
        found = {inode: self._read_again(inode) for inode in wanted}
        if not all(found.values()):
            for inode, path in netns.with_names().items():
                if found.get(inode) == {}:
                    found[inode] = _read_inside(path, _own_counters, inode)
        if all(found.values()):
            return found
        everything = self._read_all()
        return {inode: everything[inode] for inode in wanted if inode in everything}

    def _read_again(self, inode: int) -> dict[str, int]:
        pid = self._processes.get(inode)
        return {} if pid is None else _counters_by_process(pid, inode)

    def _read_all(self) -> KernelCounters:
        self._processes.clear()
        found: dict[int, dict[str, int]] = {}
        for inode, pids in netns.pids_by_namespace().items():
            for pid in pids:
                counters = _counters_by_process(pid, inode)
                if counters:
                    found[inode] = counters
                    self._processes[inode] = pid
                    break
        for inode, path in netns.with_names().items():
            counters = {} if inode in found else _read_inside(path, _own_counters, inode)
            if counters:
                found[inode] = counters
        if not found:
            raise CannotTraceError(
                "the kernel's TCP counters cannot be read",
                "no /proc/PID/net/netstat is readable",
                "mount /proc; in a container, share the host's PID namespace",
            )
        return found
