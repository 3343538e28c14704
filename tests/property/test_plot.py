"""Whatever happens, the description of a plot stays within its bounds and says no more than it
knows."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from tcpstuck_bpf.analysis import Analysis
from tcpstuck_bpf.conversions.describe import Plot
from tcpstuck_bpf.conversions.picture import FLOOD, MarkKind, Picture
from tcpstuck_bpf.judge.rules import RULES
from tcpstuck_bpf.judge.verdict import Finding
from tcpstuck_bpf.steps import Advanced, Ended, Observed, Step, Swept, TallyTaken
from tests.builders import Table, at, four_tuple, header, tally
from tests.property.test_stuck_groups import CLIENTS, STEPS

STUCK = {rule.name for rule in RULES if rule.stuck}
KNOWN = {rule.name for rule in RULES} | {FLOOD, ""}


def within_bounds(picture: Picture) -> None:
    """Holds for every picture."""
    begins = []
    for lane in picture.lanes:
        times = [mark.time_ns for mark in lane.marks]
        assert times == sorted(times)
        assert len(set(lane.marks)) == len(lane.marks)
        assert all(0 <= time_ns <= picture.end_ns for time_ns in times)
        assert all(0 <= one.time_ns <= picture.end_ns for one in lane.verdicts)
        for span in lane.spans:
            assert 0 <= span.begin_ns <= span.end_ns <= picture.end_ns
            assert span.verdict in STUCK | {""}
        for before, after in zip(lane.spans, lane.spans[1:]):
            assert before.end_ns == after.begin_ns
        if lane.goes_on:
            assert lane.verdicts[-1].verdict in STUCK
            assert lane.spans[-1].end_ns == picture.end_ns
        begins.append(min([*times, *(span.begin_ns for span in lane.spans)], default=0))
    assert begins == sorted(begins)
    for panel in picture.panels:
        for readings in (panel.accept_queue, panel.syn_queue, panel.limit):
            assert all(0 <= one.time_ns <= picture.end_ns for one in readings)
            assert list(readings) == sorted(readings)
    assert {count.verdict for count in picture.counts} <= KNOWN
    drawn = sum(lane.verdicts[-1:] != () or True for lane in picture.lanes)
    assert sum(count.last for count in picture.counts) >= drawn


@settings(deadline=None)
@given(STEPS, st.integers(2, 8), st.integers(0, 30).map(lambda seconds: seconds * 10**9))
def test_any_history_gives_a_picture_within_bounds(
    played: list[tuple[int, str, int]], capacity: int, later_ns: int
) -> None:
    analysis = Analysis(header(table_capacity=capacity))
    plot = Plot(analysis, ())
    told: dict[tuple[object, int], Finding] = {}

    def take(step: Step) -> None:
        findings = analysis.take(step)
        plot.take(step, findings)
        told.update({(one.four_tuple, one.first_syn_ns): one for one in findings})

    take(TallyTaken(tally(at(0))))
    table, now_ns, isn = Table(), at(0), 1
    for client, segment, gap_ns in played:
        who = four_tuple(client)
        now_ns += gap_ns
        isn += segment == "new syn"
        if segment.endswith("syn"):
            table.syn(who, isn, now_ns)
        else:
            getattr(table, segment.replace(" ", "_"))(who, now_ns)
        events, table.ring[:] = tuple(table.ring), []
        for step in (Observed(events), Swept(table.sweep(now_ns)), Advanced(now_ns)):
            take(step)
        table.forget(analysis.leaving)
    take(Advanced(now_ns + later_ns))
    ended = Ended(now_ns + later_ns, {}, ())
    take(ended)
    picture = plot.picture(analysis.summary(ended))
    within_bounds(picture)
    judged = [lane for lane in picture.lanes if lane.verdicts]
    assert len(judged) == len(told)
    assert all(len(lane.marks) >= 1 for lane in picture.lanes)
    syns = [mark for lane in judged for mark in lane.marks if mark.kind is MarkKind.SYN]
    assert len(syns) >= len(judged)
    assert len({lane.label for lane in picture.lanes}) <= CLIENTS
