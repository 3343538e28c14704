"""Reads the TCP sockets of network namespaces by sock_diag(7).

It takes no privilege in the namespace that this process is in, and no kernel module but tcp_diag,
which the kernel loads by itself. A socket of ours would keep a namespace alive, so each reading
opens its own.
"""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from tcpstuck_bpf.client.descriptors import held_sockets
from tcpstuck_bpf.client.diag import AF_INET, AF_INET6, Answer, parse, request, request_one
from tcpstuck_bpf.client.facts import ClientSocket, Poll
from tcpstuck_bpf.errors import CannotTraceError, UsageError, as_root_remedy, words_of
from tcpstuck_bpf.host import netns
from tcpstuck_bpf.model import SECOND_NS

Result = TypeVar("Result")

LOOK_NS = 5 * SECOND_NS
"""Time between two searches for network namespaces: each one walks over all processes."""
MOST_NAMESPACES = 1024
"""Most network namespaces that are read, our own first: any user can create thousands."""
WAYS_TRIED = 3
ANSWER_LIMIT_S = 10.0
"""The kernel answers at once, in the reader's own system calls."""

_NETLINK_SOCK_DIAG = 4
"""include/uapi/linux/netlink.h"""
_LARGEST_DATAGRAM = 1 << 16
"""A dump has datagrams of 32 KiB at most (netlink_dump)."""
_NO_HANDLER = frozenset({errno.ENOENT, errno.EPROTONOSUPPORT, errno.EAFNOSUPPORT})


class Wanted(NamedTuple):
    """Which connections are asked for."""

    ports: tuple[int, ...]
    """Server ports, sorted."""
    family: int | None = None
    """4 or 6, by the packet."""
    address: bytes | None = None
    """The server's address: 16 bytes, IPv4 mapped."""
    netns: int | None = None
    """None: every network namespace."""
    way: Path | None = None
    """A path to that network namespace."""
    pid: int | None = None
    """Only sockets that this process has open."""


class _Tally:
    """The sockets of one reading as they come. `inodes`: only these inode numbers; None: all."""

    def __init__(
        self,
        wanted: Wanted,
        keep: Callable[[ClientSocket], bool],
        inodes: frozenset[int] | None = None,
    ) -> None:
        self._ports = frozenset(wanted.ports)
        self._wanted = wanted
        self._keep = keep
        self._inodes = inodes
        self.kept: list[ClientSocket] = []
        self.number = self.accepted = self.unreadable = self.subflows = 0
        self.touched = False
        """Whether anything has been read."""

    def take(self, answer: Answer) -> None:
        """Take the sockets of one answer."""
        self.touched = True
        for one in answer.sockets:
            who, wanted = one.four_tuple, self._wanted
            if who.server_port not in self._ports:
                continue
            if wanted.address is not None and who.server_address != wanted.address:
                continue
            if wanted.family is not None and who.family != wanted.family:
                continue
            if self._inodes is not None and one.inode not in self._inodes:
                continue
            if one.accepted:
                self.accepted += 1
                continue
            if one.is_subflow and one.waits:
                self.subflows += 1
                continue
            self.number += 1
            if self._keep(one):
                self.kept.append(one)
        self.unreadable += answer.unreadable

    def add(self, part: _Tally) -> None:
        """Add the sockets of a part of the reading."""
        self.kept += part.kept
        self.number += part.number
        self.accepted += part.accepted
        self.unreadable += part.unreadable
        self.subflows += part.subflows


def dump(ports: Sequence[int], inode: int) -> Iterator[Answer]:
    """The ESTABLISHED sockets to these ports in the calling thread's namespace, `inode`.

    Raises OSError where the kernel refuses, ValueError where its answer cannot be read.
    """
    for family in (AF_INET, AF_INET6):
        with socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG
        ) as channel:
            channel.settimeout(ANSWER_LIMIT_S)
            channel.send(request(family, ports))
            done = False
            while not done:
                answer = parse(channel.recv(_LARGEST_DATAGRAM), inode)
                if answer.error:
                    raise OSError(answer.error, os.strerror(answer.error))
                yield answer
                done = answer.done


