"""What truly happened to a handshake, told from its segments alone: the oracle of the properties.

Nothing here looks at the table, at events or at the correlator.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from tcpstuck_bpf.model import FourTuple, HandshakeId

ENDS = ("ack", "ack rejected", "no listener", "reset", "syn taken")


@dataclass
class Truth:
    """The last handshake of a 4-tuple at some time."""

    first_syn_ns: int = 0
    """0: there was none."""
    isn: int = 0
    syns: int = 0
    acks_dropped: int = 0
    acks_filtered: int = 0
    over: str | None = None
    """The segment that ended it."""


class History:
    """Every segment between a server and its clients, in the order of their times."""

    def __init__(self) -> None:
        self._segments: defaultdict[FourTuple, list[tuple[int, str, int]]] = defaultdict(list)

    def add(self, key: FourTuple, time_ns: int, segment: str, isn: int) -> None:
        """`isn` is the one of the client's last SYN."""
        self._segments[key].append((time_ns, segment, isn))

    def at(self, key: FourTuple, time_ns: int) -> Truth:
        """How things stood at a time, what came at that very time included."""
        truth = Truth()
        for when_ns, segment, isn in self._segments[key]:
            if when_ns > time_ns:
                break
            truth = _after(truth, when_ns, segment, isn)
        return truth

    def ends(self) -> dict[HandshakeId, Truth]:
        """Every handshake, and how things stood when the next one of its 4-tuple began, or now."""
        found = {}
        for key, segments in self._segments.items():
            truth = Truth()
            for segment in segments:
                truth = _after(truth, *segment)
                found[HandshakeId(key, truth.first_syn_ns)] = truth
        return found


def _after(truth: Truth, when_ns: int, segment: str, isn: int) -> Truth:
    owed = truth.first_syn_ns != 0 and truth.over is None
    if segment == "syn":
        if not owed or isn != truth.isn:
            return Truth(first_syn_ns=when_ns, isn=isn, syns=1)
        truth.syns += 1
    elif segment in ("ack", "ack too late"):
        # A connection is a connection, whatever a stray RST or probe did before.
        # The first one makes it.
        if truth.first_syn_ns and truth.over not in ("ack", "ack too late"):
            truth.over = segment
    elif owed or _goes_on(truth, segment):
        truth.over = None
        _count(truth, segment, isn)
    return truth


def _goes_on(truth: Truth, segment: str) -> bool:
    """Whether the client shows that it took the cookie's SYN-ACK, and not the SYN queue's."""
    return truth.over == "syn taken" and segment in ("ack dropped", "ack filtered", "no listener")


def _count(truth: Truth, segment: str, isn: int) -> None:
    """What a segment does to a handshake that is owed its ACK."""
    if segment.startswith("syn ") and isn != truth.isn:
        truth.over = "replaced"
    elif segment == "syn dropped":
        truth.syns += 1
    elif segment == "ack dropped":
        truth.acks_dropped += 1
    elif segment == "ack filtered":
        truth.acks_filtered += 1
    elif segment == "syn taken" and (truth.acks_dropped or truth.acks_filtered):
        # An established client takes no other SYN-ACK: the SYN was slower than its ACK.
        pass
    elif segment in ENDS:
        truth.over = segment
