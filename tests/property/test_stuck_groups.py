"""The groups of who is stuck add up to the number of stuck clients, whatever happens."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from tcpstuck_bpf.analysis import Analysis
from tcpstuck_bpf.model import SweepPart
from tcpstuck_bpf.steps import Advanced, Ended, Observed, Swept, TallyTaken
from tests.builders import SECOND_NS, Table, at, four_tuple, header, tally

CLIENTS = 6
SEGMENTS = (
    *("syn", "syn", "syn", "new syn", "ack dropped", "ack dropped", "ack filtered", "ack"),
    *("reset", "ack rejected", "no listener"),
)
GAPS = st.one_of(st.integers(0, 900), st.integers(900, 200_000)).map(lambda ms: ms * 1_000_000)
STEPS = st.lists(
    st.tuples(st.integers(0, CLIENTS - 1), st.sampled_from(SEGMENTS), GAPS), min_size=1, max_size=60
)


@settings(deadline=None)
@given(STEPS, st.integers(2, 8))
def test_the_groups_are_those_who_are_stuck(
    steps: list[tuple[int, str, int]], capacity: int
) -> None:
    analysis = Analysis(header(table_capacity=capacity))
    analysis.take(TallyTaken(tally(at(0))))
    table, now_ns, isn = Table(), at(0), 1
    for client, segment, gap_ns in steps:
        who = four_tuple(client)
        now_ns += gap_ns
        isn += segment == "new syn"
        if segment.endswith("syn"):
            table.syn(who, isn, now_ns)
        else:
            getattr(table, segment.replace(" ", "_"))(who, now_ns)
        events, table.ring[:] = tuple(table.ring), []
        analysis.take(Observed(events))
        analysis.take(Swept(table.sweep(now_ns)._replace(part=SweepPart.LAST)))
        analysis.take(Advanced(now_ns))
        table.forget(analysis.leaving)
        assert len(analysis._stuck._groups) <= analysis.correlator.stats().flows
        summary = analysis.summary(Ended(now_ns, {}, ()))
        assert sum(number for _, number in summary.stuck) == summary.still_stuck
    analysis.take(Advanced(now_ns + 10_000 * SECOND_NS))
    summary = analysis.summary(Ended(now_ns, {}, ()))
    assert sum(number for _, number in summary.stuck) == summary.still_stuck
