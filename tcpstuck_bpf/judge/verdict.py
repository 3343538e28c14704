"""Verdicts are data: a table of conditions, and what each verdict means, proves and advises.

`judge` finds the one rule that matches a flow and writes its finding. A missing probe makes a fact
unknown, never absent, and the finding says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

from tcpstuck_bpf.handshake.entry import bytes_missed, ending_of
from tcpstuck_bpf.handshake.flow import FlowReport, State, TimelineEntry
from tcpstuck_bpf.judge.drop_cause import NO_NAMES, Drop, drop_of
from tcpstuck_bpf.judge.evidence import evidence
from tcpstuck_bpf.judge.netfilter import rule_text
from tcpstuck_bpf.model import SOFTIRQ_LOCK, Coverage, Ending, EventKind, FourTuple, Moved
from tcpstuck_bpf.rulesets import KernelNames

Certainty = Literal["certain", "likely", "possible"]

KFREE_SKB = "kfree_skb"
COOKIE_CHECKS = frozenset({"cookie_v4_check", "cookie_v6_check"})
# ACKs and RSTs that reach a listener go through cookie_vX_check, and dropped repeated SYNs end in
# tcp_conn_request. So silence is known only if both are probed.
_SILENCE_PROBES = COOKIE_CHECKS | {"tcp_conn_request"}

RAISE_BACKLOG = (
    "raise the listener's backlog (MySQL: back_log) and net.core.somaxconn, then restart the "
    "server: both take effect when it calls listen()"
)


class Rule(NamedTuple):
    """One verdict. `meaning` is for the table: at most 60 characters."""

    name: str
    stuck: bool
    """Whether the client thinks it is connected and the server has no record of it."""
    certainty: Certainty
    condition: Callable[[FlowReport], bool]
    meaning: str
    proves: str
    cannot_prove: str
    advice: str
    needs: frozenset[str] = frozenset()
    """Probes (kernel functions) without which the absence of a packet is not known."""


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


def _accept_queue_was_full(report: FlowReport) -> bool:
    """Whether the accept queue was full, by the kernel's counters, else by the queue's length.

    The queue is full if it has more entries than the limit (sk_acceptq_is_full() of
    include/net/sock.h).
    """
    entry = report.handshake
    if not entry.drop_counters & Moved.UNKNOWN:
        return bool(entry.drop_counters & Moved.LISTEN_OVERFLOWS)
    drops = [segment for segment in report.segments if segment.kind == EventKind.ACK_DROPPED]
    if not drops:
        return entry.accept_queue > entry.accept_queue_limit
    return any(drop.accept_queue > drop.accept_queue_limit for drop in drops)


def _is(state: State) -> Callable[[FlowReport], bool]:
    return lambda report: report.state is state


def _dropped(*, by_full_queue: bool) -> Callable[[FlowReport], bool]:
    return lambda report: (
        report.state is State.ACK_DROPPED and _accept_queue_was_full(report) == by_full_queue
    )


RULES: tuple[Rule, ...] = (
    Rule(
        name="completed",
        stuck=False,
        certainty="certain",
        condition=_is(State.COMPLETED),
        meaning="connected",
        proves="the cookie was valid, and the kernel made the server's socket (cookie_vX_check)",
        cannot_prove="whether the server has accepted it, or will answer",
        advice="nothing to do",
    ),
    Rule(
        name="recovered",
        stuck=False,
        certainty="certain",
        condition=_is(State.RECOVERED),
        meaning="was stuck; its own packet connected it",
        proves="the server knows the connection now",
        cannot_prove="whether the client's application still waits for it",
        advice="nothing to do for this connection; its earlier verdict names the cause",
    ),
    Rule(
        name="rescued",
        stuck=False,
        certainty="certain",
        condition=_is(State.RESCUED),
        meaning="was stuck; our repeated SYN-ACK connected it",
        proves="the server knows the connection now, by the bare ACK that came after our SYN-ACK",
        cannot_prove="whether the client's application still waits for it",
        advice="nothing to do for this connection; its earlier verdict names the cause",
    ),
    Rule(
        name="ack-missing",
        stuck=True,
        certainty="likely",
        condition=lambda report: report.state in (State.SILENT, State.UNANSWERED),
        meaning="no ACK got here; client likely thinks it is connected",
        proves="no ACK, RST or further SYN of this client reached TCP on this host in time",
        cannot_prove=(
            "that the client is real: a spoofed or dead client looks the same; nor where its ACK "
            "was lost: drops in native XDP, in another network namespace of this host, before a "
            "DNAT, in the network and in the client's own stack are not visible here"
        ),
        advice=(
            "look for what drops ACKs on the way to this host: a firewall that sees one direction "
            "only, native XDP on this host, the client's own outgoing rules. "
            "Many from one unknown source: probably a SYN flood; no action needed"
        ),
        needs=_SILENCE_PROBES,
    ),
    Rule(
        name="ack-filtered",
        stuck=True,
        certainty="certain",
        condition=_is(State.ACK_FILTERED),
        meaning="ACK came to this host, dropped before TCP",
        proves="an ACK of this handshake came to this host and was dropped before TCP",
        cannot_prove="whether the client's application still waits",
        advice="look at what the evidence names, in the kernel's words",
    ),
    Rule(
        name="accept-queue-full",
        stuck=True,
        certainty="certain",
        condition=_dropped(by_full_queue=True),
        meaning="ACK came, dropped: accept queue full",
        proves="a valid ACK arrived and was dropped because the accept queue was full",
        cannot_prove="whether the client's application still waits",
        advice=(
            f"find out why the server does not accept (paused? out of threads?); {RAISE_BACKLOG}. "
            "On clients, a read time-out or TCP keep-alive turns the hang into an error"
        ),
        needs=COOKIE_CHECKS,
    ),
    Rule(
        name="ack-failed",
        stuck=True,
        certainty="certain",
        condition=_dropped(by_full_queue=False),
        meaning="ACK came, dropped by this host for another reason",
        proves="an ACK arrived and cookie_vX_check dropped it without an answer",
        cannot_prove=(
            "which of memory, route, security module, bind or the client's own request in the SYN "
            "queue refused it"
        ),
        advice=(
            "look at dmesg for denials and memory pressure (net.ipv4.tcp_mem, cgroup limits), and "
            "at the route back to the client"
        ),
        needs=COOKIE_CHECKS,
    ),
    Rule(
        name="cookie-rejected",
        stuck=False,
        certainty="certain",
        condition=_is(State.REJECTED),
        meaning="cookie refused, RST sent: the client gets an error",
        proves="an ACK arrived, and the listener answers it with an RST",
        cannot_prove="that the RST reaches the client",
        advice=(
            "if the ACK is late, look for delay between client and server: a cookie lives 60 to "
            "120 s; if net.ipv4.tcp_syncookies was changed, set it back to 1"
        ),
    ),
    Rule(
        name="no-listener",
        stuck=False,
        certainty="certain",
        condition=_is(State.NO_LISTENER),
        meaning="the listener is gone, RST sent: the client gets an error",
        proves="a segment of the client found no socket, and the kernel answers it with an RST",
        cannot_prove="that the RST reaches the client",
        advice=(
            "the server closed its listening socket between the SYN-ACK and this segment (a "
            "restart?): nothing to do for this client, it gets ECONNRESET and may connect again"
        ),
    ),
    Rule(
        name="namespace-gone",
        stuck=False,
        certainty="likely",
        condition=_is(State.NAMESPACE_GONE),
        meaning="was stuck; its server's network namespace is gone",
        proves=(
            "no process, name or mount leads to that network namespace any more, or another "
            "namespace has its number by now"
        ),
        cannot_prove=(
            "that no open file or socket still holds it (a segment that arrives there revokes this "
            "verdict), nor whether the client has noticed"
        ),
        advice=(
            "no action needed here: the container or namespace of this server was removed. A "
            "client that waits for a greeting goes on waiting; let it connect again"
        ),
    ),
    Rule(
        name="client-reset",
        stuck=False,
        certainty="certain",
        condition=_is(State.RESET),
        meaning="the client's address sent an RST: no connection wanted",
        proves="an RST came from the client's address and port",
        cannot_prove="whether the client closed, or never sent the SYN (spoofed source)",
        advice="a few: nothing to do; many: look for spoofed SYNs or impatient health checks",
    ),
    Rule(
        name="synack-missing",
        stuck=False,
        certainty="certain",
        condition=_is(State.REPEATING),
        meaning="client repeats its SYN: it sees no SYN-ACK, and knows",
        proves="the client repeats its SYN, and none of its ACKs reached TCP on this host",
        cannot_prove="where the SYN-ACKs are lost, nor whether the last of them got through",
        advice=(
            "look at the path back to the client: outgoing iptables/nft rules, route, rp_filter at "
            f"its end. If SYNs were dropped here: {RAISE_BACKLOG}"
        ),
        needs=COOKIE_CHECKS,
    ),
    Rule(
        name="data-lost",
        stuck=False,
        certainty="certain",
        condition=_is(State.DATA_LOST),
        meaning="connected, but the server missed the first bytes",
        proves=(
            "the segment that validated the cookie was not the client's first: the server's "
            "socket starts at the wrong byte of the stream, and neither end gets an error"
        ),
        cannot_prove="what the bytes were; the last of them may have been a FIN and no data",
        advice=(
            "close that connection on the server: the server misses the beginning of the stream, "
            "and neither end gets an error. Then find out what drops the client's first segments: "
            "rules that drop ACKs before TCP, or a full accept queue"
        ),
    ),
)

VERDICT_NAMES: tuple[str, ...] = tuple(rule.name for rule in RULES)
"""All verdict names, for options that take one."""


def rule_for(report: FlowReport) -> Rule | None:
    """The rule that matches a flow; None for a state without a verdict (taken over, superseded)."""
    return next((rule for rule in RULES if rule.condition(report)), None)


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
