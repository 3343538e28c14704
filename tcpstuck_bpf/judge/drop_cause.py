"""Explains the kernel's drop reason and drop site in an operator's words. Pure.

The reason says most (enum skb_drop_reason, since 5.17). Without a reason the drop site decides:
the symbol of the function that called kfree_skb.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import NamedTuple

from tcpstuck_bpf.handshake.flow import FlowReport, State
from tcpstuck_bpf.judge.netfilter import BRIDGE, Suspicion, rules_after, suspicion
from tcpstuck_bpf.model import Handshake, Moved
from tcpstuck_bpf.rulesets import KernelNames

NO_NAMES = KernelNames({}, {}, {}, {})


class Cause(NamedTuple):
    """A cause for the drop of an ACK."""

    what: str
    """Stable name of the cause, for JSON."""
    words: str
    """Text of the cause."""
    advice: str


NETFILTER = Cause(
    "netfilter",
    "netfilter (an nftables or iptables rule, or a chain's policy)",
    "look at the rule, or the chain's policy, with nft list ruleset and iptables-save -c in the "
    "listener's network namespace; a state match such as `ct state invalid` drops an ACK if "
    "conntrack missed part of its handshake",
)
QUEUE_WITHOUT_ROOM = Cause(
    "nfqueue",
    "netfilter's queue (a rule's NFQUEUE or queue): no program reads it, or it is full",
    "start the program that reads the queue (for example an IPS) or make its queue longer; the "
    "option --queue-bypass, or bypass, lets packets pass while no program reads; see the columns "
    "of dropped packets in /proc/net/netfilter/nfnetlink_queue",
)
QUEUE_VERDICT = Cause(
    "nfqueue",
    "the program that reads netfilter's queue (NFQUEUE), or a later rule than the one that queued",
    "look at the log of the program that reads the queue (its port number is the second column of "
    "/proc/net/netfilter/nfnetlink_queue), and at the rules of lower priority",
)
RP_FILTER = Cause(
    "rp_filter",
    "reverse path filter: the route back to the client leaves by another interface",
    "compare `ip route get CLIENT` with the interface by which the packet came; for asymmetric "
    "routes set net.ipv4.conf.*.rp_filter to 2 (loose)",
)
TC = Cause(
    "tc",
    "traffic control at ingress (a tc filter or a BPF program there)",
    "look at `tc -s filter show dev DEV ingress` and at `bpftool net`",
)
XDP = Cause(
    "xdp",
    "generic XDP (a BPF program on the device)",
    "look at `ip -d link show` and `bpftool net` for the program",
)
XDP_VETH = Cause(
    "xdp",
    "XDP on a veth device (a BPF program in this network namespace)",
    "look at `ip -d link show` of the veth device and at `bpftool net` for the program",
)
QDISC = Cause(
    "qdisc",
    "a queueing discipline (for example an ingress shaper on an ifb device)",
    "look at `tc -s qdisc show`: the counter `dropped` of each device",
)
DEVICE = Cause(
    "device",
    "a virtual device (tun, tap, a tunnel, GSO): not ready, no room, or its own filter",
    "look at `ip -s -s link show` and at the program behind the device",
)
BRIDGE_PORT = Cause(
    "bridge",
    "a bridge, or a check of the link layer's source address",
    "look at `bridge -d link show` (STP state, learning) and find out who sends with that address",
)
TUNNEL = Cause(
    "tunnel",
    "the tunnel by which it came",
    "compare the tunnel's configuration at both ends (`ip -d link show`)",
)
MEMORY = Cause(
    "memory",
    "a shortage of memory",
    "look at dmesg for memory pressure (net.ipv4.tcp_mem, vm.min_free_kbytes, cgroup limits)",
)
FRAGMENTS = Cause(
    "fragments",
    "it came in fragments that were not reassembled",
    "find out what fragments small packets on the way; see IpReasmFails in nstat",
)
BACKLOG = Cause(
    "backlog",
    "a full softnet backlog: this CPU's input queue had no room",
    "raise net.core.netdev_max_backlog, and spread the load (RSS, RPS); see the second column of "
    "/proc/net/softnet_stat",
)
CHECKSUM = Cause(
    "checksum",
    "a wrong checksum",
    "look for a device or driver that damages packets (test with ethtool -K DEV rx off), and for "
    "what rewrites them on the way",
)
MALFORMED = Cause(
    "malformed",
    "a header that is too short or damaged",
    "capture it (tcpdump -vv) and look for what damages packets on the way",
)
OTHER_HOST = Cause(
    "other-host",
    "its link-layer address: it was addressed to another host",
    "look for a wrong ARP or neighbour entry at the client or its router",
)
SOCKET_FILTER = Cause(
    "socket-filter",
    "the listener's socket filter (SO_ATTACH_FILTER, SO_ATTACH_BPF, cgroup BPF)",
    "look at what the server program attached (ss -0b, bpftool cgroup tree)",
)
TCP_AUTH = Cause(
    "tcp-auth",
    "TCP's own signatures (MD5 or AO): missing, unexpected or wrong",
    "compare the keys of both ends (BGP: the neighbour's password)",
)
CGROUP_FILTER = SOCKET_FILTER._replace(
    words="a BPF program of the sender's cgroup on this host",
    advice="look at `bpftool cgroup tree`",
)
LSM = Cause(
    "lsm",
    "a security module refused it",
    "look for denials (dmesg, ausearch -m avc, journalctl -k) of SELinux, AppArmor or a BPF LSM",
)
PSP = Cause(
    "psp",
    "PSP: the listener or the connection requires encryption, or another encryption",
    "compare the PSP associations of both ends",
)
XFRM = Cause(
    "xfrm",
    "an IPsec policy",
    "look at `ip xfrm policy` for the direction in",
)
MIN_TTL = Cause(
    "min-ttl",
    "a TTL below what the listener accepts (IP_MINTTL, IPV6_MINHOPCOUNT)",
    "check whether the path has more routers than the server program allows (BGP: ttl-security)",
)
ROUTE = Cause(
    "route",
    "its addresses or route (martian, no route, source address not allowed)",
    "look at `ip route get CLIENT` and set net.ipv4.conf.all.log_martians to 1",
)
ROUTE_OR_RP_FILTER = ROUTE._replace(
    words="its route (reverse path filter, martian, no route; this kernel does not say which)",
    advice=f"see whether TcpExtIPReversePathFilter rises (nstat); if so, {RP_FILTER.advice}; if "
    f"not, {ROUTE.advice}",
)
BLACKHOLE = ROUTE._replace(
    words="a route that discards packets (blackhole, or dead)",
    advice="look at `ip route get CLIENT` and `ip route show table all type blackhole`",
)
TTL = ROUTE._replace(
    words="its TTL or hop limit has run out",
    advice="look for a routing loop, or a hop limit at the client that is too low",
)
EXTENSION_HEADERS = MALFORMED._replace(
    words="an IPv6 extension header that is damaged, unknown, or one too many",
    advice="look at what adds headers on the way, and at net.ipv6.max_hbh_* and max_dst_opts_*",
)
IPV6_DISABLED = Cause(
    "ipv6-disabled",
    "IPv6 is disabled on the device by which it came",
    "look at net.ipv6.conf.*.disable_ipv6 in the listener's network namespace",
)
OTHER_SOCKET = Cause(
    "other-socket",
    "another socket of the same 4-tuple (a connection, a request in the SYN queue, TIME_WAIT) got "
    "it, and dropped it",
    "look at `ss -tan` for that 4-tuple: the client reused its port, or its SYN got a place in the "
    "SYN queue meanwhile",
)
REQUEST_QUEUE_FULL = Cause(
    "accept-queue",
    "the accept queue was full when the ACK of a request in the SYN queue came",
    "find out why the server does not accept, or raise the listener's backlog",
)
NO_SOCKET = Cause(
    "no-socket",
    "no socket: the listener was gone",
    "check whether the server was restarted at that moment",
)
TCP = Cause(
    "tcp",
    "TCP's own checks before the listener gets it (checksum, signature, TTL, socket filter, "
    "IPsec), or the listener was gone; this kernel does not say which",
    "look at nstat for TcpInCsumErrors and TcpExtTCPMD5*, and at the listener's socket filter",
)
OTHER = Cause(
    "other",
    "a cause that the tool does not know; see the kernel's reason and drop site",
    "search the kernel's source for that reason or drop site",
)

ACCEPT_QUEUE = Cause(
    "accept-queue",
    "the accept queue is full (ignore NO_SOCKET: the socket exists, its queue is full)",
    "",
)
NO_ROUTE_BACK = Cause(
    "route",
    "no route back to the client",
    "look at `ip route get CLIENT` in the listener's network namespace, and at rules and VRFs",
)
CHILD = Cause(
    "child",
    "the accept queue had room; making or binding the child socket failed (memory)",
    "look at dmesg for memory pressure (net.ipv4.tcp_mem, cgroup limits)",
)
REQUEST = Cause(
    "request",
    "the cookie was valid and the accept queue had room; there was no memory for the request, or "
    "another ACK of this client came first (MPTCP: the join was not known)",
    "look at dmesg for memory pressure (net.ipv4.tcp_mem, cgroup limits)",
)

_BY_REASON: tuple[tuple[str, Cause], ...] = (
    (r"NETFILTER_DROP", NETFILTER),
    (r"IP_RPFILTER", RP_FILTER),
    (r"TC_\w+", TC),
    (r"QDISC_\w+|CAKE_FLOOD|FQ_\w+|DUALPI2_\w+", QDISC),
    (r"XDP", XDP),
    (r"CPU_BACKLOG", BACKLOG),
    (r"(TCP|IP|SKB)_CSUM", CHECKSUM),
    (r"PKT_TOO_SMALL|PKT_TOO_BIG|IP_INHDR|HDR_TRUNC", MALFORMED),
    (r"IPV6_(BAD|TOO_MANY)_EXTHDRS?", EXTENSION_HEADERS),
    (r"OTHERHOST|UNICAST_IN_L2_MULTICAST", OTHER_HOST),
    (r"SOCKET_FILTER", SOCKET_FILTER),
    (r"BPF_CGROUP_EGRESS", CGROUP_FILTER),
    (r"SECURITY_HOOK", LSM),
    (r"TCP_(MD5|AO|AUTH)\w+", TCP_AUTH),
    (r"PSP_(IN|OUT)PUT", PSP),
    (r"XFRM_POLICY", XFRM),
    (r"TCP_MINTTL", MIN_TTL),
    (r"IP_(IN|OUT)NOROUTES|IP_INADDRERRORS|IP_LOCAL\w+|IP_INVALID\w+", ROUTE),
    (r"BLACKHOLE", BLACKHOLE),
    (r"IP_TTL_EXCEEDED", TTL),
    (r"IPV6DISABLED", IPV6_DISABLED),
    (r"NOMEM|PFMEMALLOC|PROTO_MEM|SKB_UCOPY_FAULT", MEMORY),
    (r"DUP_FRAG|FRAG_\w+", FRAGMENTS),
    (r"DEV_HDR|DEV_READY|FULL_RING|TAP_\w+|SKB_GSO_SEG|SKB_BAD_GSO|RECURSION_LIMIT", DEVICE),
    (r"MAC_\w+|LOCAL_MAC|BRIDGE_INGRESS_STP_STATE", BRIDGE_PORT),
    (r"TUNNEL_\w+|IP_TUNNEL_ECN|VXLAN_\w+|TNL_\w+|GRE_\w+", TUNNEL),
    (r"TCP_LISTEN_OVERFLOW", REQUEST_QUEUE_FULL),
    (r"SOCKET_(RCVBUFF|BACKLOG|CLOSE)|TCP_(?!CSUM)\w+", OTHER_SOCKET),
    (r"NO_SOCKET", NO_SOCKET),
)
_BY_PLACE_FIRST: tuple[tuple[str, Cause], ...] = (
    (r"nf_queue", QUEUE_WITHOUT_ROOM),
    (r"nf_reinject|nfqnl_\w+", QUEUE_VERDICT),
)
"""Drop sites that say more than the reason, which is netfilter's or missing.

