"""What the kernel's words for a drop come to, and which rule of a ruleset it can have been."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tcpstuck_bpf import rulesets
from tcpstuck_bpf.judge import drop_cause
from tcpstuck_bpf.judge.drop_cause import NO_NAMES, Cause, function_of, is_by_netfilter
from tcpstuck_bpf.judge.netfilter import (
    BRIDGE,
    MORE_SUSPECTS,
    NOT_THE_RULE,
    NOTHING_QUEUES,
    Read,
    rule_text,
    rules_after,
    suspicion,
)
from tcpstuck_bpf.judge.rule_index import MOST_SUSPECTS
from tcpstuck_bpf.judge.rules import RULES
from tcpstuck_bpf.judge.verdict import KFREE_SKB, Finding, judge
from tcpstuck_bpf.model import Coverage, CoverageGap, Handshake, Moved
from tcpstuck_bpf.output.export import verdict_line
from tcpstuck_bpf.rulesets import KEPT_READINGS, LET_GO, DropRule, KernelNames, Ruleset
from tcpstuck_bpf.steps import WallClock
from tests.builders import (
    NAMES,
    NF_PLACE,
    NF_REASON,
    ack_dropped,
    ack_filtered,
    at,
    four_tuple,
    handshake,
    reports,
    sweep,
)

WHO = four_tuple()
RULE = DropRule("inet", "guard", "acks", "input", "handle", 4, (("dport", "3311"),))
LEGACY = DropRule("ip", "filter", "INPUT", "input", "number", 2, (("protocol", "tcp"),))
POLICY = DropRule("ip", "filter", "INPUT", "input", "policy", 0, ())
VALID = Moved.SYNCOOKIES_RECV


def judged(entry: Handshake, names: KernelNames = NAMES) -> Finding:
    (report,) = reports([sweep(at(60), entry)], at(60))
    finding = judge(report, Coverage("fentry"), names)
    assert finding is not None
    return finding


def named(place: str, reason: str | None) -> KernelNames:
    return KernelNames({NF_PLACE: place}, {NF_REASON: reason}, {}, {})


def filtered(place: str, reason: str | None) -> Finding:
    return judged(ack_filtered(handshake(), at(0.1)), named(place, reason))


def with_readings(*readings: Ruleset) -> Finding:
    """The finding on a drop at 0.1 s, after these readings in order."""
    names = NAMES
    for reading in readings:
        names = names.with_more(NO_NAMES._replace(rulesets={WHO.netns: (reading,)}))
    return judged(ack_filtered(handshake(), at(0.1)), names)


def with_rules(*rules: DropRule, problems: tuple[str, ...] = ()) -> Finding:
    return with_readings(Ruleset(rules, problems, at(0.2)))


def drop_in(finding: Finding) -> dict[str, object]:
    line = json.loads(verdict_line(finding, WallClock(0, 0)))
    assert isinstance(line["drop"], dict)
    return line["drop"]


@pytest.mark.parametrize(
    ("reason", "what"),
    [
        ("NETFILTER_DROP", "netfilter"),
        ("IP_RPFILTER", "rp_filter"),
        ("TC_INGRESS", "tc"),
        ("XDP", "xdp"),
        ("CPU_BACKLOG", "backlog"),
        ("TCP_CSUM", "checksum"),
        ("IP_CSUM", "checksum"),
        ("PKT_TOO_SMALL", "malformed"),
        ("OTHERHOST", "other-host"),
        ("SOCKET_FILTER", "socket-filter"),
        ("TCP_MD5UNEXPECTED", "tcp-auth"),
        ("TCP_AOFAILURE", "tcp-auth"),
        ("XFRM_POLICY", "xfrm"),
        ("TCP_MINTTL", "min-ttl"),
        ("QDISC_DROP", "qdisc"),
        ("QDISC_OVERLIMIT", "qdisc"),
        ("FQ_FLOW_LIMIT", "qdisc"),
        ("SECURITY_HOOK", "lsm"),
        ("TCP_AUTH_HDR", "tcp-auth"),
        ("PSP_INPUT", "psp"),
        ("PFMEMALLOC", "memory"),
        ("IPV6_BAD_EXTHDR", "malformed"),
        ("TCP_LISTEN_OVERFLOW", "accept-queue"),
        ("TCP_RFC7323_TW_PAWS", "other-socket"),
        ("UDP_CSUM", "other"),
        ("SOMETHING_NEW", "other"),
        ("subsystem 3 reason 7", "other"),
    ],
)
def test_a_reason_says_what_it_was_wherever_it_was(reason: str, what: str) -> None:
    finding = filtered("nf_hook_slow+0x1", reason)
    assert finding.verdict == "ack-filtered"
    assert (drop_in(finding)["reason"], drop_in(finding)["what"]) == (reason, what)
    assert not any("judged by the drop site" in sentence for sentence in finding.evidence)
    assert len(finding.meaning) <= 60


@pytest.mark.parametrize("reason", [None, "NOT_SPECIFIED"])
@pytest.mark.parametrize(
    ("place", "what"),
    [
        ("nf_hook_slow+0x41", "netfilter"),
        ("ip_rcv_finish_core.isra.0+0x1f2", "route"),
        ("__netif_receive_skb_core.constprop.0+0x9", "tc"),
        ("do_xdp_generic+0x3b", "xdp"),
        ("veth_xdp_rcv_skb.constprop.0+0x3b", "xdp"),
        ("nf_queue+0x5c", "nfqueue"),
        ("nf_reinject+0x10a", "nfqueue"),
        ("nfqnl_recv_verdict+0x2c0", "nfqueue"),
        ("enqueue_to_backlog+0x10", "backlog"),
        ("tcp_v4_rcv+0x81", "tcp"),
        ("tcp_v6_rcv+0x81", "tcp"),
        ("somewhere+0x81", "other"),
        ("0xffffffff00000000", "other"),
    ],
)
def test_without_a_reason_the_place_has_to_do_and_it_is_said(
    place: str, reason: str | None, what: str
) -> None:
    finding = filtered(place, reason)
    assert drop_in(finding)["what"] == what
    assert drop_in(finding)["place"] == place
    # A rule that was not read may have answered by RST, as TCP may have.
    may_have = ("tcp", "netfilter", "nfqueue")
    assert finding.certainty == ("likely" if what in may_have else "certain")
    assert any("judged by the drop site alone" in sentence for sentence in finding.evidence)


GENERAL = {
    "NOT_SPECIFIED": "no reason: the place has to do",
    "NEIGH_\\w+": "of packets that leave the host",
    "IP_NOPROTO|UNHANDLED_PROTO|INVALID_PROTO": "of packets that are no TCP",
    "UDP_CSUM|ICMP_CSUM|UNIX_\\w+|CAN\\w+|IPV6_NDISC_\\w+|ARP_\\w+": "of other protocols",
    "\\w+CAST_BACKLOG": "of broadcasts and multicasts",
    "NO_TX_TARGET": "of VXLAN's, at the sender",
    "QUEUE_PURGE": "a queue is thrown away as a whole, whichever it is",
    "PACKET_SOCK_ERROR": "the programs leave it out: a capture lost a copy",
}
"""Reasons that have no cause of their own, and why."""


def newest_reasons() -> list[str]:
    lines = (Path(__file__).parent / "drop_reasons.txt").read_text("ascii").splitlines()
    return [line for line in lines if not line.startswith("#")]


@pytest.mark.parametrize("reason", newest_reasons())
def test_every_reason_that_can_hit_an_ack_has_a_cause(reason: str) -> None:
    what = drop_in(filtered("somewhere+0x1", reason))["what"]
    is_general = any(re.fullmatch(pattern, reason) for pattern in GENERAL)
    assert (what == "other") == is_general


def queue_rules(*, queues: int) -> tuple[DropRule, ...]:
    """Three rules; those up to number `queues` may queue the packet, and a reader may answer."""
    return tuple(
        LEGACY._replace(number=n, may_reset=n <= queues, queues=n <= queues) for n in (1, 2, 3)
    )


def with_queue(place: str, *rules: DropRule) -> Finding:
    ruleset = Ruleset(rules, (), at(0.2))
    names = NAMES._replace(places={NF_PLACE: place}, rulesets={WHO.netns: (ruleset,)})
    return judged(ack_filtered(handshake(), at(0.1)), names)


def test_a_queue_without_a_reader_is_named_with_the_rule_that_queues() -> None:
    finding = with_queue("nf_queue+0x5c", *queue_rules(queues=1))
    drop = drop_in(finding)
    assert (drop["what"], drop["rule"], finding.certainty) == ("nfqueue", {"number": 1}, "certain")
    several = with_queue("nf_queue+0x5c", *queue_rules(queues=2))
    assert [c["rule"] for c in drop_in(several)["rule_candidates"]] == [
        {"number": 1},
        {"number": 2},
    ]  # type: ignore[attr-defined]
    none = with_queue("nf_queue+0x5c", *queue_rules(queues=0))
    assert drop_in(none)["rule_candidates"] == []
    assert NOTHING_QUEUES in none.evidence


def test_what_came_back_from_a_queue_is_laid_to_no_rule() -> None:
    """Its reader may have said no, or a rule behind the one that queued it."""
    finding = with_queue("nf_reinject+0x5c", *queue_rules(queues=1))
    drop = drop_in(finding)
    assert (drop["what"], drop["rule"], finding.certainty) == ("nfqueue", None, "likely")
    assert [c["rule"] for c in drop["rule_candidates"]] == [{"number": 1}]  # type: ignore[attr-defined]
    assert NOT_THE_RULE in finding.evidence


def test_a_reason_of_netfilters_does_not_hide_the_queue() -> None:
    names = NAMES._replace(places={NF_PLACE: "nf_reinject+0x1"})
    assert drop_in(judged(ack_filtered(handshake(), at(0.1)), names))["what"] == "nfqueue"
    assert is_by_netfilter("NETFILTER_DROP", "nf_reinject+0x1")
    assert is_by_netfilter(None, "nf_queue+0x1")


def test_the_reverse_path_filter_is_named_where_it_can_be() -> None:
    place = "ip_rcv_finish_core.isra.0+0x1f2"
    words = {
        reason: " ".join(filtered(place, reason).evidence)
        for reason in ("IP_RPFILTER", "NOT_SPECIFIED", None)
    }
    assert {reason for reason, said in words.items() if "reverse path filter" in said} == {
        "IP_RPFILTER",
        None,
    }
    assert "does not say which" in words[None]


def test_the_hook_is_that_of_the_nearest_caller_that_has_one() -> None:
    stack = ("nft_do_chain+0x4", "nft_do_chain_ipv4+0x7", "nf_hook_slow+0x4", "ip_rcv+0x9")
    names = NAMES._replace(stacks={17: (*stack, "__netif_receive_skb_core+0x3", "ip_output+0x7")})
    assert drop_in(judged(ack_filtered(handshake(), at(0.1)), names))["hook"] == "prerouting"
    unseen = ack_filtered(handshake(), at(0.1), filter_stack=0)
    assert drop_in(judged(unseen, names))["hook"] is None
    assert function_of("ip_rcv_finish_core.isra.0+0x1") == "ip_rcv_finish_core"


@pytest.mark.parametrize(
    ("callers", "hook"),
    [
        (("br_nf_pre_routing+0x2", "br_handle_frame+0x7"), "bridge"),
        (("br_pass_frame_up+0x2", "br_handle_frame_finish+0x3"), "bridge"),
        (("ip_local_deliver+0x2", "br_netif_receive_skb+0x9"), "input"),
        (("xfrm4_transport_finish+0x2", "ip_local_deliver+0x7"), "prerouting"),
    ],
)
def test_a_hook_that_runs_on_the_way_through_another_is_not_taken_for_that(
    callers: tuple[str, ...], hook: str
) -> None:
    stack = ("nf_hook_slow+0xa2", *callers, "__netif_receive_skb_core+0x3")
    ruleset = Ruleset((RULE._replace(hook="ingress"), RULE._replace(hook="input")), (), at(0.2))
    names = NAMES._replace(stacks={17: stack}, rulesets={WHO.netns: (ruleset,)})
    drop = drop_in(judged(ack_filtered(handshake(), at(0.1)), names))
    assert drop["hook"] == hook
    assert bool(drop["rule"]) == (hook == "input")


def test_a_lone_suspect_is_named() -> None:
    drop = drop_in(with_rules(RULE, DropRule("ip", "a", "b", "prerouting", "handle", 9, ())))
    found = {key: drop[key] for key in ("hook", "family", "table", "chain", "rule")}
    assert found == {
        "hook": "input",
        "family": "inet",
        "table": "guard",
        "chain": "acks",
        "rule": {"handle": 4},
    }
    assert drop["rule_candidates"] == []
    assert drop_in(with_rules(LEGACY))["rule"] == {"number": 2}
    assert drop_in(with_rules(POLICY))["rule"] == {"policy": True}


def test_several_suspects_are_all_named_and_none_is_accused() -> None:
    finding = with_rules(RULE, LEGACY, POLICY)
    drop = drop_in(finding)
    assert drop["rule"] is drop["family"] is drop["table"] is drop["chain"] is None
    assert drop["rule_candidates"] == [
        {"family": "inet", "table": "guard", "chain": "acks", "rule": {"handle": 4}},
        {"family": "ip", "table": "filter", "chain": "INPUT", "rule": {"number": 2}},
        {"family": "ip", "table": "filter", "chain": "INPUT", "rule": {"policy": True}},
    ]
    (sentence,) = (s for s in finding.evidence if "which one dropped the ACK is unknown" in s)
    assert all(rule_text(rule) in sentence for rule in (RULE, LEGACY, POLICY))


def test_what_could_not_be_read_is_said() -> None:
    problem = "the rules of nft cannot be read: it is not installed"
    assert problem in with_rules(problems=(problem,)).evidence
    assert any("rules were not read" in s for s in filtered("nf_hook_slow+0x1", None).evidence)
    assert any("no rule loaded after the drop" in s for s in with_rules().evidence)


def test_a_client_that_a_rule_answers_by_rst_is_not_surely_stuck() -> None:
    rejecting = RULE._replace(may_reset=True)
    for finding, certainty in (
        (with_rules(RULE), "certain"),
        (with_rules(RULE, LEGACY._replace(may_reset=True)), "likely"),
        (with_rules(rejecting), "possible"),
    ):
        assert finding.certainty == certainty
        assert any("an RST" in s for s in finding.evidence) == (certainty != "certain")


LATER = RULE._replace(number=9)


def test_a_drop_is_laid_to_the_rules_that_were_read_first_after_it() -> None:
    """A rule is taken away and another one comes, while the drop waits for its verdict."""
    readings = (
        Ruleset((), (), at(0)),
        Ruleset((RULE,), (), at(0.2)),
        Ruleset((LATER,), (), at(1.4)),
    )
    assert drop_in(with_readings(*readings))["rule"] == {"handle": 4}


@pytest.mark.parametrize(
    ("readings", "when"),
    [
        ([Ruleset((RULE,), (), at(0))], "before"),
        (
            [Ruleset((RULE._replace(number=n),), (), at(n)) for n in range(1, KEPT_READINGS + 2)],
            "long after",
        ),
    ],
)
def test_rules_of_another_time_accuse_nobody(readings: list[Ruleset], when: str) -> None:
    finding = with_readings(*readings)
    drop = drop_in(finding)
    assert drop["rule"] is None
    assert drop["rule_candidates"]
    assert any(f"were read {when} that drop" in sentence for sentence in finding.evidence)


def test_rules_that_never_change_are_kept_however_often_they_are_read() -> None:
    """A verdict may come minutes after the drop; the drop lies between two readings alike."""
    readings = [Ruleset((RULE,), (), at(n / 100)) for n in range(4 * KEPT_READINGS)]
    assert drop_in(with_readings(*readings))["rule"] == {"handle": 4}
    assert drop_in(with_readings(*readings, Ruleset((LATER,), (), at(2))))["rule"] == {"handle": 4}


def test_rules_of_all_namespaces_together_are_bounded_and_what_was_let_go_accuses_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Any user may make namespaces, rules in them, and others a moment later."""
    monkeypatch.setattr(rulesets, "KEPT_RULES", 20)
    names = NAMES.with_more(
        NO_NAMES._replace(rulesets={WHO.netns: (Ruleset((RULE,), (), at(0.2)),)})
    )
    for n in range(100):
        rules = tuple(RULE._replace(number=100 * n + i) for i in range(8))
        more = {n % 3: (Ruleset(rules, (), at(n)),)}
        names = names.with_more(NO_NAMES._replace(rulesets=more))
    kept = [reading for readings in names.rulesets.values() for reading in readings]
    assert sum(reading.size for reading in kept) <= 20
    assert len(names.rulesets[0]) == KEPT_READINGS
    entry = ack_filtered(handshake(), at(0.1))
    assert drop_in(judged(entry, names))["rule"] == {"handle": 4}
    filled = {WHO.netns: (Ruleset((RULE,) * 30, (), at(0.3)),)}
    finding = judged(entry, names.with_more(NO_NAMES._replace(rulesets=filled)))
    assert drop_in(finding)["rule"] is None
    assert LET_GO in finding.evidence


