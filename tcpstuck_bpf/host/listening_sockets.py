"""Whose a listener is, and what bounds its backlog: what /proc says of it.

/proc/net/tcp and tcp6 instead of sock_diag: the tool's runtime dependencies stay few, the queue's
limit comes from the packets themselves, and these two files are read in the namespace in
question, whoever owns the socket. The processes are found by the inode number of the socket.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from tcpstuck_bpf.host import netns
from tcpstuck_bpf.model import (
    IPV4_MAPPED_PREFIX,
    ListenerFacts,
    ListenerId,
    ListenerSeen,
)

TRIES = 3
"""Times that an owner is looked for: a walk over every process's open files."""

_LISTEN = "0A"


class ListeningSocket(NamedTuple):
    """A line of /proc/net/tcp or tcp6."""

    address: bytes
    """16 bytes, IPv4 mapped."""
    port: int
    inode: int

    def fit(self, address: bytes) -> int:
        """How much it is meant for what comes for an address, as compute_score has it; 0: not.

        Of any address, one of the packet's own family goes before an IPv6 one that takes IPv4 too:
        whether it does (IPV6_V6ONLY) is not to be seen, and where both are there it does not.
        """
        if self.address == address:
            return 3
        if self.address == IPV4_MAPPED_PREFIX + bytes(4):
            return 2 if address.startswith(IPV4_MAPPED_PREFIX) else 0
        return 0 if any(self.address) else 1


def parse_listeners(text: str) -> Iterator[ListeningSocket]:
    """Listening sockets of a /proc/net/tcp or tcp6: addresses are 32-bit words of the host's."""
    for line in text.splitlines()[1:]:
        words = line.split()
        if words[3] != _LISTEN:
            continue
        address, _, port = words[1].partition(":")
        swapped = b"".join(
            bytes.fromhex(address[at : at + 8])[::-1] for at in range(0, len(address), 8)
        )
        full = IPV4_MAPPED_PREFIX + swapped if len(swapped) == 4 else swapped
        yield ListeningSocket(full, int(port, 16), int(words[9]))


def _own_listeners() -> tuple[ListeningSocket, ...]:
    found: list[ListeningSocket] = []
    for name in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            text = Path("/proc/thread-self/net", name).read_text("ascii")
            found += parse_listeners(text)
    return tuple(found)


def sockets_for(
    facts: ListenerFacts, listening: Iterable[ListeningSocket]
) -> tuple[ListeningSocket, ...]:
    """The one that its segments came to, and all that share its address and port.

    None where it is gone. Where the programs did not see which it was, those that get the SYNs: of
    the very address, else of any.
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
    """`name (pid N)` of the processes that have sockets open, by inode number.

    What may not be looked into, and what ends meanwhile, is left out.
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
    """A process's name, which it chooses itself (PR_SET_NAME): any bytes but NUL."""
    return comm[: -comm.endswith(b"\n") or None].decode("utf-8", "backslashreplace")


class ListenerWatch:
    """Says of each listener whose it is, once it is known; see `TRIES`."""

    def __init__(self) -> None:
        self._last: dict[ListenerFacts, None] = {}
        self._known: dict[ListenerId, ListenerSeen] = {}
        self._tries: dict[ListenerId, int] = {}

    def changed(self, facts: Iterable[ListenerFacts]) -> tuple[ListenerSeen, ...]:
        """Those that have changed since the last call, with what is known of them."""
        now = dict.fromkeys(facts)
        news = [one for one in now if one not in self._last]
        self._last = now
        there = {one.listener for one in now}
        self._known = {which: one for which, one in self._known.items() if which in there}
        self._tries = {which: tries for which, tries in self._tries.items() if which in there}
        self._identify([one for one in news if self._wants(one)])
        return tuple(
            self._known.get(one.listener, ListenerSeen(one, (), (), {}))._replace(facts=one)
            for one in news
        )

    def _wants(self, facts: ListenerFacts) -> bool:
        known = self._known.get(facts.listener)
        return not (known and known.owners) and self._tries.get(facts.listener, 0) < TRIES

    def _identify(self, facts: list[ListenerFacts]) -> None:
        if not facts:
            return
        settings = netns.read_queue_settings()
        listening: dict[int, tuple[ListeningSocket, ...]] = {}
        for inode in {one.netns for one in facts}:
            with contextlib.suppress(OSError):
                listening[inode] = netns.run_in(inode, _own_listeners)
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
