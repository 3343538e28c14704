"""Detects silent clients that look like a SYN flood from spoofed addresses. Pure: no clock, no I/O.

A high rate alone does not prove a flood: a firewall that drops every ACK silences hundreds of real
clients at once. A flood must also show a pattern that real clients cannot share
(`_Listener.sign`). An address counts as real if an ACK from it was ever seen, if it repeated a SYN,
or if it has more handshakes than a spoofed address gets by chance.

Table rows come in no particular order, so everything is counted by the second of its SYN. Memory is
bounded: the oldest seconds, addresses and listeners are forgotten first. Times are CLOCK_MONOTONIC
nanoseconds.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Iterator
from typing import TypeVar

from tcpstuck_bpf.model import SECOND_NS, FourTuple, Handshake, HandshakeId

Key = TypeVar("Key")
Value = TypeVar("Value")

FLOOD_SILENT = 100
FLOOD_WINDOW_S = 10
"""A SYN flood has more than FLOOD_SILENT silent addresses within FLOOD_WINDOW_S seconds."""
MANY_SILENT = 1000
"""Number of silent addresses in the window that is a flood even without a pattern, if some other
clients send ACKs."""
SILENT_PER_ACK = 10
"""Smallest number of silent addresses per ACK in a flood without a pattern. If one of several paths
loses ACKs, the other paths deliver more ACKs than this."""

MAX_SECONDS = 128
MAX_ADDRESSES = 65_536
MAX_LISTENERS = 1024
MAX_REVISED = 4096
"""Most handshakes per listener that are reported again when a flood is detected later."""
MAX_OF_ADDRESS = 32
"""Most handshakes per address that are reported again when the address turns out to be real."""
_MARKS = 16
_REAL_HANDSHAKES = 3
"""Smallest number of silent handshakes that shows an address to be real."""
_CHANCE = 1e-4
"""An address is real if fewer spoofed addresses than this are expected to have as many handshakes,
among all that were seen."""
_TAIL = 50
"""Number of terms of the Poisson distribution's tail that are added up."""
_STEPS = 75
_RISING_PERCENT = 85
"""Half of all random numbers exceed their predecessor. In `_STEPS` steps, a share this large has a
chance of about 1 in 10^10."""

_FEW = f"more than {FLOOD_SILENT} addresses fell silent at this listener within {FLOOD_WINDOW_S} s"
_LIKE_A_FLOOD = "this looks like a SYN flood from spoofed addresses"
_RISING_ISNS = (
    f"{_FEW}, and the ISNs of their SYNs increase from one to the next, as from a single sender "
    f"and unlike those of real clients: {_LIKE_A_FLOOD}"
)
_RISING_PORTS = (
    f"{_FEW}, and their source ports increase from one address to the next, as from a single "
    f"sender and unlike those of real clients: {_LIKE_A_FLOOD}"
)
_MANY = (
    f"{MANY_SILENT} addresses or more fell silent at this listener within {FLOOD_WINDOW_S} s, "
    f"while a few other clients sent their ACKs: {_LIKE_A_FLOOD}"
)

_Address = tuple[int, bytes]
_ListenerKey = tuple[int, bytes, int]


class _Second:
    """The silent handshakes whose SYN came in the same second."""

    __slots__ = ("number", "repeats", "rising_isns", "rising_ports", "steps")

    def __init__(self) -> None:
        self.number = self.steps = self.rising_isns = self.rising_ports = 0
        self.repeats = 0
        """Handshakes of addresses already counted in the window; `number` excludes them."""