def test_how_long_after_the_drop_the_rules_were_read_is_told() -> None:
    finding = with_readings(Ruleset((RULE,), (), at(7.6)))
    assert drop_in(finding)["rules_read_ms"] == 7500
    assert any("rules read 7.5 s later" in sentence for sentence in finding.evidence)
    assert drop_in(with_readings(Ruleset((RULE,), (), at(0))))["rules_read_ms"] is None


def test_the_rule_is_in_the_table_and_no_control_character_of_its_name_is() -> None:
    assert "netfilter, inet guard acks, rule handle 4" in with_rules(RULE).meaning
    hostile = with_rules(RULE._replace(chain="\x1b[2Jacks\n"))
    assert all(text.isprintable() for text in (hostile.meaning, *hostile.evidence))


def test_nobody_is_accused_where_not_all_rules_could_be_read() -> None:
    problem = "the rules of iptables-save cannot be read: it is not installed"
    finding = with_rules(RULE, problems=(problem,))
    drop = drop_in(finding)
    assert drop["rule"] is drop["family"] is drop["table"] is drop["chain"] is None
    assert [candidate["rule"] for candidate in drop["rule_candidates"]] == [{"handle": 4}]  # type: ignore[attr-defined]
    assert problem in finding.evidence
    assert any(rule_text(RULE) in s and "is unknown" in s for s in finding.evidence)


