"""The values that travel one way through the tool, from the kernel's table to the output.

Times are CLOCK_MONOTONIC nanoseconds unless a name says otherwise, sequence numbers and ports
are in host order, addresses are 16 bytes as on the wire (IPv4 as ::ffff:a.b.c.d).
"""

from __future__ import annotations

import enum
import functools
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
        """4 or 6, by what was on the wire (IPv4 on an IPv6 listener is 4)."""
        return 4 if self.client_address.startswith(IPV4_MAPPED_PREFIX) else 6

    @property
    def server(self) -> tuple[bytes, int]:
        """Address and port that the client's packets are for."""
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
    """Kernel counters that moved while a segment was handled: enum counter_moved."""

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
    """By the server, as C has it (flow.bytes_missed): from ISN + 1 to what completed it."""
    mss: int
    ending: int
    drop_counters: int
    end_counters: int
    filter_device: int = 0
    """Index of the device that the last filtered ACK came by; 0 where it is not known."""
    socket: int = 0
    """Inode number of the listening socket that sent the last cookie, or, where no SYN was seen,
    dropped the ACK; 0 where it is not known."""


class ListenerId(NamedTuple):
    """What tells a listener from the others: struct listener_key of bpf/tcpstuck.h.

    Sockets may share an address and port (SO_REUSEPORT), and one that a proxy intercepts by has
    segments of any (TPROXY). Both are empty here, unless the socket is not known.
    """

    netns: int
    socket: int
    """Its inode number; 0 where it is not known."""
    server_address: bytes
    server_port: int


def listener_id(netns: int, socket: int, server_address: bytes, server_port: int) -> ListenerId:
    """The listener of a socket; where that is 0, of all sockets of an address and port."""
    return ListenerId(netns, socket, *((b"", 0) if socket else (server_address, server_port)))


def listener_of(who: FourTuple, entry: Handshake) -> ListenerId:
    """The listener that a handshake is at."""
    return listener_id(who.netns, entry.socket, *who.server)


class Event(NamedTuple):
    """Something worth telling about a handshake, with its entry right after the segment."""

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
    """What tells a handshake from an earlier or later one of the same 4-tuple."""

    four_tuple: FourTuple
    first_syn_ns: int


ATTEMPT_SENT = "sent"
ATTEMPT_NOT_SENT = "would send"


class Attempt(NamedTuple):
    """A SYN-ACK that was sent once more to a stuck client, or would have been."""

    handshake: HandshakeId
    time_ns: int
    number: int
    """Attempt number within this handshake, from 1."""
    outcome: str
    """ATTEMPT_SENT, ATTEMPT_NOT_SENT (of a dry run), or `failed: ` and why."""

    @property
    def sent(self) -> bool:
        """Whether a packet went out."""
        return self.outcome == ATTEMPT_SENT


class Rescue(NamedTuple):
    """What the rescuer did at one moment, and whom it leaves alone; figures are running totals."""

    attempts: tuple[Attempt, ...]
    unanswered: tuple[HandshakeId, ...]
    """Handshakes none of whose attempts drew an answer, each named once."""
    left_alone: Mapping[str, int]
    """Stuck clients by the reason they are not to be rescued for."""


Conditions = tuple[tuple[str, str], ...]
"""Some of a rule's matches, all of which have to hold: protocol, sport, saddr, iifname ... and the
value."""


class DropRule(NamedTuple):
    """A firewall rule, a chain's policy, or other code at a hook, that can drop what comes by."""

    family: str
    """nftables' name: ip, ip6, inet, netdev ...; ip or ip6 for iptables."""
    table: str
    """For a function, the module it is in; empty if that is the kernel itself."""
    chain: str
    """For a function, its name."""
    hook: str
    """The hook of a chain that is called by one; empty where only jumps lead to the chain."""
    kind: str
    """What its number is: `handle` (nftables), `number` (iptables, from 1), `policy`, `function`
    (another hook's), or `program` (a BPF program's)."""
    number: int
    conditions: Conditions
    may_reset: bool = False
    """Whether it may answer by RST as well (reject with tcp reset)."""
    queues: bool = False
    """Whether it may hand the packet to a queue that a program reads (NFQUEUE)."""


class Jump(NamedTuple):
    """A rule that leads from a chain to another one, where there are rules that can drop."""

    family: str
    table: str
    chain: str
    hook: str
    """As of a rule of that chain."""
    target: str
    conditions: Conditions


