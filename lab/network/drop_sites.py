"""Places on the server's host where an ACK can be dropped, one context manager each.

A fault starts after the cookie has been sent, so it can drop only the handshake's ACK. The fault is
removed when its context ends. Each context manager yields the oracle: what dropped the ACK, with
the dropper's own names and counters.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import platform
import socket
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab.errors import LabError
from lab.network.faults import ack_rule
from lab.network.readings import parse_netstat
from lab.network.topology import INTERFACE, SILENT_SOURCES
from tcpstuck_bpf.typeinfo.btf import read_running_kernel

if TYPE_CHECKING:
    from lab.network.topology import Namespace

NFT_TABLE = "lab_guard"
NFT_CHAIN = "no_bare_acks"
ELSEWHERE = "elsewhere0"
SO_ATTACH_FILTER, SO_DETACH_FILTER = 26, 27

_BPF_SYSTEM_CALL = {"x86_64": 321, "aarch64": 280}
_BPF_PROG_LOAD, _BPF_RAW_TRACEPOINT_OPEN, _BPF_LINK_CREATE = 5, 17, 28
_PROG_TYPE_XDP, _ATTACH_TYPE_XDP, _XDP_FLAGS_SKB_MODE = 6, 37, 2
_PROG_TYPE_LSM, _ATTACH_TYPE_LSM = 29, 27
_ATTRIBUTES_BYTES = 128
_XDP_DROP = struct.pack("=BBhiBBhi", 0xB7, 0, 0, 1, 0x95, 0, 0, 0)
"""r0 = XDP_DROP; exit."""
_REFUSE = struct.pack("=BBhiBBhi", 0xB7, 0, 0, -errno.EPERM, 0x95, 0, 0, 0)
"""r0 = -EPERM; exit."""
_ACTIVE_SECURITY_MODULES = Path("/sys/kernel/security/lsm")
_DROP_BARE_ACKS = b"".join(
    struct.pack("=HBBI", *instruction)
    for instruction in (
        (0x30, 0, 0, 13),  # load the flags byte; the filter's offset 0 is the TCP header
        (0x15, 0, 1, 0x10),  # only ACK set?
        (0x06, 0, 0, 0),  # yes: drop the whole packet
        (0x06, 0, 0, 0xFFFF_FFFF),
    )
)


@dataclass(frozen=True)
class Spot:
    """A server whose next ACK will be dropped."""

    server: Namespace
    listener: socket.socket
    port: int
    family: int


@dataclass(frozen=True)
class Fault:
    """What drops the ACK."""

    what: str
    """The tracer's name for the dropper."""
    reason: str
    """Name in enum skb_drop_reason without its prefix, on kernels with drop reasons."""
    packets: Callable[[], int] | None = None
    """Number of packets dropped, from the dropper's own counter; None if it has no counter."""
    named: Mapping[str, str] = field(default_factory=dict)
    """Netfilter hook, family, table and chain."""
    rules: tuple[Mapping[str, object], ...] = ()
    """Netfilter's names for the rule; the tracer may report any of them."""
    verdict: str = "ack-filtered"
    vague_reason: str | None = None
    """A less specific reason that some kernels report instead."""
    what_without_reason: str = ""
    """The tracer's name on kernels without drop reasons (before 5.17); empty: same as `what`."""


def _iptables_row(server: Namespace, program: str) -> tuple[int, int]:
    """Number and packet count of the dropping rule in INPUT."""
    listed = server.command(program, "-w", "-L", "INPUT", "-nvx", "--line-numbers")
    (row,) = (
        line.split() for line in listed.splitlines() if " DROP " in line and "Chain" not in line
    )
    return int(row[0]), int(row[1])


def _nft_rules(server: Namespace, family: str, table: str, chain: str) -> list[dict[str, Any]]:
    listed = json.loads(server.command("nft", "-j", "list", "chain", family, table, chain))
    return [entry["rule"] for entry in listed["nftables"] if "rule" in entry]