@pytest.mark.parametrize(
    ("conditions", "can_be"),
    [
        ((), True),
        ((("protocol", "tcp"), ("dport", "3311"), ("sport", "40000")), True),
        ((("dport", "3000:4000"),), True),
        ((("dport", "3312"),), False),
        ((("dport", "1:3310"),), False),
        ((("protocol", "udp"),), False),
        ((("protocol", "all"),), True),
        ((("nfproto", "ipv6"),), False),
        ((("saddr", "10.0.0.0/8"), ("daddr", "192.0.2.1")), True),
        ((("saddr", "10.1.0.0/16"),), False),
        ((("saddr", "not an address"), ("dport", "http"), ("mark", "7")), True),
    ],
)
def test_a_rule_is_ruled_out_only_by_what_surely_fails(
    conditions: tuple[tuple[str, str], ...], can_be: bool
) -> None:
    read = Read(Ruleset((RULE._replace(conditions=conditions),), ()), 0)
    assert bool(suspicion(read, WHO, "input", False).suspects) == can_be
    assert bool(suspicion(read, WHO, None, True).suspects) == can_be


@pytest.mark.parametrize(
    ("rule", "family", "by_nftables", "can_be"),
    [
        (RULE, 6, True, True),
        (LEGACY, 6, False, False),
        (LEGACY, 4, True, False),
        (LEGACY, 4, False, True),
        (LEGACY._replace(family="bridge"), 4, False, False),
    ],
)
def test_another_family_and_another_back_end_are_no_suspects(
    rule: DropRule, family: int, by_nftables: bool, can_be: bool
) -> None:
    who = four_tuple(family=family)
    read = Read(Ruleset((rule,), ()), 0)
    assert bool(suspicion(read, who, "input", by_nftables).suspects) == can_be


