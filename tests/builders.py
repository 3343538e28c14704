"""Handshakes, events and sweeps in few words, and a model of the kernel's table.

Times are nanoseconds; `ms` and `seconds` make them. `Table` plays segments by the rules that
bpf/tcpstuck.bpf.c follows, and yields what the kernel would tell: events and rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from tcpstuck_bpf.handshake.correlate import Correlator
from tcpstuck_bpf.handshake.flow import FlowReport
from tcpstuck_bpf.kernel.probes import PROBES, WHY_PROBES
from tcpstuck_bpf.model import (
    Attempt,
    Coverage,
    Ending,
    Event,
    EventKind,
    FourTuple,
    Handshake,
    HandshakeId,
    Moved,
    NetnsCount,
    Rescue,
    Row,
    Sweep,
    Tally,
    TraceFilter,
    TraceSettings,
    address_bytes,
)
from tcpstuck_bpf.rulesets import KernelNames
from tcpstuck_bpf.steps import Header, Vanished, WallClock

SECOND_NS = 1_000_000_000
START_NS = 1_000 * SECOND_NS
TIMEOUT_NS = 3 * SECOND_NS

CLIENT_ISN = 0x0A0B0C0D
COOKIE_ISN = 0x1A2B3C4D
MSS = 1460
OVERFLOW = Moved.SYNCOOKIES_RECV | Moved.LISTEN_OVERFLOWS | Moved.LISTEN_DROPS

# Numbers such as a kernel has, and what they mean there.
NF_PLACE, NF_STACK, NF_REASON = 0xFFFFFFFF81A2B3C4, 17, 8
NAMES = KernelNames(
    places={NF_PLACE: "nf_hook_slow+0xa2"},
    reasons={NF_REASON: "NETFILTER_DROP"},
    stacks={NF_STACK: ("nf_hook_slow+0xa2", "ip_local_deliver+0xc1")},
    rulesets={},
)

FIN, SYN, RST, PSH, ACK = 0x01, 0x02, 0x04, 0x08, 0x10
FLAGS = {
    EventKind.SYN_REPEATED: SYN,
    EventKind.SYN_DROPPED: SYN,
    EventKind.TAKEN_OVER: SYN,
    EventKind.REPLACED: SYN,
    EventKind.ACK_DROPPED: ACK,
    EventKind.ACK_REJECTED: ACK,
    EventKind.ACK_FILTERED: ACK,
    EventKind.COMPLETED: ACK,
    EventKind.RESET: RST,
    EventKind.NO_LISTENER: ACK,
}


def seconds(number: float) -> int:
    """Nanoseconds."""
    return round(number * SECOND_NS)


def at(number: float) -> int:
    """The time so many seconds after the first SYN of `handshake()`."""
    return START_NS + seconds(number)


def four_tuple(number: int = 0, family: int = 4) -> FourTuple:
    """One of many clients of one server."""
    if family == 4:
        client, server = f"10.0.{number >> 8 & 255}.{number & 255}", "192.0.2.1"
    else:
        client, server = f"2001:db8::{number:x}", "2001:db8:1::1"
    return FourTuple(address_bytes(client), address_bytes(server), 40_000, 3311, 4_026_531_840)


def handshake(first_syn_ns: int = START_NS, **changes: Any) -> Handshake:
    """An entry after one SYN, with some fields changed."""
    fresh = Handshake(
        first_syn_ns=first_syn_ns,
        last_syn_ns=first_syn_ns,
        first_ack_dropped_ns=0,
        last_ack_dropped_ns=0,
        first_ack_filtered_ns=0,
        last_ack_filtered_ns=0,
        filter_place=0,
        drop_place=0,
        ended_ns=0,
        client_isn=CLIENT_ISN,
        cookie_isn=COOKIE_ISN,
        syn_count=1,
        syns_dropped=0,
        acks_dropped=0,
        acks_filtered=0,
        filter_reason=0,
        drop_reason=0,
        filter_stack=0,
        filter_device=0,
        accept_queue=51,
        accept_queue_limit=50,
        syn_queue=0,
        bytes_missed=0,
        mss=MSS,
        ending=Ending.NONE,
        drop_counters=0,
        end_counters=0,
        socket=0,
    )
    return fresh._replace(**changes)


def repeated(entry: Handshake, *times_ns: int) -> Handshake:
    """The entry after further SYNs, each answered by another cookie."""
    return entry._replace(
        last_syn_ns=times_ns[-1],
        syn_count=entry.syn_count + len(times_ns),
        cookie_isn=entry.cookie_isn + len(times_ns),
    )


def has_answered(entry: Handshake) -> bool:
    """Whether the client has acknowledged a cookie."""
    return entry.acks_dropped > 0 or entry.acks_filtered > 0


def gone_on(entry: Handshake) -> Handshake:
    """The entry when such an ACK comes: that the SYN queue has it is no end."""
    if entry.ending != Ending.TAKEN_OVER:
        return entry
    return entry._replace(ending=Ending.NONE, ended_ns=0, end_counters=0)


def ack_dropped(entry: Handshake, time_ns: int, counters: int = OVERFLOW) -> Handshake:
    """The entry after a further ACK was dropped."""
    return entry._replace(
        first_ack_dropped_ns=entry.first_ack_dropped_ns or time_ns,
        last_ack_dropped_ns=time_ns,
        acks_dropped=entry.acks_dropped + 1,
        drop_counters=entry.drop_counters | counters,
    )


def ack_filtered(entry: Handshake, time_ns: int, **changes: Any) -> Handshake:
    """The entry after a further ACK was dropped before TCP, by default at netfilter's input."""
    facts = {"filter_place": NF_PLACE, "filter_stack": NF_STACK, "filter_reason": NF_REASON}
    return entry._replace(
        first_ack_filtered_ns=entry.first_ack_filtered_ns or time_ns,
        last_ack_filtered_ns=time_ns,
        acks_filtered=entry.acks_filtered + 1,
        **{**facts, **changes},
    )


