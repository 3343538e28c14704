"""The flows in memory, and which of them leave it or the kernel's table. Pure.

Times are CLOCK_MONOTONIC nanoseconds.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import ItemsView

from tcpstuck_bpf.handshake.flow import ENDED_STATES, Flow, ending_of, sharing
from tcpstuck_bpf.handshake.flow_counts import FlowCounts
from tcpstuck_bpf.model import SECOND_NS, Ending, FourTuple, Handshake, HandshakeId

REMEMBERED_NS = 60 * SECOND_NS
"""A flow stays in memory for this long after it has left the kernel's table. An observation of it
may come late: a batch of a sweep that was read before the end, or an event that waited in the ring
buffer."""
COOKIE_VALID_NS = 120 * SECOND_NS
"""A cookie is valid in the minute in which it was made and in the next (MAX_SYNCOOKIE_AGE). An
entry that the SYN queue took over stays as long: an ACK may still prove that it is the cookie's."""
EVICTED_AT_ONCE = 16
"""Each eviction removes one in this many flows, so that a flood causes no search for each SYN."""


class FlowTable:
    """The flows by 4-tuple, no more than `max_flows`.

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
        """The flow of a 4-tuple; None where there is none."""
        return self._flows.get(four_tuple)

    def named(self, handshake: HandshakeId) -> Flow | None:
        """The flow of a handshake; None where its 4-tuple has no flow, or a later handshake's."""
        flow = self._flows.get(handshake.four_tuple)
        known = flow is not None and flow.handshake.first_syn_ns == handshake.first_syn_ns
        return flow if known else None

    def is_suspected(self, handshake: HandshakeId) -> bool:
        """Whether a flow is in memory and looks like a SYN flood's."""
        flow = self.named(handshake)
        return flow is not None and bool(flow.flood)

    def items(self) -> ItemsView[FourTuple, Flow]:
        """All flows with their 4-tuples."""
        return self._flows.items()

    def begin(self, four_tuple: FourTuple, handshake: Handshake) -> Flow:
        """Make the flow of a new handshake, in place of the 4-tuple's last one."""
        if four_tuple not in self._flows and len(self._flows) >= self._max_flows:
            self._evict()
        flow = self._flows[sharing(four_tuple)] = Flow(handshake)
        return flow

    def _evict(self) -> None:
        """Make room: ended flows go first, then reported ones, then the others, the oldest first.

        Flows whose ACK was dropped go last of their kind.
        """

        def worth(item: tuple[FourTuple, Flow]) -> tuple[int, bool, int, FourTuple]:
            four_tuple, flow = item
            rank = 2 if flow.state is None else 0 if flow.state in ENDED_STATES else 1
            entry = flow.handshake
            return (rank, entry.acks_dropped > 0, entry.first_syn_ns, four_tuple)

        number = max(1, self._max_flows // EVICTED_AT_ONCE)
        for four_tuple, flow in heapq.nsmallest(number, self._flows.items(), key=worth):
            # A judged entry must leave the kernel's table too: the next sweep would bring it back,
            # and it would be reported again. An entry that is not judged yet must come back.
            if flow.in_table and flow.state is not None and four_tuple not in self.touched:
                self._evicted_rows.append(HandshakeId(four_tuple, flow.handshake.first_syn_ns))
            if flow.state not in ENDED_STATES:
                self._counts.evicted += 1
            del self._flows[four_tuple]
            self.touched.discard(four_tuple)

    def expired(self, now_ns: int, table_rows: int, table_capacity: int) -> list[HandshakeId]:
        """Choose the entries that may be deleted from the kernel's table, and forget old flows.

        These entries may go, each of which is named once:

        - ended ones that were reported. An entry that the SYN queue took over stays until no cookie
          of it is valid any more;
        - judged open ones whose last SYN is older than `row_life_ns`;
        - where `table_rows` are more than three quarters of `table_capacity`, the oldest judged
          ones until half of the table is free. Those whose ACK was dropped go last: no address of a
          SYN flood sends an ACK.

        An entry that is not judged yet never goes. A flow that left the table is forgotten after a
        minute.
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
        """Whether the entry of a judged flow can show nothing more."""
        if ending_of(flow.handshake) == Ending.TAKEN_OVER:
            return since_syn_ns > min(COOKIE_VALID_NS, self._row_life_ns)
        ended = flow.state in ENDED_STATES and not flow.unsettled
        return ended or since_syn_ns > self._row_life_ns

    def _let_go(self, four_tuple: FourTuple, flow: Flow, leaving: list[HandshakeId]) -> None:
        flow.in_table = False
        leaving.append(HandshakeId(four_tuple, flow.handshake.first_syn_ns))
        if ending_of(flow.handshake) == Ending.NONE:
            self._counts.let_go += 1