class SilenceRate:
    """Number of silent addresses in each second, and the order of their ISNs and ports."""

    def __init__(self) -> None:
        self._seconds: dict[int, _Second] = {}
        self._last: tuple[int, int, int] | None = None

    def note(self, time_ns: int, isn: int = 0, port: int = 0) -> None:
        """Count an address whose SYN came at `time_ns`."""
        counts = self._at(time_ns // SECOND_NS)
        counts.number += 1
        if self._last is not None and time_ns >= self._last[0]:
            counts.steps += 1
            # An equal ISN counts as rising: simple senders reuse one ISN, real clients do not.
            counts.rising_isns += (isn - self._last[1]) % 2**32 < 2**31
            # An equal port does not count: clients of some protocols have a fixed port.
            counts.rising_ports += port > self._last[2]
        self._last = (time_ns, isn, port)

    def note_repeat(self, second: int) -> None:
        """Count another handshake of an address that was already counted in the window."""
        self._at(second).repeats += 1

    def _at(self, second: int) -> _Second:
        counts = self._seconds.get(second)
        if counts is None:
            counts = self._seconds[second] = _Second()
            if len(self._seconds) > MAX_SECONDS:
                del self._seconds[min(self._seconds)]
        return counts

    def within(self, last_second: int) -> _Second:
        """Sums over the FLOOD_WINDOW_S seconds up to `last_second`."""
        sums = _Second()
        for second in range(last_second - FLOOD_WINDOW_S + 1, last_second + 1):
            counts = self._seconds.get(second)
            if counts is not None:
                sums.number += counts.number
                sums.steps += counts.steps
                sums.rising_isns += counts.rising_isns
                sums.rising_ports += counts.rising_ports
        return sums

    def is_high(self, time_ns: int) -> bool:
        """Whether more than FLOOD_SILENT addresses fell silent in the window up to `time_ns`."""
        return self.within(time_ns // SECOND_NS).number > FLOOD_SILENT

    def busy_seconds(self, last_second: int) -> Iterator[int]:
        """The seconds of the window that are busy enough for a flood, and their neighbours."""
        for second in range(last_second - FLOOD_WINDOW_S + 1, last_second + 1):
            counts = self._seconds.get(second)
            if counts is None:
                continue
            if (counts.number + counts.repeats) * FLOOD_WINDOW_S >= FLOOD_SILENT:
                yield from (second - 1, second, second + 1)


class _Source:
    """One address at one listener."""

    __slots__ = ("counted", "handshakes", "real", "reported")

    def __init__(self) -> None:
        self.handshakes = 0
        self.counted: int | None = None
        """Second in which the rate last counted the address."""
        self.real = False
        self.reported: tuple[HandshakeId, ...] = ()
        """Handshakes of the address that were reported as part of a flood."""


class _Listener:
    """The addresses that fell silent at one listener, and the floods there."""

    def __init__(self) -> None:
        self.handshakes = 0
        self.addresses = 0
        self.floods: OrderedDict[int, str] = OrderedDict()
        """By second: why its SYNs look like a flood."""
        self.before: deque[HandshakeId] = deque(maxlen=MAX_REVISED)
        """Handshakes reported as stuck while no flood was detected."""
        self._rate = SilenceRate()
        self._touched: set[int] = set()

    def note(self, source: _Source, who: FourTuple, entry: Handshake) -> None:
        """Count a silent handshake; an address counts once per window."""
        second = entry.first_syn_ns // SECOND_NS
        self._touched.add(second)
        if source.counted is not None and abs(second - source.counted) < FLOOD_WINDOW_S:
            self._rate.note_repeat(second)
            return
        source.counted = second
        self._rate.note(entry.first_syn_ns, entry.client_isn, who.client_port)

    def settle(self, ack_interval_ns: float) -> bool:
        """Look for floods in the noted handshakes. Returns whether a flood has grown.

        `ack_interval_ns` is the mean time between two ACKs of other clients; 0 if none came.
        """
        before = len(self.floods)
        ends = {last for second in self._touched for last in range(second, second + FLOOD_WINDOW_S)}
        self._touched.clear()
        for last in sorted(ends):
            why = self.sign(self._rate.within(last), ack_interval_ns)
            if why:
                for second in self._rate.busy_seconds(last):
                    self.floods.setdefault(second, why)
        more = len(self.floods) > before
        while len(self.floods) > MAX_SECONDS:
            del self.floods[min(self.floods)]
        return more

    @staticmethod
    def sign(counts: _Second, ack_interval_ns: float) -> str:
        """Why these counts look like a flood, as text; empty if another cause is possible.

        Real stacks make ISNs by a keyed hash of the 4-tuple (RFC 6528), and the ports of different
        hosts are independent.
        """
        if counts.number <= FLOOD_SILENT:
            return ""
        if counts.steps >= _STEPS:
            if 100 * counts.rising_isns >= _RISING_PERCENT * counts.steps:
                return _RISING_ISNS
            if 100 * counts.rising_ports >= _RISING_PERCENT * counts.steps:
                return _RISING_PORTS
        others = FLOOD_WINDOW_S * SECOND_NS / ack_interval_ns if ack_interval_ns else 0
        if counts.number >= MANY_SILENT and 0 < others * SILENT_PER_ACK <= counts.number:
            return _MANY
        return ""

    def why(self, handshake: HandshakeId) -> str:
        """Why a handshake's time falls into a flood, as text; empty if it does not."""
        return self.floods.get(handshake.first_syn_ns // SECOND_NS, "")

    def is_beyond_chance(self, handshakes: int) -> bool:
        """Whether an address has more handshakes than any spoofed one gets by chance.

        The number of handshakes of a random address is Poisson-distributed. If there are many
        possible addresses, few recur, and the mean over the seen ones is 1 + expected / 2. One
        recurrence more than seen is assumed, and those of this address do not count.
        """
        if handshakes < _REAL_HANDSHAKES:
            return False
        seen = max(1, self.addresses)
        recurred = max(0, self.handshakes - (handshakes - 1) - self.addresses)
        mean = 1 + (recurred + 1) / seen
        expected = min(2 * (mean - 1), mean)
        return handshakes > expected and seen * _share_with(handshakes, expected) < _CHANCE


def _share_with(handshakes: int, expected: float) -> float:
    """Share of the seen addresses that have at least so many handshakes, if all are spoofed.

    `handshakes` must exceed `expected`: the terms of the tail then decrease.
    """
    probability = math.exp(
        -expected + handshakes * math.log(expected) - math.lgamma(handshakes + 1)
    )
    tail = probability
    for number in range(handshakes + 1, handshakes + _TAIL):
        probability *= expected / number
        tail += probability
    return min(1.0, tail / -math.expm1(-expected))


class _Acks:
    """The rate of ACKs in one network namespace, as counted by the programs."""

    def __init__(self) -> None:
        self._marks: deque[tuple[int, int]] = deque(maxlen=_MARKS)

    def note(self, time_ns: int, total: int) -> None:
        if not self._marks or time_ns - self._marks[-1][0] >= SECOND_NS:
            self._marks.append((time_ns, total))
        elif len(self._marks) > 1:
            self._marks[-1] = (self._marks[-1][0], total)

    @property
    def interval_ns(self) -> float:
        """Mean time between two ACKs; 0 if none came."""
        if len(self._marks) < 2:
            return 0
        number = self._marks[-1][1] - self._marks[0][1]
        return (self._marks[-1][0] - self._marks[0][0]) / number if number > 0 else 0


class FloodWatch:
    """Takes silent handshakes in the order of their SYNs, and decides which look spoofed."""

    def __init__(self) -> None:
        self._listeners: OrderedDict[_ListenerKey, _Listener] = OrderedDict()
        self._sources: OrderedDict[tuple[_ListenerKey, bytes], _Source] = OrderedDict()
        self._real: OrderedDict[_Address, None] = OrderedDict()
        self._acks: OrderedDict[int, _Acks] = OrderedDict()
        self._noted: set[_ListenerKey] = set()
        self._revised: list[HandshakeId] = []

    def note_acks(self, netns: int, time_ns: int, total: int) -> None:
        """Note the number of ACKs for cookies in a network namespace since the run began."""
        _kept(self._acks, netns, _Acks, MAX_LISTENERS).note(time_ns, total)

    def note_real(self, who: FourTuple) -> None:
        """Mark a client's address as real: it sent something that a spoofed source cannot send."""
        address = (who.netns, who.client_address)
        is_new = address not in self._real
        self._real[address] = None
        self._real.move_to_end(address)
        if len(self._real) > MAX_ADDRESSES:
            self._real.popitem(last=False)
        source = self._sources.get((_listener_of(who), who.client_address))
        if is_new and source is not None:
            self._revise(source)

    def _revise(self, source: _Source) -> None:
        self._revised += source.reported
        source.reported = ()

    def note(self, who: FourTuple, entry: Handshake) -> None:
        """Note a client that fell silent after one SYN."""
        key = _listener_of(who)
        listener = _kept(self._listeners, key, _Listener, MAX_LISTENERS)
        source = self._sources.get((key, who.client_address))
        if source is None:
            listener.addresses += 1
            source = self._sources[key, who.client_address] = _Source()
            self._forget_source()
        self._sources.move_to_end((key, who.client_address))
        source.handshakes += 1
        listener.handshakes += 1
        if not source.real and listener.is_beyond_chance(source.handshakes):
            source.real = True
            self._revise(source)
        listener.note(source, who, entry)
        self._noted.add(key)

    def _forget_source(self) -> None:
        if len(self._sources) > MAX_ADDRESSES:
            (key, _), gone = self._sources.popitem(last=False)
            listener = self._listeners.get(key)
            if listener is not None:
                listener.addresses = max(0, listener.addresses - 1)
                listener.handshakes = max(0, listener.handshakes - gone.handshakes)

    def why(self, handshake: HandshakeId) -> str:
        """Why a noted silent handshake looks like part of a flood; empty if it does not.

        The caller reports the handshake accordingly. The answer is remembered, so that `settle` can
        revise it.
        """
        who = handshake.four_tuple
        key = _listener_of(who)
        listener, source = self._listeners.get(key), self._sources.get((key, who.client_address))
        if listener is None or source is None:
            return ""
        if source.real or (who.netns, who.client_address) in self._real:
            return ""
        why = listener.why(handshake)
        if not why:
            listener.before.append(handshake)
        elif len(source.reported) < MAX_OF_ADDRESS:
            source.reported += (handshake,)
        return why

    def settle(self) -> list[HandshakeId]:
        """Look for floods in the noted handshakes. Returns those for which `why` has changed."""
        for key in self._noted:
            listener = self._listeners.get(key)
            acks = self._acks.get(key[0])
            if listener is not None and listener.settle(0 if acks is None else acks.interval_ns):
                still = [one for one in listener.before if not listener.why(one)]
                self._revised += (one for one in listener.before if listener.why(one))
                listener.before = deque(still, maxlen=MAX_REVISED)
        self._noted.clear()
        revised, self._revised = self._revised, []
        return revised


def _listener_of(who: FourTuple) -> _ListenerKey:
    return (who.netns, who.server_address, who.server_port)


def _kept(kept: OrderedDict[Key, Value], key: Key, make: type[Value], most: int) -> Value:
    """The value of a key, created if missing. The least recently used value may be dropped."""
    if key not in kept:
        kept[key] = make()
        if len(kept) > most:
            kept.popitem(last=False)
    kept.move_to_end(key)
    return kept[key]
