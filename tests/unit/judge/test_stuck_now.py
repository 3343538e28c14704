"""Who is stuck now, by listener, verdict and cause."""

from __future__ import annotations

from tcpstuck_bpf.judge.stuck_now import StuckNow
from tcpstuck_bpf.model import HandshakeId
from tests.builders import four_tuple
from tests.unit.output.test_render import finding


def test_a_client_counts_by_its_latest_finding() -> None:
    stuck = StuckNow()
    told = finding(four_tuple())
    stuck.take(told)
    stuck.take(told._replace(verdict="ack-filtered", cause="a rule"))
    ((group, number),) = stuck.groups()
    assert (group.verdict, group.cause, number) == ("ack-filtered", "a rule", 1)
    stuck.take(told._replace(verdict="recovered", stuck=False))
    assert stuck.groups() == ()


def test_a_suspected_flood_does_not_count() -> None:
    stuck = StuckNow()
    stuck.take(finding(four_tuple()))
    stuck.take(finding(four_tuple())._replace(flood_suspected=True))
    assert stuck.groups() == ()


def test_the_largest_group_comes_first() -> None:
    stuck = StuckNow()
    for n in range(9):
        port = 25 if n < 4 else 3311
        stuck.take(finding(four_tuple(n)._replace(server_port=port)))
    assert [(group.server_port, number) for group, number in stuck.groups()] == [(3311, 5), (25, 4)]


def test_who_cannot_change_any_more_is_counted_and_not_remembered() -> None:
    stuck = StuckNow()
    told = finding(four_tuple())
    stuck.take(told)
    stuck.settle(lambda _: False)
    stuck.leave(HandshakeId(told.four_tuple, told.first_syn_ns))
    assert [number for _, number in stuck.groups()] == [1]
    assert not stuck._groups
