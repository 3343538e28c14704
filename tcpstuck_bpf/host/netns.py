"""Network namespaces of this machine, and the kernel's own TCP counters in each.

Own code instead of pyroute2, because the tool's runtime dependencies stay few: all it needs is
one setns(2) and /proc/net/netstat.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import threading
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TypeVar

from tcpstuck_bpf.errors import CannotTraceError, UsageError, as_root_remedy
from tcpstuck_bpf.host.netns_cookie import own_cookie
from tcpstuck_bpf.model import NETNS_COOKIE, KernelCounters

COUNTERS = ("SyncookiesSent", "SyncookiesRecv", "SyncookiesFailed", "ListenOverflows")
QUEUE_SETTINGS = ("ipv4.tcp_syncookies", "ipv4.tcp_max_syn_backlog", "core.somaxconn")
"""Below /proc/sys/net, each namespace has its own (ip-sysctl.rst)."""

Result = TypeVar("Result")

_PROC = Path("/proc")
_NAMED = Path("/run/netns")
_MOUNTED = re.compile(r" net:\[(\d+)\] ")
"""The root of a namespace's mount in /proc/PID/mountinfo: proc_pid_mountinfo(5), nsfs."""
_CLONE_NEWNET = 0x40000000
_NS_GET_NSTYPE = 0xB703
"""ioctl_ns(2)."""
_INITIAL_PID_NAMESPACE = 0xEFFFFFFC
"""PROC_PID_INIT_INO of include/linux/proc_ns.h, since 3.8."""
_INITIAL_NETWORK_NAMESPACE = 0xEFFFFFF9
"""NET_NS_INIT_INO of include/uapi/linux/nsfs.h, of recent kernels.

Earlier it had one of the numbers from 0xF0000000 on, which go to all namespaces
(PROC_DYNAMIC_FIRST in fs/proc/generic.c): there no other namespace has this one.
"""


def own_netns() -> int:
    """Inode number of this process's network namespace."""
    return Path("/proc/self/ns/net").stat().st_ino


def resolve(text: str) -> int | None:
    """The inode number that `--netns` means: a path, a name of `ip netns`, or `all` (None).

    Raises UsageError where there is no such network namespace, CannotTraceError where it may not
    be looked at.
    """
    if text == "all":
        return None
    path = Path(text) if "/" in text else _NAMED / text
    try:
        inode, obstacle = path.stat().st_ino, _obstacle(path)
    except PermissionError as error:
        raise CannotTraceError(
            f"the network namespace {text} cannot be looked at",
            f"{path}: {error.strerror}",
            as_root_remedy(),
        ) from error
    except OSError as error:
        raise UsageError(
            f"no network namespace {text}",
            f"{path}: {error.strerror}",
            "give a path such as /run/netns/NAME or /proc/PID/ns/net, or a name of `ip netns`",
        ) from error
    if obstacle:
        raise UsageError(
            f"{text or repr(text)} is not a network namespace",
            f"{path} is {obstacle}",
            "give a path such as /run/netns/NAME or /proc/PID/ns/net, or a name of `ip netns`",
        )
    return inode


def _obstacle(path: Path) -> str:
    """What a path leads to instead of a network namespace; empty where it leads to one."""
    if path.is_dir():
        return "a directory"
    if not _on_nsfs(path):
        return "an ordinary file"
    with path.open("rb") as file:
        kind = fcntl.ioctl(file.fileno(), _NS_GET_NSTYPE)
    return "" if kind == _CLONE_NEWNET else "a namespace of another kind"


def _on_nsfs(path: Path) -> bool:
    """Whether a path leads to a namespace: nsfs is a device of its own (nsfs, ioctl_ns(2))."""
    return path.stat().st_dev == Path("/proc/self/ns/net").stat().st_dev


def names() -> dict[int, str]:
    """Names people know namespaces by: those of `ip netns`, `host`, `own`, and `pid 1's`.

    In a PID namespace of its own a container's process 1 is not the host's.
    """
    found = {inode: path.name for inode, path in _with_names().items()}
    own, init = own_netns(), _of_process_1()
    found.setdefault(own, "own")
    if init is not None:
        pid_namespace, inode = init
        if pid_namespace == _INITIAL_PID_NAMESPACE:
            found[inode] = "host"
        else:
            found.setdefault(inode, "pid 1's")
    if _INITIAL_NETWORK_NAMESPACE in found:
        found[_INITIAL_NETWORK_NAMESPACE] = "host"
    return found