def ended(entry: Handshake, ending: Ending, time_ns: int, counters: int = 0) -> Handshake:
    """The entry after its end."""
    return entry._replace(ending=ending, ended_ns=time_ns, end_counters=counters)


def event(
    kind: EventKind, entry: Handshake, time_ns: int, tuple_: FourTuple | None = None, **changes: Any
) -> Event:
    """An event whose segment fits the entry, with some fields changed."""
    is_syn = FLAGS[kind] == SYN
    fitting = Event(
        four_tuple=four_tuple() if tuple_ is None else tuple_,
        handshake=entry,
        time_ns=time_ns,
        sequence=entry.client_isn + (0 if is_syn else 1),
        acknowledgement=0 if is_syn else entry.cookie_isn + 1,
        accept_queue=51,
        accept_queue_limit=50,
        payload_length=0,
        tcp_flags=FLAGS[kind],
        counters=entry.drop_counters if kind is EventKind.ACK_DROPPED else entry.end_counters,
        # As wire.decode_event gives it: equal to the enumerator, and not the same object.
        kind=int(kind),
    )
    return fitting._replace(**changes)


def sweep(time_ns: int, *entries: Handshake) -> Sweep:
    """A sweep that showed these entries, of the 4-tuples 0, 1, 2 ..."""
    return Sweep(time_ns, tuple(Row(four_tuple(n), entry) for n, entry in enumerate(entries)))


def correlator(**changes: Any) -> Correlator:
    """A correlator with the tests' time-out."""
    return Correlator(**{"timeout_ns": TIMEOUT_NS, **changes})


def reports(
    observations: Iterable[Event | Sweep | Rescue | Vanished],
    now_ns: int,
    of: Correlator | None = None,
) -> list[FlowReport]:
    """What is told once all observations are in."""
    told_by = correlator() if of is None else of
    for observation in observations:
        if isinstance(observation, Rescue):
            told_by.note_rescue(observation)
        elif isinstance(observation, Vanished):
            told_by.note_gone(observation.netns, observation.now_ns, observation.until_ns)
        else:
            told_by.observe(observation)
    return told_by.advance(now_ns)


