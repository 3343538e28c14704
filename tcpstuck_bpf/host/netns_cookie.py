"""A network namespace's cookie, unique within a boot."""

from __future__ import annotations

import socket
import sys

_SO_NETNS_COOKIE, _COOKIE_BYTES = 71, 8
"""asm-generic/socket.h. No architecture with BPF tracing has another number."""


def own_cookie() -> int:
    """Cookie of the calling thread's namespace; 0 before 5.14, which lacks SO_NETNS_COOKIE."""
    try:
        with socket.socket() as inside:
            cookie = inside.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, _COOKIE_BYTES)
    except OSError:
        return 0
    return int.from_bytes(cookie, sys.byteorder)
