"""The table of verdicts, and what a finding says of each kind of flow."""

from __future__ import annotations

import pytest

from tcpstuck_bpf.handshake.flow import STUCK_STATES, FlowReport, State
from tcpstuck_bpf.judge.rules import ALL_RULES, RULES, VERDICT_NAMES, Rule
from tcpstuck_bpf.judge.verdict import KFREE_SKB, Finding, judge, missing_probes
from tcpstuck_bpf.model import (
    SOFTIRQ_LOCK,
    Coverage,
    CoverageGap,
    Ending,
    Event,
    EventKind,
    FourTuple,
    Handshake,
    Moved,
    Rescue,
    Row,
    Sweep,
)
from tcpstuck_bpf.steps import Vanished
from tests.builders import (
    ACK,
    CLIENT_ISN,
    COOKIE_ISN,
    FIN,
    MSS,
    OVERFLOW,
    PSH,
    ack_dropped,
    ack_filtered,
    at,
    attempt,
    correlator,
    ended,
    event,
    four_tuple,
    handshake,
    repeated,
    reports,
    seconds,
    sweep,
    time_of,
)

EVERY_PROBE = Coverage(
    "fentry",
    frozenset(
        {
            "tcp_conn_request",
            "cookie_v4_init_sequence",
            "cookie_v6_init_sequence",
            "cookie_v4_check",
            "cookie_v6_check",
            "tcp_rcv_state_process",
            "tcp_check_req",
            KFREE_SKB,
        }
    ),
)
SYN_ONCE = handshake()
RULE = {rule.name: rule for rule in RULES}


def without(*probes: str, gaps: tuple[CoverageGap, ...] = ()) -> Coverage:
    return Coverage("kprobe", EVERY_PROBE.probes - set(probes), gaps)


def finding_of(
    *observations: Event | Sweep | Rescue | Vanished,
    coverage: Coverage = EVERY_PROBE,
    tell_healthy: bool = False,
    unseen_acks: int = 0,
) -> Finding:
    """The verdict on the last report of these observations, each advanced to its time."""
    watching = correlator(tell_healthy=tell_healthy)
    told: list[FlowReport] = []
    for observation in observations:
        told += reports([observation], time_of(observation), watching)
    finding = judge(told[-1], coverage, unseen_acks=unseen_acks)
    assert finding is not None
    return finding


def text_of(finding: Finding) -> str:
    return "\n".join(finding.evidence)


def swept(entry: Handshake, after_s: float = 60) -> Sweep:
    return sweep(at(after_s), entry)


DROPPED = ack_dropped(SYN_ONCE, at(0.0121))
FILTERED = ack_filtered(SYN_ONCE, at(0.0121))
CASES: dict[str, list[Event | Sweep | Rescue | Vanished]] = {
    "ack-filtered": [event(EventKind.ACK_FILTERED, FILTERED, at(0.0121)), swept(FILTERED)],
    "completed": [
        event(EventKind.COMPLETED, ended(SYN_ONCE, Ending.COMPLETED, at(0.5), 1), at(0.5))
    ],
    "recovered": [
        swept(SYN_ONCE, 3),
        event(EventKind.COMPLETED, ended(SYN_ONCE, Ending.COMPLETED, at(9), 1), at(9)),
    ],
    "rescued": [
        swept(SYN_ONCE, 3),
        attempt(SYN_ONCE, at(3.1)),
        event(EventKind.COMPLETED, ended(SYN_ONCE, Ending.COMPLETED, at(3.2), 1), at(3.2)),
    ],
    "ack-missing": [swept(SYN_ONCE)],
    "accept-queue-full": [swept(DROPPED)],
    "ack-failed": [swept(ack_dropped(SYN_ONCE, at(1), Moved.SYNCOOKIES_RECV))],
    "cookie-rejected": [swept(ended(SYN_ONCE, Ending.REJECTED, at(1)))],
    "no-listener": [swept(ended(SYN_ONCE, Ending.NO_LISTENER, at(1)))],
    "namespace-gone": [swept(SYN_ONCE), Vanished(at(61), (four_tuple().netns,))],
    "client-reset": [swept(ended(SYN_ONCE, Ending.RESET, at(1)))],
    "synack-missing": [swept(repeated(SYN_ONCE, at(1), at(3)))],
    "data-lost": [swept(ended(SYN_ONCE._replace(bytes_missed=2), Ending.COMPLETED, at(0.5), 1))],
}
STUCK = {"ack-missing", "ack-filtered", "accept-queue-full", "ack-failed"}


