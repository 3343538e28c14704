"""A run with stuck clients of several causes, for the live view's tests."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from tcpstuck_bpf.analysis import Analysis
from tcpstuck_bpf.model import ListenerFacts, ListenerId, Row, Sweep, SweepPart
from tcpstuck_bpf.output.page import Page
from tcpstuck_bpf.steps import Advanced, Header, Listened, Named, Swept, TallyTaken
from tcpstuck_bpf.view.frame import Frames
from tcpstuck_bpf.view.snapshot import Book, Snapshot
from tests.builders import (
    NAMES,
    START_NS,
    ack_dropped,
    ack_filtered,
    at,
    four_tuple,
    handshake,
    header,
    tally,
)
from tests.unit.judge.test_listener import overflown, seen


class World:
    """An analysis and its book. Clients' numbers are those of `four_tuple`."""

    def __init__(self, queues: Mapping[ListenerId, int] | None = None) -> None:
        self.analysis = Analysis(a_header())
        self.analysis.take(TallyTaken(tally(START_NS)))
        self.analysis.take(Named(NAMES))
        self.book = Book(self.analysis.is_stuck, lambda facts: self._lengths(facts, queues or {}))
        self.asked: list[ListenerId] = []
        """The listeners whose present queue lengths were read."""

    def _lengths(
        self, facts: Iterable[ListenerFacts], queues: Mapping[ListenerId, int]
    ) -> Mapping[ListenerId, int]:
        self.asked += [one.listener for one in facts]
        return queues

    def listener(self, facts: ListenerFacts) -> None:
        """The listener's figures have changed."""
        self.analysis.take(Listened((seen(facts),)))

    def stuck(self, numbers: Iterable[int], verdict: str, began: float = 0) -> None:
        """Clients get this verdict, four seconds after `began`."""
        entry = handshake(at(began))
        if verdict == "accept-queue-full":
            entry = ack_dropped(entry, at(began + 0.1))
        elif verdict == "ack-filtered":
            entry = ack_filtered(entry, at(began + 0.1))
        else:
            assert verdict == "ack-missing", verdict
        rows = tuple(Row(four_tuple(number), entry) for number in numbers)
        self.analysis.take(Swept(Sweep(at(began + 4), rows, SweepPart.MORE)))
        self.advance(began + 4)

    def advance(self, when: float) -> None:
        """Judge what is due, so many seconds after the start."""
        self.book.take(self.analysis.take(Advanced(at(when))))

    def snapshot(self, when: float, *remarks: str) -> Snapshot:
        """What is shown so many seconds after the start."""
        summary = self.analysis.so_far({}, at(when), {})
        return self.book.snapshot(summary, at(when), remarks)


def a_header() -> Header:
    """The run's header; network namespace names are foreign text."""
    return header(netns_names={four_tuple().netns: "web\x1b[31m"})


def frames() -> Frames:
    """Frames of the world's run."""
    one = a_header()
    return Frames(
        lambda width: Page(
            clock=one.clock,
            width=width,
            colour=False,
            own_netns=1,
            netns_names=one.netns_names,
        )
    )


def busy_world() -> World:
    """Three causes at one listener, whose backlog is too small."""
    world = World()
    world.listener(overflown())
    world.stuck(range(120), "accept-queue-full")
    world.stuck(range(200, 217), "ack-filtered", began=5)
    world.stuck(range(300, 303), "ack-missing", began=10)
    return world
