"""Finds what can drop packets at the netfilter hooks of our network namespace, apart from rules.

Kernels since 5.14 list their hooks if built with CONFIG_NETFILTER_NETLINK_HOOK (Debian 12's is
not). On other kernels this module looks for the traces of in-tree code that drops at hooks: IPVS,
BPF programs, SYNPROXY, flow tables and two security modules. Out-of-tree modules leave no traces,
so a problem names them.

The netlink code is our own, because pyroute2 does not support this subsystem.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import socket
import struct
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from tcpstuck_bpf.host.bpf_syscall import RefusedError, bpf, bpf_answering
from tcpstuck_bpf.rulesets import DropRule

_OWN_NET = Path("/proc/thread-self/net")
_MODULES = Path("/proc/modules")
_SECURITY_MODULES = Path("/sys/kernel/security/lsm")

_FAMILIES = {"ip": 2, "ip6": 10, "netdev": 5}
"""NFPROTO_* of the families that IP packets pass."""
_NAME_OF_FAMILY = {1: "inet", 2: "ip", 5: "netdev", 10: "ip6"}
_HOOKS = ("prerouting", "input", "forward", "output", "postrouting")
"""enum nf_inet_hooks. A device's ingress hook has number 0."""
_INGRESS = "ingress"

_NETLINK_NETFILTER = 12
_GET_HOOKS = 12 << 8
"""NFNL_SUBSYS_HOOK and NFNL_MSG_HOOK_GET."""
_REQUEST_DUMP = 0x301
_DUMP_INTERRUPTED = 0x10
_ERROR, _DONE = 2, 3
_HEADER = struct.Struct("=IHHII")
_FAMILY = struct.Struct("=BBH")
_ATTRIBUTE = struct.Struct("=HH")
_TYPE_BITS = 0x3FFF
_HOOKNUM, _DEVICE, _FUNCTION, _MODULE, _CHAIN_INFO = 1, 3, 4, 5, 6
_INFO_DESCRIPTION, _INFO_TYPE = 1, 2
_CHAIN_TABLE, _CHAIN_FAMILY, _CHAIN_NAME = 1, 2, 3
_BPF_PROGRAM_ID = 1
_OF_NFTABLES, _OF_BPF = 1, 2
_ANSWER_BYTES = 1 << 16
_LIMIT_S = 5.0
_MOST_DEVICES = 256
"""Largest number of devices whose ingress hooks are listed; each device is one request."""
_MOST_LINKS = 4096
"""Largest number of BPF links examined; they are those of the whole machine."""

_LINK_NEXT_ID, _LINK_BY_ID, _INFO_BY_FILE = 31, 30, 15
_LINK_INFO_BYTES = 128
_LINK_TYPE_NETFILTER = 10

_XTABLES_FUNCTIONS = frozenset(
    {"ipt_do_table", "ip6t_do_table"}
    | {
        f"{family}table_{table}_hook"
        for family in ("ip", "ip6")
        for table in ("raw", "mangle", "filter", "security")
    }
)
_INNOCENT_PREFIXES = (
    "nft_do_chain",
    "nf_nat_",
    "ipv4_conntrack_",
    "ipv6_conntrack_",
    "nf_conntrack_",
    "nf_confirm",
    "ipv4_confirm",
    "ipv6_confirm",
    "ipv4_helper",
    "ipv6_helper",
    "ipv6_defrag",
    "iptable_nat_",
    "ip6table_nat_",
    "ip_sabotage_in",
    "ipvlan_nf_input",
    "ila_nf_input",
    "nf_hook_lwtunnel",
)
"""Functions that drop no whole segment, or only for lack of memory, or that count their drops."""


class Hook(NamedTuple):
    """One function that netfilter calls at a hook."""

    family: str
    hook: str
    function: str
    module: str
    """Module of the function; empty if it is built into the kernel."""
    chain: tuple[str, str, str] | None
    """Family, table and name of the nftables chain that it runs, if any."""
    program: int | None
    """ID of the BPF program that it runs, if any."""
    device: str


class Others(NamedTuple):
    """What can drop packets apart from the rules that were read."""

    rules: tuple[DropRule, ...]
    problems: tuple[str, ...]


class UnlistedError(Exception):
    """The kernel does not list its hooks, or not reliably."""


def _attribute(kind: int, value: bytes) -> bytes:
    head = _ATTRIBUTE.pack(_ATTRIBUTE.size + len(value), kind)
    return head + value + bytes(-len(value) % 4)


def _attributes(data: bytes) -> dict[int, bytes]:
    """Parse netlink attributes. Raises struct.error or UnlistedError where they are damaged."""
    found = {}
    at = 0
    while at + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        if length < _ATTRIBUTE.size:
            raise UnlistedError("the answer is damaged")
        found[kind & _TYPE_BITS] = data[at + _ATTRIBUTE.size : at + length]
        at += (length + 3) & ~3
    return found


def _text(value: bytes) -> str:
    return value.rstrip(b"\0").decode("utf-8", "replace")