def _one(wanted: ClientSocket) -> Answer:
    """The answer to a request for one socket, in the calling thread's namespace."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, _NETLINK_SOCK_DIAG) as channel:
        channel.settimeout(ANSWER_LIMIT_S)
        channel.send(request_one(wanted))
        return parse(channel.recv(_LARGEST_DATAGRAM), wanted.four_tuple.netns)


class Process:
    """A process that sockets must belong to. Raises UsageError or CannotTraceError."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        try:
            # Of this directory the kernel says ESRCH once the process has ended, even if another
            # process gets its number.
            self._directory = os.open(f"/proc/{pid}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            self.inodes()
        except PermissionError as error:
            raise CannotTraceError(
                f"the files of process {pid} may not be listed",
                f"/proc/{pid}/fd: {error.strerror}",
                as_root_remedy(),
            ) from error
        except OSError as error:
            raise UsageError(
                f"there is no process {pid}",
                f"/proc/{pid}: {error.strerror}",
                "give the number of a running process, as pgrep prints it",
            ) from error

    def netns(self) -> int:
        """Inode number of its network namespace. Raises OSError."""
        return os.stat("ns/net", dir_fd=self._directory).st_ino

    def inodes(self) -> frozenset[int]:
        """Inode numbers of its sockets. Raises ProcessLookupError once it has ended, or OSError."""
        return frozenset(held_sockets("fd", self._directory))

    def close(self) -> None:
        """Forget the process."""
        os.close(self._directory)


class SocketReader:
    """Reads the wanted sockets. `clock_ns` is CLOCK_MONOTONIC.

    Raises UsageError or CannotTraceError where there is no such process, or its files may not be
    listed.
    """

    def __init__(
        self,
        wanted: Wanted,
        clock_ns: Callable[[], int] = time.monotonic_ns,
        cpu_ns: Callable[[], int] = time.process_time_ns,
    ) -> None:
        self.ended = False
        """Whether the process of `--pid` has ended."""
        self._clock_ns, self._cpu_ns = clock_ns, cpu_ns
        self._process = None if wanted.pid is None else Process(wanted.pid)
        if self._process is not None and wanted.netns is None:
            wanted = wanted._replace(netns=self._process.netns())
        self._wanted = wanted
        self._own = netns.own_netns()
        self._ways: dict[int, list[Path]] = {}
        self._look_ns = 0
        self.beyond = 0
        """Number of network namespaces that are too many to be read."""

    def read(self, keep: Callable[[ClientSocket], bool]) -> Poll:
        """Read every namespace once. `keep` says of which sockets the poll has the facts."""
        gone = self._look()
        inodes = None
        if self._process is not None and not self.ended:
            try:
                inodes = self._process.inodes()
            except (FileNotFoundError, ProcessLookupError):
                self.ended = True
                gone = frozenset(self._ways)
        tally = _Tally(self._wanted, keep, inodes)
        read, failures = set(), {}
        for inode, ways in [*self._ways.items()] if not self.ended else []:
            try:
                tally.add(self._read_one(inode, ways, _Tally(self._wanted, keep, inodes)))
                read.add(inode)
            except (OSError, ValueError) as error:
                failures[inode] = words_of(error)
                if isinstance(error, (FileNotFoundError, ProcessLookupError)):
                    self._look_ns = 0  # the ways were those of processes that have ended
        return Poll(
            self._clock_ns(),
            tuple(tally.kept),
            tally.number,
            frozenset(read),
            gone,
            tally.unreadable,
            tally.accepted,
            tally.subflows,
            failures,
        )

    def close(self) -> None:
        """Close what is open."""
        if self._process is not None:
            self._process.close()

    def again(self, known: ClientSocket) -> ClientSocket | None:
        """The same socket by now; None if it has ended or is no longer ESTABLISHED.

        May be called from any thread. Raises OSError where its namespace cannot be entered, or the
        kernel refuses, and ValueError for an answer that is none.
        """
        inode = known.four_tuple.netns
        answer = self._inside(inode, self._ways.get(inode, []), lambda: _one(known), lambda: False)
        if answer.error in (errno.ENOENT, errno.ESTALE):
            return None
        if answer.error:
            raise OSError(answer.error, os.strerror(answer.error))
        same = (one for one in answer.sockets if one.key == known.key)
        return next((one for one in same if one.four_tuple == known.four_tuple), None)

    def _read_one(self, inode: int, ways: list[Path], tally: _Tally) -> _Tally:
        """Read a namespace through the first way into it. Raises OSError, ValueError."""

        def read() -> _Tally:
            for answer in dump(self._wanted.ports, inode):
                tally.take(answer)
            return tally

        return self._inside(inode, ways, read, lambda: tally.touched)

    def _inside(
        self,
        inode: int,
        ways: list[Path],
        read: Callable[[], Result],
        begun: Callable[[], bool],
    ) -> Result:
        """Call a function in a namespace. Once it has `begun`, no further way is tried."""
        if inode == self._own:
            return read()
        failure: OSError = FileNotFoundError(errno.ENOENT, "the network namespace is gone")
        for way in ways[:WAYS_TRIED]:
            try:
                return netns.inside(way, read, inode)
            except OSError as error:
                failure = error
                if begun():
                    break
        raise failure

    def _look(self) -> frozenset[int]:
        """Find the namespaces if that is due. Returns those that are gone since the last time."""
        begun_ns = self._cpu_ns()
        if self._clock_ns() < self._look_ns:
            return frozenset()
        found: dict[int, list[Path]] = {}
        wanted = self._wanted.netns
        if wanted is None or wanted == self._own:
            found[self._own] = []
        if wanted is None or wanted != self._own:
            for inode, path in netns.with_names().items():
                found.setdefault(inode, []).append(path)
            for inode, pids in netns.pids_by_namespace().items():
                ways = (Path(f"/proc/{pid}/ns/net") for pid in pids[:WAYS_TRIED])
                found.setdefault(inode, []).extend(ways)
        if wanted is not None:
            found = {wanted: found.get(wanted, [])}
            way = self._wanted.way
            if way is not None and _leads_to(way, wanted):
                found[wanted].insert(0, way)
            elif wanted != self._own and not found[wanted]:
                found = {}
        self.beyond = max(0, len(found) - MOST_NAMESPACES)
        gone = frozenset(self._ways).difference(found)
        self._ways = dict([*found.items()][:MOST_NAMESPACES])
        self._look_ns = self._clock_ns() + max(LOOK_NS, 20 * (self._cpu_ns() - begun_ns))
        return gone


def _leads_to(way: Path, inode: int) -> bool:
    """Whether a path leads to this namespace."""
    try:
        return way.stat().st_ino == inode
    except OSError:
        return False


def refuse_unless_readable(wanted: Wanted) -> None:
    """Raises CannotTraceError where the kernel does not list its sockets."""
    try:
        for _ in dump(wanted.ports, 0):
            return
    except (OSError, ValueError) as error:
        missing = isinstance(error, OSError) and error.errno in _NO_HANDLER
        raise CannotTraceError(
            "the kernel does not list its TCP sockets",
            "it has no tcp_diag" if missing else f"sock_diag: {words_of(error)}",
            "load it: modprobe tcp_diag (CONFIG_INET_TCP_DIAG)"
            if missing
            else "in a container, allow sockets of the family AF_NETLINK; `ss -t` needs the same",
        ) from error