CONNTRACK = DropRule("ip", "nf_conntrack", "nf_confirm", "input", "function", 0, ())
PROGRAM = DropRule("ip", "", "", "input", "program", 77, ())
IPVS = DropRule("ip", "ip_vs", "ip_vs_reply4", "input", "function", 0, ())


def test_code_at_the_hook_that_is_no_rule_is_a_suspect_beside_the_rule() -> None:
    """A rule of nft was named as the only one, beside IPVS or a BPF program."""
    for other, value in (
        (IPVS, {"function": "ip_vs_reply4"}),
        (PROGRAM, {"program": 77}),
        (CONNTRACK, {"function": "nf_confirm"}),
    ):
        drop = drop_in(with_rules(RULE, other))
        assert drop["rule"] is None
        named = {"family": "ip", "table": None, "chain": None, "rule": value}
        assert named in drop["rule_candidates"]  # type: ignore[operator]
        alone = with_rules(other)
        assert drop_in(alone)["rule"] == value
        assert rule_text(other) in " ".join(alone.evidence)


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (RULE, "inet guard acks, rule handle 4"),
        (LEGACY, "ip filter INPUT, rule number 2"),
        (POLICY, "ip filter INPUT, the chain's policy"),
        (PROGRAM, "ip, the BPF program 77"),
        (IPVS, "ip, the hook function ip_vs_reply4 of the module ip_vs"),
        (IPVS._replace(table=""), "ip, the hook function ip_vs_reply4"),
        (RULE._replace(table="nf_conntrack"), "inet nf_conntrack acks, rule handle 4"),
    ],
)
def test_what_names_a_suspect(rule: DropRule, text: str) -> None:
    """Anybody may call a table nf_conntrack."""
    assert rule_text(rule) == text