def _number(value: bytes) -> int:
    return int.from_bytes(value, "big")


def parse_hook(family: str, hook: str, device: str, data: bytes) -> Hook:
    """Parse an NFNL_MSG_HOOK_GET message after its headers (linux/netfilter/nfnetlink_hook.h)."""
    found = _attributes(data)
    info = _attributes(found.get(_CHAIN_INFO, b""))
    about = _attributes(info.get(_INFO_DESCRIPTION, b""))
    kind = _number(info.get(_INFO_TYPE, b""))
    chain = None
    if kind == _OF_NFTABLES:
        of = _NAME_OF_FAMILY.get(_number(about.get(_CHAIN_FAMILY, b"")), "")
        chain = (of, _text(about.get(_CHAIN_TABLE, b"")), _text(about.get(_CHAIN_NAME, b"")))
    program = _number(about.get(_BPF_PROGRAM_ID, b"")) if kind == _OF_BPF else None
    function, module = _text(found.get(_FUNCTION, b"")), _text(found.get(_MODULE, b""))
    return Hook(family, hook, function, module, chain, program, device)


def _listed(link: socket.socket, family: str, number: int, device: str) -> Iterator[bytes]:
    """The kernel's messages for one hook. Raises UnlistedError and OSError."""
    body = _FAMILY.pack(_FAMILIES[family], 0, 0) + _attribute(_HOOKNUM, struct.pack(">I", number))
    if device:
        body += _attribute(_DEVICE, device.encode() + b"\0")
    link.send(_HEADER.pack(_HEADER.size + len(body), _GET_HOOKS, _REQUEST_DUMP, 1, 0) + body)
    while True:
        answer = link.recv(_ANSWER_BYTES)
        while len(answer) >= _HEADER.size:
            length, kind, flags, _, _ = _HEADER.unpack_from(answer)
            if length < _HEADER.size or flags & _DUMP_INTERRUPTED:
                raise UnlistedError("the hooks changed during the dump")
            if kind == _ERROR:
                (refused,) = struct.unpack_from("=i", answer, _HEADER.size)
                raise OSError(-refused, os.strerror(-refused))
            if kind == _DONE:
                return
            yield answer[_HEADER.size + _FAMILY.size : length]
            answer = answer[(length + 3) & ~3 :]


def list_hooks(devices: Iterable[str]) -> list[Hook]:
    """Every function at the hooks that IP packets of this namespace pass.

    The kernel may load the module nfnetlink_hook, which only lists hooks. Raises UnlistedError
    where this kernel does not list them.
    """
    places = [
        (family, hook, number, "") for family in ("ip", "ip6") for number, hook in enumerate(_HOOKS)
    ]
    ingress = [("netdev", _INGRESS, 0, device) for device in devices]
    found = []
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER) as link:
            link.settimeout(_LIMIT_S)
            for family, hook, number, device in places + ingress[:_MOST_DEVICES]:
                with contextlib.suppress(_NoSuchHookError):
                    found += [
                        parse_hook(family, hook, device, data)
                        for data in _of_one(link, family, number, device)
                    ]
    except (OSError, struct.error) as error:
        raise UnlistedError(str(error)) from error
    if len(ingress) > _MOST_DEVICES:
        raise UnlistedError("there are too many devices")
    return found


class _NoSuchHookError(Exception):
    """The kernel has no such hook, or the device is gone."""


def _of_one(link: socket.socket, family: str, number: int, device: str) -> list[bytes]:
    try:
        return list(_listed(link, family, number, device))
    except OSError as error:
        if device and error.errno in (errno.ENODEV, errno.EOPNOTSUPP, errno.EPROTONOSUPPORT):
            raise _NoSuchHookError from error
        raise


def besides_rules(
    chains: Collection[tuple[str, str, str]],
    tables_read: Collection[str],
    mentioned: Collection[str],
    devices: Iterable[str],
) -> Others:
    """What may drop packets apart from the rules that were read.

    `chains` has the nftables chains that were read, `tables_read` the families whose legacy tables
    were read, and `mentioned` the rules' statements that make a hook of their own.
    """
    try:
        hooks = list_hooks(devices)
    except UnlistedError:
        return _known_to_hook(mentioned)
    return of_hooks(hooks, chains, tables_read)


def of_hooks(
    hooks: Iterable[Hook],
    chains: Collection[tuple[str, str, str]],
    tables_read: Collection[str],
) -> Others:
    """Those of these functions that may drop packets and are not rules that were read."""
    rules: dict[DropRule, None] = {}
    problems: dict[str, None] = {}
    for hook in hooks:
        at_device = (("iifname", hook.device),) if hook.device else ()
        if hook.chain is not None:
            if hook.chain not in chains:
                problems["there are nftables chains that nft did not list"] = None
        elif hook.program is not None:
            rules[DropRule(hook.family, "", "", hook.hook, "program", hook.program, at_device)] = (
                None
            )
        elif hook.function in _XTABLES_FUNCTIONS:
            if hook.family not in tables_read:
                problems[f"{hook.family}tables has legacy tables that were not read"] = None
        elif not hook.function.startswith(_INNOCENT_PREFIXES):
            rules[_function(hook.family, hook.module, hook.function, hook.hook, at_device)] = None
    return Others(tuple(rules), tuple(problems))