nf_queue() frees a packet that it cannot queue (net/netfilter/nf_queue.c). nf_reinject() frees a
packet that the queue's reader or a later hook dropped. Since 6.10 nf_reinject() is static in
nfnetlink_queue.c, and may be inlined into any function there.
"""
_BY_FUNCTION: tuple[tuple[str, Cause], ...] = (
    (r"nf_hook_slow|nft_do_chain|ipt_do_table|ip6t_do_table", NETFILTER),
    (r"ip_rcv_finish_core|ip_rcv_finish", ROUTE),
    (r"veth_xdp_rcv_skb|veth_xdp_rcv|veth_poll", XDP_VETH),
    (r"do_xdp_generic|netif_receive_generic_xdp|bpf_prog_run_generic_xdp", XDP),
    (r"sch_handle_ingress|__netif_receive_skb_core|tcf_classify\w*", TC),
    (r"enqueue_to_backlog", BACKLOG),
    (r"tcp_v[46]_rcv|tcp_v[46]_do_rcv|tcp_filter|sk_filter_trim_cap", TCP),
    (r"ip_rcv_core|ip6_rcv_core|ip_rcv", MALFORMED),
)
_HOOK_OF_CALLER: Mapping[str, str] = MappingProxyType(
    {
        "ip_local_deliver": "input",
        "ip6_input": "input",
        "ip_rcv": "prerouting",
        "ipv6_rcv": "prerouting",
        "nf_hook_slow_list": "prerouting",
        "xfrm4_transport_finish": "prerouting",
        "xfrm6_transport_finish": "prerouting",
        "__netif_receive_skb_core": "ingress",
        "ip_forward": "forward",
        "ip6_forward": "forward",
        "__ip_local_out": "output",
        "__ip6_local_out": "output",
        "ip_output": "postrouting",
        "ip6_output": "postrouting",
    }
)
"""Netfilter hook by function. NF_HOOK() in the function runs the hook through nf_hook_slow."""


NOT_NETFILTER = Suspicion((), ())


@dataclass(frozen=True)
class Drop:
    """Where and why an ACK was dropped, as far as known."""

    reason: str | None
    """The kernel's drop reason; None if the kernel has none."""
    place: str | None
    """Drop site, `symbol+0x1f`."""
    cause: Cause | None
    """Why an ACK was dropped before the cookie check; None if it reached the check."""
    hook: str | None = None
    """Netfilter hook."""
    counter: str | None = None
    """The kernel's counter for this drop."""
    refusal: Cause | None = None
    """Why the cookie check dropped an ACK; None if unknown."""
    netfilter: Suspicion = NOT_NETFILTER
    """The rules that can have dropped the ACK."""

    @property
    def what(self) -> str:
        """The cause in one stable word; empty where it is not known."""
        cause = self.cause or self.refusal
        return "" if cause is None else cause.what

    @property
    def sure(self) -> bool:
        """Whether the cause rests on the kernel's reason, not on the drop site alone."""
        return self.reason not in (None, "NOT_SPECIFIED")

    @property
    def maybe_answered(self) -> bool:
        """Whether an RST may have gone out. The drop alone does not show that."""
        return self.cause is TCP or self.netfilter.may_reset


