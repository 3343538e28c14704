"""Which network namespaces are looked for, and what comes of a look."""

from __future__ import annotations

from collections.abc import Collection

from tcpstuck_bpf.app.namespaces import LOOK_INTERVAL_NS, NamespaceWatch
from tcpstuck_bpf.steps import Vanished
from tests.builders import at
from tests.scripted_run import FakeKernel


def watch(kernel: FakeKernel, *gone: int) -> NamespaceWatch:
    def find_gone(wanted: Collection[int]) -> frozenset[int]:
        return frozenset(wanted).intersection(gone)

    return NamespaceWatch(kernel, find_gone, None, lambda: kernel.now_ns)


def test_only_those_with_stuck_clients_are_said_to_be_gone() -> None:
    kernel = FakeKernel()
    kernel.crowded = frozenset({1, 3})
    assert watch(kernel, 1, 2).look({2, 4}) == [Vanished(at(0), (2,))]
    assert kernel.freed == [(at(0), frozenset({1, 2}))]


def test_a_number_that_became_anothers_is_told_with_the_time_until_it_was_not() -> None:
    watching = watch(FakeKernel())
    watching.note_living({1: 71}, at(-9))
    watching.note_living({1: 72}, at(-1))
    assert watching.look({1}) == [Vanished(at(0), (1,), at(-9))]
    assert watching.look({1}) == []


def test_a_look_that_found_somebody_to_ask_about_puts_off_the_next() -> None:
    kernel = FakeKernel()
    watching = watch(kernel)
    assert watching.look(()) == []
    assert watching.is_due
    watching.look({1})
    assert not watching.is_due
    kernel.now_ns += LOOK_INTERVAL_NS
    assert watching.is_due


def test_at_the_end_it_is_due_at_once() -> None:
    watching = watch(FakeKernel())
    watching.look({1})
    watching.hurry()
    assert watching.is_due