def _function(
    family: str, module: str, name: str, hook: str, conditions: tuple[tuple[str, str], ...] = ()
) -> DropRule:
    """A function as a DropRule. An unknown function may also answer with an RST."""
    known = name.startswith(
        ("ip_vs_", "ipv4_synproxy", "ipv6_synproxy", "nf_flow_", "selinux_", "smack_")
    )
    return DropRule(family, module, name, hook, "function", 0, conditions, not known, not known)


def _known_to_hook(mentioned: Collection[str]) -> Others:
    rules: list[DropRule] = []
    problems: list[str] = []
    families = ("ip", "ip6")
    if _has_ipvs_services():
        rules += [
            _function(family, "ip_vs", "ip_vs_in_hook", hook)
            for family in families
            for hook in ("input", "forward", "output")
        ]
    if "synproxy" in mentioned:
        rules += [
            _function(
                family, "nf_synproxy_core", f"ipv{4 if family == 'ip' else 6}_synproxy_hook", hook
            )
            for family in families
            for hook in ("input", "postrouting")
        ]
    if "flowtable" in mentioned:
        rules.append(_function("netdev", "nf_flow_table", "nf_flow_offload_inet_hook", _INGRESS))
    for module in _security_modules() & {"selinux", "smack"}:
        rules += [
            _function(family, "", f"{module}_{family}_{hook}", hook)
            for family in families
            for hook in ("forward", "output", "postrouting")
        ]
    try:
        rules += _bpf_programs()
    except RefusedError as error:
        problems.append(f"it is unknown whether netfilter's hooks have BPF programs: {error}")
    foreign = _foreign_modules()
    if foreign:
        some = ", ".join(foreign[:3])
        problems.append(
            "this kernel does not list netfilter's hooks, and out-of-tree modules may use one: "
            f"{some}{' ...' if len(foreign) > 3 else ''}"
        )
    return Others(tuple(rules), tuple(problems))


def _has_ipvs_services() -> bool:
    """Whether IPVS has services. Without any it lets every packet pass (ip_vs_core.c)."""
    try:
        lines = (_OWN_NET / "ip_vs").read_text("ascii", "replace").splitlines()
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return any(line.startswith(("TCP", "UDP", "SCTP", "FWM")) for line in lines)


def _security_modules() -> frozenset[str]:
    try:
        return frozenset(_SECURITY_MODULES.read_text("ascii").strip().split(","))
    except OSError:
        return frozenset()


def _foreign_modules() -> list[str]:
    """Modules that the kernel marks as built outside its tree (TAINT_OOT_MODULE)."""
    try:
        lines = _MODULES.read_text("ascii", "replace").splitlines()
    except FileNotFoundError:
        return []
    except OSError:
        return ["/proc/modules cannot be read"]
    return [line.split()[0] for line in lines if line.endswith(")") and "O" in line.rsplit("(")[-1]]


def _bpf_programs() -> list[DropRule]:
    """Netfilter BPF programs of all network namespaces; the kernel does not show whose they are.

    Raises RefusedError. A kernel before 6.4 has none (nf_bpf_link.c).
    """
    found: list[DropRule] = []
    link = 0
    for _ in range(_MOST_LINKS):
        answer, refused = bpf_answering(_LINK_NEXT_ID, struct.pack("=III", link, 0, 0))
        if refused is not None:
            if refused.number in (errno.ENOENT, errno.EINVAL):
                return found
            raise refused
        (link,) = struct.unpack_from("=I", answer, 4)
        rule = _bpf_link(link)
        if rule is not None:
            found.append(rule)
    raise RefusedError(errno.E2BIG)


def _bpf_link(link: int) -> DropRule | None:
    try:
        file = bpf(_LINK_BY_ID, struct.pack("=I", link))
    except RefusedError as error:
        if error.number == errno.ENOENT:
            return None
        raise
    try:
        kind, _, program, family, hook = _link_info(file)
    finally:
        os.close(file)
    if kind != _LINK_TYPE_NETFILTER or hook >= len(_HOOKS):
        return None
    name = _NAME_OF_FAMILY.get(family, "")
    return DropRule(name, "", "", _HOOKS[hook], "program", program, ())


def _link_info(file: int) -> tuple[int, ...]:
    """Type, id and prog_id of struct bpf_link_info, and pf and hooknum of its netfilter part."""
    info = ctypes.create_string_buffer(_LINK_INFO_BYTES)
    bpf(_INFO_BY_FILE, struct.pack("=IIQ", file, len(info), ctypes.addressof(info)))
    return struct.unpack_from("=III4xII", info.raw)
