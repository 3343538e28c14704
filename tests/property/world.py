"""A kernel's table, the true history beside it, and a correlator that watches the table."""

from __future__ import annotations

from collections.abc import Iterable

from tcpstuck_bpf.handshake.flow import FlowReport
from tcpstuck_bpf.model import HandshakeId, Sweep
from tests.builders import SECOND_NS, Table, correlator, four_tuple
from tests.property.history import History

CLIENTS = 5


class World:
    """Plays segments, and has them watched: late, out of order, and with events lost.

    `lost` says of each event in turn whether the ring buffer was full.
    """

    def __init__(self, lost: Iterable[bool] = (), tell_healthy: bool = False) -> None:
        lost = iter(lost)
        self.table = Table(tell_healthy, lambda: next(lost, False))
        self.history = History()
        self.correlator = correlator(tell_healthy=tell_healthy)
        self.now_ns = 1_000 * SECOND_NS
        self.isns = dict.fromkeys(range(CLIENTS), 1_000)
        self.reported: list[FlowReport] = []
        self.late_sweep: Sweep | None = None
        self.leaving: list[HandshakeId] = []
        self.let_go: set[HandshakeId] = set()
        """What is gone from the table: nobody can know what becomes of it."""

    def play(self, client: int, segment: str, gap_ns: int) -> None:
        self.now_ns += gap_ns
        key = four_tuple(client)
        if segment.startswith("new "):
            self.isns[client] += 1
            segment = segment[len("new ") :]
        isn = self.isns[client]
        self.history.add(key, self.now_ns, segment, isn)
        if segment == "syn":
            self.table.syn(key, isn, self.now_ns)
        elif segment == "syn dropped":
            self.table.syn_dropped(key, isn, self.now_ns)
        elif segment == "syn taken":
            self.table.syn_taken(key, isn, self.now_ns)
        else:
            getattr(self.table, segment.replace(" ", "_"))(key, self.now_ns)

    def watch(self, what: str) -> None:
        self.table.forget(self.leaving)
        self.let_go.update(self.leaving)
        self.leaving = []
        if what in ("drain", "tidy"):
            for event in self.table.ring:
                self.correlator.observe(event)
            self.table.ring.clear()
        if self.late_sweep is not None and what != "advance":
            self.correlator.observe(self.late_sweep)
            self.late_sweep = None
        if what in ("sweep", "tidy"):
            self.correlator.observe(self.table.sweep(self.now_ns))
        if what == "begin sweep":
            self.late_sweep = self.table.sweep(self.now_ns)
        if what in ("advance", "tidy"):
            self.reported += self.correlator.advance(self.now_ns)
        if what == "tidy":
            rows = len(self.table.entries)
            self.leaving = self.correlator.flows.expired(self.now_ns, rows, 1_000)
            assert len(set(self.leaving)) == len(self.leaving)

    def finish(self) -> None:
        self.now_ns += 10_000 * SECOND_NS
        self.watch("drain")
        self.watch("sweep")
        self.watch("advance")