def test_there_is_a_case_for_every_rule() -> None:
    assert set(CASES) == set(RULE)


@pytest.mark.parametrize("name", CASES)
def test_verdicts_are_the_ones_of_the_design(name: str) -> None:
    finding = finding_of(*CASES[name], tell_healthy=name == "completed")
    assert finding.verdict == name
    assert finding.stuck == (name in STUCK)
    likely = name in ("ack-missing", "namespace-gone")
    assert finding.certainty == ("likely" if likely else "certain")
    assert (finding.client_isn, finding.first_syn_ns) == (CLIENT_ISN, SYN_ONCE.first_syn_ns)
    assert finding.verdict_ns == finding.first_syn_ns + finding.age_ns
    assert (finding.delay_ns is not None) == (
        name in ("completed", "recovered", "rescued", "data-lost")
    )
    assert f"cookie SYN-ACK {finding.cookie_isn:#010x}" in text_of(finding)
    assert f"MSS {MSS}" in text_of(finding)


@pytest.mark.parametrize("name", CASES)
def test_what_is_stuck_for_the_correlator_is_stuck_for_the_rule(name: str) -> None:
    watching = correlator(tell_healthy=True)
    told = [r for o in CASES[name] for r in reports([o], time_of(o), watching)]
    assert RULE[name].stuck == (told[-1].state in STUCK_STATES)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_rules_are_fit_to_print(rule: Rule) -> None:
    texts = (rule.meaning, rule.proves, rule.cannot_prove, rule.advice)
    assert len(rule.meaning) <= 60
    for text in texts:
        assert text == text.strip()
        assert text.isprintable()
        assert text


def test_names_are_unique() -> None:
    assert len(set(VERDICT_NAMES)) == len(VERDICT_NAMES) == len(ALL_RULES)


@pytest.mark.parametrize("state", [State.TAKEN_OVER, State.SUPERSEDED])
def test_states_that_are_never_told_have_no_verdict(state: State) -> None:
    report = reports([swept(SYN_ONCE)], at(60))[0]
    assert judge(report._replace(state=state), EVERY_PROBE) is None


@pytest.mark.parametrize(
    ("before", "name"),
    [
        (SYN_ONCE, "ack-missing"),
        (ack_dropped(SYN_ONCE, at(1)), "accept-queue-full"),
        (ack_dropped(SYN_ONCE, at(1), Moved.LISTEN_DROPS), "ack-failed"),
        (repeated(SYN_ONCE, at(1), at(3)), "synack-missing"),
    ],
)
def test_an_update_names_the_verdict_it_replaces(before: Handshake, name: str) -> None:
    # Another drop, for another reason, right before the end must not change what was said.
    after = ack_dropped(before, at(20), OVERFLOW) if before.acks_dropped else before
    after = ended(after, Ending.RESET, at(21))
    finding = finding_of(swept(before, 10), event(EventKind.RESET, after, at(21)))
    assert (finding.verdict, finding.updates) == ("client-reset", name)
    assert finding_of(swept(before, 10)).updates is None


@pytest.mark.parametrize("queues", [(3, 51), (51, 3)])
def test_a_verdict_is_replaced_by_the_name_it_was_told_by(queues: tuple[int, int]) -> None:
    """Whether the queue was full is judged by its length where the kernel's counters are hidden."""
    first = ack_dropped(handshake(accept_queue=0), at(0.1), Moved.UNKNOWN)
    second = ack_dropped(first, at(5), Moved.UNKNOWN)
    end = ended(second, Ending.COMPLETED, at(6))
    watching = correlator()
    dropped = (
        event(EventKind.ACK_DROPPED, entry, time_ns, accept_queue=length)
        for entry, time_ns, length in zip((first, second), (at(0.1), at(5)), queues)
    )
    told = reports([next(dropped), sweep(at(4), first)], at(4), watching)
    told += reports([next(dropped), event(EventKind.COMPLETED, end, at(6))], at(6), watching)
    before, after = (judge(report, EVERY_PROBE) for report in told)
    assert before is not None
    assert after is not None
    assert after.updates == before.verdict