def test_connection_tracking_is_named_with_what_fills_it() -> None:
    text = rule_text(CONNTRACK)
    assert "connection tracking (nf_confirm;" in text
    assert "net.netfilter.nf_conntrack_max" in text


def test_a_reading_that_began_with_the_drop_is_after_it() -> None:
    read = rules_after([Ruleset((RULE,), (), at(0.1))], at(0.1))
    assert read is not None
    assert (read.after_ns, read.ruleset.problems) == (0, ())


def test_where_only_much_later_readings_are_kept_the_first_of_them_is_nearest() -> None:
    readings = [Ruleset((RULE,), (), at(n)) for n in range(1, KEPT_READINGS + 1)]
    read = rules_after(readings, at(0))
    assert read is not None
    assert read.ruleset.read_ns == at(1)
    assert "long after" in " ".join(read.ruleset.problems)


def test_of_a_bridges_rules_nothing_is_told() -> None:
    found = suspicion(Read(Ruleset((RULE,), ()), 0), WHO, BRIDGE, False)
    assert found.suspects == ()
    assert "bridge" in " ".join(found.notes)


def test_within_nftables_no_other_code_is_a_suspect() -> None:
    names = NAMES._replace(
        places={NF_PLACE: "nft_do_chain+0x47f"},
        rulesets={WHO.netns: (Ruleset((RULE, IPVS, PROGRAM, LEGACY), (), at(0.2)),)},
    )
    assert drop_in(judged(ack_filtered(handshake(), at(0.1)), names))["rule"] == {"handle": 4}


