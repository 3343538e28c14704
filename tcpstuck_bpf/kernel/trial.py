"""A handshake of our own under a SYN cookie: whether the programs that are attached are run.

They need not be. With kernel.ftrace_enabled=0, or with kprobes switched off, the kernel attaches
what it is given and never calls it: not one cookie would be seen, and nothing would look stuck.
"""

from __future__ import annotations

import fcntl
import socket
import struct
from collections.abc import Mapping
from pathlib import Path

from tcpstuck_bpf.errors import CannotTraceError
from tcpstuck_bpf.host import netns
from tcpstuck_bpf.model import NetnsCount

NOBODYS_NETNS = 0xFFFF_FFFF
"""No namespace has this inode number: a filter for it leaves everything out."""
ADDRESS = "127.83.89.78"
"""The address of both ends. The programs of other instances pass it over."""
PATIENCE_S = 60.0
"""On the loopback interface it takes no time; an emulated machine with other work may take some."""

_COOKIES = Path("/proc/sys/net/ipv4/tcp_syncookies")
_ALWAYS = "2"
"""A cookie for every SYN (ip-sysctl.rst)."""
_SIOCSIFFLAGS, _IFF_UP, _IFREQ = 0x8914, 1, struct.Struct("16sh14x")
"""netdevice(7)."""
_SWITCHES = (
    (Path("/proc/sys/kernel/ftrace_enabled"), "kernel.ftrace_enabled", "sysctl"),
    (Path("/sys/kernel/debug/kprobes/enabled"), "/sys/kernel/debug/kprobes/enabled", "file"),
)


def cookie_handshake() -> int:
    """Complete a handshake under a cookie in a network namespace of its own, gone afterwards.

    Returns the namespace's inode number. When it returns, all of the handshake's segments have
    been handled. Raises OSError where there can be no such namespace or handshake.
    """
    return netns.in_new_namespace(_handshake)


def _handshake() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        fcntl.ioctl(listener.fileno(), _SIOCSIFFLAGS, _IFREQ.pack(b"lo", _IFF_UP))
        _COOKIES.write_text(_ALWAYS, encoding="ascii")
        listener.settimeout(PATIENCE_S)
        listener.bind((ADDRESS, 0))
        listener.listen(1)
        with socket.create_connection(
            listener.getsockname(), PATIENCE_S, source_address=(ADDRESS, 0)
        ) as client:
            # The server's socket can be accepted before the program at the end of cookie_v4_check
            # has run. What comes after the ACK is handled after it.
            client.sendall(b"\n")
            served, _ = listener.accept()
            with served:
                served.settimeout(PATIENCE_S)
                served.recv(1)
    return Path("/proc/thread-self/ns/net").stat().st_ino


def require_seen(counted: Mapping[NetnsCount, int], *, has_counters: bool) -> None:
    """What the programs counted of that handshake, while their filter left everything out.

    Raises CannotTraceError where they did not run. An ACK is counted only where they can read the
    kernel's counters.
    """
    unseen = [] if counted.get(NetnsCount.COOKIES_SENT_OUTSIDE) else ["SYN"]
    if has_counters and not counted.get(NetnsCount.COOKIES_RECEIVED_OUTSIDE):
        unseen.append("ACK")
    if unseen:
        why, remedy = _switched_off()
        raise CannotTraceError(
            "the programs are attached, but the kernel does not run them",
            f"the {' and the '.join(unseen)} of a handshake of our own passed unseen; {why}",
            remedy,
        )


def _switched_off() -> tuple[str, str]:
    """Which switch keeps the programs from being run, as far as it can be found, and the remedy."""
    for path, name, kind in _SWITCHES:
        try:
            off = path.read_text(encoding="ascii").strip() == "0"
        except OSError:
            continue
        if off:
            remedy = f"sysctl {name}=1" if kind == "sysctl" else f"echo 1 > {name}"
            return f"{name} is 0", remedy
    return (
        "no switch was found that is off (kernel.ftrace_enabled, kprobes)",
        "look at the kernel log, and report it with the kernel's version",
    )