def test_silence_after_one_syn_has_its_figures() -> None:
    assert finding_of(swept(SYN_ONCE)).evidence == (
        f"1 SYN, cookie SYN-ACK {COOKIE_ISN:#010x} sent at +0.0 ms (MSS {MSS})",
        "no ACK, no RST and no repeated SYN seen within 3.0 s",
    )


def test_a_client_that_may_have_given_up_is_only_possibly_stuck() -> None:
    finding = finding_of(swept(repeated(SYN_ONCE, at(1))))
    assert (finding.verdict, finding.certainty, finding.syn_count) == ("ack-missing", "possible", 2)
    assert "repeated its SYN once after 1.0 s, then stopped" in text_of(finding)
    assert f"{COOKIE_ISN + 1:#010x}" in text_of(finding)


def test_dropped_acks_have_their_figures() -> None:
    entry = ack_dropped(ack_dropped(DROPPED, at(1)), at(3.5))
    seen = event(EventKind.ACK_DROPPED, entry, at(3.5), accept_queue=129, accept_queue_limit=128)
    finding = finding_of(seen, swept(entry))
    assert (
        "ACK dropped 3 times, first at +12.1 ms, last at +3500.0 ms: accept queue 129 of 128"
        in (finding.evidence)
    )
    assert "kernel counters that moved: SyncookiesRecv, ListenOverflows, ListenDrops" in (
        finding.evidence
    )


def test_without_the_event_the_queue_is_the_one_the_syn_met() -> None:
    queue = f"accept queue {DROPPED.accept_queue} of {DROPPED.accept_queue_limit} when the SYN came"
    assert f"ACK dropped once at +12.1 ms: {queue}" in finding_of(swept(DROPPED)).evidence


@pytest.mark.parametrize(
    ("flags", "payload_length", "sentence"),
    [
        (ACK, 0, None),
        (ACK | PSH, 12, "keeps retransmitting it"),
        (ACK | FIN, 0, "has closed its side"),
    ],
)
def test_what_a_dropped_segment_carried_is_told(
    flags: int, payload_length: int, sentence: str | None
) -> None:
    seen = event(
        EventKind.ACK_DROPPED, DROPPED, at(0.0121), tcp_flags=flags, payload_length=payload_length
    )
    text = text_of(finding_of(seen, swept(DROPPED)))
    assert ("a segment carried" in text) == (sentence is not None)
    assert (sentence or "") in text


@pytest.mark.parametrize(
    ("counters", "name", "sentence"),
    [
        (Moved.LISTEN_OVERFLOWS, "accept-queue-full", "ListenOverflows"),
        (Moved.SYNCOOKIES_RECV | Moved.LISTEN_DROPS, "ack-failed", "binding the child socket"),
        (Moved.SYNCOOKIES_RECV, "ack-failed", "security module"),
        (Moved.NOTHING, "ack-failed", "moved: none"),
    ],
)
def test_the_cause_of_a_drop_is_what_the_counters_say(
    counters: int, name: str, sentence: str
) -> None:
    finding = finding_of(swept(ack_dropped(SYN_ONCE, at(1), counters)))
    assert (finding.verdict, finding.certainty) == (name, "certain")
    assert sentence in text_of(finding)


def test_a_client_whose_syn_was_not_seen_is_told_by_its_ack() -> None:
    entry = ack_dropped(SYN_ONCE._replace(syn_count=0), at(0))
    seen = event(EventKind.ACK_DROPPED, entry, at(0))
    finding = finding_of(seen, swept(entry))
    assert (finding.verdict, finding.certainty) == ("accept-queue-full", "likely")
    assert (finding.syn_count, finding.age_ns) == (0, seconds(3))
    assert "the SYN was not seen" in text_of(finding)
    assert "1 SYN" not in text_of(finding)
    assert [line.what for line in finding.timeline] == ["ACK dropped"]


