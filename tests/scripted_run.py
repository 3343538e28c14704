"""A whole run by a script: its source and its clock are our own, nothing waits, no kernel."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

from tcpstuck_bpf.analysis import Analysis
from tcpstuck_bpf.app.live import Live
from tcpstuck_bpf.app.namespaces import NamespaceWatch
from tcpstuck_bpf.app.printer import Printer
from tcpstuck_bpf.model import (
    NETNS_COOKIE,
    Coverage,
    Ending,
    Event,
    FourTuple,
    Handshake,
    HandshakeId,
    KernelCounters,
    ListenerFacts,
    NetnsCount,
    NetnsCounts,
    Row,
    Sweep,
    SweepPart,
)
from tcpstuck_bpf.output.writers import JsonOutput, Selection
from tcpstuck_bpf.recording.replay import Recorder
from tests.builders import (
    SECOND_NS,
    at,
    four_tuple,
    header,
)


def is_completed(entry: Handshake | None) -> bool:
    """Whether the programs have counted it as completed."""
    return entry is not None and entry.ending == Ending.COMPLETED


class FakeKernel:
    """A source whose table changes at given times, and the clock that goes with it.

    Polling is what passes the time.
    """

    timings: Mapping[str, float] = {}
    table_capacity = 1024
    coverage: Coverage = header().coverage

    def __init__(self) -> None:
        self.now_ns = at(0)
        self.table: dict[FourTuple, Handshake] = {}
        self.script: list[tuple[int, FourTuple, Handshake | None, Event | None]] = []
        self.crowd: list[Row] = []
        """Entries of others that come first in a sweep, each in a batch of its own."""
        self.sweeps: list[int] = []
        self.choices: list[int] = []
        self.sweep_cost_ns = 0
        self.stolen_ns = 0
        """How long other processes run during each reading of the table."""
        self.cpu_ns = 0
        self.forgotten: list[FourTuple] = []
        self.completed = 0
        self.closed = False
        self.crowded: frozenset[int] = frozenset()
        """Network namespaces that have entries in tables that fill."""
        self.freed: list[tuple[int, frozenset[int]]] = []
        """When room was to be made, and by whom."""
        self.freed_beside: list[dict[int, int]] = []
        """The cookies of those that are there, each time."""
        self.living: list[dict[int, int]] = []
        """The cookies that counts were asked for with, each time."""
        self.cookie = 0
        """The network namespace's."""
        self.unseen_acks: list[int] = []
        """When valid ACKs came that the kernel's counter has and no program saw."""
        self.in_processing = 0
        """ACKs of others that the kernel has counted and whose programs are still running."""
        self.readings: list[Collection[int] | None] = []
        """The network namespaces whose kernel counters were requested, for each request."""

    def at(self, time_ns: int, entry: Handshake | None, told: Event | None = None) -> None:
        """Client 0's entry becomes this, None for gone, and perhaps an event tells of it."""
        self.script.append((time_ns, four_tuple(), entry, told))

    @property
    def most_waiting(self) -> int:
        return len(self.script)

    def poll(self, timeout_ns: int) -> list[Event]:
        self.now_ns += timeout_ns
        events = []
        while self.script and self.script[0][0] <= self.now_ns:
            _, who, entry, told = self.script.pop(0)
            before = self.table.pop(who, None)
            if entry is not None:
                self.table[who] = entry
                self.completed += is_completed(entry) and not is_completed(before)
            if told is not None:
                events.append(told)
        return events

    def sweep(self) -> Iterator[Sweep]:
        begun = self.now_ns
        self.sweeps.append(begun)
        for row in self.crowd:
            self._pay()
            yield Sweep(begun, (row,), SweepPart.MORE)
        self._pay()
        yield Sweep(begun, tuple(Row(*item) for item in self.table.items()))

    def _pay(self) -> None:
        self.cpu_ns += self.sweep_cost_ns
        self.now_ns += self.sweep_cost_ns + self.stolen_ns

    def chosen(self) -> Sweep:
        self.choices.append(self.now_ns)
        return Sweep(
            self.now_ns, tuple(Row(*item) for item in self.table.items()), SweepPart.CHOSEN
        )

    def forget(self, handshakes: Iterable[HandshakeId]) -> None:
        for who, first_syn_ns in handshakes:
            assert self.table[who].first_syn_ns == first_syn_ns
            self.forgotten.append(who)
            del self.table[who]

    def netns_in_full_tables(self) -> Collection[int]:
        return self.crowded

    def free(self, gone: Collection[int], living: Mapping[int, int]) -> None:
        self.freed_beside.append(dict(living))
        self.freed.append((self.now_ns, frozenset(gone)))
        self.crowded -= frozenset(gone)

    def settle(self) -> None:
        self.completed += self.in_processing
        self.in_processing = 0

    def counts(self, living: Mapping[int, int] = MappingProxyType({})) -> NetnsCounts:
        self.living.append(dict(living))
        return {
            four_tuple().netns: dict.fromkeys(
                (NetnsCount.COMPLETED, NetnsCount.COOKIES_RECEIVED), self.completed
            )
        }

    def listeners(self) -> tuple[ListenerFacts, ...]:
        return ()

    def losses(self) -> Mapping[str, int]:
        return {"undecodable_events": 0}

    def close(self) -> None:
        self.closed = True

    def counters(self, wanted: Collection[int] | None) -> KernelCounters:
        self.readings.append(wanted)
        unseen = sum(came_ns <= self.now_ns for came_ns in self.unseen_acks)
        cookie = {NETNS_COOKIE: self.cookie} if self.cookie else {}
        received = self.completed + self.in_processing + unseen
        return {four_tuple().netns: {"SyncookiesRecv": received, **cookie}}


def no_counters(_wanted: Collection[int] | None) -> KernelCounters:
    return {}


def live(
    kernel: FakeKernel,
    seconds: float | None,
    only: str = "",
    record: str | None = None,
    find_gone: Callable[[Collection[int]], Collection[int]] | None = None,
    find_living: Callable[[Collection[int]], Mapping[int, int]] | None = None,
    **more: Any,
) -> list[dict[str, Any]]:
    """Run it for so many seconds; the JSON lines."""
    stream = io.StringIO()
    output = JsonOutput(stream, header().clock, Selection([only] if only else [], nothing=False))
    recorder = None if record is None else Recorder(record, header())
    namespaces = None
    if find_gone is not None:
        namespaces = NamespaceWatch(kernel, find_gone, find_living, lambda: kernel.now_ns)
    run = Live(
        kernel,
        Analysis(header()),
        Printer(output),
        recorder,
        kernel.counters,
        lambda: kernel.now_ns,
        cpu_ns=lambda: kernel.cpu_ns,
        namespaces=namespaces,
        **more,
    )
    run.run(None if seconds is None else int(seconds * SECOND_NS), None)
    if recorder is not None:
        recorder.close()
    return [json.loads(line) for line in stream.getvalue().splitlines()]
