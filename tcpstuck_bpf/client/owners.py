"""Finds the processes that have sockets open, in /proc/PID/fd (proc_pid_fd(5)).

A user may list the files of his own processes alone. What may not be listed is said, and no error.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator
from pathlib import Path

from tcpstuck_bpf.client.descriptors import held_sockets
from tcpstuck_bpf.client.facts import Owner, Owners
from tcpstuck_bpf.host import netns_owners

PROC = Path("/proc")
MOST_OWNERS = 16
"""Most processes that are named for one socket; the others are counted."""
_LARGEST_CGROUP = 1 << 16


def owners_of(inodes: Collection[int]) -> dict[int, Owners]:
    """The owners of these sockets, each of which is in the result.

    The processes are those of the PID namespace in which /proc was mounted. They may end, or close
    the socket, during the search.
    """
    wanted = frozenset(inodes)
    found: dict[int, list[Owner]] = {inode: [] for inode in wanted}
    more = dict.fromkeys(wanted, 0)
    hidden = False
    for process in _processes() if wanted else ():
        try:
            held = held_sockets(str(process / "fd"))
        except PermissionError:
            hidden = True
            continue
        except OSError:  # it has ended
            continue
        for inode in wanted.intersection(held):
            descriptor = held[inode]
            if len(found[inode]) < MOST_OWNERS:
                found[inode].append(_owner(process, descriptor))
            else:
                more[inode] += 1
    return {
        inode: Owners(tuple(sorted(some, key=lambda one: one.pid)), more[inode], hidden)
        for inode, some in found.items()
    }


def _processes() -> Iterator[Path]:
    with contextlib.suppress(OSError), os.scandir(PROC) as entries:
        for entry in entries:
            if entry.name.isdecimal():
                yield PROC / entry.name


def _owner(process: Path, descriptor: int) -> Owner:
    """A process by its name and container, as far as they can be read."""
    name = groups = b""
    with contextlib.suppress(OSError):
        name = (process / "comm").read_bytes()
    with contextlib.suppress(OSError), (process / "cgroup").open("rb") as file:
        groups = file.read(_LARGEST_CGROUP)
    # Any process chooses its name (PR_SET_NAME): any bytes but NUL.
    text = name[: -name.endswith(b"\n") or None].decode("utf-8", "backslashreplace")
    container = netns_owners.container_name(os.fsdecode(groups))
    return Owner(text, int(process.name), descriptor, container)
