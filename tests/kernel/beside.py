"""The source inside the test, beside a server that answers every SYN by a cookie."""

from __future__ import annotations

import itertools
from contextlib import ExitStack
from functools import partial
from types import TracebackType

from lab.network.syns import Syn, send_in_bursts
from lab.network.topology import SERVER_ADDRESS, SILENT_SOURCES, Topology, source_addresses
from lab.network.watch import Watch
from lab.records import FourTuple
from lab.scenarios.scene import PORT
from tcpstuck_bpf import model
from tcpstuck_bpf.kernel.source import KernelSource
from tcpstuck_bpf.model import Event, NetnsCount, Row
from tests.kernel.conftest import listening

SERVER_IP = SERVER_ADDRESS[4]


def identity(row: Row) -> model.HandshakeId:
    return model.HandshakeId(row.four_tuple, row.handshake.first_syn_ns)


def lab_name(four_tuple: model.FourTuple) -> FourTuple:
    return FourTuple(
        four_tuple.client_ip, four_tuple.client_port, four_tuple.server_ip, four_tuple.server_port
    )


class Beside:
    """A listener that answers every SYN by a cookie, and the source beside it.

    The source is emptied first: what others left in its table would be swept as well.
    """

    topology: Topology
    watch: Watch

    def __init__(self, source: KernelSource) -> None:
        self.source = source
        self._cleanup = ExitStack()

    def __enter__(self) -> Beside:
        with ExitStack() as building:
            self.topology = building.enter_context(Topology())
            self.netns = self.topology.server.inode
            self.cookies_for_all()
            building.enter_context(listening(self.topology.server))
            self.watch = building.enter_context(Watch(self.topology.client, PORT))
            self._cleanup = building.pop_all()
        self.all_events()
        self.source.forget(map(identity, self.all_rows()))
        self._before = self._counts()
        self._kernel_before = self.topology.server.counters()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._cleanup.close()

    def cookies_for_all(self) -> None:
        self.topology.server.pin({"net/ipv4/tcp_syncookies": "2"})

    def cookies_when_full(self) -> None:
        """The SYN queue is empty: from now on a SYN gets an ordinary handshake."""
        self.topology.server.pin({"net/ipv4/tcp_syncookies": "1"})

    def send(self, *syns: Syn) -> None:
        send_in_bursts(self.topology.client, self.watch, syns)

    def all_rows(self) -> list[Row]:
        return [row for batch in self.source.sweep() for row in batch.rows]

    def rows(self) -> list[Row]:
        return [row for row in self.all_rows() if row.four_tuple.netns == self.netns]

    def row(self, four_tuple: FourTuple) -> model.Handshake:
        (found,) = (row for row in self.rows() if lab_name(row.four_tuple) == four_tuple)
        return found.handshake

    def all_events(self) -> list[Event]:
        """All events waiting in the ring buffer."""
        return list(itertools.chain.from_iterable(iter(partial(self.source.poll, 0), [])))

    def events(self) -> list[Event]:
        return [event for event in self.all_events() if event.four_tuple.netns == self.netns]

    def counted(self, which: NetnsCount) -> int:
        return self._counts().get(which, 0) - self._before.get(which, 0)

    def moved(self, counter: str) -> int:
        return self.topology.server.counters()[counter] - self._kernel_before[counter]

    def _counts(self) -> dict[NetnsCount, int]:
        return dict(self.source.counts().get(self.netns, {}))


def silent_client(number: int) -> FourTuple:
    """A 4-tuple whose client's address nobody owns."""
    sources = source_addresses(SILENT_SOURCES[4], number + 1)
    return FourTuple(sources[number], 2000 + number, SERVER_IP, PORT)
