"""The values that pass one way through the tool, from the kernel's table to the output.

Times are CLOCK_MONOTONIC nanoseconds unless a name says otherwise. Sequence numbers and ports are
in host order. Addresses are 16 bytes as on the wire (IPv4 as ::ffff:a.b.c.d).
"""

from __future__ import annotations

import enum
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

IPV4_MAPPED_PREFIX = bytes(10) + b"\xff\xff"


class FourTuple(NamedTuple):
    """One client's connection to one server address, within one network namespace."""

    client_address: bytes
    server_address: bytes
    client_port: int
    server_port: int
    netns: int
    """Inode number of the network namespace."""

    @property
    def family(self) -> int:
        """4 or 6, by the packet (IPv4 on an IPv6 listener is 4)."""
        return 4 if self.client_address.startswith(IPV4_MAPPED_PREFIX) else 6

    @property
    def server(self) -> tuple[bytes, int]:
        """Destination address and port of the client's packets."""
        return (self.server_address, self.server_port)

    @property
    def client_ip(self) -> str:
        """The client's address in text, IPv4 in dotted form."""
        return address_text(self.client_address)

    @property
    def server_ip(self) -> str:
        """The server's address in text, IPv4 in dotted form."""
        return address_text(self.server_address)


def address_text(address: bytes) -> str:
    """Text of a 16-byte address, IPv4-mapped ones in dotted form."""
    if address.startswith(IPV4_MAPPED_PREFIX):
        return str(ipaddress.IPv4Address(address[12:]))
    return str(ipaddress.IPv6Address(address))


def address_bytes(text: str) -> bytes:
    """The 16 bytes of an IPv4 or IPv6 address in text.

    Raises ValueError where the text is neither.
    """
    address = ipaddress.ip_address(text)
    if isinstance(address, ipaddress.IPv4Address):
        return IPV4_MAPPED_PREFIX + address.packed
    return address.packed


class Ending(enum.IntEnum):
    """enum handshake_ending of bpf/tcpstuck.h."""

    NONE = 0
    COMPLETED = 1
    REJECTED = 2
    RESET = 3
    TAKEN_OVER = 4
    REPLACED = 5
    NO_LISTENER = 6


class Moved(enum.IntFlag):
    """Kernel counters that moved while the kernel handled a segment: enum counter_moved."""

    NOTHING = 0
    SYNCOOKIES_RECV = 1 << 0
    SYNCOOKIES_FAILED = 1 << 1
    LISTEN_OVERFLOWS = 1 << 2
    LISTEN_DROPS = 1 << 3
    UNKNOWN = 1 << 7


class EventKind(enum.IntEnum):
    """enum event_kind of bpf/tcpstuck.h."""

    SYN_REPEATED = 1
    SYN_DROPPED = 2
    ACK_DROPPED = 3
    ACK_REJECTED = 4
    RESET = 5
    COMPLETED = 6
    TAKEN_OVER = 7
    REPLACED = 8
    ACK_FILTERED = 9
    NO_LISTENER = 10


class Handshake(NamedTuple):
    """An entry of the awaiting-ACK table: struct handshake of bpf/tcpstuck.h, in its order."""

    first_syn_ns: int
    last_syn_ns: int
    first_ack_dropped_ns: int
    last_ack_dropped_ns: int
    first_ack_filtered_ns: int
    last_ack_filtered_ns: int
    filter_place: int
    drop_place: int
    ended_ns: int
    client_isn: int
    cookie_isn: int
    syn_count: int
    syns_dropped: int
    acks_dropped: int
    acks_filtered: int
    filter_reason: int
    drop_reason: int
    filter_stack: int
    accept_queue: int
    accept_queue_limit: int
    syn_queue: int
    bytes_missed: int
    """Sequence number of the completing segment minus ISN + 1, unsigned (entry.bytes_missed)."""
    mss: int
    ending: int
    drop_counters: int
    end_counters: int
    filter_device: int = 0
    """Index of the device by which the last filtered ACK came; 0 if unknown."""
    socket: int = 0
    """Inode number of the listening socket that sent the last cookie or, if no SYN was seen,
    dropped the ACK; 0 if unknown."""


class ListenerId(NamedTuple):
    """The identity of a listener: struct listener_key of bpf/tcpstuck.h.

    Sockets may share an address and port (SO_REUSEPORT), and a proxy's socket may get segments for
    any (TPROXY). So address and port are empty here, unless the socket is unknown.
    """

    netns: int
    socket: int
    """Inode number of the listening socket; 0 if unknown."""
    server_address: bytes
    server_port: int