@pytest.mark.parametrize(
    ("in_queue", "name"),
    [(50, "ack-failed"), (51, "accept-queue-full")],
)
@pytest.mark.parametrize("event_is_lost", [False, True])
def test_without_counters_the_accept_queue_tells_the_likely_cause(
    in_queue: int, name: str, event_is_lost: bool
) -> None:
    entry = ack_dropped(
        SYN_ONCE._replace(accept_queue=in_queue, accept_queue_limit=50), at(1), Moved.UNKNOWN
    )
    seen = event(EventKind.ACK_DROPPED, entry, at(1), accept_queue=in_queue, accept_queue_limit=50)
    finding = finding_of(*([] if event_is_lost else [seen]), swept(entry))
    assert (finding.verdict, finding.certainty) == (name, "likely")
    assert "could not be read: judged by the accept queue" in text_of(finding)


def test_without_counters_it_is_the_queue_at_the_ack_that_tells_and_not_at_another_segment() -> (
    None
):
    """The queue was full when the client repeated its SYN, and not when its ACK was dropped."""
    again = repeated(SYN_ONCE, at(0.5))
    entry = ack_dropped(again, at(1), Moved.UNKNOWN)
    queue = {"accept_queue_limit": 50}
    finding = finding_of(
        event(EventKind.SYN_REPEATED, again, at(0.5), accept_queue=51, **queue),
        event(EventKind.ACK_DROPPED, entry, at(1), accept_queue=3, **queue),
        swept(entry),
    )
    assert finding.verdict == "ack-failed"


@pytest.mark.parametrize(
    ("unseen", "words"), [(1, "1 valid cookie ACK"), (2, "2 valid cookie ACKs")]
)
def test_how_many_acks_passed_unseen_is_said(unseen: int, words: str) -> None:
    assert words in text_of(finding_of(*CASES["ack-missing"], unseen_acks=unseen))


@pytest.mark.parametrize(
    ("counters", "sentence"),
    [
        (Moved.SYNCOOKIES_FAILED, "bad or has expired"),
        (Moved.SYNCOOKIES_RECV, "timestamp option"),
        (Moved.NOTHING, "did not check"),
        (Moved.UNKNOWN, "cause is unknown"),
    ],
)
def test_the_cause_of_a_rejection_is_what_the_counters_say(counters: int, sentence: str) -> None:
    causes = ("bad or has expired", "timestamp option", "did not check", "cause is unknown")
    text = text_of(finding_of(swept(ended(SYN_ONCE, Ending.REJECTED, at(1), counters))))
    assert [cause for cause in causes if cause in text] == [sentence]


@pytest.mark.parametrize(
    ("sequence", "acknowledgement", "after_s", "sentence"),
    [
        (CLIENT_ISN, COOKIE_ISN + 1, 30, "keep-alive probe"),
        (CLIENT_ISN + 1 + 5, COOKIE_ISN + 1, 30, "5 bytes before it"),
        (CLIENT_ISN + 1, COOKIE_ISN + 1, 90, "more than 60 s"),
        (CLIENT_ISN + 1, COOKIE_ISN + 9, 30, f"the cookie's {COOKIE_ISN + 1:#010x}"),
        (CLIENT_ISN + 1, COOKIE_ISN + 1, 30, None),
    ],
)
def test_a_rejected_segment_tells_what_kind_it_is(
    sequence: int, acknowledgement: int, after_s: float, sentence: str | None
) -> None:
    entry = ended(SYN_ONCE, Ending.REJECTED, at(after_s), Moved.SYNCOOKIES_FAILED)
    kinds = ("keep-alive probe", "bytes before it", "more than 60 s", "the cookie's")
    seen = event(
        EventKind.ACK_REJECTED,
        entry,
        at(after_s),
        sequence=sequence,
        acknowledgement=acknowledgement,
    )
    text = text_of(finding_of(seen))
    assert sum(kind in text for kind in kinds) == (sentence is not None)
    assert (sentence or "") in text


