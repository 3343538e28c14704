"""Finds a listener's owner and the settings that limit its backlog, in /proc.

The source is /proc/net/tcp and tcp6, because sock_diag would need a further dependency. The
programs already show the queue's limit. Both files list every socket of the namespace in which they
are read. The socket's inode number leads to the processes.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from tcpstuck_bpf.host import netns, netns_counters
from tcpstuck_bpf.model import (
    IPV4_MAPPED_PREFIX,
    ListenerFacts,
    ListenerId,
    ListenerSeen,
)

TRIES = 3
"""Number of searches for an owner; each one walks over all open files of all processes."""

_LISTEN = "0A"
_SYNCOOKIES = "ipv4.tcp_syncookies"


class ListeningSocket(NamedTuple):
    """A line of /proc/net/tcp or tcp6."""

    address: bytes
    """Local address: 16 bytes, IPv4 mapped."""
    port: int
    inode: int
    accept_queue: int
    """Present length of the accept queue, in entries: sk_ack_backlog (get_tcp4_sock)."""

    def fit(self, address: bytes) -> int:
        """How well the socket matches a destination address, like compute_score; 0: no match.

        A wildcard socket of the packet's own family beats an IPv6 one that may take IPv4 too. /proc
        does not show whether it does (IPV6_V6ONLY); where both sockets exist, it does not.
        """
        if self.address == address:
            return 3
        if self.address == IPV4_MAPPED_PREFIX + bytes(4):
            return 2 if address.startswith(IPV4_MAPPED_PREFIX) else 0
        return 0 if any(self.address) else 1


def parse_listeners(lines: Iterable[str]) -> Iterator[ListeningSocket]:
    """Listening sockets in the lines of a /proc/net/tcp or tcp6, the heading included.

    Reads up to the first other socket: the kernel lists all listening sockets before any other
    (tcp_get_idx), and a busy server has many others. Addresses are 32-bit words in host order.
    """
    for line in itertools.islice(lines, 1, None):
        words = line.split()
        if words[3] != _LISTEN:
            return
        address, _, port = words[1].partition(":")
        swapped = b"".join(
            bytes.fromhex(address[at : at + 8])[::-1] for at in range(0, len(address), 8)
        )
        full = IPV4_MAPPED_PREFIX + swapped if len(swapped) == 4 else swapped
        _sent, _, received = words[4].partition(":")
        yield ListeningSocket(full, int(port, 16), int(words[9]), int(received, 16))


def own_listeners() -> tuple[ListeningSocket, ...]:
    """The listening TCP sockets of the calling thread's network namespace."""
    found: list[ListeningSocket] = []
    for name in ("tcp", "tcp6"):
        with (
            contextlib.suppress(OSError),
            Path("/proc/thread-self/net", name).open(encoding="ascii") as lines,
        ):
            found += parse_listeners(lines)
    return tuple(found)


def accept_queues(listeners: Iterable[ListenerFacts]) -> dict[ListenerId, int]:
    """Present lengths of these listeners' accept queues, in entries.

    A listener is left out if its socket is unknown, is gone, or cannot be reached.
    """
    wanted: dict[int, dict[int, ListenerId]] = {}
    for facts in listeners:
        if facts.socket:
            wanted.setdefault(facts.netns, {})[facts.socket] = facts.listener
    found: dict[ListenerId, int] = {}
    for netns_inode, by_socket in wanted.items():
        with contextlib.suppress(OSError):
            for one in netns.run_in(netns_inode, own_listeners):
                if one.inode in by_socket:
                    found[by_socket[one.inode]] = one.accept_queue
    return found


def sockets_for(
    facts: ListenerFacts, listening: Iterable[ListeningSocket]
) -> tuple[ListeningSocket, ...]:
    """The listening socket of these facts, and all that share its address and port.

    Empty if the socket is gone. If the programs did not see which socket it was, the sockets that
    would get the SYNs: those bound to the address, else the wildcard ones.
    """
    listening = tuple(listening)
    for own in listening:
        if facts.socket and own.inode == facts.socket:
            return tuple(one for one in listening if one[:2] == own[:2])
    if facts.socket:
        return ()
    fits = {
        one: one.fit(facts.server_address) for one in listening if one.port == facts.server_port
    }
    best = max(fits.values(), default=0)
    return tuple(one for one, fit in fits.items() if fit == best and fit)


