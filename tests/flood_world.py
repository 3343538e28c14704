"""A listener whose clients fall silent, judged as a run judges them: by sweeps in batches.

A batch holds rows as a hash table gives them, in no order.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from typing import NamedTuple

from tcpstuck_bpf.analysis import Analysis
from tcpstuck_bpf.judge.verdict import Finding
from tcpstuck_bpf.model import FourTuple, Handshake, NetnsCount, Row, Sweep, SweepPart, Tally
from tcpstuck_bpf.steps import Advanced, Ended, Swept, TallyTaken
from tcpstuck_bpf.summary import Summary
from tests.builders import SECOND_NS, START_NS, TIMEOUT_NS, four_tuple, handshake, header

BATCH = 4096
EPHEMERAL = (32_768, 60_999)
"""Linux's ip_local_port_range."""


class Client(NamedTuple):
    """One handshake that is never completed."""

    four_tuple: FourTuple
    entry: Handshake


def client(address: int, port: int, isn: int, syn_ns: int, **changes: int) -> Client:
    """The SYN of an IPv4 address, given as a number."""
    mapped = bytes(10) + b"\xff\xff" + address.to_bytes(4, "big")
    who = four_tuple()._replace(client_address=mapped, client_port=port)
    return Client(who, handshake(syn_ns, client_isn=isn, **changes))


def real(
    number: int, addresses: int, seconds: float, seed: int = 0, first: int = 0x0A00_0000
) -> list[Client]:
    """Clients with stacks such as hosts have, from so many addresses in turn."""
    chosen = random.Random(seed)
    return [
        client(
            first + n % addresses,
            EPHEMERAL[0] + chosen.randrange(EPHEMERAL[1] - EPHEMERAL[0]),
            chosen.randrange(2**32),
            START_NS + round(n * seconds * SECOND_NS / number),
        )
        for n in range(number)
    ]


def spoofed(
    number: int,
    seconds: float,
    seed: int = 0,
    address: Callable[[random.Random, int], int] = lambda chosen, _: chosen.randrange(2**32),
    port: Callable[[random.Random, int], int] = lambda chosen, _: chosen.randrange(1024, 2**16),
    isn: Callable[[random.Random, int], int] = lambda chosen, _: chosen.randrange(2**32),
) -> list[Client]:
    """One sender's SYNs: random, except for values given as a function of the SYN's number."""
    chosen = random.Random(seed)
    return [
        client(
            address(chosen, n),
            port(chosen, n),
            isn(chosen, n),
            START_NS + round(n * seconds * SECOND_NS / number),
        )
        for n in range(number)
    ]


def one_sender(number: int, seconds: float = 1) -> list[Client]:
    """SYNs whose source ports count up."""
    return spoofed(number, seconds, port=lambda _, n: 1024 + n)


class FloodWorld:
    """Sweeps once a second; `acks_a_second` are those of clients that get through."""

    def __init__(self, clients: Iterable[Client], acks_a_second: int = 0, seed: int = 0) -> None:
        self.clients = list({one.four_tuple: one for one in clients}.values())
        random.Random(seed).shuffle(self.clients)
        self._acks = acks_a_second
        self.analysis = Analysis(header(table_capacity=131_072))
        self.reported: list[Finding] = []
        self.now_ns = START_NS
        self._tally()

    def _tally(self) -> None:
        acks = self._acks * (self.now_ns - START_NS) // SECOND_NS
        traced = {four_tuple().netns: {NetnsCount.COMPLETED: acks}}
        self.analysis.take(TallyTaken(Tally(self.now_ns, {}, traced, {})))

    def look(self) -> None:
        """Make a sweep, one second later."""
        self.now_ns += SECOND_NS
        rows = [Row(*one) for one in self.clients if one.entry.first_syn_ns <= self.now_ns]
        batches = [tuple(rows[n : n + BATCH]) for n in range(0, len(rows), BATCH)] or [()]
        for number, batch in enumerate(batches, 1):
            part = SweepPart.LAST if number == len(batches) else SweepPart.MORE
            self.analysis.take(Swept(Sweep(self.now_ns, batch, part)))
            self._tally()
            self.reported += self.analysis.take(Advanced(self.now_ns))

    def watch(self) -> Summary:
        """Until everyone is judged."""
        last_ns = max(one.entry.first_syn_ns for one in self.clients)
        while self.now_ns <= last_ns + TIMEOUT_NS + SECOND_NS:
            self.look()
        return self.summary()

    def summary(self) -> Summary:
        """The summary of everything so far."""
        self._tally()
        return self.analysis.summary(Ended(self.now_ns, {}, ()))

    @property
    def at_last(self) -> dict[FourTuple, Finding]:
        """The last finding on each."""
        return {finding.four_tuple: finding for finding in self.reported}


def with_dropped_ack(one: Client) -> Client:
    """The same, its ACK dropped by a full accept queue."""
    dropped_ns = one.entry.first_syn_ns + 1
    entry = one.entry._replace(
        acks_dropped=1, first_ack_dropped_ns=dropped_ns, last_ack_dropped_ns=dropped_ns
    )
    return one._replace(entry=entry)
