"""Programs that did not run stand among the losses: the summary says what that means."""

from __future__ import annotations

import pytest

from tcpstuck_bpf.analysis import Analysis
from tcpstuck_bpf.steps import Ended, TallyTaken
from tcpstuck_bpf.summary import Summary
from tests.builders import at, header, tally


def summary(kernel: int, traced: int, missed: int) -> Summary:
    analysis = Analysis(header())
    analysis.take(TallyTaken(tally(at(0))))
    analysis.take(TallyTaken(tally(at(1), kernel, traced)))
    return analysis.summary(Ended(at(1), {"programs_not_run": missed}, ("said before",)))


@pytest.mark.parametrize(("traced", "told"), [(5, "agree exactly"), (4, "may be why")])
def test_the_summary_says_what_it_cost(traced: int, told: str) -> None:
    first, note = summary(5, traced, missed=4).notes
    assert first == "said before"
    assert told in note


def test_nothing_is_said_where_every_program_ran() -> None:
    assert summary(5, 5, missed=0).notes == ("said before",)