def function_of(place: str) -> str:
    """The function in `symbol+0x1f`, without a compiler's suffix."""
    return place.partition("+")[0].partition(".")[0]


_BY_NETFILTER = frozenset({NETFILTER, QUEUE_WITHOUT_ROOM, QUEUE_VERDICT})


def _cause(reason: str | None, place: str) -> Cause:
    if reason in (None, "NOT_SPECIFIED", "NETFILTER_DROP"):
        for pattern, cause in _BY_PLACE_FIRST:
            if re.fullmatch(pattern, function_of(place)):
                return cause
    for pattern, cause in _BY_REASON:
        if reason is not None and re.fullmatch(pattern, reason):
            return cause
    if reason in (None, "NOT_SPECIFIED"):
        for pattern, cause in _BY_FUNCTION:
            if re.fullmatch(pattern, function_of(place)):
                # Kernels with drop reasons have one for the reverse path filter.
                return ROUTE_OR_RP_FILTER if cause is ROUTE and reason is None else cause
    return OTHER


@functools.lru_cache(maxsize=1024)
def is_by_netfilter(reason: str | None, place: str) -> bool:
    """Whether a firewall rule can have dropped a packet, by the kernel's reason and drop site."""
    return _cause(reason, place) in _BY_NETFILTER


def _hook(stack: tuple[str, ...]) -> str | None:
    """The hook run by the innermost caller that runs one; None if there is no such caller.

    A bridge has its own hooks, and also runs those of IP (br_netfilter): all are BRIDGE here.
    """
    for frame in stack:
        function = function_of(frame)
        hook = BRIDGE if function.startswith("br_") else _HOOK_OF_CALLER.get(function)
        if hook is not None:
            return hook
    return None