def owners_of(inodes: Iterable[int]) -> dict[int, tuple[str, ...]]:
    """`name (pid N)` of the processes that have these sockets open, by inode number.

    Processes that may not be examined, or that end meanwhile, are left out.
    """
    wanted = {f"socket:[{inode}]": inode for inode in inodes}
    found: dict[int, dict[str, None]] = {}
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            for descriptor in os.scandir(f"/proc/{entry.name}/fd"):
                with contextlib.suppress(OSError):
                    inode = wanted.get(str(Path(descriptor.path).readlink()))
                    if inode is not None:
                        name = _name(Path(f"/proc/{entry.name}/comm").read_bytes())
                        owner = f"{name} (pid {entry.name})"
                        found.setdefault(inode, {})[owner] = None
    return {inode: tuple(owners) for inode, owners in found.items()}


def _name(comm: bytes) -> str:
    """A process's name. The process chooses it (PR_SET_NAME): any bytes but NUL."""
    return comm[: -comm.endswith(b"\n") or None].decode("utf-8", "backslashreplace")


class ListenerWatch:
    """Reports listeners that changed, with their owners once they are found; see `TRIES`.

    Settings are read once, and tcp_syncookies again where a new cookie contradicts it.
    """

    def __init__(self) -> None:
        self._last: dict[ListenerFacts, None] = {}
        self._known: dict[ListenerId, ListenerSeen] = {}
        self._tries: dict[ListenerId, int] = {}

    def changed(self, facts: Iterable[ListenerFacts]) -> tuple[ListenerSeen, ...]:
        """The listeners that have changed since the last call, with their owners and settings."""
        now = dict.fromkeys(facts)
        news = [one for one in now if one not in self._last]
        sent = {one.listener: one.cookies_sent for one in self._last}
        self._last = now
        there = {one.listener for one in now}
        self._known = {which: one for which, one in self._known.items() if which in there}
        self._tries = {which: tries for which, tries in self._tries.items() if which in there}
        self._identify([one for one in news if self._wants(one)])
        for one in news:
            if one.cookies_sent > sent.get(one.listener, 0):
                self._note_cookies(one)
        return tuple(
            self._known.get(one.listener, ListenerSeen(one, (), (), {}))._replace(facts=one)
            for one in news
        )

    def _note_cookies(self, facts: ListenerFacts) -> None:
        """Read tcp_syncookies again if it does not explain a cookie: it may have been changed."""
        known = self._known.get(facts.listener)
        # 2: every SYN gets a cookie. 1: if the SYN queue is full.
        expected = 2 if facts.lowest_cookie_syn_queue < facts.limit else 1
        if known is None or known.settings.get(_SYNCOOKIES, expected) == expected:
            return
        with contextlib.suppress(OSError):
            now = netns.run_in(facts.netns, netns_counters.own_queue_settings)
            changed = {name: number for name, number in now.items() if name == _SYNCOOKIES}
            self._known[facts.listener] = known._replace(settings={**known.settings, **changed})

    def _wants(self, facts: ListenerFacts) -> bool:
        known = self._known.get(facts.listener)
        return not (known and known.owners) and self._tries.get(facts.listener, 0) < TRIES

    def _identify(self, facts: list[ListenerFacts]) -> None:
        if not facts:
            return
        settings = netns_counters.read_queue_settings()
        listening: dict[int, tuple[ListeningSocket, ...]] = {}
        for inode in {one.netns for one in facts}:
            with contextlib.suppress(OSError):
                listening[inode] = netns.run_in(inode, own_listeners)
        sockets = {one: sockets_for(one, listening.get(one.netns, ())) for one in facts}
        owned = {
            one: (one.socket,) if one.socket else tuple(socket.inode for socket in some)
            for one, some in sockets.items()
        }
        owners = owners_of(inode for inodes in owned.values() for inode in inodes)
        for one, some in sockets.items():
            names = {name: None for inode in owned[one] for name in owners.get(inode, ())}
            self._tries[one.listener] = self._tries.get(one.listener, 0) + 1
            self._known[one.listener] = ListenerSeen(
                one,
                tuple(names),
                tuple(sorted(socket.inode for socket in some)),
                settings.get(one.netns, {}),
                some[0].address if one.socket and some else None,
            )
