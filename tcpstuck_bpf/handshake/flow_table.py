"""The flows in memory; decides when they leave it, and when entries leave the kernel's table. Pure.

Times are CLOCK_MONOTONIC nanoseconds.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import ItemsView

from tcpstuck_bpf.handshake.entry import ending_of
from tcpstuck_bpf.handshake.flow import ENDED_STATES, Flow, sharing
from tcpstuck_bpf.handshake.flow_counts import FlowCounts
from tcpstuck_bpf.model import SECOND_NS, Ending, FourTuple, Handshake, HandshakeId

REMEMBERED_NS = 60 * SECOND_NS
"""How long a flow stays in memory after it has left the kernel's table. A late observation of it
may follow: a sweep batch read before the end, or an event waiting in the ring buffer."""
COOKIE_VALID_NS = 120 * SECOND_NS
"""Longest validity of a cookie: the minute in which it was made and the next (MAX_SYNCOOKIE_AGE).
An entry that the SYN queue took over stays as long: an ACK may still prove that the client holds
the cookie."""
EVICTED_AT_ONCE = 16
"""An eviction removes one in this many flows, so that a flood does not cause a search per SYN."""


class FlowTable:
    """The flows by 4-tuple, at most `max_flows`.

    `row_life_ns`: how long after its last SYN a judged, open entry may stay in the kernel's table.
    """

    def __init__(self, counts: FlowCounts, max_flows: int, row_life_ns: int) -> None:
        self.touched: set[FourTuple] = set()
        """The flows with facts that are not judged yet."""
        self._counts = counts
        self._max_flows = max_flows
        self._row_life_ns = row_life_ns
        self._flows: dict[FourTuple, Flow] = {}
        self._evicted_rows: deque[HandshakeId] = deque(maxlen=max_flows)

    def __len__(self) -> int:
        return len(self._flows)

    def __contains__(self, four_tuple: FourTuple) -> bool:
        return four_tuple in self._flows

    def __getitem__(self, four_tuple: FourTuple) -> Flow:
        return self._flows[four_tuple]

    def get(self, four_tuple: FourTuple) -> Flow | None:
        """The flow of a 4-tuple; None if there is none."""
        return self._flows.get(four_tuple)

    def named(self, handshake: HandshakeId) -> Flow | None:
        """The flow of a handshake; None if its 4-tuple has no flow or that of a later handshake."""
        flow = self._flows.get(handshake.four_tuple)
        known = flow is not None and flow.handshake.first_syn_ns == handshake.first_syn_ns
        return flow if known else None

    def is_suspected(self, handshake: HandshakeId) -> bool:
        """Whether a handshake's flow is in memory and looks like part of a SYN flood."""
        flow = self.named(handshake)
        return flow is not None and bool(flow.flood)

    def items(self) -> ItemsView[FourTuple, Flow]:
        """All flows with their 4-tuples."""
        return self._flows.items()

    def begin(self, four_tuple: FourTuple, handshake: Handshake) -> Flow:
        """Create the flow of a new handshake; it replaces the previous flow of the 4-tuple."""
        if four_tuple not in self._flows and len(self._flows) >= self._max_flows:
            self._evict()
        self._counts.begun_by_ack += not handshake.syn_count
        flow = self._flows[sharing(four_tuple)] = Flow(handshake)
        return flow

    def _evict(self) -> None:
        """Make room: remove ended flows first, then reported ones, then the others; oldest first.

        Within each class, flows whose ACK was dropped are removed last.
        """

        def worth(item: tuple[FourTuple, Flow]) -> tuple[int, bool, int, FourTuple]:
            four_tuple, flow = item
            rank = 2 if flow.state is None else 0 if flow.state in ENDED_STATES else 1
            entry = flow.handshake
            return (rank, entry.acks_dropped > 0, entry.first_syn_ns, four_tuple)

        number = max(1, self._max_flows // EVICTED_AT_ONCE)
        for four_tuple, flow in heapq.nsmallest(number, self._flows.items(), key=worth):
            # A judged entry must leave the kernel's table too. Otherwise the next sweep would read
            # it, and it would be reported again. An unjudged entry must be read again.
            if flow.in_table and flow.state is not None and four_tuple not in self.touched:
                self._evicted_rows.append(HandshakeId(four_tuple, flow.handshake.first_syn_ns))
            if flow.state not in ENDED_STATES:
                self._counts.evicted += 1
            del self._flows[four_tuple]
            self.touched.discard(four_tuple)

    def expired(self, now_ns: int, table_rows: int, table_capacity: int) -> list[HandshakeId]:
        """Choose the entries to delete from the kernel's table, and forget old flows.

        These entries are returned, each once:

        - ended entries that were reported. An entry that the SYN queue took over stays until none
          of its cookies is valid any more;
        - judged open entries whose last SYN is older than `row_life_ns`;
        - if `table_rows` exceeds three quarters of `table_capacity`: the oldest judged entries,
          until half of the table is free. Entries whose ACK was dropped go last, because no address
          of a SYN flood sends an ACK.

        An unjudged entry is never returned. A flow that left the table is forgotten after a minute.
        """
        leaving = list(self._evicted_rows)
        self._evicted_rows.clear()
        crowded = 4 * table_rows > 3 * table_capacity
        staying: list[tuple[bool, int, FourTuple]] = []
        forgotten: list[FourTuple] = []
        for four_tuple, flow in self._flows.items():
            judged = flow.state is not None and four_tuple not in self.touched
            if judged and flow.in_table:
                last_syn_ns = flow.handshake.last_syn_ns
                if self._is_done(flow, now_ns - last_syn_ns):
                    self._let_go(four_tuple, flow, leaving)
                elif crowded:
                    dropped = flow.handshake.acks_dropped > 0
                    staying.append((dropped, last_syn_ns, four_tuple))
            elif now_ns - flow.seen_ns > REMEMBERED_NS and four_tuple not in self.touched:
                forgotten.append(four_tuple)
        if crowded:
            excess = table_rows - len(leaving) - table_capacity // 2
            for _, _, four_tuple in heapq.nsmallest(excess, staying):
                self._let_go(four_tuple, self._flows[four_tuple], leaving)
        for four_tuple in forgotten:
            if self._flows.pop(four_tuple).state is None:
                self._counts.unresolved += 1
        return leaving

    def _is_done(self, flow: Flow, since_syn_ns: int) -> bool:
        """Whether the entry of a judged flow can show nothing new."""
        if ending_of(flow.handshake) == Ending.TAKEN_OVER:
            return since_syn_ns > min(COOKIE_VALID_NS, self._row_life_ns)
        ended = flow.state in ENDED_STATES and not flow.unsettled
        return ended or since_syn_ns > self._row_life_ns

    def _let_go(self, four_tuple: FourTuple, flow: Flow, leaving: list[HandshakeId]) -> None:
        flow.in_table = False
        leaving.append(HandshakeId(four_tuple, flow.handshake.first_syn_ns))
        if ending_of(flow.handshake) == Ending.NONE:
            self._counts.let_go += 1