def identity(entry: Handshake, tuple_: FourTuple | None = None) -> HandshakeId:
    """The name of a handshake, by default of the 4-tuple 0."""
    return HandshakeId(four_tuple() if tuple_ is None else tuple_, entry.first_syn_ns)


def attempt(entry: Handshake, time_ns: int, number: int = 1, outcome: str = "sent") -> Rescue:
    """One SYN-ACK repeated, or tried to be."""
    return Rescue((Attempt(identity(entry), time_ns, number, outcome),), (), {})


def time_of(observation: Event | Sweep | Rescue | Vanished) -> int:
    """When it was made."""
    if isinstance(observation, Vanished):
        return observation.now_ns
    if isinstance(observation, Rescue):
        return observation.attempts[-1].time_ns
    return observation.time_ns


class Table:
    """The awaiting-ACK table under the rules of the BPF program, and its ring buffer.

    `loses` says of each event whether the ring buffer is full when it comes.
    """

    def __init__(
        self, tell_healthy: bool = False, loses: Callable[[], bool] = lambda: False
    ) -> None:
        self.entries: dict[FourTuple, Handshake] = {}
        self.ring: list[Event] = []
        self._loses = loses
        self._tell_after_ns = 0 if tell_healthy else TIMEOUT_NS * 3 // 4

    def _tell(self, kind: EventKind, key: FourTuple, now_ns: int, **changes: Any) -> bool:
        if self._loses():
            return False
        self.ring.append(event(kind, self.entries[key], now_ns, key, **changes))
        return True

    def syn(self, key: FourTuple, isn: int, now_ns: int) -> None:
        """A SYN that a cookie answers."""
        entry = self.entries.get(key)
        if entry is None or entry.ending or entry.client_isn != isn:
            if entry is not None and now_ns - entry.first_syn_ns >= self._tell_after_ns:
                self._replace(key, isn, now_ns)
            self.entries[key] = handshake(now_ns, client_isn=isn)
            return
        self.entries[key] = repeated(entry, now_ns)
        self._tell(EventKind.SYN_REPEATED, key, now_ns)

    def syn_dropped(self, key: FourTuple, isn: int, now_ns: int) -> None:
        """A SYN that tcp_conn_request drops; only a repeated one is noted."""
        entry = self.entries.get(key)
        if entry is None or entry.ending:
            return
        if entry.client_isn != isn:
            self._replace(key, isn, now_ns)
            return
        self.entries[key] = entry._replace(
            syn_count=entry.syn_count + 1, syns_dropped=entry.syns_dropped + 1, last_syn_ns=now_ns
        )
        self._tell(EventKind.SYN_DROPPED, key, now_ns)

    def syn_taken(self, key: FourTuple, isn: int, now_ns: int) -> None:
        """A SYN that gets a place in the SYN queue."""
        entry = self.entries.get(key)
        if entry is not None and entry.client_isn != isn:
            self._replace(key, isn, now_ns)
        elif entry is not None and not entry.ending and has_answered(entry):
            self._tell(EventKind.TAKEN_OVER, key, now_ns)
        else:
            self._end(EventKind.TAKEN_OVER, Ending.TAKEN_OVER, key, now_ns)

    def _end(
        self, kind: EventKind, ending: Ending, key: FourTuple, now_ns: int, **changes: Any
    ) -> None:
        entry = self.entries.get(key)
        if entry is not None and not entry.ending:
            self.entries[key] = ended(entry, ending, now_ns)
            self._tell(kind, key, now_ns, **changes)

    def _replace(self, key: FourTuple, isn: int, now_ns: int) -> None:
        """End a handshake by the SYN of another one."""
        self._end(EventKind.REPLACED, Ending.REPLACED, key, now_ns, sequence=isn)

    def reset(self, key: FourTuple, now_ns: int) -> None:
        """An RST that fits the handshake."""
        self._end(EventKind.RESET, Ending.RESET, key, now_ns)

    def ack_rejected(self, key: FourTuple, now_ns: int) -> None:
        """An ACK that cookie_vX_check gives back."""
        self._end(EventKind.ACK_REJECTED, Ending.REJECTED, key, now_ns)

    def no_listener(self, key: FourTuple, now_ns: int) -> None:
        """An ACK for a cookie's SYN-ACK that meets no socket."""
        entry = self.entries.get(key)
        if entry is not None and entry.ending in (Ending.NONE, Ending.TAKEN_OVER):
            self.entries[key] = gone_on(entry)
            self._end(EventKind.NO_LISTENER, Ending.NO_LISTENER, key, now_ns)

    def ack_dropped(self, key: FourTuple, now_ns: int, counters: int = OVERFLOW) -> None:
        """An ACK that cookie_vX_check drops."""
        entry = self.entries.get(key)
        if entry is not None:
            self.entries[key] = ack_dropped(gone_on(entry), now_ns, counters)
            self._tell(EventKind.ACK_DROPPED, key, now_ns)

    def ack_filtered(self, key: FourTuple, now_ns: int) -> None:
        """An ACK for the last cookie's SYN-ACK that something drops before TCP."""
        entry = self.entries.get(key)
        if entry is not None and entry.ending in (Ending.NONE, Ending.TAKEN_OVER):
            self.entries[key] = ack_filtered(gone_on(entry), now_ns)
            self._tell(EventKind.ACK_FILTERED, key, now_ns)

    def ack_too_late(self, key: FourTuple, now_ns: int) -> None:
        """A segment that makes the connection, two bytes beyond what the server has seen."""
        self.ack(key, now_ns, missed=2)

    def ack(self, key: FourTuple, now_ns: int, missed: int = 0) -> None:
        """An ACK that makes the connection."""
        entry = self.entries.get(key)
        if entry is None:
            return
        if entry.ending != Ending.COMPLETED:
            entry = entry._replace(bytes_missed=missed)
        dropped = entry.acks_dropped or entry.acks_filtered
        remarkable = entry.ending or entry.syn_count > 1 or dropped or missed
        if remarkable or now_ns - entry.first_syn_ns >= self._tell_after_ns:
            self.entries[key] = ended(entry, Ending.COMPLETED, now_ns, Moved.SYNCOOKIES_RECV)
            if not self._tell(EventKind.COMPLETED, key, now_ns):
                return
        del self.entries[key]

    def sweep(self, now_ns: int) -> Sweep:
        """Every entry as it is now."""
        return Sweep(now_ns, tuple(Row(key, entry) for key, entry in self.entries.items()))

    def forget(self, handshakes: Iterable[HandshakeId]) -> None:
        """What user space does with `Correlator.expired`."""
        for key, first_syn_ns in handshakes:
            if key in self.entries and self.entries[key].first_syn_ns == first_syn_ns:
                del self.entries[key]


def header(**changes: Any) -> Header:
    """The header of a run with the tests' time-out and every probe attached."""
    values: dict[str, Any] = {
        "settings": TraceSettings(TraceFilter(ports=(3311,)), timeout_ns=TIMEOUT_NS),
        "coverage": Coverage(
            "fentry", frozenset(probe.function for probe in (*PROBES, *WHY_PROBES))
        ),
        "clock": WallClock(START_NS, 1_700_000_000_123_456_789),
        "watched": "port 3311",
        "table_capacity": 1024,
    }
    return Header(**{**values, **changes})


def tally(time_ns: int, kernel: int = 0, traced: int = 0, netns: int = 4_026_531_840) -> Tally:
    """Both sides' figures of SyncookiesSent at one moment."""
    counters = {netns: {"SyncookiesSent": kernel}}
    return Tally(time_ns, counters, {netns: {NetnsCount.COOKIES_SENT: traced}}, counters)
