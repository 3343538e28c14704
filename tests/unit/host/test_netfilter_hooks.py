"""Functions at netfilter's hooks, as the kernel lists them, and what else drops there."""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tcpstuck_bpf.host import netfilter_hooks
from tcpstuck_bpf.host.bpf_syscall import RefusedError
from tcpstuck_bpf.host.netfilter_hooks import (
    Hook,
    Others,
    UnlistedError,
    besides_rules,
    list_hooks,
    of_hooks,
    parse_hook,
)
from tcpstuck_bpf.rulesets import DropRule

INPUT = Hook("ip", "input", "nft_do_chain_inet", "nf_tables", ("inet", "t", "c"), None, "")
READ = {("inet", "t", "c")}


def attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def number(kind: int, value: int) -> bytes:
    return attribute(kind, struct.pack(">I", value))


def text(kind: int, value: str) -> bytes:
    return attribute(kind, value.encode() + b"\0")


def nested(kind: int, *inside: bytes) -> bytes:
    return attribute(kind | 0x8000, b"".join(inside))


NFT = (
    text(5, "nf_tables")
    + text(4, "nft_do_chain_inet")
    + number(1, 1)
    + number(2, 0)
    + nested(6, number(2, 1), nested(1, text(1, "t"), text(3, "c"), attribute(2, b"\1")))
)
BPF = text(4, "nf_hook_run_bpf") + number(1, 1) + nested(6, number(2, 2), nested(1, number(1, 77)))
IPVS = text(5, "ip_vs") + text(4, "ip_vs_reply4") + number(1, 1)


def test_a_hook_is_read_as_the_kernel_writes_it() -> None:
    """linux/netfilter/nfnetlink_hook.h and nfnl_hook_dump_one()."""
    assert parse_hook("ip", "input", "", NFT) == INPUT
    assert parse_hook("ip", "input", "", BPF) == Hook(
        "ip", "input", "nf_hook_run_bpf", "", None, 77, ""
    )
    assert parse_hook("ip", "input", "", IPVS)[2:5] == ("ip_vs_reply4", "ip_vs", None)
    with pytest.raises(UnlistedError):
        parse_hook("ip", "input", "", struct.pack("=HH", 2, 4))


def message(kind: int, body: bytes, flags: int = 2) -> bytes:
    data = struct.pack("=IHHII", 16 + len(body), kind, flags, 1, 0) + body
    return data + bytes(-len(data) % 4)


DONE = message(3, bytes(4))


class Kernel:
    """The other end of a netlink socket; `says` answers each request."""

    def __init__(self, says: Callable[[int, int, str], list[bytes]]) -> None:
        self.says = says
        self.answers: Iterator[bytes] = iter(())

    def __enter__(self) -> Kernel:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def settimeout(self, _: float) -> None:
        pass

    def send(self, data: bytes) -> None:
        length, kind, flags = struct.unpack_from("=IHH", data)
        assert (length, kind, flags) == (len(data), 0xC00, 0x301)
        family, (hook,) = data[16], struct.unpack_from(">I", data, 24)
        self.answers = iter(self.says(family, hook, data[32:].rstrip(b"\0").decode()))

    def recv(self, _: int) -> bytes:
        return next(self.answers)


def kernel_says(
    monkeypatch: pytest.MonkeyPatch, says: Callable[[int, int, str], list[bytes]]
) -> None:
    monkeypatch.setattr(socket, "socket", lambda *_: Kernel(says))


def test_every_hook_of_ip_and_of_each_device_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def says(family: int, hook: int, device: str) -> list[bytes]:
        asked.append((family, hook, device))
        if (family, hook) == (2, 1):
            return [message(0xC00, bytes(4) + NFT) + message(0xC00, bytes(4) + IPVS), DONE]
        if device == "gone":
            return [message(2, struct.pack("=i", -errno.ENODEV))]
        return [DONE]

    kernel_says(monkeypatch, says)
    hooks = list_hooks(["veth0", "gone"])
    assert hooks == [INPUT, Hook("ip", "input", "ip_vs_reply4", "ip_vs", None, None, "")]
    assert [a for a in asked if a[0] == 2] == [(2, hook, "") for hook in range(5)]
    assert [a for a in asked if a[0] == 10] == [(10, hook, "") for hook in range(5)]
    assert [a[2] for a in asked if a[0] == 5] == ["veth0", "gone"]


