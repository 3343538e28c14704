"""What the kernel says of a client's socket, and who owns it. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from tcpstuck_bpf.model import FourTuple


class ClientSocket(NamedTuple):
    """One ESTABLISHED TCP socket, as sock_diag describes it (struct inet_diag_msg, tcp_info)."""

    four_tuple: FourTuple
    """This end is the client: the server's port is one of those asked for."""
    cookie: int
    """The kernel gives no other socket this number until it reboots (sock_gen_cookie)."""
    inode: int
    """What /proc/PID/fd shows as socket:[N]; 0: no process has it open."""
    uid: int
    age_ns: int
    """Time since the connection was established, or since data came last.

    It is tcpi_last_data_recv. tcp_finish_connect sets icsk_ack.lrcvtime, and after that only
    tcp_event_data_recv does, so on a connection that received nothing it is the connection's age.
    tcpi_last_ack_recv is not: the answer to a keep-alive probe sets it. The kernel counts it in
    milliseconds of 32 bits, so it starts again from 0 after 49.7 days, and stands still in a
    suspend.
    """
    last_ack_ns: int
    """Time since the kernel took an ACK of the server last (tcp_ack sets rcv_tstamp)."""
    bytes_acked: int
    """1 for the SYN, and what the server has acknowledged since."""
    bytes_received: int
    segs_in: int
    data_segs_out: int
    unsent: int
    """Bytes that the application wrote and the server has not acknowledged."""
    unread: int
    """Bytes that came and the application has not read."""
    keepalive_ns: int | None
    """Time until the kernel's next keep-alive probe; None if keep-alive is off."""
    is_subflow: bool = False
    """Whether it is one of the subflows of an MPTCP connection, of which it may be an idle one."""
    interface: int = 0
    """Index of the network device that it is bound to; 0 if it is bound to none."""

    @property
    def key(self) -> tuple[int, int]:
        """Identifies the socket for as long as the machine runs."""
        return (self.four_tuple.netns, self.cookie)

    @property
    def accepted(self) -> bool:
        """Whether this is a server's end, and no client's.

        The ACK of its SYN is in a client's bytes_acked (tcp_snd_una_update); the socket that
        accept() returns begins with 0. So does one that was restored with TCP_REPAIR.
        """
        return self.bytes_acked == 0 and self.data_segs_out == 0

    @property
    def spoke(self) -> bool:
        """Whether the client has sent data, or written data that is still to be sent.

        bytes_acked above 1 is data in the SYN (TCP Fast Open).
        """
        return self.data_segs_out > 0 or self.bytes_acked > 1 or self.unsent > 0

    @property
    def heard(self) -> bool:
        """Whether the server's data has come."""
        return self.bytes_received > 0 or self.unread > 0

    @property
    def waits(self) -> bool:
        """Whether not a byte has gone either way."""
        return not (self.spoke or self.heard or self.accepted)


class Owner(NamedTuple):
    """A process that has a socket open. The name and the container's are foreign text."""

    name: str
    pid: int
    fd: int
    """The lowest descriptor of the socket in that process."""
    container: str
    """Container or pod; empty if there is none, or none can be found."""


class Owners(NamedTuple):
    """All that could be found out about the owners of one socket."""

    processes: tuple[Owner, ...]
    more: int
    """Number of further processes that have it open."""
    hidden: bool
    """Whether processes exist whose files this user may not list."""
    sought: bool = True
    """Whether anybody looked for them."""


NOBODY = Owners((), 0, False)
NOT_SOUGHT = Owners((), 0, False, sought=False)


class Poll(NamedTuple):
    """One reading of the sockets. Times are CLOCK_MONOTONIC nanoseconds."""

    time_ns: int
    sockets: tuple[ClientSocket, ...]
    """Those that wait, and those that were asked for; not every healthy one."""
    established: int
    """Number of all connections to the wanted ports, healthy ones included."""
    namespaces: frozenset[int]
    """The network namespaces that were read completely."""
    gone: frozenset[int] = frozenset()
    """Network namespaces to which nothing leads any more."""
    unreadable: int = 0
    """Number of sockets whose tcp_info lacks a fact that is needed."""
    accepted: int = 0
    """Number of sockets left out because they are a server's end that is still silent."""
    subflows: int = 0
    """Number of silent MPTCP subflows, left out: another one may carry the data."""
    failures: Mapping[int, str] = MappingProxyType({})
    """Why a network namespace could not be read, by its inode number."""