@contextlib.contextmanager
def iptables(spot: Spot, backend: str) -> Iterator[Fault]:
    """A dropping rule of `iptables-legacy` or `iptables-nft`, second in INPUT."""
    program = f"{'iptables' if spot.family == 4 else 'ip6tables'}-{backend}"
    rules = (("-p", "udp", "-j", "ACCEPT"), (*ack_rule(spot.port), "-j", "DROP"))
    for rule in rules:
        spot.server.command(program, "-w", "-A", "INPUT", *rule)
    family = "ip" if spot.family == 4 else "ip6"
    names: list[Mapping[str, object]] = [{"number": _iptables_row(spot.server, program)[0]}]
    if backend == "nft":
        handle = _nft_rules(spot.server, family, "filter", "INPUT")[-1]["handle"]
        names.append({"handle": handle})
    named = {"hook": "input", "family": family, "table": "filter", "chain": "INPUT"}
    try:
        yield Fault(
            "netfilter",
            "NETFILTER_DROP",
            lambda: _iptables_row(spot.server, program)[1],
            named,
            tuple(names),
        )
    finally:
        for rule in rules:
            spot.server.command(program, "-w", "-D", "INPUT", *rule)


@contextlib.contextmanager
def nft_rule(spot: Spot, hook: str) -> Iterator[Fault]:
    """A dropping rule in its own chain at a hook, after a rule that does not match."""
    place = f"inet {NFT_TABLE} {NFT_CHAIN}"
    match = f"tcp dport {spot.port} tcp flags & (syn | ack) == ack"
    spot.server.command(
        "nft",
        f"add table inet {NFT_TABLE}; "
        f"add chain {place} {{ type filter hook {hook} priority 0; policy accept; }}; "
        f"add rule {place} udp dport 9 counter accept; "
        f"add rule {place} {match} counter drop",
    )

    def rule() -> dict[str, Any]:
        return _nft_rules(spot.server, "inet", NFT_TABLE, NFT_CHAIN)[-1]

    def packets() -> int:
        (counter,) = (part["counter"] for part in rule()["expr"] if "counter" in part)
        return int(counter["packets"])

    named = {"hook": hook, "family": "inet", "table": NFT_TABLE, "chain": NFT_CHAIN}
    try:
        yield Fault("netfilter", "NETFILTER_DROP", packets, named, ({"handle": rule()["handle"]},))
    finally:
        spot.server.command("nft", f"delete table inet {NFT_TABLE}")


@contextlib.contextmanager
def nft_policy(spot: Spot) -> Iterator[Fault]:
    """A chain at the input hook with policy drop."""
    place = f"inet {NFT_TABLE} {NFT_CHAIN}"
    spot.server.command(
        "nft",
        f"add table inet {NFT_TABLE}; "
        f"add chain {place} {{ type filter hook input priority 0; policy drop; }}; "
        f"add rule {place} udp dport 9 accept",
    )
    named = {"hook": "input", "family": "inet", "table": NFT_TABLE, "chain": NFT_CHAIN}
    try:
        yield Fault("netfilter", "NETFILTER_DROP", None, named, ({"policy": True},))
    finally:
        spot.server.command("nft", f"delete table inet {NFT_TABLE}")


@contextlib.contextmanager
def _route(spot: Spot, *elsewhere: str) -> Iterator[None]:
    """Replace the route through the client to SILENT_SOURCES by another route."""
    ip, prefix = ("ip", f"-{spot.family}"), SILENT_SOURCES[spot.family]
    (before,) = json.loads(spot.server.command(*ip, "-j", "route", "show", prefix))
    way = ("via", str(before["gateway"]), "dev", INTERFACE)
    spot.server.command(*ip, "route", "del", prefix)
    spot.server.command(*ip, "route", "add", *elsewhere)
    try:
        yield
    finally:
        spot.server.command(*ip, "route", "del", *elsewhere)
        spot.server.command(*ip, "route", "add", prefix, *way)


