"""Whether silent clients look like a SYN flood from spoofed addresses. Pure: no clock, no I/O.

A rate alone does not tell a flood from a firewall that lets nobody's ACK through: then hundreds of
real clients fall silent at once. So besides the rate something is asked for that real clients
cannot have in common (`_Listener.sign`), and where there is nothing of the kind there is no flood.
An address whose ACK was ever seen, that repeated a SYN, or that has more handshakes than chance
gives to a spoofed one, is real.

Rows of the table come in no order, so everything is counted by the second of its SYN. All of it is
bounded: seconds, addresses and listeners are forgotten, the oldest first. Times are CLOCK_MONOTONIC
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
"""More silent ones than that within so many seconds may be a SYN flood."""
MANY_SILENT = 1000
"""So many addresses within the same time are a flood without a pattern too, where others answer."""
SILENT_PER_ACK = 10
"""Beside a flood without a pattern at most one ACK comes for so many silent addresses: where one of
several ways loses ACKs, the others do not."""

MAX_SECONDS = 128
MAX_ADDRESSES = 65_536
MAX_LISTENERS = 1024
MAX_REVISED = 4096
"""Clients of one listener, told before the flood was seen, that may be told anew."""
MAX_OF_ADDRESS = 32
"""Clients of one address, told as a flood's, that may be told anew."""
_MARKS = 16
_CHANCE_SIGMAS = 5
_REAL_HANDSHAKES = 3
"""One address with so many silent handshakes is no chance, where spoofed ones hardly ever recur."""
_STEPS = 75
_RISING_PERCENT = 85
"""Half of the numbers drawn at random rise from one to the next. That so many of `_STEPS` do
happens once in 10^10 times."""

_FEW = f"more than {FLOOD_SILENT} addresses fell silent at this listener within {FLOOD_WINDOW_S} s"
_LIKE_A_FLOOD = "this looks like a SYN flood from spoofed addresses"
_RISING_ISNS = (
    f"{_FEW}, and the sequence numbers of their SYNs follow one another, as those of one sender do "
    f"and those of real clients do not: {_LIKE_A_FLOOD}"
)
_RISING_PORTS = (
    f"{_FEW}, and their source ports count up from one address to the next, as those of one sender "
    f"do and those of real clients do not: {_LIKE_A_FLOOD}"
)
_MANY = (
    f"{MANY_SILENT} addresses or more fell silent at this listener within {FLOOD_WINDOW_S} s, "
    f"while ACKs of other clients came, few beside them: {_LIKE_A_FLOOD}"
)

_Address = tuple[int, bytes]
_ListenerKey = tuple[int, bytes, int]


class _Second:
    """The silent ones whose SYN came in one second."""

    __slots__ = ("number", "repeats", "rising_isns", "rising_ports", "steps")

    def __init__(self) -> None:
        self.number = self.steps = self.rising_isns = self.rising_ports = 0
        self.repeats = 0
        """Those of addresses that others of the window are of: they do not count in `number`."""


