"""Asks the server about a connection through the application's own socket, and changes nothing.

The socket is borrowed by pidfd_getfd(2) (5.6). The kernel sends a probe from it, for keep-alive or
for the window, with an old sequence number: SND.UNA - 1 (tcp_xmit_probe_skb). A server that knows
the connection answers with an ACK, one that forgot it with an RST.

While a SYN cookie can be valid, such a probe is fatal, because its sequence number is one too low.
With the highest index of MSS the cookie is invalid, and an RST ends a connection that could have
been mended. With any other the listener makes a connection that waits for a byte which the client
never sent: the client gets the greeting, and its own data never arrives. So `ask` refuses where
less than COOKIE_LIFE_S have passed since the last SYN.

A borrowed socket is a duplicate: if the application closes its own meanwhile, the FIN leaves, and
epoll(7) forgets the socket, when the duplicate is closed.
"""

from __future__ import annotations

import enum
import errno
import math
import os
import select
import socket
import stat
import struct
import time
from collections.abc import Callable
from typing import NamedTuple

from tcpstuck_bpf.client.option_guard import GuardError, OptionGuard, no_step
from tcpstuck_bpf.host.bpf_syscall import RefusedError, system_call

COOKIE_LIFE_S = 120.0
"""No cookie is valid later: MAX_SYNCOOKIE_AGE of include/net/tcp.h is 2 minutes' numbers."""
LIMIT_S = 3.0
"""How long to wait for an answer."""

# Both have the same number on every architecture (scripts/syscall.tbl).
_PIDFD_OPEN = {"x86_64": 434, "aarch64": 434}
_PIDFD_GETFD = {"x86_64": 438, "aarch64": 438}
# Python's socket module lacks these (asm-generic/socket.h, linux/tcp.h).
_SO_COOKIE = 57
_TCP_USER_TIMEOUT = 18
_TCP_REPAIR, _REPAIR_OFF = 19, 0
_TCP_INFO_BYTES = 144
"""struct tcp_info up to tcpi_segs_in (4.2)."""
_STATE_AT, _PROBES_AT, _UNACKED_AT, _LAST_ACK_AT = 0, 3, 24, 56
_BYTES_RECEIVED_AT, _SEGS_IN_AT = 128, 140
_ESTABLISHED, _CLOSE = 1, 7
_TICKS_MS = 20
"""Two ticks of the slowest clock (HZ=100), by which the time of the last ACK may seem to move."""
_LOOK_AGAIN_S = 0.025
"""A bare ACK wakes nobody who polls the socket, so TCP_INFO is read in these intervals."""
_MOST_PROBES = 127
"""MAX_TCP_KEEPCNT."""
_AN_HOUR_S = 3600
_KEEP_ALIVE = (
    # So that the kernel never ends the connection: probes of an earlier question count.
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _MOST_PROBES),
    # One probe, and no second: each unanswered one would bring the application's own keep-alive
    # nearer to its limit (icsk_probes_out).
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _AN_HOUR_S),
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    # Last: set while keep-alive is on, it starts the timer with what is left of one second, so the
    # probe leaves at once (tcp_sock_set_keepidle_locked).
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 1),
)


class TooYoungError(ValueError):
    """The server may still hold a valid cookie, so the connection must not be asked about."""


class Answer(enum.Enum):
    """What came of a question."""

    SERVER_FORGOT = "server-forgot"
    """An RST ended the connection; the application gets ECONNRESET."""
    SERVER_KNOWS = "server-knows"
    """An ACK of the server arrived: it has the connection."""
    NO_ANSWER = "no-answer"
    """Nothing came within the limit."""
    NOT_OURS = "not-ours"
    """We may not borrow from this process."""
    GONE = "gone"
    """Process, descriptor or connection is another one now, or has ended."""
    REFUSED = "refused"
    """It could not be asked, or not without harm."""


class Outcome(NamedTuple):
    """An answer, and the reason for it in words."""

    answer: Answer
    reason: str


class Way(enum.Enum):
    """How to make the kernel send a probe."""

    WINDOW_PROBE = "window probe"
    """The end of TCP_REPAIR, which never began: the kernel sends a window probe at once and changes
    no option but SO_REUSEADDR, to 0 (do_tcp_setsockopt, tcp_send_window_probe). Takes CAP_NET_ADMIN
    over the socket's namespace."""
    KEEP_ALIVE = "keep-alive"
    """Keep-alive for a moment, with a child process that restores the options."""