@contextlib.contextmanager
def rp_filter(spot: Spot) -> Iterator[Fault]:
    """Strict reverse path filtering, with the return route on another interface."""
    server = spot.server
    everywhere = "net/ipv4/conf/all/rp_filter"
    server.command("ip", "link", "add", ELSEWHERE, "type", "dummy")
    server.command("ip", "link", "set", ELSEWHERE, "up")
    before = server.counters()["IPReversePathFilter"]
    try:
        with _route(spot, SILENT_SOURCES[spot.family], "dev", ELSEWHERE):
            server.pin({everywhere: "1"})
            try:
                yield Fault(
                    "rp_filter",
                    "IP_RPFILTER",
                    lambda: server.counters()["IPReversePathFilter"] - before,
                    what_without_reason="route",
                )
            finally:
                server.pin({everywhere: "0"})
    finally:
        server.command("ip", "link", "del", ELSEWHERE)


@contextlib.contextmanager
def tc_ingress(spot: Spot) -> Iterator[Fault]:
    """A tc filter at the interface's ingress that drops every TCP packet."""
    device = ("dev", INTERFACE)
    protocol = "ip" if spot.family == 4 else "ipv6"
    spot.server.command("tc", "qdisc", "add", *device, "ingress")
    words = ("protocol", protocol, "flower", "ip_proto", "tcp", "action", "drop")
    spot.server.command("tc", "filter", "add", *device, "ingress", *words)

    def packets() -> int:
        listed = spot.server.command("tc", "-s", "-j", "filter", "show", *device, "ingress")
        actions = (
            action
            for entry in json.loads(listed)
            for action in entry.get("options", {}).get("actions", [])
        )
        return sum(int(action["stats"]["drops"]) for action in actions)

    try:
        yield Fault("tc", "TC_INGRESS", packets)
    finally:
        spot.server.command("tc", "qdisc", "del", *device, "ingress")


def _bpf(command: int, attributes: bytes) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    union = ctypes.create_string_buffer(attributes, _ATTRIBUTES_BYTES)
    result: int = libc.syscall(
        _BPF_SYSTEM_CALL[platform.machine()], command, union, _ATTRIBUTES_BYTES
    )
    if result < 0:
        raise LabError(
            f"bpf(2) refused command {command}", os.strerror(ctypes.get_errno()), "run it as root"
        )
    return result