def counter_of(counters: int) -> str | None:
    """The most specific of the kernel's counters that moved for a dropped ACK."""
    for bit, name in (
        (Moved.UNKNOWN, None),
        (Moved.LISTEN_OVERFLOWS, "ListenOverflows"),
        (Moved.LISTEN_DROPS, "ListenDrops"),
        (Moved.SYNCOOKIES_RECV, "SyncookiesRecv"),
    ):
        if counters & bit:
            return name
    return None


def _refusal(reason: str | None, counters: int) -> Cause | None:
    """Why cookie_vX_check dropped an ACK, by the counters and, from 6.9 on, the drop reason."""
    if counters & Moved.UNKNOWN:
        return None
    if counters & Moved.LISTEN_OVERFLOWS:
        return ACCEPT_QUEUE
    if counters & Moved.LISTEN_DROPS:
        return CHILD
    return {"SECURITY_HOOK": LSM, "IP_OUTNOROUTES": NO_ROUTE_BACK, "NO_SOCKET": REQUEST}.get(
        reason or ""
    )


def drop_of(report: FlowReport, names: KernelNames) -> Drop | None:
    """Facts of the last ACK that this host dropped; None if the state is not about a drop."""
    if report.state is State.ACK_FILTERED:
        return _before_tcp(report, names)
    return _by_check(report.handshake, names) if report.state is State.ACK_DROPPED else None


