"""Network namespaces of this machine: their names, the ways into them, and which are gone.

This needs only setns(2) and /proc, so pyroute2 would not be worth a dependency.
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

Result = TypeVar("Result")

_PROC = Path("/proc")
_NAMED = Path("/run/netns")
_MOUNTED = re.compile(r" net:\[(\d+)\] ")
"""Root of a mounted namespace in /proc/PID/mountinfo: proc_pid_mountinfo(5), nsfs."""
_CLONE_NEWNET = 0x40000000
_NS_GET_NSTYPE = 0xB703
"""ioctl_ns(2)."""
_INITIAL_PID_NAMESPACE = 0xEFFFFFFC
"""PROC_PID_INIT_INO of include/linux/proc_ns.h, since 3.8."""
_INITIAL_NETWORK_NAMESPACE = 0xEFFFFFF9
"""NET_NS_INIT_INO of include/uapi/linux/nsfs.h, in recent kernels.

Older kernels give the initial namespace a number from 0xF0000000 on, like any other
(PROC_DYNAMIC_FIRST in fs/proc/generic.c). There no namespace has the number above.
"""


def own_netns() -> int:
    """Inode number of this process's network namespace."""
    return Path("/proc/self/ns/net").stat().st_ino


def resolve(text: str) -> int | None:
    """The inode number for `--netns`: a path, a name of `ip netns`, or `all` (None).

    Raises UsageError where there is no such network namespace, CannotTraceError where access is
    denied.
    """
    if text == "all":
        return None
    path = way(text)
    try:
        inode, obstacle = path.stat().st_ino, _obstacle(path)
    except PermissionError as error:
        raise CannotTraceError(
            f"no access to the network namespace {text}",
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


def way(text: str) -> Path:
    """The path for a `--netns` that is not `all`."""
    return Path(text) if "/" in text else _NAMED / text


def _obstacle(path: Path) -> str:
    """What a path leads to instead of a network namespace; empty if it leads to one."""
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
    """Names of namespaces: those of `ip netns`, `host`, `own`, and `pid 1's`.

    `pid 1's` is for a container with its own PID namespace, whose process 1 is not the host's.
    """
    found = {inode: path.name for inode, path in with_names().items()}
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
    """Inode numbers of process 1's PID and network namespace; None if access is denied.

    Process 1 is that of the PID namespace in which /proc was mounted.
    """
    try:
        return Path("/proc/1/ns/pid").stat().st_ino, Path("/proc/1/ns/net").stat().st_ino
    except OSError:
        return None


def with_names() -> dict[int, Path]:
    """Paths in /run/netns by namespace, including links that lead to one."""
    found: dict[int, Path] = {}
    with contextlib.suppress(OSError):
        for path in sorted(_NAMED.iterdir()):
            with contextlib.suppress(OSError):
                if _on_nsfs(path):
                    found[path.stat().st_ino] = path
    return found


def pids_by_namespace() -> dict[int, list[int]]:
    """All processes of each namespace. Any of them may end at any moment."""
    found: dict[int, list[int]] = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                inode = Path(f"/proc/{entry.name}/ns/net").stat().st_ino
            except OSError:
                continue
            found.setdefault(inode, []).append(int(entry.name))
    return found


def inodes() -> list[int]:
    """Inode numbers of the network namespaces that a process or a name leads to, our own first."""
    own = own_netns()
    found = dict.fromkeys([own, *with_names(), *pids_by_namespace()])
    return list(found)


def inside(path: Path, function: Callable[[], Result], inode: int | None = None) -> Result:
    """Call a function in another namespace, from a temporary thread.

    Raises OSError where the namespace cannot be entered, or where the path leads to a namespace
    other than `inode`. Raises what the function raises.
    """

    def enter(libc: ctypes.CDLL) -> int:
        with path.open("rb") as file:
            # The process may have changed its namespace, or its PID may have been reused.
            if inode not in (None, os.fstat(file.fileno()).st_ino):
                raise _gone()
            return int(libc.setns(file.fileno(), _CLONE_NEWNET))

    return _in_thread(enter, function)


def in_new_namespace(function: Callable[[], Result]) -> Result:
    """Call a function in a new, temporary namespace.

    Raises OSError where the namespace cannot be made (that takes CAP_SYS_ADMIN), and what the
    function raises.
    """
    return _in_thread(lambda libc: int(libc.unshare(_CLONE_NEWNET)), function)


def _in_thread(enter: Callable[[ctypes.CDLL], int], function: Callable[[], Result]) -> Result:
    """Call a function in a thread that first calls `enter`."""
    results: list[Result] = []
    errors: list[Exception] = []

    def call() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        try:
            if enter(libc) != 0:
                number = ctypes.get_errno()
                raise OSError(number, os.strerror(number))
            results.append(function())
        except Exception as error:  # raised again in the caller's thread
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


def _ways_into(inode: int) -> Iterator[Path]:
    """Paths that lead to a namespace, a name first because a process may end at any moment."""
    path = with_names().get(inode)
    if path is not None:
        yield path
    for pid in pids_by_namespace().get(inode, ()):
        yield Path(f"/proc/{pid}/ns/net")


def run_in(inode: int, function: Callable[[], Result]) -> Result:
    """Call a function in the namespace with this inode number.

    The calling thread keeps its namespace. Raises OSError where the namespace is gone or cannot be
    entered (that takes CAP_SYS_ADMIN), and what the function raises.
    """
    if inode == own_netns():
        return function()
    failure = _gone()
    for path in _ways_into(inode):
        try:
            return inside(path, function, inode)
        except OSError as error:
            failure = error
    raise failure


def _gone() -> OSError:
    return OSError(errno.ENOENT, "the network namespace is gone")


def gone(wanted: Collection[int]) -> frozenset[int]:
    """Those of these network namespaces to which no process, name or mount leads any more.

    Empty if anything was not accessible, because an inaccessible namespace is not gone. A namespace
    that only an open file or a socket holds counts as gone. To find such a file would take a walk
    over all open files, and even that would not show a socket's namespace.
    """
    init = _of_process_1()
    if init is None or init[0] != _INITIAL_PID_NAMESPACE:
        return frozenset()
    left = {*wanted} - {own_netns(), *with_names()}
    try:
        for ways in (_of_processes, _of_threads, _of_mounts):
            left = left.difference(ways()) if left else left
    except OSError:
        return frozenset()
    return frozenset(left)


def _entries(directory: Path) -> Iterator[Path]:
    """Entries whose name is a number; none if the process has ended. Raises OSError."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        yield from (entry for entry in directory.iterdir() if entry.name.isdigit())


def _number(link: Path) -> int | None:
    """The inode number of a thread's namespace; None if the thread has ended.

    Raises OSError where access is denied. The kernel also denies access to a thread that is just
    ending (proc_ns_get_link); that counts as ended.
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
    """Namespaces mounted in any process's mount namespace; each mount namespace is read once."""
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