def _attach_dropping_xdp() -> int:
    """Attach the program; returns the link's descriptor. Closing it detaches the program."""
    program = ctypes.create_string_buffer(_XDP_DROP, len(_XDP_DROP))
    licence = ctypes.create_string_buffer(b"GPL")
    addresses = (ctypes.addressof(program), ctypes.addressof(licence))
    loaded = _bpf(
        _BPF_PROG_LOAD, struct.pack("=IIQQ", _PROG_TYPE_XDP, len(_XDP_DROP) // 8, *addresses)
    )
    try:
        device = socket.if_nametoindex(INTERFACE)
        request = (loaded, device, _ATTACH_TYPE_XDP, _XDP_FLAGS_SKB_MODE)
        return _bpf(_BPF_LINK_CREATE, struct.pack("=IIII", *request))
    finally:
        os.close(loaded)


@contextlib.contextmanager
def generic_xdp(spot: Spot) -> Iterator[Fault]:
    """A generic XDP program, run after the driver, that drops every packet."""
    link = spot.server.run(_attach_dropping_xdp)
    try:
        # netif_receive_generic_xdp frees dropped packets without a reason, at least up to 6.1.
        yield Fault("xdp", "XDP", vague_reason="NOT_SPECIFIED")
    finally:
        os.close(link)


@contextlib.contextmanager
def socket_filter(spot: Spot) -> Iterator[Fault]:
    """A socket filter on the listener that drops bare ACKs."""
    code = ctypes.create_string_buffer(_DROP_BARE_ACKS, len(_DROP_BARE_ACKS))
    program = struct.pack("@HP", len(_DROP_BARE_ACKS) // 8, ctypes.addressof(code))
    spot.listener.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, program)
    try:
        yield Fault("socket-filter", "SOCKET_FILTER", what_without_reason="tcp")
    finally:
        spot.listener.setsockopt(socket.SOL_SOCKET, SO_DETACH_FILTER, 0)


@contextlib.contextmanager
def no_route(spot: Spot) -> Iterator[Fault]:
    """No route to the client: the cookie is valid, but the kernel cannot create a socket."""
    before = spot.server.counters()["SyncookiesRecv"]
    with _route(spot, "unreachable", SILENT_SOURCES[spot.family]):
        yield Fault(
            "route",
            "IP_OUTNOROUTES",
            lambda: spot.server.counters()["SyncookiesRecv"] - before,
            verdict="ack-failed",
        )


def has_bpf_security_module() -> bool:
    """Whether this kernel runs BPF LSM programs (CONFIG_BPF_LSM, and `bpf` in lsm=)."""
    try:
        return "bpf" in _ACTIVE_SECURITY_MODULES.read_text("ascii").split(",")
    except OSError:
        return False


def _attach_refusing_program() -> int:
    """Attach the program; returns the link's descriptor. Closing it detaches the program."""
    hook = read_running_kernel().function("bpf_lsm_inet_conn_request")
    program = ctypes.create_string_buffer(_REFUSE, len(_REFUSE))
    licence = ctypes.create_string_buffer(b"GPL")
    addresses = (ctypes.addressof(program), ctypes.addressof(licence))
    # union bpf_attr: the zero padding covers the verifier log, the name and debug information.
    attributes = struct.pack(
        "=IIQQ44xI36xI", _PROG_TYPE_LSM, len(_REFUSE) // 8, *addresses, _ATTACH_TYPE_LSM, hook or 0
    )
    loaded = _bpf(_BPF_PROG_LOAD, attributes)
    try:
        return _bpf(_BPF_RAW_TRACEPOINT_OPEN, struct.pack("=QI", 0, loaded))
    finally:
        os.close(loaded)


@contextlib.contextmanager
def security_module(spot: Spot) -> Iterator[Fault]:
    """A BPF program at the LSM hook inet_conn_request that rejects every socket on the host."""
    before = spot.server.counters()["SyncookiesRecv"]
    link = _attach_refusing_program()
    try:
        yield Fault(
            "lsm",
            "SECURITY_HOOK",
            lambda: spot.server.counters()["SyncookiesRecv"] - before,
            verdict="ack-failed",
        )
    finally:
        os.close(link)


def wrong_checksums(server: Namespace) -> int:
    """Number of TCP segments with a bad checksum received in a namespace (TcpInCsumErrors)."""
    snmp = server.run(Path("/proc/thread-self/net/snmp").read_text)
    return parse_netstat(snmp, "Tcp")["InCsumErrors"]


@dataclass(frozen=True)
class DropSite:
    """One drop site, and the address families it exists for."""

    make: Callable[[Spot], contextlib.AbstractContextManager[Fault]]
    families: tuple[int, ...] = (4, 6)


DROP_SITES: Mapping[str, DropSite] = {
    "iptables-legacy": DropSite(partial(iptables, backend="legacy")),
    "iptables-nft": DropSite(partial(iptables, backend="nft")),
    "nft-input": DropSite(partial(nft_rule, hook="input")),
    "nft-prerouting": DropSite(partial(nft_rule, hook="prerouting")),
    "nft-policy": DropSite(nft_policy),
    "rp-filter": DropSite(rp_filter, families=(4,)),
    "tc-ingress": DropSite(tc_ingress),
    "generic-xdp": DropSite(generic_xdp),
    "socket-filter": DropSite(socket_filter),
    "no-route": DropSite(no_route),
}
"""All drop sites by name. The kernel has reverse path filtering for IPv4 only."""
