"""Makes a handshake of our own under a SYN cookie, to check that the kernel runs the programs.

With kernel.ftrace_enabled=0, or with kprobes switched off, the kernel attaches programs but never
runs them. Then no cookie is seen and nothing looks stuck.
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
"""No namespace has this inode number, so a filter for it excludes everything."""
ADDRESS = "127.83.89.78"
"""Address of both ends. The programs of other instances ignore it."""
PATIENCE_S = 60.0
"""Seconds to wait. Loopback takes almost no time, but a busy emulated machine takes longer."""

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
    """Complete a handshake under a cookie in a temporary network namespace.

    Returns the namespace's inode number, after all segments of the handshake have been processed.
    Raises OSError where the namespace or the handshake fails.
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
            # accept() can return before the fexit program of cookie_v4_check has run. A segment
            # after the ACK is processed only after the ACK, so wait for one.
            client.sendall(b"\n")
            served, _ = listener.accept()
            with served:
                served.settimeout(PATIENCE_S)
                served.recv(1)
    return Path("/proc/thread-self/ns/net").stat().st_ino


def require_seen(counted: Mapping[NetnsCount, int], *, has_counters: bool) -> None:
    """Check the programs' counts of our handshake, made while their filter excluded everything.

    Raises CannotTraceError where the programs did not run. They count the ACK only if they can
    read the kernel's counters.
    """
    unseen = [] if counted.get(NetnsCount.COOKIES_SENT_OUTSIDE) else ["SYN"]
    if has_counters and not counted.get(NetnsCount.COOKIES_RECEIVED_OUTSIDE):
        unseen.append("ACK")
    if unseen:
        why, remedy = _switched_off()
        raise CannotTraceError(
            "the programs are attached, but the kernel does not run them",
            f"they did not see the {' and the '.join(unseen)} of a handshake of our own; {why}",
            remedy,
        )


def _switched_off() -> tuple[str, str]:
    """The switch that keeps the programs from running, if one is found, and the remedy."""
    for path, name, kind in _SWITCHES:
        try:
            off = path.read_text(encoding="ascii").strip() == "0"
        except OSError:
            continue
        if off:
            remedy = f"sysctl {name}=1" if kind == "sysctl" else f"echo 1 > {name}"
            return f"{name} is 0", remedy
    return (
        "the known switches (kernel.ftrace_enabled, kprobes) are not off",
        "look at the kernel log, and report it, with the kernel's version",
    )
