"""A recording made of segments at given times, for the plot's tests.

The kernel's table is `builders.Table`. Each moment becomes the steps that a run would record.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tcpstuck_bpf.analysis import Analysis
from tcpstuck_bpf.conversions.describe import Plot
from tcpstuck_bpf.conversions.picture import Lane, Mark, MarkKind, Picture
from tcpstuck_bpf.model import FourTuple, ListenerFacts, Rescue
from tcpstuck_bpf.recording.replay import Recorder
from tcpstuck_bpf.rulesets import KernelNames
from tcpstuck_bpf.steps import (
    Advanced,
    Ended,
    Header,
    Listened,
    Named,
    Observed,
    Rescued,
    Step,
    Swept,
    TallyTaken,
)
from tcpstuck_bpf.summary import Summary
from tests.builders import NAMES, Table, at, four_tuple, header, tally
from tests.unit.judge.test_listener import seen


class Scene:
    """Plays segments and collects the steps. Times are seconds since `at(0)`."""

    def __init__(self, names: KernelNames = NAMES, **changes: Any) -> None:
        self.header: Header = header(**changes)
        self.steps: list[Step] = [TallyTaken(tally(at(0))), Named(names)]
        self._table = Table()
        self._cookies = 0
        self._isns: dict[FourTuple, int] = {}

    def play(
        self, when: float, segment: str, *clients: int, queues: tuple[int, int] = (51, 50)
    ) -> None:
        """A segment of each of these clients, with the lengths of accept queue and SYN queue."""
        for client in clients:
            self._play(at(when), segment, four_tuple(client), *queues)
        events = tuple(
            one._replace(accept_queue=queues[0], handshake=self._entry(one.four_tuple))
            if one.four_tuple in self._table.entries
            else one
            for one in self._table.ring
        )
        self._table.ring.clear()
        if events:
            self.steps.append(Observed(events))

    def _entry(self, who: FourTuple) -> Any:
        return self._table.entries[who]

    def _play(self, now_ns: int, segment: str, who: FourTuple, accept: int, syn: int) -> None:
        if segment == "new syn":
            self._isns[who] = self._isns.get(who, 1) + 1
        if segment.endswith("syn") or segment.startswith("syn "):
            getattr(self._table, segment.replace("new syn", "syn").replace(" ", "_"))(
                who, self._isns.get(who, 1), now_ns
            )
            entry = self._table.entries[who]
            if segment.endswith("syn"):
                self._cookies += 1
                lengths = {"accept_queue": accept, "syn_queue": syn}
                self._table.entries[who] = entry._replace(**lengths)
        else:
            getattr(self._table, segment.replace(" ", "_"))(who, now_ns)

    def rescue(self, rescue: Rescue) -> None:
        """SYN-ACKs are repeated."""
        self.steps.append(Rescued(rescue))

    def listener(self, facts: ListenerFacts, owner: str = "greeter (pid 7)") -> None:
        """The listener's figures have changed."""
        self.steps.append(Listened((seen(facts, owner),)))

    def look(self, when: float) -> None:
        """The table is read, and what is due is judged."""
        self.steps += [Swept(self._table.sweep(at(when))), Advanced(at(when))]

    def end(self, when: float, cut_off: bool = False) -> None:
        """The run ends."""
        self.steps += [
            TallyTaken(tally(at(when), self._cookies, self._cookies)),
            Ended(at(when), {}, (), cut_off),
        ]

    def record(self, path: Path) -> Path:
        """Write the recording."""
        recorder = Recorder(str(path), self.header)
        for step in self.steps:
            recorder.write(step)
        recorder.close()
        return path

    def picture(self, only: Sequence[str] = ()) -> Picture:
        """The description of the plot."""
        return picture_of(self.header, self.steps, only)


def picture_of(header: Header, steps: Iterable[Step], only: Sequence[str] = ()) -> Picture:
    """The description of a plot of these steps, which must end with Ended."""
    analysis = Analysis(header)
    plot = Plot(analysis, only)
    summary: Summary | None = None
    for step in steps:
        plot.take(step, analysis.take(step))
        if isinstance(step, Ended):
            summary = analysis.summary(step)
    assert summary is not None
    return plot.picture(summary)


def marks(lane: Lane) -> list[tuple[float, MarkKind]]:
    """The packets of a lane, in seconds."""
    return [(mark.time_ns / 1e9, mark.kind) for mark in lane.marks]


def mark(when: float, kind: MarkKind) -> Mark:
    """A packet so many seconds after the first SYN."""
    return Mark(round(when * 1e9), kind)


def crowd(number: int) -> Scene:
    """A server whose backlog is too small: most clients get stuck for several causes."""
    scene = Scene(netns_names={four_tuple().netns: "web"}, table_capacity=8192)
    spread = 3.0 / number
    for client in range(number):
        lengths = (min(51, client), min(50, 20 + client))
        scene.play(1 + spread * client, "syn", client, queues=lengths)
    for client in range(number):
        came = 1.05 + spread * client
        if client % 10 < 6:
            scene.play(came, "ack dropped", client)
            scene.play(came + 2.5, "ack dropped", client)
        elif client % 10 == 6:
            scene.play(came, "ack filtered", client)
        elif client % 10 == 7:
            scene.play(came + 0.4, "reset", client)
        elif client % 10 == 8:
            for later in (1, 3):
                scene.play(came + later, "syn", client, queues=(40, 30))
    for when in (4, 6, 7.5, 9):
        scene.look(when)
    for client in range(0, number, 10):
        scene.play(9.2, "ack", client, queues=(12, 3))
    scene.look(9.5)
    scene.end(12)
    return scene