class Wanted(NamedTuple):
    """A socket of a process, and how to recognise it."""

    pid: int
    fd: int
    inode: int
    """The socket's, as in /proc/PID/fd."""
    cookie: int | None = None
    """SO_COOKIE, in host order; None if not known."""


class _Reading(NamedTuple):
    """What TCP_INFO says at a moment."""

    state: int
    probes: int
    """Probes without an answer, icsk_probes_out."""
    unacknowledged: int
    last_ack_ms: float
    """When the last acceptable ACK arrived (rcv_tstamp, set by tcp_ack); CLOCK_MONOTONIC."""
    bytes_received: int
    segments_in: int


class _NotBorrowedError(Exception):
    def __init__(self, answer: Answer, reason: str) -> None:
        super().__init__(reason)
        self.outcome = Outcome(answer, reason)


def ask(
    wanted: Wanted,
    since_last_syn_s: float,
    *,
    limit_s: float = LIMIT_S,
    way: Way | None = None,
    step: Callable[[str], None] = no_step,
) -> Outcome:
    """Ask the server about an idle connection, and wait up to `limit_s` seconds for the answer.

    `since_last_syn_s` is the time since the client's last SYN, in seconds; a lower bound will do.
    Raises TooYoungError unless it is above COOKIE_LIFE_S. Without `way`, a window probe is sent
    where that is possible and leaves the application's options alone; otherwise keep-alive is used.
    `step` is called between steps.

    Every option is as before in the end. One thing is not: an application that has never set
    TCP_KEEPIDLE, TCP_KEEPINTVL or TCP_KEEPCNT follows the sysctls. After keep-alive was used, it
    has the values that the sysctls had then. SO_ERROR is never read: that would take the error
    away from the application.

    An application with keep-alive of its own is asked as well: by default it would wait two hours.
    It is refused where our probe could make its own keep-alive end the connection too early: with
    TCP_USER_TIMEOUT, with a limit of one probe, or while it is itself waiting for an answer.
    """
    if not COOKIE_LIFE_S < since_last_syn_s < math.inf:
        raise TooYoungError(
            f"{since_last_syn_s:g} s since the last SYN: a probe would break the connection "
            f"while a cookie can be valid, up to {COOKIE_LIFE_S:g} s"
        )
    try:
        borrowed = _borrow(wanted)
    except _NotBorrowedError as error:
        return error.outcome
    with borrowed:
        step("borrowed")
        try:
            return _ask(borrowed, limit_s, way, step)
        except GuardError as error:
            return Outcome(Answer.REFUSED, str(error))
        except OSError as error:
            return Outcome(Answer.REFUSED, error.strerror or str(error))


def _borrow(wanted: Wanted) -> socket.socket:
    """The duplicate of a descriptor, when it is the wanted socket. Raises _NotBorrowedError."""
    try:
        process = system_call(_PIDFD_OPEN, wanted.pid, 0)
        try:
            number = system_call(_PIDFD_GETFD, process, wanted.fd, 0)
        finally:
            os.close(process)
    except RefusedError as error:
        raise _NotBorrowedError(_meaning(error.number), str(error)) from error
    try:
        _recognise(number, wanted)
        # No time-out may ever be set on it: O_NONBLOCK is the application's too.
        borrowed = socket.socket(fileno=number)
    except BaseException:
        os.close(number)
        raise
    if wanted.cookie is not None and _cookie(borrowed) != wanted.cookie:
        borrowed.close()
        raise _NotBorrowedError(Answer.GONE, "the descriptor is another socket by now")
    return borrowed


def _meaning(number: int) -> Answer:
    if number in (errno.ESRCH, errno.EBADF):
        return Answer.GONE
    return Answer.NOT_OURS if number in (errno.EPERM, errno.EACCES) else Answer.REFUSED


def _recognise(number: int, wanted: Wanted) -> None:
    found = os.fstat(number)
    if not stat.S_ISSOCK(found.st_mode) or found.st_ino != wanted.inode:
        raise _NotBorrowedError(Answer.GONE, "the descriptor is another file by now")


def _cookie(borrowed: socket.socket) -> int:
    data = borrowed.getsockopt(socket.SOL_SOCKET, _SO_COOKIE, 8)
    (cookie,) = struct.unpack("=Q", data)
    return int(cookie)