@pytest.mark.parametrize(
    "answer",
    [
        message(2, struct.pack("=i", -errno.EINVAL)),
        message(2, struct.pack("=i", -errno.EPERM)),
        message(0xC00, bytes(4) + NFT, flags=0x12),
        struct.pack("=IHHII", 3, 0xC00, 2, 1, 0),
    ],
)
def test_a_kernel_that_does_not_list_them_is_told_from_one_that_has_none(
    answer: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel_says(monkeypatch, lambda *_: [answer])
    with pytest.raises(UnlistedError):
        list_hooks([])


def test_hooks_of_more_devices_than_are_asked_for_are_unknown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kernel_says(monkeypatch, lambda *_: [DONE])
    monkeypatch.setattr(netfilter_hooks, "_MOST_DEVICES", 2)
    assert list_hooks(["a", "b"]) == []
    with pytest.raises(UnlistedError):
        list_hooks(["a", "b", "c"])


def hook(function: str, module: str = "", **more: object) -> Hook:
    return INPUT._replace(function=function, module=module, chain=None)._replace(**more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("found", "rules", "problems"),
    [
        (INPUT, [], 0),
        (INPUT._replace(chain=("inet", "t", "other")), [], 1),
        (hook("ipv4_conntrack_in", "nf_conntrack"), [], 0),
        (hook("nf_nat_ipv4_local_in", "nf_nat"), [], 0),
        (hook("ipt_do_table", "ip_tables"), [], 1),
        (hook("ipt_do_table", "ip_tables", family="ip6"), [], 0),
        (hook("iptable_filter_hook", "iptable_filter"), [], 1),
        (hook("ip_vs_reply4", "ip_vs"), [("function", 0, False)], 0),
        (hook("ipv4_synproxy_hook", "nf_synproxy_core"), [("function", 0, False)], 0),
        (hook("foreign_hook", "foreign"), [("function", 0, True)], 0),
        (hook("nf_hook_run_bpf", program=77), [("program", 77, False)], 0),
    ],
)
def test_what_is_no_rule_that_was_read_is_a_suspect_or_is_missed(
    found: Hook, rules: list[tuple[str, int, bool]], problems: int
) -> None:
    others = of_hooks([found], READ, {"ip6"})
    assert [(rule.kind, rule.number, rule.may_reset) for rule in others.rules] == rules
    assert len(others.problems) == problems
    assert all((rule.family, rule.hook) == ("ip", "input") for rule in others.rules)


def test_a_function_at_one_device_sees_no_other() -> None:
    ingress = hook("nf_flow_offload_inet_hook", family="netdev", hook="ingress", device="veth0")
    (rule,) = of_hooks([ingress], READ, ()).rules
    assert (rule.hook, rule.conditions) == ("ingress", (("iifname", "veth0"),))


class Traces:
    """What of the kernel's own code that has hooks leaves traces."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path = path
        self.links: list[tuple[int, ...]] = []
        self.refuses: RefusedError | None = None
        monkeypatch.setattr(netfilter_hooks, "list_hooks", self.unlisted)
        monkeypatch.setattr(netfilter_hooks, "_OWN_NET", path)
        monkeypatch.setattr(netfilter_hooks, "_MODULES", path / "modules")
        monkeypatch.setattr(netfilter_hooks, "_SECURITY_MODULES", path / "lsm")
        monkeypatch.setattr(netfilter_hooks, "bpf_answering", self.next_link)
        monkeypatch.setattr(netfilter_hooks, "bpf", lambda _command, which: which[0])
        monkeypatch.setattr(netfilter_hooks, "_link_info", lambda file: self.links[file - 1])
        monkeypatch.setattr(netfilter_hooks.os, "close", lambda _: None)

    def unlisted(self, _: object) -> list[Hook]:
        raise UnlistedError

    def next_link(self, _: int, attributes: bytes) -> tuple[bytes, RefusedError | None]:
        if self.refuses is not None:
            return attributes, self.refuses
        (link,) = struct.unpack_from("=I", attributes)
        if link >= len(self.links):
            return attributes, RefusedError(errno.ENOENT)
        return struct.pack("=III", link, link + 1, 0), None


@pytest.fixture
def traces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Traces:
    return Traces(tmp_path, monkeypatch)


def others(*mentioned: str) -> Others:
    return besides_rules(READ, (), mentioned, ["lo"])


def places(found: Others) -> set[tuple[str, str, str]]:
    return {(rule.family, rule.hook, rule.chain) for rule in found.rules}


def test_where_nothing_has_a_hook_nothing_is_told(traces: Traces) -> None:
    (traces.path / "modules").write_text("nf_tables 1 0 - Live 0x0\nnfsd 1 0 - Live 0x0 (E)\n")
    (traces.path / "ip_vs").write_text("IP Virtual Server version 1.2.1 (size=4096)\nProt Local\n")
    (traces.path / "lsm").write_text("lockdown,capability,apparmor\n")
    assert others() == Others((), ())


def test_services_of_ipvs_make_its_hooks_suspects(traces: Traces) -> None:
    listed = "IP Virtual Server version 1.2.1\nProt Local\nTCP  C0000201:0CEF rr\n"
    (traces.path / "ip_vs").write_text(listed)
    found = places(others())
    assert {("ip", "input", "ip_vs_in_hook"), ("ip6", "input", "ip_vs_in_hook")} <= found
    assert not [rule for rule in others().rules if rule.may_reset]


@pytest.mark.usefixtures("traces")
def test_what_rules_mention_makes_its_hook_a_suspect() -> None:
    assert ("ip", "input", "ipv4_synproxy_hook") in places(others("synproxy"))
    assert ("netdev", "ingress", "nf_flow_offload_inet_hook") in places(others("flowtable"))


def test_security_modules_have_hooks_on_the_way_out(traces: Traces) -> None:
    (traces.path / "lsm").write_text("lockdown,selinux\n")
    assert {hook for _, hook, _ in places(others())} == {"forward", "output", "postrouting"}


def test_modules_from_outside_the_tree_are_named(traces: Traces) -> None:
    lines = [f"foreign{n} 16384 0 - Live 0x0 (OE)\n" for n in range(4)]
    (traces.path / "modules").write_text("ext4 1 0 - Live 0x0\n" + "".join(lines))
    (problem,) = others().problems
    assert "foreign0, foreign1, foreign2 ..." in problem


def test_bpf_programs_at_netfilters_hooks_are_suspects(traces: Traces) -> None:
    traces.links = [(10, 1, 77, 2, 1), (1, 2, 5, 0, 0), (10, 3, 78, 10, 0)]
    assert others().rules == (
        DropRule("ip", "", "", "input", "program", 77, ()),
        DropRule("ip6", "", "", "prerouting", "program", 78, ()),
    )


@pytest.mark.parametrize(("refused", "is_told"), [(errno.EINVAL, False), (errno.EPERM, True)])
def test_a_kernel_without_bpf_links_has_none_and_one_that_refuses_may(
    refused: int, is_told: bool, traces: Traces
) -> None:
    traces.refuses = RefusedError(refused)
    assert bool(others().problems) == is_told
