"""Reasons why a run may see nothing: no listening socket, or SYN cookies are off.

Without these warnings, a run on the wrong port would look like a healthy server.
"""

from __future__ import annotations

from typing import NamedTuple

from tcpstuck_bpf.host import netns, netns_counters
from tcpstuck_bpf.host.listening_sockets import own_listeners
from tcpstuck_bpf.model import TraceFilter

MAX_NAMESPACES = 64
"""Most network namespaces that are checked, our own first: any user can create thousands."""
SYNCOOKIES = "ipv4.tcp_syncookies"


class _Seen(NamedTuple):
    ports: frozenset[int]
    """Ports with a listening TCP socket, in host byte order."""
    syncookies: int | None
    """The sysctl; None if it cannot be read."""


def _own() -> _Seen:
    settings = netns_counters.own_queue_settings()
    return _Seen(frozenset(one.port for one in own_listeners()), settings.get(SYNCOOKIES))


def _look(wanted: TraceFilter) -> tuple[dict[int, _Seen], bool]:
    """The state of the wanted network namespaces, and whether all of them could be checked."""
    if wanted.netns is not None:
        chosen, is_all = [wanted.netns], True
    else:
        everything = netns.inodes()
        chosen, is_all = everything[:MAX_NAMESPACES], len(everything) <= MAX_NAMESPACES
    seen = {}
    for inode in chosen:
        try:
            seen[inode] = netns.run_in(inode, _own)
        except OSError:
            is_all = False
    return seen, is_all


def doubts(wanted: TraceFilter) -> tuple[str, ...]:
    """Warnings that this trace may see nothing; empty if it may see something.

    Source: /proc/net/tcp, /proc/net/tcp6 and net.ipv4.tcp_syncookies of each network namespace.
    """
    seen, is_all = _look(wanted)
    if not seen:
        return ()
    beyond = "" if is_all else " (not every network namespace could be looked at)"
    heard = frozenset().union(*(one.ports for one in seen.values()))
    found = []
    deaf = [str(port) for port in wanted.ports if port not in heard]
    if deaf:
        several = "s" if len(deaf) > 1 else ""
        found.append(f"nobody listens on port{several} {', '.join(deaf)}{beyond}")
    elif not heard:
        found.append(f"nobody listens on any TCP port{beyond}")
    names = netns.names()
    off = [
        names.get(inode, str(inode))
        for inode, one in seen.items()
        if one.syncookies == 0 and one.ports and (not wanted.ports or one.ports & {*wanted.ports})
    ]
    if off:
        found.append(
            f"SYN cookies are off (net.ipv4.tcp_syncookies=0) in {', '.join(off)}: no client can "
            "get stuck under a cookie there"
        )
    return tuple(found)
