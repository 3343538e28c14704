"""A network namespace's cookie, which no other one of this boot has or had."""

from __future__ import annotations

import socket
import sys

_SO_NETNS_COOKIE, _COOKIE_BYTES = 71, 8
"""asm-generic/socket.h; of the architectures with BPF tracing none has another number."""


def own_cookie() -> int:
    """The calling thread's namespace's; 0 before 5.14, which has none (SO_NETNS_COOKIE)."""
    try:
        with socket.socket() as inside:
            cookie = inside.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, _COOKIE_BYTES)
    except OSError:
        return 0
    return int.from_bytes(cookie, sys.byteorder)
