"""When a namespace's rules are read, and that nobody waits for it."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from lab.patience import COMMAND_S, patient
from tcpstuck_bpf.host.ruleset_watch import (
    AT_ONCE_NS,
    INTERVAL_NS,
    MAX_NAMESPACES,
    SHARE,
    RulesetWatch,
)
from tcpstuck_bpf.rulesets import Ruleset
from tests.builders import at

ONE, OTHER = 7, 8


class Machine:
    """A clock, and a reader whose readings end when they are told to."""

    def __init__(self) -> None:
        self.now_ns = at(0)
        self.spent_ns = 0
        """Processor time of all readings."""
        self.begun: list[int] = []
        """Namespaces, as their readings began."""
        self.jobs: list[Callable[[], None]] = []
        self.fails: Exception | None = None
        self.watch = RulesetWatch(self.read, lambda: self.now_ns, self.begin, lambda: self.spent_ns)

    def read(self, netns: int) -> Ruleset:
        if self.fails is not None:
            raise self.fails
        return Ruleset((), (str(netns),))

    def begin(self, job: Callable[[], None]) -> None:
        self.jobs.append(job)

    def end_after(self, cost_ns: int, waiting_ns: int = 0) -> dict[int, Ruleset]:
        """The reading under way takes so much processor time, and has to wait for it besides."""
        (job,) = self.jobs
        self.jobs.clear()
        self.now_ns += cost_ns + waiting_ns
        self.spent_ns += cost_ns
        job()
        return self.watch.taken()


def test_nothing_waits_for_a_reading_and_it_is_dated_by_its_beginning() -> None:
    machine = Machine()
    machine.watch.want(ONE, at(-1))
    assert machine.watch.taken() == {}
    assert len(machine.jobs) == 1
    assert machine.watch.taken() == {}
    assert machine.end_after(5) == {ONE: Ruleset((), (str(ONE),), at(0))}
    assert machine.watch.taken() == {}


def test_a_drop_that_a_reading_came_after_wants_no_other() -> None:
    machine = Machine()
    for dropped_ns in (at(-2), at(-1)):
        machine.watch.want(ONE, dropped_ns)
    machine.watch.taken()
    machine.watch.want(ONE, at(-0.5))
    machine.end_after(5)
    machine.now_ns = at(60)
    machine.watch.want(ONE, at(-0.5))
    machine.watch.taken()
    assert machine.jobs == []
    machine.watch.want(ONE, at(0) + 1)
    machine.watch.taken()
    assert len(machine.jobs) == 1


def test_a_namespace_rests_and_another_does_not_wait_for_it() -> None:
    machine = Machine()
    machine.watch.want(ONE, at(-1))
    machine.watch.taken()
    machine.watch.want(OTHER, at(-1))
    cost_ns = INTERVAL_NS // 100
    assert ONE in machine.end_after(cost_ns)
    machine.watch.want(ONE, machine.now_ns)
    assert OTHER in machine.end_after(cost_ns)
    assert machine.jobs == []
    machine.now_ns = at(0) + cost_ns + INTERVAL_NS - 1
    machine.watch.taken()
    assert machine.jobs == []
    machine.now_ns += 1
    machine.watch.taken()
    assert ONE in machine.end_after(cost_ns)


def test_slow_readings_follow_one_another_until_they_have_taken_much_time() -> None:
    """On a slow machine the cause of the first drops must not wait for a pause."""
    machine = Machine()
    cost_ns = AT_ONCE_NS // 4
    for netns in range(10):
        machine.watch.want(netns, at(-1))
    machine.watch.taken()
    for netns in range(4):
        assert netns in machine.end_after(cost_ns)
    assert machine.jobs == []
    machine.now_ns += SHARE * cost_ns
    machine.watch.taken()
    assert len(machine.jobs) == 1


def test_a_reading_that_had_to_wait_for_a_processor_makes_no_pause() -> None:
    """On a busy machine, or beside other guests, most of its time is not its own."""
    machine = Machine()
    for netns in range(10):
        machine.watch.want(netns, at(-1))
    machine.watch.taken()
    for netns in range(10):
        assert netns in machine.end_after(AT_ONCE_NS // 20, waiting_ns=60 * INTERVAL_NS)


@pytest.mark.parametrize("namespaces", [1, 50])
@pytest.mark.parametrize("cost_ns", [INTERVAL_NS // 50, 5 * INTERVAL_NS])
def test_a_flood_of_drops_has_rules_read_for_a_part_of_the_time(
    namespaces: int, cost_ns: int
) -> None:
    machine = Machine()
    spent_ns = 0
    while machine.now_ns < at(0) + 400 * max(cost_ns, INTERVAL_NS):
        for netns in range(namespaces):
            machine.watch.want(netns, machine.now_ns)
        machine.watch.taken()
        if machine.jobs:
            machine.end_after(cost_ns)
            spent_ns += cost_ns
        machine.now_ns += cost_ns
    passed_ns = machine.now_ns - at(0)
    assert spent_ns <= AT_ONCE_NS + passed_ns // SHARE
    busy = min(1 / (SHARE + 2), namespaces * cost_ns / (INTERVAL_NS + 3 * cost_ns))
    assert spent_ns >= 0.8 * busy * passed_ns


def test_at_the_end_nothing_rests() -> None:
    machine = Machine()
    machine.watch.want(ONE, at(-1))
    machine.watch.taken()
    machine.end_after(INTERVAL_NS)
    machine.watch.want(ONE, machine.now_ns)
    machine.watch.taken()
    assert machine.jobs == []
    machine.watch.hurry()
    machine.watch.taken()
    assert ONE in machine.end_after(1)


def test_a_reading_that_fails_is_a_reading_that_says_so() -> None:
    machine = Machine()
    machine.fails = KeyError("strange")
    machine.watch.want(ONE, at(-1))
    machine.watch.taken()
    (ruleset,) = machine.end_after(5).values()
    assert ruleset.read_ns == at(0)
    assert "strange" in ruleset.problems[0]


def test_where_no_thread_can_be_made_the_reading_says_so() -> None:
    def refuse(_job: Callable[[], None]) -> None:
        raise RuntimeError("can't start new thread")

    watch = RulesetWatch(lambda _netns: Ruleset((), ()), lambda: at(0), refuse)
    watch.want(ONE, at(-1))
    watch.taken()
    (ruleset,) = watch.taken().values()
    assert "can't start new thread" in ruleset.problems[0]


def test_a_slow_reading_holds_nothing_up() -> None:
    may_end = threading.Event()

    def read(_netns: int) -> Ruleset:
        assert may_end.wait(patient(COMMAND_S))
        return Ruleset((), ())

    before = set(threading.enumerate())
    watch = RulesetWatch(read, lambda: at(0))
    watch.want(ONE, at(-1))
    assert watch.taken() == {}
    (reader,) = set(threading.enumerate()) - before
    assert reader.daemon
    may_end.set()
    reader.join(patient(COMMAND_S))
    assert watch.taken() == {ONE: Ruleset((), (), at(0))}


def test_what_is_remembered_of_namespaces_that_were_read_is_bounded() -> None:
    """A long run on a host of containers sees any number of them."""
    machine = Machine()
    for netns in range(MAX_NAMESPACES + 50):
        machine.watch.want(netns, machine.now_ns)
        machine.watch.taken()
        machine.end_after(1)
        machine.now_ns += INTERVAL_NS
    assert len(machine.watch._read_ns) == MAX_NAMESPACES
    assert len(machine.watch._rests_until_ns) <= MAX_NAMESPACES


def test_no_more_than_a_number_of_namespaces_wait_to_be_read() -> None:
    machine = Machine()
    for netns in range(MAX_NAMESPACES + 50):
        machine.watch.want(netns, machine.now_ns)
    assert len(machine.watch._wanted) == MAX_NAMESPACES