def listener_id(netns: int, socket: int, server_address: bytes, server_port: int) -> ListenerId:
    """The listener with this socket; if it is 0, all sockets of the address and port together."""
    return ListenerId(netns, socket, *((b"", 0) if socket else (server_address, server_port)))


def listener_of(who: FourTuple, entry: Handshake) -> ListenerId:
    """The listener of a handshake."""
    return listener_id(who.netns, entry.socket, *who.server)


class Event(NamedTuple):
    """An event of a handshake, with the table entry right after the segment."""

    four_tuple: FourTuple
    handshake: Handshake
    time_ns: int
    sequence: int
    acknowledgement: int
    accept_queue: int
    accept_queue_limit: int
    payload_length: int
    tcp_flags: int
    counters: int
    kind: int


class HandshakeId(NamedTuple):
    """The identity of a handshake, which distinguishes it from others of the same 4-tuple."""

    four_tuple: FourTuple
    first_syn_ns: int


ATTEMPT_SENT = "sent"
ATTEMPT_NOT_SENT = "would send"


class Attempt(NamedTuple):
    """A SYN-ACK repeated to a stuck client, or one that a dry run would repeat."""

    handshake: HandshakeId
    time_ns: int
    number: int
    """Attempt number within this handshake, from 1."""
    outcome: str
    """ATTEMPT_SENT, ATTEMPT_NOT_SENT (dry run), or `failed: ` and why."""

    @property
    def sent(self) -> bool:
        """Whether a packet went out."""
        return self.outcome == ATTEMPT_SENT


class Rescue(NamedTuple):
    """The rescuer's attempts at one moment, and running totals of the clients it leaves alone."""

    attempts: tuple[Attempt, ...]
    unanswered: tuple[HandshakeId, ...]
    """Handshakes whose attempts all drew no answer, each reported only once."""
    left_alone: Mapping[str, int]
    """Number of stuck clients left alone, by reason."""


class KernelWarning(NamedTuple):
    """A line of the kernel's log which says that a listener answers with cookies."""

    time_ns: int
    port: int
    address: bytes | None
    """Address of the listener (16 bytes); None if the kernel does not say."""
    text: str


class Row(NamedTuple):
    """One entry of the awaiting-ACK table, as a sweep read it."""

    four_tuple: FourTuple
    handshake: Handshake


class SweepPart(enum.IntEnum):
    """The kind of a batch of rows."""

    MORE = 0
    """Part of a whole sweep; more batches follow."""
    LAST = 1
    """Last part of a whole sweep."""
    CHOSEN = 2
    """Rows read by their keys; they say nothing about other entries."""


class Sweep(NamedTuple):
    """A batch of rows of the awaiting-ACK table, as of `time_ns`.

    `time_ns` is the time at which the sweep *began*, so that no entry looks older than it is.
    """

    time_ns: int
    rows: tuple[Row, ...]
    part: SweepPart = SweepPart.LAST


class NetnsCount(enum.IntEnum):
    """enum netns_count of bpf/tcpstuck.h: the programs' counts per network namespace."""

    COOKIES_SENT = 0
    COOKIES_SENT_OUTSIDE = 1
    COOKIES_RECEIVED = 2
    COOKIES_RECEIVED_OUTSIDE = 3
    COOKIES_FAILED = 4
    COOKIES_FAILED_OUTSIDE = 5
    LISTEN_OVERFLOWS = 6
    LISTEN_OVERFLOWS_OUTSIDE = 7
    COMPLETED = 8
    COMPLETED_UNTRACKED = 9
    ESTABLISHED = 10
    STILLBORN = 11
    ACKS_DROPPED = 12
    ACKS_DROPPED_UNTRACKED = 13
    ACKS_REJECTED = 14
    ACKS_REJECTED_UNTRACKED = 15
    RESETS = 16
    RESETS_UNTRACKED = 17
    SYNS_REPEATED = 18
    SYNS_DROPPED = 19
    TAKEN_OVER = 20
    REPLACED = 21
    TABLE_FULL = 22
    TABLE_BUSY = 23
    ACKS_FILTERED = 24
    EVENTS_LOST = 25
    NO_LISTENER = 26