class Ruleset(NamedTuple):
    """What can drop in a network namespace, as it was when it was read."""

    rules: tuple[DropRule, ...]
    problems: tuple[str, ...]
    """Complete sentences: what could not be read."""
    read_ns: int = 0
    """When the reading began."""
    jumps: tuple[Jump, ...] = ()
    packets: tuple[int | None, ...] = ()
    """What each rule has counted, in the order of the rules, None where it does not count. Packets
    it does not drop may be among them, but every one that it drops is."""
    elsewhere: tuple[str, ...] = ()
    """As `problems`: what could not be read of anything but nftables."""
    devices: tuple[tuple[int, str], ...] | None = None
    """Index and name of the network devices there; None where they are not known."""
    counted_ns: int = 0
    """When the last of them was read, `packets` with it; 0 where that is not known."""
    namespace: int = 0
    """The namespace's cookie (SO_NETNS_COOKIE, from 5.14 on); 0 where it is not known. An inode
    number may be used again, by a namespace with the same rules and counters of its own."""

    @property
    def contents(self) -> tuple[object, ...]:
        """What two readings have in common between which nothing was changed."""
        return (
            self.rules,
            self.jumps,
            self.problems,
            self.elsewhere,
            self.devices,
            self.namespace,
        )

    def shares_rules_with(self, other: Ruleset) -> bool:
        """Whether it has the very rules of another one, as readings that are alike are kept."""
        return self.rules is other.rules and self.jumps is other.jumps

    @property
    def size(self) -> int:
        """How many rules are kept for it."""
        return len(self.rules) + len(self.jumps)


KEPT_READINGS = 16
"""Of a namespace's rules, the latest. Of those in a row that are alike the first and the last are
kept, so that these are at least half as many changes."""
KEPT_RULES = 50_000
"""Of all namespaces and readings together: some 25 MB. Whoever may make rules in a namespace of
their own is not to fill this process's memory."""
LET_GO = "the rules were read, and let go again: too many are kept"


def _with_reading(known: tuple[Ruleset, ...], reading: Ruleset) -> tuple[Ruleset, ...]:
    """Readings of one namespace and a further one."""
    alike = [kept for kept in known[-2:] if kept.contents == reading.contents]
    if alike:
        # One copy of the rules is enough.
        reading = alike[-1]._replace(
            read_ns=reading.read_ns, packets=reading.packets, counted_ns=reading.counted_ns
        )
    kept = known[:-1] if len(alike) == 2 else known
    return (*kept, reading)[-KEPT_READINGS:]


def _size(readings: tuple[Ruleset, ...]) -> int:
    return sum({id(reading.rules): reading.size for reading in readings}.values())


def _within_bounds(rulesets: dict[int, tuple[Ruleset, ...]]) -> dict[int, tuple[Ruleset, ...]]:
    """The same; where they are too many, the namespaces that have most lose their oldest rules.

    That there was a reading is kept, so that no later one is taken for the first after a drop.
    """
    sizes = {netns: _size(readings) for netns, readings in rulesets.items()}
    while sum(sizes.values()) > KEPT_RULES:
        largest = max(sizes, key=sizes.__getitem__)
        readings = list(rulesets[largest])
        oldest = next(place for place, reading in enumerate(readings) if reading.size)
        readings[oldest] = Ruleset((), (LET_GO,), readings[oldest].read_ns)
        rulesets[largest] = tuple(readings)
        sizes[largest] = _size(rulesets[largest])
    return rulesets


class KernelNames(NamedTuple):
    """What numbers of the traced kernel mean, as far as they came to be asked for."""

    places: Mapping[int, str]
    """`symbol+0x1f` by kernel address."""
    reasons: Mapping[int, str | None]
    """enum skb_drop_reason by number, without prefix; None where the kernel has no reasons."""
    stacks: Mapping[int, tuple[str, ...]]
    """Functions by a stack's number, the one that dropped first and then its callers."""
    rulesets: Mapping[int, tuple[Ruleset, ...]]
    """By network namespace (inode number), oldest first; the latest KEPT_READINGS."""

    def with_more(self, others: KernelNames) -> KernelNames:
        """These names and others."""
        return KernelNames(
            {**self.places, **others.places},
            {**self.reasons, **others.reasons},
            {**self.stacks, **others.stacks},
            _within_bounds(
                {
                    **self.rulesets,
                    **{
                        netns: functools.reduce(
                            _with_reading, readings, self.rulesets.get(netns, ())
                        )
                        for netns, readings in others.rulesets.items()
                    },
                }
            ),
        )


class KernelWarning(NamedTuple):
    """A line of the kernel's log that says that a listener answers by cookies."""

    time_ns: int
    port: int
    address: bytes | None
    """Where the listener is bound to (16 bytes); None where the kernel does not say."""
    text: str


class Row(NamedTuple):
    """One entry of the awaiting-ACK table as a sweep saw it."""

    four_tuple: FourTuple
    handshake: Handshake