def _of_process_1() -> tuple[int, int] | None:
    """Inode numbers of process 1's PID and network namespace; None where it may not be looked at.

    It is the process 1 of the PID namespace that /proc was mounted in.
    """
    try:
        return Path("/proc/1/ns/pid").stat().st_ino, Path("/proc/1/ns/net").stat().st_ino
    except OSError:
        return None


def _with_names() -> dict[int, Path]:
    """The paths of the namespaces that `ip netns` knows, or a link beside them leads to."""
    found: dict[int, Path] = {}
    with contextlib.suppress(OSError):
        for path in sorted(_NAMED.iterdir()):
            with contextlib.suppress(OSError):
                if _on_nsfs(path):
                    found[path.stat().st_ino] = path
    return found


def _pids_by_namespace() -> dict[int, list[int]]:
    """Processes through which each namespace can be read; a process may end at any moment."""
    found: dict[int, list[int]] = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                inode = Path(f"/proc/{entry.name}/ns/net").stat().st_ino
            except OSError:
                continue
            found.setdefault(inode, []).append(int(entry.name))
    return found


def parse_netstat(text: str) -> dict[str, int]:
    """The TcpExt counters of a /proc/net/netstat: pairs of lines, names above values."""
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


def _own_queue_settings() -> dict[str, int]:
    """/proc/sys/net shows the reading thread's namespace. A setting it lacks is left out."""
    found = {}
    for name in QUEUE_SETTINGS:
        path = Path("/proc/sys/net") / name.replace(".", "/")
        with contextlib.suppress(OSError, ValueError):
            found[name] = int(path.read_text("ascii"))
    return found


def _inside(path: Path, function: Callable[[], Result], inode: int | None = None) -> Result:
    """What a function returns in another namespace: a thread of ours enters it for a moment.

    Raises OSError where it cannot be entered, or where the path leads to another one than that
    with the number `inode`, and what the function raises.
    """

    def enter(libc: ctypes.CDLL) -> int:
        with path.open("rb") as file:
            # A process may have changed namespaces, or its number be another one's, by now.
            if inode not in (None, os.fstat(file.fileno()).st_ino):
                raise _gone()
            return int(libc.setns(file.fileno(), _CLONE_NEWNET))

    return _in_thread(enter, function)


def in_new_namespace(function: Callable[[], Result]) -> Result:
    """What a function returns in a namespace that is made for it, and is gone afterwards.

    Raises OSError where none can be made (that takes CAP_SYS_ADMIN), and what the function raises.
    """
    return _in_thread(lambda libc: int(libc.unshare(_CLONE_NEWNET)), function)


def _in_thread(enter: Callable[[ctypes.CDLL], int], function: Callable[[], Result]) -> Result:
    """What a function returns in a thread that has entered another namespace before."""
    results: list[Result] = []
    errors: list[Exception] = []

    def call() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        try:
            if enter(libc) != 0:
                number = ctypes.get_errno()
                raise OSError(number, os.strerror(number))
            results.append(function())
        except Exception as error:  # handed to the caller, whose thread it is not
            errors.append(error)

    thread = threading.Thread(target=call)
    try:
        thread.start()
    except RuntimeError as error:
        raise OSError(errno.EAGAIN, "no thread can be made to enter it") from error
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def _read_inside(path: Path, read_own: Callable[[], dict[str, int]], inode: int) -> dict[str, int]:
    """What `read_own` finds in another namespace; empty where it cannot be entered."""
    try:
        return _inside(path, read_own, inode)
    except (OSError, ValueError):
        return {}


def _ways_into(inode: int) -> Iterator[Path]:
    """Paths that lead to a namespace, those with a name first: a process may end at any moment."""
    path = _with_names().get(inode)
    if path is not None:
        yield path
    for pid in _pids_by_namespace().get(inode, ()):
        yield Path(f"/proc/{pid}/ns/net")


def run_in(inode: int, function: Callable[[], Result]) -> Result:
    """What a function returns in the namespace with that inode number.

    The calling thread stays where it is. Raises OSError where the namespace is gone or cannot be
    entered (that takes CAP_SYS_ADMIN), and what the function raises.
    """
    if inode == own_netns():
        return function()
    failure = _gone()
    for path in _ways_into(inode):
        try:
            return _inside(path, function, inode)
        except OSError as error:
            failure = error
    raise failure


def _gone() -> OSError:
    return OSError(errno.ENOENT, "the network namespace is gone")


