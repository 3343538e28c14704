"""Judging a flow: `judge` finds the one rule that matches it and writes its finding.

A missing probe makes a fact unknown, never absent, and the finding says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from tcpstuck_bpf.handshake.entry import bytes_missed, ending_of
from tcpstuck_bpf.handshake.flow import FlowReport, State, TimelineEntry
from tcpstuck_bpf.judge.drop_cause import NO_NAMES, Drop, drop_of
from tcpstuck_bpf.judge.evidence import evidence
from tcpstuck_bpf.judge.netfilter import rule_text
from tcpstuck_bpf.judge.rules import Certainty, Rule, rule_for
from tcpstuck_bpf.model import SOFTIRQ_LOCK, Coverage, Ending, FourTuple, Moved
from tcpstuck_bpf.rulesets import KernelNames

KFREE_SKB = "kfree_skb"


class Finding(NamedTuple):
    """A verdict on one flow, ready to print. Times are CLOCK_MONOTONIC nanoseconds."""

    verdict: str
    stuck: bool
    certainty: Certainty
    four_tuple: FourTuple
    syn_count: int
    cookie_isn: int
    client_isn: int
    first_syn_ns: int
    verdict_ns: int
    age_ns: int
    """Time from the first SYN to the verdict."""
    delay_ns: int | None
    """Time from the first SYN to the connection; None if there is no connection."""
    meaning: str
    evidence: tuple[str, ...]
    cannot_prove: str
    advice: str
    timeline: tuple[TimelineEntry, ...]
    timeline_omitted: int
    """Number of entries left out of the timeline's middle."""
    updates: str | None
    """Name of the verdict on this flow that this one replaces; the same name if only the facts
    about the drop are new."""
    to_be_updated: bool = False
    """Whether the firewall's rules are still to be read, so that another verdict follows."""
    bytes_missed: int = 0
    """Number of the client's bytes that the server's application will never see."""
    rescue_tries: int = 0
    """Number of SYN-ACKs repeated for this handshake."""
    drop: Drop | None = None
    """Where and why this host dropped the ACK."""
    flood_suspected: bool = False
    """Whether the client looks like part of a SYN flood; it then does not count as stuck."""
    listener_socket: int = 0
    """Inode number of the listening socket; 0 if unknown."""
    cause: str = ""
    """What dropped the ACK, in words; empty if the verdict says all that is known."""


def _replaced(report: FlowReport) -> str | None:
    if report.previous is None or report.previous_facts is None:
        return None
    entry, segments = report.previous_facts
    rule = rule_for(report._replace(state=report.previous, handshake=entry, segments=segments))
    return None if rule is None else rule.name


def missing_probes(rule: Rule, family: int, coverage: Coverage) -> tuple[str, ...]:
    """The missing probes that a rule needs for this address family (4 or 6), sorted."""
    other = "_v6_" if family == 4 else "_v4_"
    return tuple(sorted(p for p in rule.needs - coverage.probes if other not in p))


def _gap_sentences(missing: tuple[str, ...], coverage: Coverage) -> Iterator[str]:
    gaps = {gap.probe: gap for gap in coverage.gaps}
    for probe in missing:
        gap = gaps.get(probe)
        why, lost = (f" ({gap.why})", gap.lost) if gap else ("", "what it would show is unknown")
        yield f"no probe on {probe}{why}: {lost}"


class _Words(NamedTuple):
    meaning: str
    cause: str
    advice: str


def _words(rule: Rule, drop: Drop | None, *, in_flood: bool) -> _Words:
    """Meaning and advice: those of the drop's cause if it is known, else the rule's."""
    if in_flood:
        return _Words(FLOOD_MEANING, "", FLOOD_ADVICE)
    if drop is not None and drop.cause is not None:
        named = drop.netfilter.rule
        what = drop.cause.what if named is None else f"{drop.cause.what}, {rule_text(named)}"
        return _Words(f"ACK dropped here before TCP: {what}", what, drop.cause.advice)
    if drop is not None and drop.refusal is not None and drop.refusal.advice:
        what = drop.refusal.what
        return _Words(f"ACK came, dropped by this host: {what}", what, drop.refusal.advice)
    return _Words(rule.meaning, "", rule.advice)


def _sight_of_drops(rule: Rule, coverage: Coverage) -> Iterator[str]:
    """Why this host's own drops are not seen, if the probe for them is missing."""
    if rule.name != "ack-missing" or KFREE_SKB in coverage.probes:
        return
    gap = next((gap for gap in coverage.gaps if gap.probe == KFREE_SKB), None)
    if gap is not None:
        yield f"no probe on {KFREE_SKB} ({gap.why}): {gap.lost}"
    else:
        yield "--no-why: the tool did not look whether this host dropped the ACK"


