"""What is remembered of listeners in a long run: what they suffered stays, and all of it is few."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from tcpstuck_bpf.host.listening_sockets import ListenerWatch
from tcpstuck_bpf.judge import backlog_history
from tcpstuck_bpf.judge.backlog_history import KEPT_HEIGHTS, ListenerHistory
from tcpstuck_bpf.model import HandshakeId, Sweep
from tests.builders import at
from tests.unit.judge.test_listener import facts, overflown, seen, silent_rows

MOST = 8


@pytest.fixture(autouse=True)
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backlog_history, "MAX_LISTENERS", MOST)
    monkeypatch.setattr(backlog_history, "MAX_ENDED", MOST)


def netns_of(history: ListenerHistory) -> list[int]:
    return [one.netns for one in history.reports()]


def test_figures_that_begin_anew_are_those_of_another_listener() -> None:
    """Its namespace went, and gave its number to the next one."""
    history = ListenerHistory()
    history.take_listeners([seen(overflown())])
    history.take_listeners([seen(facts(syns=3))])
    assert [(one.facts.acks_refused, one.facts.syns) for one in history.reports()] == [
        (148, 199),
        (0, 3),
    ]
    history.take_listeners([seen(overflown(acks_refused=7))])
    history.take_listeners([seen(facts(syns=1))])
    assert [one.facts.acks_refused for one in history.reports()] == [148, 7, 0]


def test_of_one_that_begins_anew_and_suffered_nothing_only_the_new_figures_stay() -> None:
    history = ListenerHistory()
    history.take_listeners([seen(facts(syns=9))])
    history.take_listeners([seen(facts(syns=3))])
    assert [one.facts.syns for one in history.reports()] == [3]


def test_of_more_than_are_remembered_those_go_that_suffered_nothing_and_are_idle() -> None:
    history = ListenerHistory()
    history.take_listeners([seen(overflown(netns=1))])
    history.take_listeners(seen(facts(netns=netns, syns=1)) for netns in range(2, MOST + 1))
    history.take_listeners([seen(facts(netns=2, syns=2))])
    assert history.forgotten == 0
    history.take_listeners([seen(facts(netns=99, syns=1))])
    assert netns_of(history) == [1, 2, *range(4, MOST + 1), 99]
    assert history.forgotten == 1


def test_where_all_suffered_the_one_that_changed_longest_ago_goes() -> None:
    history = ListenerHistory()
    history.take_listeners(seen(overflown(netns=netns)) for netns in range(MOST + 2))
    assert netns_of(history) == list(range(2, MOST + 2))
    assert history.forgotten == 2


def test_those_that_ended_are_few_as_well() -> None:
    history = ListenerHistory()
    for netns in range(MOST + 3):
        history.take_listeners([seen(overflown(netns=netns))])
        history.take_listeners([seen(facts(netns=netns, syns=1))])
    assert len([one for one in history.reports() if one.suffered]) == MOST
    assert history.forgotten >= 3


def leave(history: ListenerHistory, first: int, number: int) -> None:
    rows = silent_rows(number)
    moved = [
        row._replace(handshake=row.handshake._replace(first_syn_ns=at(first) + n))
        for n, row in enumerate(rows)
    ]
    history.take_sweep(Sweep(at(first + 1), tuple(moved)))
    history.take_leaving(HandshakeId(row.four_tuple, row.handshake.first_syn_ns) for row in moved)


def test_a_flood_that_goes_on_leaves_no_more_than_there_are_heights() -> None:
    history = ListenerHistory()
    for second in range(3 * KEPT_HEIGHTS):
        need = {"syn_need_ns": at(second), "syn_need_owed": 149 + second}
        history.take_listeners([seen(overflown(**need))])
        leave(history, second, 1)
    ((_, gone),) = history._gone.items()
    assert len(gone) <= KEPT_HEIGHTS + 1
    assert sum(gone.values()) == 3 * KEPT_HEIGHTS


def test_who_never_answered_at_a_listener_that_is_not_known_is_not_remembered() -> None:
    history = ListenerHistory()
    leave(history, 1, 3)
    assert not history._gone


@pytest.mark.usefixtures("_nobody_listens")
def test_owners_are_remembered_of_those_alone_that_the_programs_still_know() -> None:
    watch = ListenerWatch()
    for netns in range(50):
        watch.changed([facts(netns=netns)])
    assert len(watch._known) == len(watch._tries) == 1


@pytest.fixture
def _nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(_inodes: Iterable[int]) -> dict[int, tuple[str, ...]]:
        return {}

    monkeypatch.setattr("tcpstuck_bpf.host.netns_counters.read_queue_settings", dict)
    monkeypatch.setattr("tcpstuck_bpf.host.listening_sockets.owners_of", nobody)