class SweepPart(enum.IntEnum):
    """What a batch of rows is a part of."""

    MORE = 0
    """A whole sweep of the table, of which more is to come."""
    LAST = 1
    """A whole sweep, which ends with it."""
    CHOSEN = 2
    """Rows that were asked for by their keys: nothing is known of any other."""


class Sweep(NamedTuple):
    """A batch of rows of the awaiting-ACK table, as of `time_ns`.

    Every row of a sweep carries the time the sweep *began*: a handshake cannot look older than
    the kernel's view of it.
    """

    time_ns: int
    rows: tuple[Row, ...]
    part: SweepPart = SweepPart.LAST


class NetnsCount(enum.IntEnum):
    """enum netns_count of bpf/tcpstuck.h: what is counted per network namespace."""

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
    """How the queues of one listening socket fared: struct listener_facts, in its order.

    Queue lengths are entries. `peak_...` are each on its own, `..._need_...` belong together: what
    was there when their sum was highest.
    """

    netns: int
    """Inode number of the network namespace."""
    server_address: bytes
    """What its first segment was for; a socket of any address has others."""
    server_port: int
    """The socket's own, where that is known."""
    syns: int
    cookies_sent: int
    syns_refused: int
    """Dropped for a full accept queue, repetitions included."""
    acks_refused: int
    """Of cookies and of ordinary handshakes, repetitions included."""
    syn_need_ns: int
    limit: int
    """sk_max_ack_backlog, which is what listen() was given or net.core.somaxconn if less."""
    peak_accept_queue: int
    peak_syn_queue: int
    lowest_cookie_syn_queue: int
    owed: int
    turned_away: int
    syn_need_syn_queue: int
    syn_need_owed: int
    """Handshakes under cookies that no ACK had come for."""
    accept_need_accept_queue: int
    accept_need_turned_away: int
    """Clients whose ACK had been dropped since the accept queue was last seen empty."""
    accept_need_syn_queue: int
    socket: int = 0
    """Its inode number; 0 where it is not known: then all sockets of that address and port."""

    @property
    def listener(self) -> ListenerId:
        """Whose they are."""
        return listener_id(self.netns, self.socket, self.server_address, self.server_port)

    @property
    def suffered(self) -> bool:
        """Whether a queue was too short for anyone, or cookies were sent."""
        return bool(self.cookies_sent or self.syns_refused or self.acks_refused)


class ListenerSeen(NamedTuple):
    """A listener's facts, and what user space knows of it."""

    facts: ListenerFacts
    owners: tuple[str, ...]
    """`name (pid N)` of each process that has the listening socket open; empty if unknown."""
    sockets: tuple[int, ...]
    """Inode numbers of the listening sockets that share its address and port, itself among them;
    empty if unknown."""
    settings: Mapping[str, int]
    """Of the namespace: netns.QUEUE_SETTINGS, as far as they could be read."""
    bound: bytes | None = None
    """Address that the socket listens at, any address as zeros; None if unknown."""


GONE_NETNS, CROWDED_NETNS = 0, 1
"""In place of an inode number, which none of a network namespace is (PROC_DYNAMIC_FIRST in
fs/proc/generic.c): all namespaces that are gone, and all that there was no place for."""
NETNS_COOKIE = "net_cookie"
"""Beside a namespace's counters: its cookie (SO_NETNS_COOKIE, from 5.14 on), which tells it from
another one of the same inode number; missing, or 0, where it is not known."""

NOT_KNOWN: Mapping[int, int] = {}
"""The cookies of network namespaces where nobody has asked for them."""

NetnsCounts = Mapping[int, Mapping[NetnsCount, int]]
"""What the programs counted, by network namespace (inode number)."""

KernelCounters = Mapping[int, Mapping[str, int]]
"""TcpExt counters of the kernel (SyncookiesSent ...), by network namespace (inode number), with
NETNS_COOKIE."""


def living_of(counters: KernelCounters) -> dict[int, int]:
    """The cookies of the namespaces that these counters were read in, by inode number."""
    cookies = {netns: values.get(NETNS_COOKIE, 0) for netns, values in counters.items()}
    return {netns: cookie for netns, cookie in cookies.items() if cookie}


class Tally(NamedTuple):
    """Both sides' counters at one moment, the referee's raw material.

    The kernel's counters are read before and after ours: what happened between the two reads
    may or may not be in ours, and that is the only uncertainty of the comparison.
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
"""Of a gap that is no probe's: keeps the packets of one CPU apart (`softirqs.softirq_gaps`)."""


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
    """What the user asked for, as far as the kernel side has to know it."""

    trace_filter: TraceFilter = field(default_factory=TraceFilter)
    timeout_ns: int = 3_000_000_000
    tell_healthy: bool = False
    probe_mode: str = "auto"
    max_handshakes: int = 131_072


SECOND_NS = 1_000_000_000
