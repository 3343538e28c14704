"""Who is in the live view: each stuck client under its cause, and nobody else."""

from __future__ import annotations

import pytest

from tcpstuck_bpf.model import Ending, EventKind
from tcpstuck_bpf.steps import Observed
from tcpstuck_bpf.view import snapshot as snapshot_module
from tcpstuck_bpf.view.snapshot import MOST_CLIENTS
from tests.builders import ack_dropped, at, ended, event, four_tuple, handshake
from tests.unit.judge.test_listener import overflown
from tests.unit.view.world import World, busy_world


def test_each_cause_has_its_number_and_its_newest_clients() -> None:
    shown = busy_world().snapshot(15)
    numbers = {cause.group.verdict: cause.number for cause in shown.causes}
    assert numbers == {"accept-queue-full": 120, "ack-filtered": 17, "ack-missing": 3}
    assert [cause.number for cause in shown.causes] == [120, 17, 3]
    kept = {cause.group.verdict: len(cause.clients) for cause in shown.causes}
    assert kept == {"accept-queue-full": MOST_CLIENTS, "ack-filtered": 17, "ack-missing": 3}


def test_the_newest_clients_of_all_causes_come_first() -> None:
    shown = busy_world().snapshot(15)
    assert len(shown.clients) == MOST_CLIENTS
    verdicts = [finding.verdict for finding in shown.clients]
    assert verdicts == ["ack-missing"] * 3 + ["ack-filtered"] * 17 + ["accept-queue-full"] * 80
    times = [finding.verdict_ns for finding in shown.clients]
    assert times == sorted(times, reverse=True)


def test_who_connects_after_all_leaves_the_view() -> None:
    world = World()
    world.stuck(range(2), "accept-queue-full")
    entry = ended(ack_dropped(handshake(at(0)), at(0.1)), Ending.COMPLETED, at(5))
    world.analysis.take(Observed((event(EventKind.COMPLETED, entry, at(5), four_tuple(1)),)))
    world.advance(6)
    shown = world.snapshot(6)
    assert [finding.four_tuple for finding in shown.clients] == [four_tuple(0)]
    assert [cause.number for cause in shown.causes] == [1]


def test_who_gives_up_and_uses_its_port_again_leaves_the_view_though_no_finding_says_so() -> None:
    world = World()
    world.stuck(range(2), "accept-queue-full")
    entry = handshake(at(6), client_isn=99)
    world.analysis.take(Observed((event(EventKind.SYN_REPEATED, entry, at(6), four_tuple(1)),)))
    world.advance(6.1)
    shown = world.snapshot(6.1)
    assert [finding.four_tuple for finding in shown.clients] == [four_tuple(0)]


def test_beyond_the_limit_the_cause_that_grew_longest_ago_loses_its_clients_not_its_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(snapshot_module, "MOST_CAUSES", 2)
    shown = busy_world().snapshot(15)
    kept = {cause.group.verdict: len(cause.clients) for cause in shown.causes}
    assert kept == {"accept-queue-full": 0, "ack-filtered": 17, "ack-missing": 3}
    assert [cause.number for cause in shown.causes] == [120, 17, 3]


def test_a_listener_has_its_present_queue_its_rate_and_its_stuck_clients() -> None:
    facts = overflown(socket=0)
    world = World({facts.listener: 42})
    world.listener(facts)
    world.stuck(range(3), "accept-queue-full")
    world.snapshot(10)
    world.listener(facts._replace(cookies_sent=facts.cookies_sent + 50))
    shown = world.snapshot(20)
    (one,) = shown.listeners
    assert (one.accept_queue, one.cookies_per_second, one.stuck) == (42, 5.0, 3)
    assert world.asked == [facts.listener] * 2


def test_a_rate_is_the_average_since_the_start_at_first_and_of_the_last_ten_seconds_later() -> None:
    world = World()
    rates = []
    for second, cookies in ((5, 100), (10, 200), (15, 200), (20, 200), (25, 200)):
        summary = world.analysis.so_far({}, at(second), {})._replace(cookies_sent=cookies)
        rates.append(world.book.snapshot(summary, at(second), ()).cookies_per_second)
    assert rates == [20, 20, 10, 0, 0]


def test_a_counter_that_falls_began_again_from_zero() -> None:
    world = World()
    rates = []
    for second, cookies in ((10, 500), (20, 30)):
        world.listener(overflown(cookies_sent=cookies))
        rates.append(world.snapshot(second).listeners[0].cookies_per_second)
    assert rates == [50, 3]
