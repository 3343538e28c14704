"""The exit status of a run: an all-clear only where everything is known."""

from __future__ import annotations

from typing import Any

import pytest

from tcpstuck_bpf.analysis import Analysis
from tcpstuck_bpf.errors import EXIT_NOT_KNOWN, EXIT_NOTHING_STUCK, EXIT_STUCK
from tcpstuck_bpf.model import NetnsCount, Tally
from tcpstuck_bpf.run import exit_status
from tcpstuck_bpf.steps import Advanced, Ended, Step, Swept, TallyTaken
from tcpstuck_bpf.summary import Summary
from tests.builders import ack_dropped, at, four_tuple, handshake, header, sweep, tally


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"verdicts": {"completed": 5}}, EXIT_NOTHING_STUCK),
        ({"verdicts": {"completed": 5}, "pending": 3}, EXIT_NOTHING_STUCK),
        ({"verdicts": {"completed": 5}, "ever_stuck": 1}, EXIT_STUCK),
        ({"verdicts": {"completed": 5}, "data_lost": 1}, EXIT_STUCK),
        ({"untracked": 1}, EXIT_NOT_KNOWN),
        ({"untracked": 1, "ever_stuck": 1}, EXIT_STUCK),
        ({"losses": {"cookies_unmatched": 1}}, EXIT_NOT_KNOWN),
        ({"acks_unknown": 1}, EXIT_NOT_KNOWN),
        ({"pending": 3}, EXIT_NOT_KNOWN),
    ],
)
def test_the_exit_status_is_no_all_clear_where_something_is_not_known(
    changes: dict[str, Any], status: int
) -> None:
    analysis = Analysis(header())
    analysis.take(TallyTaken(tally(at(0))))
    summary = analysis.summary(Ended(at(9), {}, ()))
    assert exit_status(summary._replace(**changes)) == status


def test_a_dropped_ack_that_belongs_to_no_handshake_is_no_all_clear() -> None:
    """Its SYN came before tracing began, and the accept queue was not full: nobody is reported."""
    netns = four_tuple().netns

    def summed(dropped: int, *steps: Step) -> Summary:
        analysis = Analysis(header())
        analysis.take(TallyTaken(tally(at(0))))
        for step in steps:
            analysis.take(step)
        counts = {netns: {NetnsCount.ACKS_DROPPED_UNTRACKED: dropped}}
        analysis.take(TallyTaken(Tally(at(9), {}, counts, {})))
        return analysis.summary(Ended(at(9), {}, ()))

    assert summed(1).unwatched == 1
    told = ack_dropped(handshake(syn_count=0), at(0.1))
    reported = Swept(sweep(at(4), told))
    assert summed(1, reported, Advanced(at(4))).unwatched == 0
    assert summed(2, reported, Advanced(at(4))).unwatched == 1