@pytest.mark.parametrize(
    ("place", "is_named"), [("nft_do_chain+0x4", True), ("nf_hook_slow+0x4", False)]
)
def test_what_was_not_read_elsewhere_matters_only_to_what_nftables_did_not_drop(
    place: str, is_named: bool
) -> None:
    missing = "iptables has legacy tables (filter), and nothing that lists them is installed"
    ruleset = Ruleset((RULE,), (), at(0.2), elsewhere=(missing,))
    names = NAMES._replace(places={NF_PLACE: place}, rulesets={WHO.netns: (ruleset,)})
    finding = judged(ack_filtered(handshake(), at(0.1)), names)
    assert (drop_in(finding)["rule"] is not None) == is_named
    assert (missing in finding.evidence) == (not is_named)


COUNTING = (RULE, LATER)


def counted(*packets: int | None, read_s: float, counted_s: float | None = None) -> Ruleset:
    done_s = read_s if counted_s is None else counted_s
    return Ruleset(COUNTING, (), at(read_s), packets=packets, counted_ns=at(done_s), namespace=1)


@pytest.mark.parametrize(
    ("readings", "suspects"),
    [
        ([counted(None, None, read_s=0.2)], [4, 9]),
        ([counted(0, 3, read_s=0.2)], [9]),
        ([counted(0, 0, read_s=0.2)], []),
        ([counted(3, 0, read_s=0.2)], [4]),
        ([counted(3, 5, read_s=0), counted(3, 6, read_s=0.2)], [9]),
        ([counted(3, 5, read_s=0), counted(4, 6, read_s=0.2)], [4, 9]),
        ([counted(3, 5, read_s=0), counted(0, 6, read_s=0.2)], [4, 9]),
        ([counted(3, None, read_s=0), counted(3, None, read_s=0.2)], [9]),
        # Of the last rule there is no counter, at either end.
        ([counted(0, read_s=0.2)], [9]),
        ([counted(3, read_s=0), counted(3, 6, read_s=0.2)], [9]),
        # The reading before had not ended when the packet came, or nobody knows when it did.
        ([counted(3, 5, read_s=0, counted_s=0.15), counted(3, 6, read_s=0.2)], [4, 9]),
        ([counted(3, 5, read_s=0, counted_s=0.095), counted(3, 6, read_s=0.2)], [4, 9]),
        ([counted(3, 5, read_s=0)._replace(counted_ns=0), counted(3, 6, read_s=0.2)], [4, 9]),
        # What was read before was another namespace of this inode number, or may have been.
        ([counted(3, 5, read_s=0)._replace(namespace=2), counted(3, 6, read_s=0.2)], [4, 9]),
        (
            [
                one._replace(namespace=0)
                for one in (counted(3, 5, read_s=0), counted(3, 6, read_s=0.2))
            ],
            [4, 9],
        ),
        # What was read before had other rules.
        (
            [counted(3, 5, read_s=0)._replace(rules=(LATER, RULE)), counted(3, 6, read_s=0.2)],
            [4, 9],
        ),
        ([counted(0, 3, read_s=0)], [4, 9]),
    ],
)
def test_a_counter_that_has_not_counted_the_packet_clears_its_rule(
    readings: list[Ruleset], suspects: list[int]
) -> None:
    drop = drop_in(with_readings(*readings))
    named = [drop["rule"]] if drop["rule"] else [c["rule"] for c in drop["rule_candidates"]]  # type: ignore[attr-defined]
    assert [rule["handle"] for rule in named] == suspects  # type: ignore[index]


