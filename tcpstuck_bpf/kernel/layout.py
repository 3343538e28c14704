"""Finds the offsets of the struct members that the programs read.

The result is `kernel_layout.h`, a generated header that declares the structs with only those
members, each at its true offset. So the C reads like kernel code without kernel headers. The
members found decide what is compiled; the kernel's version does not matter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from tcpstuck_bpf.errors import CannotTraceError
from tcpstuck_bpf.typeinfo.graph import POINTER_BYTES, KernelTypes, MemberPlace


class Member(NamedTuple):
    """A member: its name and type in our C, and its path in the kernel's struct."""

    struct: str
    name: str
    c_type: str
    kernel_struct: str
    path: str

    @property
    def size(self) -> int:
        """Bytes of the member, as the programs read it."""
        return POINTER_BYTES if self.c_type.endswith("*") else C_TYPES[self.c_type]


C_TYPES = {"u8": 1, "u16": 2, "u32": 4, "u64": 8}

REQUIRED_MEMBERS = (
    Member("net", "inum", "u32", "net", "ns.inum"),
    Member("sock", "skc_net", "struct net *", "sock", "__sk_common.skc_net.net"),
    Member("sock", "skc_state", "u8", "sock", "__sk_common.skc_state"),
    Member("sock", "sk_ack_backlog", "u32", "sock", "sk_ack_backlog"),
    Member("sock", "sk_max_ack_backlog", "u32", "sock", "sk_max_ack_backlog"),
    Member(
        "sock",
        "icsk_accept_queue_qlen",
        "u32",
        "inet_connection_sock",
        "icsk_accept_queue.qlen",
    ),
    Member("sk_buff", "head", "u8 *", "sk_buff", "head"),
    Member("sk_buff", "len", "u32", "sk_buff", "len"),
    Member("sk_buff", "protocol", "u16", "sk_buff", "protocol"),
    Member("sk_buff", "network_header", "u16", "sk_buff", "network_header"),
    Member("sk_buff", "transport_header", "u16", "sk_buff", "transport_header"),
)
SOCKET_MEMBERS = (
    Member("sock", "skc_num", "u16", "sock", "__sk_common.skc_num"),
    Member("sock", "sk_socket", "struct socket *", "sock", "sk_socket"),
    Member("socket_alloc", "i_ino", "u64", "socket_alloc", "vfs_inode.i_ino"),
)
"""Members that identify a listening socket. Without them, sockets of one port share their figures.

The inode number is SOCK_INODE's (include/net/sock.h), as in /proc/net/tcp and sock_diag. The socket
cookie is no alternative: the kernel creates it only on request (__sock_gen_cookie).
"""
COUNTER_MEMBER = Member("net", "net_statistics", "void *", "net", "mib.net_statistics")

COOKIE_MEMBER = Member("net", "net_cookie", "u64", "net", "net_cookie")
"""The namespace's cookie (SO_NETNS_COOKIE), which is never used again."""

PACKET_SPAN = "packet_span"
"""C struct for one read of struct sk_buff, with all members that are needed first."""
SPAN_MEMBERS = (
    Member(PACKET_SPAN, "protocol", "u16", "sk_buff", "protocol"),
    Member(PACKET_SPAN, "network_header", "u16", "sk_buff", "network_header"),
    Member(PACKET_SPAN, "tail", "u32", "sk_buff", "tail"),
    Member(PACKET_SPAN, "head", "u8 *", "sk_buff", "head"),
    Member(PACKET_SPAN, "data", "u8 *", "sk_buff", "data"),
)
DROP_MEMBERS = (
    *SPAN_MEMBERS,
    Member("sk_buff", "dev", "struct net_device *", "sk_buff", "dev"),
    Member("sk_buff", "skb_refdst", "u64", "sk_buff", "_skb_refdst"),
    Member("dst_entry", "dev", "struct net_device *", "dst_entry", "dev"),
    Member("net_device", "ifindex", "u32", "net_device", "ifindex"),
    Member("net_device", "nd_net", "struct net *", "net_device", "nd_net.net"),
)
"""Members needed for drops before TCP; without them only those drops are not seen."""
LONGEST_SPAN = 64
"""Largest span in bytes; a longer one leaves too little room on a program's stack."""