def test_sequence_numbers_wrap() -> None:
    entry = handshake(client_isn=2**32 - 1, cookie_isn=2**32 - 1)
    entry = ended(entry, Ending.REJECTED, at(1), Moved.SYNCOOKIES_FAILED)
    seen = event(EventKind.ACK_REJECTED, entry, at(1), sequence=2, acknowledgement=0)
    text = text_of(finding_of(seen))
    assert "seq ISN+3" in text
    assert "2 bytes before it" in text


def test_a_syn_dropped_by_this_host_is_not_blamed_on_the_network() -> None:
    entry = repeated(SYN_ONCE, at(1), at(3))._replace(syns_dropped=2)
    seen = event(EventKind.SYN_DROPPED, entry, at(3), accept_queue=6, accept_queue_limit=5)
    finding = finding_of(seen, swept(entry))
    assert finding.verdict == "synack-missing"
    assert "SYN dropped 2 times by this host, without a SYN-ACK: accept queue 6 of 5" in (
        finding.evidence
    )
    assert "in answer to 1 SYN-ACKs" in text_of(finding)
    assert "backlog" in finding.advice


def test_an_mss_that_could_not_be_read_is_said_to_be_unknown() -> None:
    finding = finding_of(swept(SYN_ONCE._replace(mss=0), 3))
    assert "(MSS unknown)" in text_of(finding)
    assert "MSS 0" not in text_of(finding)


def test_a_handshake_taken_over_tells_by_what() -> None:
    entry = ended(SYN_ONCE, Ending.TAKEN_OVER, at(9))
    seen = event(EventKind.TAKEN_OVER, entry, at(9))
    finding = finding_of(swept(SYN_ONCE, 3), seen)
    assert (finding.verdict, finding.updates) == ("recovered", "ack-missing")
    assert finding.certainty == "likely"
    assert "a repeated SYN was answered by a normal" in text_of(finding)


def test_a_recovery_tells_the_delay_and_by_what() -> None:
    entry = ended(SYN_ONCE, Ending.COMPLETED, at(42), Moved.SYNCOOKIES_RECV)
    fin = event(EventKind.COMPLETED, entry, at(42), tcp_flags=FIN | ACK)
    finding = finding_of(swept(SYN_ONCE, 3), fin)
    assert finding.delay_ns == finding.age_ns == seconds(42)
    assert "connected at +42000.0 ms by FIN,ACK with 0 bytes of data, 42.0 s after the SYN" in (
        finding.evidence
    )


def test_a_connection_that_lost_its_first_bytes_is_not_called_healthy_only() -> None:
    entry = ended(SYN_ONCE._replace(bytes_missed=2), Ending.COMPLETED, at(1), Moved.SYNCOOKIES_RECV)
    seen = event(EventKind.COMPLETED, entry, at(1), sequence=CLIENT_ISN + 3)
    finding = finding_of(seen)
    assert (finding.verdict, finding.bytes_missed) == ("data-lost", 2)
    assert "that segment has seq ISN+3" in text_of(finding)
    assert "the 2 bytes before it" in text_of(finding)


@pytest.mark.parametrize("before", [SYN_ONCE, DROPPED, repeated(SYN_ONCE, at(1), at(3))])
def test_data_that_a_stuck_client_lost_is_told_and_not_its_recovery(before: Handshake) -> None:
    entry = ended(before._replace(bytes_missed=1), Ending.COMPLETED, at(20), 1)
    was = finding_of(swept(before, 10)).verdict
    for seen in (event(EventKind.COMPLETED, entry, at(20)), swept(entry, 20)):
        finding = finding_of(swept(before, 10), seen)
        assert (finding.verdict, finding.updates) == ("data-lost", was)
        assert "the byte before it" in text_of(finding)