def test_of_several_readings_before_a_drop_the_last_has_the_counters_that_tell() -> None:
    readings = [counted(3, n, read_s=n / 100) for n in (0, 1, 20)]
    read = rules_after(readings, at(0.1))
    assert read is not None
    assert (read.before, read.ruleset) == (readings[1], readings[2])


def test_a_ruleset_that_never_changes_keeps_its_counters_of_both_ends() -> None:
    readings = [counted(3, n, read_s=n / 100) for n in range(50)]
    assert drop_in(with_readings(*readings))["rule"] == {"handle": 9}


def test_a_rule_for_a_device_that_is_not_there_is_no_suspect() -> None:
    """`iifname "eth7" drop` beside `iifname "veth0" drop`."""
    rules = tuple(
        RULE._replace(number=n, conditions=(("iifname", name),))
        for n, name in ((1, "eth7"), (2, "veth0"))
    )
    there = ((1, "lo"), (2, "veth0"))
    ruleset = Ruleset(rules, (), at(0.2), devices=there)
    assert drop_in(with_readings(ruleset))["rule"] == {"handle": 2}
    both = ruleset._replace(devices=(*there, (3, "eth7")))
    assert drop_in(with_readings(both))["rule"] is None
    (suspect,) = suspicion(Read(both, 0), WHO, "input", False, device=3).suspects
    assert suspect.number == 1