def drop_at(place: int, reason: int, names: KernelNames) -> Drop:
    """A drop before TCP by the kernel's numbers alone: without hook, and without rules."""
    reason_name = names.reasons.get(reason)
    place_name = names.places.get(place, f"{place:#x}")
    return Drop(reason_name, place_name, _cause(reason_name, place_name))


def _before_tcp(report: FlowReport, names: KernelNames) -> Drop:
    entry, who = report.handshake, report.four_tuple
    drop = drop_at(entry.filter_place, entry.filter_reason, names)
    cause, place = drop.cause, drop.place or ""
    if cause not in _BY_NETFILTER:
        return drop
    hook = _hook(names.stacks.get(entry.filter_stack, ()))
    by_nftables = function_of(place).startswith("nft_")
    read = rules_after(names.rulesets.get(who.netns, ()), entry.last_ack_filtered_ns)
    suspects = suspicion(read, who, hook, by_nftables, entry.filter_device or None)
    if cause is QUEUE_WITHOUT_ROOM:
        suspects = suspects.of_full_queue()
    elif cause is QUEUE_VERDICT:
        suspects = suspects.of_queue_verdict()
    return replace(drop, hook=hook, netfilter=suspects)


def _by_check(entry: Handshake, names: KernelNames) -> Drop:
    counter = counter_of(entry.drop_counters)
    if not entry.drop_place:
        return Drop(None, None, None, None, counter, _refusal(None, entry.drop_counters))
    reason = names.reasons.get(entry.drop_reason)
    place = names.places.get(entry.drop_place, f"{entry.drop_place:#x}")
    return Drop(reason, place, None, None, counter, _refusal(reason, entry.drop_counters))