class SilenceRate:
    """How many fell silent in each second, and how their SYNs followed one another."""

    def __init__(self) -> None:
        self._seconds: dict[int, _Second] = {}
        self._last: tuple[int, int, int] | None = None

    def note(self, time_ns: int, isn: int = 0, port: int = 0) -> None:
        """One more, whose SYN came at `time_ns`."""
        counts = self._at(time_ns // SECOND_NS)
        counts.number += 1
        if self._last is not None and time_ns >= self._last[0]:
            counts.steps += 1
            # One number for all, which a sloppy sender has, is as unlike real ones as rising ones.
            counts.rising_isns += (isn - self._last[1]) % 2**32 < 2**31
            # One port for all proves nothing: clients of some protocols have a fixed one.
            counts.rising_ports += port > self._last[2]
        self._last = (time_ns, isn, port)

    def note_repeat(self, second: int) -> None:
        """One more of an address that has been noted in these seconds."""
        self._at(second).repeats += 1

    def _at(self, second: int) -> _Second:
        counts = self._seconds.get(second)
        if counts is None:
            counts = self._seconds[second] = _Second()
            if len(self._seconds) > MAX_SECONDS:
                del self._seconds[min(self._seconds)]
        return counts

    def within(self, last_second: int) -> _Second:
        """The sums of the FLOOD_WINDOW_S seconds of which this is the last."""
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
        """Whether more than FLOOD_SILENT fell silent in the seconds up to this time."""
        return self.within(time_ns // SECOND_NS).number > FLOOD_SILENT

    def busy_seconds(self, last_second: int) -> Iterator[int]:
        """Those of these seconds that have their part in a flood, and the ones beside them."""
        for second in range(last_second - FLOOD_WINDOW_S + 1, last_second + 1):
            counts = self._seconds.get(second)
            if counts is None:
                continue
            if (counts.number + counts.repeats) * FLOOD_WINDOW_S >= FLOOD_SILENT:
                yield from (second - 1, second, second + 1)


class _Source:
    """One address at one listener."""

    __slots__ = ("counted", "handshakes", "real", "told")

    def __init__(self) -> None:
        self.handshakes = 0
        self.counted: int | None = None
        """The second in which it last counted for the rate."""
        self.real = False
        self.told: tuple[HandshakeId, ...] = ()
        """Its handshakes that were told as a flood's."""


class _Listener:
    """The addresses that fell silent at one listener, and the floods there."""

    def __init__(self) -> None:
        self.handshakes = 0
        self.addresses = 0
        self.floods: OrderedDict[int, str] = OrderedDict()
        """Why the SYNs of a second look like a flood's."""
        self.before: deque[HandshakeId] = deque(maxlen=MAX_REVISED)
        """Told as stuck while no flood was seen."""
        self._rate = SilenceRate()
        self._touched: set[int] = set()

    def note(self, source: _Source, who: FourTuple, entry: Handshake) -> None:
        """A silent handshake; in the same window each address counts once."""
        second = entry.first_syn_ns // SECOND_NS
        self._touched.add(second)
        if source.counted is not None and abs(second - source.counted) < FLOOD_WINDOW_S:
            self._rate.note_repeat(second)
            return
        source.counted = second
        self._rate.note(entry.first_syn_ns, entry.client_isn, who.client_port)

    def settle(self, ack_interval_ns: float) -> bool:
        """Look for floods in what was noted; whether there is more of one.

        `ack_interval_ns`: the mean time between two ACKs of others, 0 where none came.
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
        """What makes so many silent ones a flood, in words; empty where it may be something else.

        ISNs of real stacks are a keyed hash of the 4-tuple (RFC 6528), and ports of different
        hosts know nothing of each other.
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
        """Why it looks like a flood's by its time; empty where it does not."""
        return self.floods.get(handshake.first_syn_ns // SECOND_NS, "")

    def is_beyond_chance(self, handshakes: int) -> bool:
        """Whether an address has more handshakes than a spoofed one has by chance.

        Of addresses drawn at random each has a number that is Poisson-distributed; few recur where
        there are many to draw from, and the mean of those seen at all is then 1 + expected / 2.
        """
        mean = self.handshakes / max(1, self.addresses)
        expected = min(2 * (mean - 1), mean)
        chance = expected + _CHANCE_SIGMAS * math.sqrt(max(0.0, expected))
        return handshakes >= _REAL_HANDSHAKES + chance


class _Acks:
    """How often ACKs come in one network namespace, by the programs' own count."""

    def __init__(self) -> None:
        self._marks: deque[tuple[int, int]] = deque(maxlen=_MARKS)

    def note(self, time_ns: int, total: int) -> None:
        if not self._marks or time_ns - self._marks[-1][0] >= SECOND_NS:
            self._marks.append((time_ns, total))
        elif len(self._marks) > 1:
            self._marks[-1] = (self._marks[-1][0], total)

    @property
    def interval_ns(self) -> float:
        """The mean time between two; 0 where none came."""
        if len(self._marks) < 2:
            return 0
        number = self._marks[-1][1] - self._marks[0][1]
        return (self._marks[-1][0] - self._marks[0][0]) / number if number > 0 else 0


class FloodWatch:
    """Takes in silent handshakes in the order of their SYNs, and says which look spoofed."""

    def __init__(self) -> None:
        self._listeners: OrderedDict[_ListenerKey, _Listener] = OrderedDict()
        self._sources: OrderedDict[tuple[_ListenerKey, bytes], _Source] = OrderedDict()
        self._real: OrderedDict[_Address, None] = OrderedDict()
        self._acks: OrderedDict[int, _Acks] = OrderedDict()
        self._noted: set[_ListenerKey] = set()
        self._revised: list[HandshakeId] = []

    def note_acks(self, netns: int, time_ns: int, total: int) -> None:
        """How many ACKs for cookies came in a network namespace since the run began."""
        _kept(self._acks, netns, _Acks, MAX_LISTENERS).note(time_ns, total)

    def note_real(self, who: FourTuple) -> None:
        """Something came from this client that no spoofed one sends."""
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
        self._revised += source.told
        source.told = ()

    def note(self, who: FourTuple, entry: Handshake) -> None:
        """A client has fallen silent after one SYN."""
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
        """Why a silent handshake that was noted looks like a flood's; empty where it does not.

        It is remembered how it is told now, for `settle`.
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
        elif len(source.told) < MAX_OF_ADDRESS:
            source.told += (handshake,)
        return why

    def settle(self) -> list[HandshakeId]:
        """Look for floods in what was noted; the handshakes to be asked about anew."""
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
    """The value of a key, made where there is none; the one longest unused goes."""
    if key not in kept:
        kept[key] = make()
        if len(kept) > most:
            kept.popitem(last=False)
    kept.move_to_end(key)
    return kept[key]
