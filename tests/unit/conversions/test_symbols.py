"""Symbols: never on each other where that can be avoided, and each kind is there."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tcpstuck_bpf.conversions import looks
from tcpstuck_bpf.conversions.picture import FLOOD, MarkKind
from tcpstuck_bpf.conversions.symbols import MOST_MOVED, chosen, side_by_side
from tcpstuck_bpf.judge.rules import RULES

GAP = 9.0
PLACES = st.tuples(st.floats(0, 600), st.floats(0, 600))


@given(st.lists(st.lists(PLACES, max_size=40), max_size=5))
def test_whole_symbols_do_not_overlap_and_every_group_has_one(
    groups: list[list[tuple[float, float]]],
) -> None:
    whole = chosen(groups, GAP)
    assert [len(one) for one in whole] == [len(one) for one in groups]
    assert all(any(one) for one, group in zip(whole, groups) if group)
    for group, is_whole in zip(groups, whole):
        shown = [place for place, yes in zip(group, is_whole) if yes]
        for number, (x, y) in enumerate(shown):
            others = shown[:number]
            assert not [one for one in others if abs(one[0] - x) < GAP and abs(one[1] - y) < GAP]


def test_a_frequent_kind_does_not_push_a_rare_one_out() -> None:
    frequent = [(100.0, float(y)) for y in range(400)]
    rare = [(100.0, 200.0), (102.0, 320.0)]
    many, few = chosen([frequent, rare], GAP)
    assert few == [True, True]
    assert 15 <= sum(many) <= 22


@given(st.lists(st.floats(0, 600), max_size=30).map(sorted), st.floats(1, 12))
def test_symbols_of_a_line_only_move_to_the_right_and_never_far(
    places: list[float], width: float
) -> None:
    moved = side_by_side(places, [width] * len(places))
    for place, at in zip(places, moved):
        assert place <= at <= place + MOST_MOVED


def test_those_at_one_moment_stand_side_by_side() -> None:
    assert side_by_side([10, 10, 10.5, 11, 40], [0, 6, 0, 6, 6]) == [10, 10, 16, 16, 40]


def test_every_verdict_and_every_packet_has_a_look_of_its_own() -> None:
    assert looks.VERDICTS.keys() == {*(rule.name for rule in RULES), FLOOD}
    shapes = [look.shape for look in looks.VERDICTS.values()]
    assert len(set(shapes)) == len(shapes), "in grey they would be alike"
    assert looks.MARKS.keys() == set(MarkKind)
    assert len(set(looks.MARKS.values())) == len(looks.MARKS)