COUNTERS = ("SYNCOOKIESRECV", "SYNCOOKIESFAILED", "LISTENOVERFLOWS", "LISTENDROPS")
"""Names in enum LINUX_MIB_*. The programs read the first two in one access, and the last two."""
PER_CPU_OFFSET_SYMBOL = "__per_cpu_offset"


@dataclass(frozen=True)
class Layout:
    """Offsets in bytes, counter indices, and the address of the per-CPU offset table."""

    offsets: Mapping[Member, int]
    counters: Mapping[str, int]
    per_cpu_offset_table: int | None
    drop_obstacle: str | None = None
    """Why dropped packets cannot be read; None if they can."""

    @property
    def span(self) -> tuple[int, int]:
        """Offset of struct packet_span in struct sk_buff, a multiple of 8, and its bytes."""
        places = {member: self.offsets[member] for member in SPAN_MEMBERS if member in self.offsets}
        begin = min(places.values(), default=0) // POINTER_BYTES * POINTER_BYTES
        end = max((offset + member.size for member, offset in places.items()), default=0)
        return begin, -(-(end - begin) // POINTER_BYTES) * POINTER_BYTES

    @property
    def has_sockets(self) -> bool:
        """Whether the programs can distinguish listening sockets of one port."""
        return SOCKET_MEMBERS[0] in self.offsets

    @property
    def has_counters(self) -> bool:
        """Whether the programs can read the kernel's SNMP counters of this CPU."""
        return COUNTER_MEMBER in self.offsets and self.per_cpu_offset_table is not None


def obstacle(member: Member, place: MemberPlace | None) -> str | None:
    """Why the programs cannot read a member; None if they can.

    Another offset is no obstacle. A bit-field has no address, and a member of another size would be
    misread.
    """
    if place is None:
        return f"struct {member.kernel_struct} has no member {member.path}"
    if place.bits:
        return f"struct {member.kernel_struct}'s member {member.path} is a bit-field"
    if place.size != member.size:
        return (
            f"struct {member.kernel_struct}'s member {member.path} has {place.size} bytes, "
            f"not {member.size}"
        )
    return None


def cookie_obstacle(types: KernelTypes) -> str | None:
    """Why a namespace's cookie cannot be read; None if it can.

    Before 5.12 the cookie is an atomic64_t that stays 0 until somebody asks for it
    (commit 3d368ab87cf6, "net: initialize net->net_cookie at netns setup").
    """
    if types.place(COOKIE_MEMBER.kernel_struct, f"{COOKIE_MEMBER.path}.counter") is not None:
        return "struct net's member net_cookie is set only on request"
    return obstacle(COOKIE_MEMBER, types.place(COOKIE_MEMBER.kernel_struct, COOKIE_MEMBER.path))


def find_layout(types: KernelTypes, per_cpu_offset_table: int | None) -> Layout:
    """Look every member up.

    `per_cpu_offset_table` is the address of the kernel's __per_cpu_offset; None if unknown. Raises
    CannotTraceError where a required member is missing.
    """
    offsets: dict[Member, int] = {}
    for member in REQUIRED_MEMBERS:
        place = types.place(member.kernel_struct, member.path)
        why = obstacle(member, place)
        if why is not None or place is None:
            raise CannotTraceError(
                f"the programs cannot read this kernel's structs: {why}",
                "its types differ from those of every kernel that this version supports",
                "report it, with the kernel's version; a newer tcpstuck-trace may know it",
            )
        offsets[member] = place.offset
    cookie = types.place(COOKIE_MEMBER.kernel_struct, COOKIE_MEMBER.path)
    if cookie is not None and cookie_obstacle(types) is None:
        offsets[COOKIE_MEMBER] = cookie.offset
    drop_obstacle = find_drop_members(types, offsets)
    find_socket_members(types, offsets)
    enumerators = types.enumerators("LINUX_MIB_")
    counters = {
        name: enumerators[f"LINUX_MIB_{name}"]
        for name in COUNTERS
        if f"LINUX_MIB_{name}" in enumerators
    }
    statistics = types.place(COUNTER_MEMBER.kernel_struct, COUNTER_MEMBER.path)
    if (
        statistics is None
        or obstacle(COUNTER_MEMBER, statistics) is not None
        or not _readable_in_pairs(counters)
    ):
        return Layout(offsets, {}, None, drop_obstacle)
    offsets[COUNTER_MEMBER] = statistics.offset
    return Layout(offsets, counters, per_cpu_offset_table, drop_obstacle)


def find_socket_members(types: KernelTypes, offsets: dict[Member, int]) -> None:
    """Add the offsets of SOCKET_MEMBERS, all or none.

    The programs need struct socket at the start of struct socket_alloc.
    """
    places = {m: types.place(m.kernel_struct, m.path) for m in SOCKET_MEMBERS}
    first = types.place("socket_alloc", "socket")
    if first is None or first.offset:
        return
    found = {
        member: place.offset
        for member, place in places.items()
        if place is not None and obstacle(member, place) is None
    }
    if len(found) == len(SOCKET_MEMBERS):
        offsets.update(found)


def find_drop_members(types: KernelTypes, offsets: dict[Member, int]) -> str | None:
    """Add the offsets of DROP_MEMBERS, all or none. Returns why none; None if all were added."""
    found: dict[Member, int] = {}
    for member in DROP_MEMBERS:
        place = types.place(member.kernel_struct, member.path)
        why = obstacle(member, place)
        if why is not None or place is None:
            return why
        found[member] = place.offset
    length = Layout(found, {}, None).span[1]
    if length > LONGEST_SPAN:
        return f"struct sk_buff's members are {length} bytes apart, more than {LONGEST_SPAN}"
    offsets.update(found)
    return None


def _readable_in_pairs(counters: Mapping[str, int]) -> bool:
    if len(counters) != len(COUNTERS):
        return False
    first, second, third, fourth = (counters[name] for name in COUNTERS)
    return second == first + 1 and fourth == third + 1


def header_text(layout: Layout) -> str:
    """The generated header, KERNEL_LAYOUT_H of the program text.

    It is the same at each boot. The address that changes with a boot is in the programs'
    configuration.
    """
    structs: dict[str, list[str]] = {}
    checks: list[str] = []
    begin, length = layout.span
    for member, offset in sorted(layout.offsets.items(), key=lambda item: item[1]):
        offset -= begin if member.struct == PACKET_SPAN else 0
        space = "" if member.c_type.endswith("*") else " "
        padding = f"u8 before_{member.name}[{offset}]; " if offset else ""
        structs.setdefault(member.struct, []).append(
            f"\t\tstruct {{ {padding}{member.c_type}{space}{member.name}; }};"
        )
        checks.append(
            f"_Static_assert(__builtin_offsetof(struct {member.struct}, {member.name}) == {offset},"
            f' "{member.struct}.{member.name} is not aligned as the kernel has it");'
        )
    lines = [
        "/* Generated from this kernel's type information by tcpstuck_bpf/layout.py. */",
        "struct net;",
        "struct net_device;",
        "struct socket;",
    ]
    for name, members in structs.items():
        lines += [f"struct {name} {{", "\tunion {", *members, "\t};", "};"]
    if length:
        lines.append(f"#define PACKET_SPAN_AT {begin}")
        checks.append(f'_Static_assert(sizeof(struct {PACKET_SPAN}) == {length}, "padded");')
    if layout.has_sockets:
        lines.append("#define HAVE_SOCKET_INODE")
    if COOKIE_MEMBER in layout.offsets:
        lines.append("#define HAVE_NET_COOKIE")
    if layout.counters:
        lines.append("#define HAVE_MIB_COUNTERS")
        lines += [f"#define MIB_{name} {index}" for name, index in layout.counters.items()]
    return "\n".join(lines + checks) + "\n"