def test_a_connection_made_by_a_keep_alive_probe_is_not_told_as_sound() -> None:
    missed = SYN_ONCE._replace(bytes_missed=2**32 - 1)
    entry = ended(missed, Ending.COMPLETED, at(1), Moved.SYNCOOKIES_RECV)
    seen = event(EventKind.COMPLETED, entry, at(1), sequence=CLIENT_ISN)
    for finding in (finding_of(seen), finding_of(swept(entry, 1))):
        assert (finding.verdict, finding.bytes_missed) == ("data-lost", -1)
        assert "seq ISN+0, like a keep-alive probe" in text_of(finding)
        assert "waits for the byte before ISN+1" in text_of(finding)


class TestCoverage:
    """A probe that is missing makes a fact unknown, never absent."""

    @pytest.mark.parametrize("probe", ["cookie_v4_check", "tcp_conn_request"])
    def test_silence_is_only_possible_where_not_everything_is_heard(self, probe: str) -> None:
        gap = CoverageGap(probe, "inlined in this kernel", "something is not seen")
        finding = finding_of(swept(SYN_ONCE), coverage=without(probe, gaps=(gap,)))
        assert (finding.verdict, finding.certainty) == ("ack-missing", "possible")
        assert finding.evidence[-1] == (
            f"no probe on {probe} (inlined in this kernel): something is not seen"
        )

    def test_a_gap_that_nobody_explained_is_told_as_well(self) -> None:
        finding = finding_of(swept(SYN_ONCE), coverage=without("cookie_v4_check"))
        assert "no probe on cookie_v4_check: what it would show is unknown" in finding.evidence

    @pytest.mark.parametrize("name", sorted(CASES))
    def test_where_packets_may_be_mixed_up_nothing_is_certain(self, name: str) -> None:
        gap = CoverageGap(SOFTIRQ_LOCK, "PREEMPT_RT", "one packet may be taken for another")
        sure, unsure = (
            finding_of(*CASES[name], coverage=coverage, tell_healthy=name == "completed")
            for coverage in (EVERY_PROBE, without(gaps=(gap,)))
        )
        lower = {"certain": "likely", "likely": "possible", "possible": "possible"}
        assert (unsure.verdict, unsure.certainty) == (sure.verdict, lower[sure.certainty])
        assert unsure.evidence[-1] == f"no {SOFTIRQ_LOCK} (PREEMPT_RT): {gap.lost}"

    @pytest.mark.parametrize("name", sorted(CASES))
    def test_acks_that_passed_unseen_leave_no_silence_certain(self, name: str) -> None:
        sure, unsure = (
            finding_of(*CASES[name], tell_healthy=name == "completed", unseen_acks=unseen)
            for unseen in (0, 2)
        )
        assert unsure.verdict == sure.verdict
        if sure.stuck or name == "synack-missing":
            lower = {"certain": "likely", "likely": "possible", "possible": "possible"}
            assert unsure.certainty == lower[sure.certainty]
            assert "2 valid cookie ACKs" in unsure.evidence[-1]
        else:
            assert unsure == sure

    @pytest.mark.parametrize(("family", "other"), [(4, "cookie_v6_check"), (6, "cookie_v4_check")])
    def test_the_other_family_does_not_matter(self, family: int, other: str) -> None:
        key: FourTuple = four_tuple(1, family)
        seen = Sweep(at(9), (Row(key, SYN_ONCE),))
        finding = finding_of(seen, coverage=without(other))
        assert (finding.four_tuple, finding.certainty) == (key, "likely")

    @pytest.mark.parametrize(
        "name", ["client-reset", "cookie-rejected", "no-listener", "recovered", "completed"]
    )
    def test_a_fact_that_was_seen_needs_no_other_probe(self, name: str) -> None:
        finding = finding_of(
            *CASES[name], coverage=Coverage("none"), tell_healthy=name == "completed"
        )
        assert finding.certainty == "certain"

    @pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
    @pytest.mark.parametrize("family", [4, 6])
    def test_probes_are_called_by_names_that_exist(self, rule: Rule, family: int) -> None:
        assert rule.needs <= EVERY_PROBE.probes
        assert missing_probes(rule, family, EVERY_PROBE) == ()