class ListenerFacts(NamedTuple):
    """Queue figures of one listening socket: struct listener_facts, in its order.

    Queue lengths are in entries. Each `peak_...` is an independent maximum. The `..._need_...`
    figures of one queue belong together: they are from the moment at which their sum was highest.
    """

    netns: int
    """Inode number of the network namespace."""
    server_address: bytes
    """Destination of the first segment; a wildcard socket has other destinations too."""
    server_port: int
    """The socket's own port, if known."""
    syns: int
    cookies_sent: int
    syns_refused: int
    """SYNs dropped for a full accept queue, repetitions included."""
    acks_refused: int
    """ACKs of cookies and of ordinary handshakes dropped for a full accept queue, repetitions
    included."""
    syn_need_ns: int
    limit: int
    """sk_max_ack_backlog: the smaller of listen()'s backlog and net.core.somaxconn."""
    peak_accept_queue: int
    peak_syn_queue: int
    lowest_cookie_syn_queue: int
    owed: int
    turned_away: int
    syn_need_syn_queue: int
    syn_need_owed: int
    """Cookie handshakes still without an ACK."""
    accept_need_accept_queue: int
    accept_need_turned_away: int
    """Clients whose ACK had been dropped since the accept queue was last seen empty."""
    accept_need_syn_queue: int
    socket: int = 0
    """Inode number of the socket; 0 if unknown, for all sockets of the address and port."""

    @property
    def listener(self) -> ListenerId:
        """The listener of these figures."""
        return listener_id(self.netns, self.socket, self.server_address, self.server_port)

    @property
    def suffered(self) -> bool:
        """Whether a queue was too short for some client, or cookies were sent."""
        return bool(self.cookies_sent or self.syns_refused or self.acks_refused)


class ListenerSeen(NamedTuple):
    """A listener's facts, and what user space knows about it."""

    facts: ListenerFacts
    owners: tuple[str, ...]
    """`name (pid N)` of each process that has the listening socket open; empty if unknown."""
    sockets: tuple[int, ...]
    """Inode numbers of the listening sockets that share the address and port, this one included;
    empty if unknown."""
    settings: Mapping[str, int]
    """The namespace's netns_counters.QUEUE_SETTINGS, as far as they could be read."""
    bound: bytes | None = None
    """Address at which the socket listens, zeros for a wildcard; None if unknown."""


GONE_NETNS, CROWDED_NETNS = 0, 1
"""Stand in place of an inode number for all removed namespaces, and for all without an entry in the
table. No network namespace has these numbers (PROC_DYNAMIC_FIRST in fs/proc/generic.c)."""
NETNS_COOKIE = "net_cookie"
"""Key of a namespace's cookie (SO_NETNS_COOKIE, from 5.14 on) among its counters. The cookie
distinguishes namespaces with the same inode number; it is missing or 0 if unknown."""

NOT_KNOWN: Mapping[int, int] = {}
"""No cookies of network namespaces, because nobody has read them."""

NetnsCounts = Mapping[int, Mapping[NetnsCount, int]]
"""The programs' counts, by network namespace (inode number)."""

KernelCounters = Mapping[int, Mapping[str, int]]
"""TcpExt counters of the kernel (SyncookiesSent ...), by network namespace (inode number), with
NETNS_COOKIE."""


def living_of(counters: KernelCounters) -> dict[int, int]:
    """The cookies among these counters, by inode number."""
    cookies = {netns: values.get(NETNS_COOKIE, 0) for netns, values in counters.items()}
    return {netns: cookie for netns, cookie in cookies.items() if cookie}


class Tally(NamedTuple):
    """The kernel's and the programs' counters at one moment, the referee's input.

    The kernel's counters are read before and after ours. What happened between the two reads may
    or may not be in ours; that is the only uncertainty of the comparison. What was being processed
    at the first read is in ours (`Source.settle`).
    """

    time_ns: int
    kernel_before: KernelCounters
    traced: NetnsCounts
    kernel_after: KernelCounters


@dataclass(frozen=True)
class CoverageGap:
    """A probe that is not attached, and what cannot be known without it."""

    probe: str
    why: str
    lost: str


SOFTIRQ_LOCK = "softirq lock"
"""Name of a gap that is not a probe: the lock that keeps packets of one CPU apart
(`softirqs.softirq_gaps`)."""


@dataclass(frozen=True)
class Coverage:
    """Which facts can be known: the probes that attached, and the gaps."""

    mode: str
    probes: frozenset[str] = frozenset()
    gaps: tuple[CoverageGap, ...] = ()


@dataclass(frozen=True)
class TraceFilter:
    """Which handshakes to trace; empty or None means every one."""

    ports: tuple[int, ...] = ()
    family: int | None = None
    listener_address: bytes | None = None
    netns: int | None = None


@dataclass(frozen=True)
class TraceSettings:
    """The user's settings that the kernel side needs."""

    trace_filter: TraceFilter = field(default_factory=TraceFilter)
    timeout_ns: int = 3_000_000_000
    tell_healthy: bool = False
    probe_mode: str = "auto"
    max_handshakes: int = 131_072


SECOND_NS = 1_000_000_000