def _ask(
    borrowed: socket.socket, limit_s: float, way: Way | None, step: Callable[[str], None]
) -> Outcome:
    if borrowed.proto != socket.IPPROTO_TCP:
        return Outcome(Answer.REFUSED, "it is no TCP socket")
    before = _read(borrowed)
    obstacle = _obstacle(borrowed, before)
    if obstacle is not None:
        return obstacle
    if way is not Way.KEEP_ALIVE and _send_window_probe(borrowed, only=way is not None):
        step("asked")
        return _await_answer(borrowed, before, limit_s)
    refusal = _keep_alive_refusal(borrowed, before)
    if refusal:
        return Outcome(Answer.REFUSED, refusal)
    # The guard's limit is for a process that was stopped; a slow one shall not reach it.
    with OptionGuard(borrowed, _KEEP_ALIVE, 2 * limit_s, step):
        outcome = _await_answer(borrowed, before, limit_s)
        step("answered")
    return outcome


def _obstacle(borrowed: socket.socket, now: _Reading) -> Outcome | None:
    """Why nothing needs to be asked, or can be; None if it can."""
    if borrowed.family not in (socket.AF_INET, socket.AF_INET6) or now.state != _ESTABLISHED:
        return Outcome(Answer.GONE, "the connection is no longer established")
    if now.bytes_received:
        return Outcome(Answer.SERVER_KNOWS, "the server has sent data")
    if now.unacknowledged:
        return Outcome(Answer.REFUSED, "the client has sent data: the kernel asks by itself")
    return None


def _send_window_probe(borrowed: socket.socket, *, only: bool) -> bool:
    """Whether a window probe was sent. Raises OSError instead of answering no if `only` is set."""
    if borrowed.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR) and not only:
        return False  # it would be lost
    try:
        borrowed.setsockopt(socket.IPPROTO_TCP, _TCP_REPAIR, _REPAIR_OFF)
    except OSError:
        if only:
            raise
        return False
    return True


def _keep_alive_refusal(borrowed: socket.socket, now: _Reading) -> str:
    """Why keep-alive could harm the application's connection (tcp_keepalive_timer); or empty."""
    timeout = borrowed.getsockopt(socket.IPPROTO_TCP, _TCP_USER_TIMEOUT)
    if timeout and now.probes:
        return "TCP_USER_TIMEOUT would end the connection: an earlier probe has no answer"
    if not borrowed.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE):
        return ""
    if now.probes:
        return "the application's own keep-alive is waiting for an answer"
    if timeout:
        return "the application has keep-alive with TCP_USER_TIMEOUT, which asks for itself"
    if borrowed.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT) < 2:
        return "the application's keep-alive ends the connection after one probe"
    return ""


def _read(borrowed: socket.socket) -> _Reading:
    data = borrowed.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
    now_ms = time.monotonic() * 1000
    data = data.ljust(_TCP_INFO_BYTES, b"\0")
    (unacknowledged,) = struct.unpack_from("=I", data, _UNACKED_AT)
    (since_ack_ms,) = struct.unpack_from("=I", data, _LAST_ACK_AT)
    (bytes_received,) = struct.unpack_from("=Q", data, _BYTES_RECEIVED_AT)
    (segments_in,) = struct.unpack_from("=I", data, _SEGS_IN_AT)
    return _Reading(
        data[_STATE_AT],
        data[_PROBES_AT],
        unacknowledged,
        now_ms - since_ack_ms,
        bytes_received,
        segments_in,
    )


def _await_answer(borrowed: socket.socket, before: _Reading, limit_s: float) -> Outcome:
    until = time.monotonic() + limit_s
    waiting = select.poll()
    waiting.register(borrowed, 0)  # errors and hang-ups alone
    while True:
        left_s = until - time.monotonic()
        outcome = _judged(before, _read(borrowed))
        if outcome is not None:
            return outcome
        if left_s <= 0:
            return Outcome(Answer.NO_ANSWER, f"no segment came within {limit_s:g} s")
        pause_s = min(_LOOK_AGAIN_S, left_s)
        if waiting.poll(math.ceil(pause_s * 1000)) and _judged(before, _read(borrowed)) is None:
            time.sleep(pause_s)  # an error queue stays ready


def _judged(before: _Reading, now: _Reading) -> Outcome | None:
    """What two readings prove; None if nothing.

    Both counts are needed: any segment counts as one that came in, but only an acceptable one has
    its ACK processed.
    """
    came_in = now.segments_in > before.segments_in
    if now.state == _CLOSE and came_in:
        return Outcome(Answer.SERVER_FORGOT, "an RST came")
    if now.state == _CLOSE:
        return Outcome(Answer.GONE, "the connection ended without a segment of the server")
    if came_in and now.last_ack_ms > before.last_ack_ms + _TICKS_MS:
        return Outcome(Answer.SERVER_KNOWS, "an ACK came")
    return None
