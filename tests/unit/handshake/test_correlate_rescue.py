"""What becomes of a flow whose SYN-ACK was repeated: by whose packet it connected, or by none."""

from __future__ import annotations

from typing import Any

import pytest

from tcpstuck_bpf.handshake.correlate import Correlator
from tcpstuck_bpf.handshake.flow import State
from tcpstuck_bpf.judge.verdict import judge
from tcpstuck_bpf.model import Coverage, Ending, EventKind, Rescue
from tests.builders import (
    ACK,
    FIN,
    PSH,
    ack_dropped,
    at,
    attempt,
    correlator,
    ended,
    event,
    handshake,
    identity,
    reports,
    sweep,
)

SYN_ONCE = handshake()
COVERED = Coverage("fentry", frozenset({"cookie_v4_check", "tcp_conn_request", "kfree_skb"}))


def stuck() -> Correlator:
    watching = correlator()
    (report,) = reports([sweep(at(3), SYN_ONCE)], at(3), watching)
    assert report.state is State.SILENT
    return watching


def connected(watching: Correlator, **segment: Any) -> State:
    """The state after a segment connected it at 4 s."""
    entry = ended(SYN_ONCE, Ending.COMPLETED, at(4), 1)
    (report,) = reports([event(EventKind.COMPLETED, entry, at(4), **segment)], at(4), watching)
    return report.state


def test_a_bare_ack_after_our_packet_was_drawn_by_it() -> None:
    watching = stuck()
    watching.note_rescue(attempt(SYN_ONCE, at(3.5)))
    assert connected(watching) is State.RESCUED
    stats = watching.stats()
    assert (stats.ever_stuck, stats.still_stuck, stats.reported_now) == (1, 0, {State.RESCUED: 1})


@pytest.mark.parametrize(
    "segment",
    [
        pytest.param({"tcp_flags": ACK | PSH, "payload_length": 5}, id="data"),
        pytest.param({"tcp_flags": ACK | FIN}, id="FIN"),
        pytest.param({"payload_length": 5}, id="data without PSH"),
        pytest.param({"sequence": SYN_ONCE.client_isn + 6}, id="data before it is lost"),
    ],
)
def test_a_segment_of_the_clients_own_recovers_it(segment: dict[str, int]) -> None:
    watching = stuck()
    watching.note_rescue(attempt(SYN_ONCE, at(3.5)))
    assert connected(watching, **segment) is State.RECOVERED


@pytest.mark.parametrize(
    "note",
    [
        pytest.param(attempt(SYN_ONCE, at(3.5), outcome="would send"), id="dry run"),
        pytest.param(attempt(SYN_ONCE, at(3.5), outcome="failed: EPERM"), id="not sent"),
        pytest.param(attempt(SYN_ONCE, at(4.5)), id="sent later"),
        pytest.param(attempt(handshake(at(-9)), at(3.5)), id="of an earlier handshake"),
    ],
)
def test_what_did_not_go_out_before_drew_nothing(note: Rescue) -> None:
    watching = stuck()
    watching.note_rescue(note)
    assert connected(watching) is State.RECOVERED


def test_by_which_packet_is_not_claimed_where_the_event_was_lost() -> None:
    watching = stuck()
    watching.note_rescue(attempt(SYN_ONCE, at(3.5)))
    done = ended(SYN_ONCE, Ending.COMPLETED, at(4), 1)
    (report,) = reports([sweep(at(5), done)], at(5), watching)
    assert report.state is State.RECOVERED


def test_silence_after_every_try_makes_the_verdict_less_sure() -> None:
    watching = stuck()
    for number in (1, 2, 3):
        watching.note_rescue(attempt(SYN_ONCE, at(3 + number), number))
    watching.note_rescue(Rescue((), (identity(SYN_ONCE),), {"no answer": 1}))
    (report,) = watching.advance(at(7))
    assert report.state is State.UNANSWERED
    finding = judge(report, COVERED)
    assert finding is not None
    assert (finding.verdict, finding.updates, finding.stuck) == ("ack-missing", "ack-missing", True)
    assert finding.certainty == "possible"
    assert finding.rescue_tries == 3
    assert "3 times" in finding.evidence[-1]
    assert watching.stats().still_stuck == 1
    assert watching.advance(at(8)) == []


def test_an_unanswered_client_that_answers_after_all_is_told() -> None:
    watching = stuck()
    watching.note_rescue(attempt(SYN_ONCE, at(3.5)))
    watching.note_rescue(Rescue((), (identity(SYN_ONCE),), {}))
    watching.advance(at(3.6))
    dropped = ack_dropped(SYN_ONCE, at(3.8))
    (report,) = reports([event(EventKind.ACK_DROPPED, dropped, at(3.8))], at(3.8), watching)
    assert (report.state, report.previous) == (State.ACK_DROPPED, State.UNANSWERED)


def test_our_packets_are_in_the_timeline() -> None:
    watching = stuck()
    watching.note_rescue(attempt(SYN_ONCE, at(3.5)))
    entry = ended(SYN_ONCE, Ending.COMPLETED, at(4), 1)
    (report,) = reports([event(EventKind.COMPLETED, entry, at(4))], at(4), watching)
    ours = [line for line in report.timeline if line.what == "rescue"]
    assert [line.time_ns for line in ours] == [at(3.5)]
    assert "try 1" in ours[0].detail