def gone(wanted: Collection[int]) -> frozenset[int]:
    """Those of these network namespaces to which no process, name or mount leads any more.

    None of them where anything could not be looked at: what cannot be entered is not gone. One that
    only an open file or a socket holds is among them: that cannot be told without looking at every
    open file, and of a socket not even so.
    """
    init = _of_process_1()
    if init is None or init[0] != _INITIAL_PID_NAMESPACE:
        return frozenset()
    left = {*wanted} - {own_netns(), *_with_names()}
    try:
        for ways in (_of_processes, _of_threads, _of_mounts):
            left = left.difference(ways()) if left else left
    except OSError:
        return frozenset()
    return frozenset(left)


def _entries(directory: Path) -> Iterator[Path]:
    """Those with a number for their name; none where the process has ended. Raises OSError."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        yield from (entry for entry in directory.iterdir() if entry.name.isdigit())


def _number(link: Path) -> int | None:
    """The inode number of a thread's namespace; None where the thread has ended.

    Raises OSError where it may not be looked at, which the kernel says of one that ends just now
    as well (proc_ns_get_link).
    """
    try:
        return link.stat().st_ino
    except (FileNotFoundError, ProcessLookupError):
        return None
    except PermissionError:
        if link.parents[1].exists():
            raise
        return None


def _of_processes() -> Iterator[int]:
    numbers = (_number(one / "task" / one.name / "ns/net") for one in _entries(_PROC))
    yield from (number for number in numbers if number is not None)


def _of_threads() -> Iterator[int]:
    for process in _entries(_PROC):
        numbers = (_number(one / "ns/net") for one in _entries(process / "task"))
        yield from (number for number in numbers if number is not None)


def _of_mounts() -> Iterator[int]:
    """The mounts of every mount namespace that a process is in, each read once."""
    read: set[int | None] = {None}
    for process in _entries(_PROC):
        number = _number(process / "task" / process.name / "ns/mnt")
        if number in read:
            continue
        try:
            text = (process / "mountinfo").read_text("utf-8", "replace")
        except (FileNotFoundError, ProcessLookupError):
            continue
        read.add(number)
        yield from map(int, _MOUNTED.findall(text))


def read_queue_settings() -> dict[int, dict[str, int]]:
    """QUEUE_SETTINGS of every namespace that can be found, by inode number.

    Empty for one that cannot be entered (that takes CAP_SYS_ADMIN).
    """
    paths = {
        inode: [Path(f"/proc/{pid}/ns/net") for pid in pids]
        for inode, pids in _pids_by_namespace().items()
    }
    for inode, path in _with_names().items():
        paths.setdefault(inode, []).append(path)
    own = own_netns()
    found = {}
    for inode, ways in paths.items():
        settings = _own_queue_settings() if inode == own else {}
        for way in ways:
            settings = settings or _read_inside(way, _own_queue_settings, inode)
        found[inode] = settings
    return found


def _counters_by_process(pid: int, inode: int) -> dict[str, int]:
    """Empty where the process has ended, or lives in another namespace by now.

    Without the cookie where the namespace cannot be entered.
    """
    with contextlib.suppress(OSError, ValueError):
        return _inside(Path(f"/proc/{pid}/ns/net"), _own_counters, inode)
    try:
        counters = parse_netstat(Path(f"/proc/{pid}/net/netstat").read_text("ascii"))
        return counters if Path(f"/proc/{pid}/ns/net").stat().st_ino == inode else {}
    except (OSError, ValueError):
        return {}


class CounterReader:
    """Reads the kernel's TcpExt counters of network namespaces.

    To find the namespaces means to look at every process. So the process through which each one
    was read is kept, for those who want few of them, and often.
    """

    def __init__(self) -> None:
        self._processes: dict[int, int] = {}

    def read(self, wanted: Collection[int] | None = None) -> KernelCounters:
        """Counters by inode number, of those namespaces or of every one that can be reached.

        One that cannot be reached is left out; the reconciliation names it as unknown. Raises
        CannotTraceError where not even our own can be read (no /proc).
        """
        if wanted is None:
            return self._read_all()
        found = {inode: self._read_again(inode) for inode in wanted}
        if not all(found.values()):
            for inode, path in _with_names().items():
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
        for inode, pids in _pids_by_namespace().items():
            for pid in pids:
                counters = _counters_by_process(pid, inode)
                if counters:
                    found[inode] = counters
                    self._processes[inode] = pid
                    break
        for inode, path in _with_names().items():
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