def test_more_suspects_than_are_named_are_said() -> None:
    rules = tuple(RULE._replace(number=n) for n in range(100))
    finding = with_rules(*rules)
    drop = drop_in(finding)
    assert (drop["rule"], len(drop["rule_candidates"])) == (None, MOST_SUSPECTS)  # type: ignore[arg-type]
    assert MORE_SUSPECTS in finding.evidence
    # One of them that is not named may answer by RST.
    assert finding.certainty == "likely"


names_of_matches = st.one_of(
    st.sampled_from(["protocol", "nfproto", "sport", "dport", "saddr", "daddr"]),
    st.text(max_size=8),
)


@example([("dport", "²")])
@given(st.lists(st.tuples(names_of_matches, st.text(max_size=20)), max_size=4))
def test_no_match_however_strange_is_an_error(conditions: list[tuple[str, str]]) -> None:
    rule = RULE._replace(conditions=tuple(conditions))
    assert len(suspicion(Read(Ruleset((rule,), ()), 0), WHO, None, False).suspects) <= 1


@pytest.mark.parametrize(
    ("reason", "counters", "what", "counter"),
    [
        ("NO_SOCKET", VALID | Moved.LISTEN_OVERFLOWS | Moved.LISTEN_DROPS, "accept-queue", None),
        ("NO_SOCKET", VALID | Moved.LISTEN_DROPS, "child", "ListenDrops"),
        ("NO_SOCKET", VALID, "request", "SyncookiesRecv"),
        ("SECURITY_HOOK", VALID, "lsm", "SyncookiesRecv"),
        ("IP_OUTNOROUTES", VALID, "route", "SyncookiesRecv"),
        ("NOT_SPECIFIED", VALID, None, "SyncookiesRecv"),
        (None, VALID, None, "SyncookiesRecv"),
        ("NO_SOCKET", Moved.UNKNOWN, None, None),
    ],
)
def test_an_ack_that_tcp_itself_dropped_has_its_true_name(
    reason: str | None, counters: Moved, what: str | None, counter: str | None
) -> None:
    entry = ack_dropped(handshake(), at(0.1), counters)
    entry = entry._replace(drop_place=NF_PLACE, drop_reason=NF_REASON, accept_queue=0)
    finding = judged(entry, named("tcp_v4_syn_recv+0x1", reason))
    drop = drop_in(finding)
    assert (drop["reason"], drop["place"], drop["what"]) == (reason, "tcp_v4_syn_recv+0x1", what)
    assert drop["counter"] == (counter or ("ListenOverflows" if what else None))
    assert (finding.verdict == "accept-queue-full") == (what == "accept-queue")
    told = any("does not say which" in sentence for sentence in finding.evidence)
    assert told == (what is None and counter is not None)
    assert all(len(rule.meaning) <= 60 for rule in RULES)


@pytest.mark.parametrize(
    ("coverage", "words"),
    [
        (Coverage("none"), "--no-why"),
        (Coverage("none", gaps=(CoverageGap(KFREE_SKB, "refused", "drops"),)), "(refused): drops"),
        (Coverage("none", frozenset({KFREE_SKB})), ""),
    ],
)
def test_silence_says_where_nobody_looked(coverage: Coverage, words: str) -> None:
    (report,) = reports([sweep(at(60), handshake())], at(60))
    finding = judge(report, coverage)
    assert finding is not None
    assert finding.verdict == "ack-missing"
    found = [s for s in finding.evidence if KFREE_SKB in s or "--no-why" in s]
    assert len(found) == bool(words)
    assert all(words in sentence for sentence in found)


def test_the_docs_have_every_word() -> None:
    text = (Path(__file__).parents[3] / "docs" / "verdicts.md").read_text("utf-8")
    section = text[text.index("## ack-filtered") : text.index("## cookie-rejected")]
    words = set(re.findall(r"[a-z][a-z0-9_]*(?:-[a-z0-9]+)*", section))
    whats = {one.what for one in vars(drop_cause).values() if isinstance(one, Cause)}
    assert len(whats) > 15
    assert whats - words == set()