def _certainty(
    rule: Rule, report: FlowReport, missing: tuple[str, ...], drop: Drop | None
) -> Certainty:
    if not report.handshake.syn_count:
        # The first ACK may have been good, while this one was in progress on another CPU.
        return "possible" if missing else "likely"
    gave_up_maybe = report.state is State.SILENT and report.handshake.syn_count > 1
    if missing or gave_up_maybe or report.flood or report.state is State.UNANSWERED:
        return "possible"
    if ending_of(report.handshake) == Ending.TAKEN_OVER:
        # No program sees the end of the ordinary handshake that took over.
        return "likely"
    if drop is not None and drop.maybe_answered:
        # A matching rule may have answered with an RST, the more so if it is the only match.
        return "likely" if drop.netfilter.rule is None else "possible"
    if drop is not None and drop.netfilter.may_be_unseen:
        # An unread rule may have answered with an RST.
        return "likely"
    cause_unsure = report.handshake.drop_counters & Moved.UNKNOWN
    return "likely" if report.state is State.ACK_DROPPED and cause_unsure else rule.certainty


FLOOD_MEANING = "no ACK got here; looks like a SYN flood's spoofed source"
FLOOD_ADVICE = (
    "no action needed: a spoofed source waits for nothing, and SYN cookies already protect this "
    "host. If these addresses are your clients', look for what drops ACKs on the way to this host"
)

UPDATE_FOLLOWS = "the rules are being read; another verdict will say what they show"
NO_ROOM_FOR_UPDATE = "too many verdicts already wait for the rules: no update will follow"


def with_evidence(finding: Finding, sentence: str) -> Finding:
    """A finding with one more sentence of evidence."""
    return finding._replace(evidence=(*finding.evidence, sentence))


def _unseen_sentences(unseen_acks: int) -> Iterator[str]:
    if unseen_acks:
        yield (
            f"the kernel counted {unseen_acks} valid cookie ACK{'s' * (unseen_acks > 1)} in "
            "this network namespace that no program saw; one may be this client's"
        )


def judge(
    report: FlowReport,
    coverage: Coverage,
    names: KernelNames = NO_NAMES,
    unseen_acks: int = 0,
) -> Finding | None:
    """The verdict on a flow; None if its state has none.

    Missing probes, mixed-up packets and unseen ACKs lower its certainty. `unseen_acks` is the
    number of valid ACKs that no program saw and that may belong to this flow.
    """
    rule = rule_for(report)
    if rule is None:
        return None
    entry = report.handshake
    drop = drop_of(report, names)
    words = _words(rule, drop, in_flood=bool(report.flood))
    missing = missing_probes(rule, report.four_tuple.family, coverage)
    certainty = _certainty(rule, report, missing, drop)
    mixed_up = [gap for gap in coverage.gaps if gap.probe == SOFTIRQ_LOCK]
    if not (rule.stuck or rule.needs):
        unseen_acks = 0
    if mixed_up or unseen_acks:
        certainty = "likely" if certainty == "certain" else "possible"
    return Finding(
        verdict=rule.name,
        stuck=rule.stuck and not report.flood,
        certainty=certainty,
        four_tuple=report.four_tuple,
        syn_count=entry.syn_count,
        cookie_isn=entry.cookie_isn,
        client_isn=entry.client_isn,
        first_syn_ns=entry.first_syn_ns,
        verdict_ns=report.decided_ns,
        age_ns=report.age_ns,
        delay_ns=report.delay_ns,
        meaning=words.meaning,
        evidence=(
            *evidence(report, drop),
            *filter(None, (report.flood,)),
            *_sight_of_drops(rule, coverage),
            *_gap_sentences(missing, coverage),
            *(f"no {gap.probe} ({gap.why}): {gap.lost}" for gap in mixed_up),
            *_unseen_sentences(unseen_acks),
        ),
        cannot_prove=rule.cannot_prove,
        advice=words.advice,
        timeline=report.timeline,
        timeline_omitted=report.timeline_omitted,
        updates=_replaced(report),
        bytes_missed=bytes_missed(entry),
        rescue_tries=sum(attempt.sent for attempt in report.attempts),
        drop=drop,
        flood_suspected=bool(report.flood),
        listener_socket=entry.socket,
        cause=words.cause,
    )
