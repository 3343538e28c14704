"""A server, its clients, the tool and time, as far as the rescue is concerned: a simulation.

The kernel's table is `builders.Table`, verdicts come from the true correlator; only `Rescuer` is
under test. Time jumps to whatever is next, and `plan` is called when there is news or it is due.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable

from tcpstuck_bpf.model import ATTEMPT_SENT, SECOND_NS, Attempt, FourTuple, HandshakeId, Moved
from tcpstuck_bpf.rescue.candidate import MAX_TRIES
from tcpstuck_bpf.rescue.planner import Plan, Rescuer
from tcpstuck_bpf.rescue.policy import RescuePolicy
from tests.builders import (
    ACK,
    CLIENT_ISN,
    FIN,
    OVERFLOW,
    PSH,
    START_NS,
    Table,
    correlator,
    four_tuple,
)

ROUND_TRIP_NS = 1_000_000
OF_MEMORY = Moved.SYNCOOKIES_RECV
BACKLOG = 50
COMPLETES, OVERFLOWS, OUT_OF_MEMORY, SILENT = "completes", "overflows", "out of memory", "silent"
FILTERED = "filtered"


def client(number: int, server_port: int = 3311) -> FourTuple:
    """One of many clients of one address."""
    return four_tuple()._replace(client_port=10_000 + number, server_port=server_port)


class Queue:
    """A listener's accept queue. The server takes `accepts` connections per second from `resumes`.

    Full is longer than the limit, see sk_acceptq_is_full.
    """

    def __init__(self, length: int = 0, accepts: int = 2_000, resumes_ns: int = START_NS) -> None:
        self.length = length
        self._accepts = accepts
        self._taken_ns = resumes_ns

    def answer(self, now_ns: int) -> str:
        """What happens to an ACK now."""
        taken = max(0, now_ns - self._taken_ns) * self._accepts // SECOND_NS
        if taken:
            self.length = max(0, self.length - taken)
            self._taken_ns = now_ns
        if self.length > BACKLOG:
            return OVERFLOWS
        self.length += 1
        return COMPLETES


class RescueWorld:
    """`answer` says what becomes of the ACK that a repeated SYN-ACK would draw from a client."""

    def __init__(
        self,
        policy: RescuePolicy,
        *,
        answer: Callable[[FourTuple, int], str],
        is_known: Callable[[FourTuple], bool] = lambda _: True,
        outcome: str = ATTEMPT_SENT,
    ) -> None:
        self.now_ns = START_NS
        self.table = Table()
        self.correlate = correlator()
        self.rescuer = Rescuer(policy)
        self.plans: list[tuple[int, Plan]] = []
        self.unanswered: list[HandshakeId] = []
        self.completed: dict[FourTuple, int] = {}
        self.tries: Counter[HandshakeId] = Counter()
        """Tries of each handshake, without those that found a full accept queue."""
        self._owed: set[HandshakeId] = set()
        self.check: Callable[[Plan], None] = lambda _: None
        self._answer = answer
        self._is_known = is_known
        self.outcome = outcome
        self._answers: list[tuple[int, HandshakeId]] = []
        self._next_sweep_ns = START_NS

    def stuck(self, who: FourTuple, counters: int = OVERFLOW, socket: int = 0) -> None:
        """A client connects, and its ACK is dropped; by one of its port's sockets, where named."""
        self.table.syn(who, CLIENT_ISN, self.now_ns)
        self.table.entries[who] = self.table.entries[who]._replace(socket=socket)
        self.drop(who, counters)

    def drop(
        self, who: FourTuple, counters: int = OVERFLOW, data: int = 0, fin: bool = False
    ) -> None:
        """A segment of a client is dropped; after a try it counts as the answer."""
        entry = self.table.entries.get(who)
        if entry is not None and HandshakeId(who, entry.first_syn_ns) in self._owed:
            self._owed.discard(HandshakeId(who, entry.first_syn_ns))
            full = bool(counters & Moved.LISTEN_OVERFLOWS)
            self.tries[HandshakeId(who, entry.first_syn_ns)] -= full
        told = len(self.table.ring)
        self.table.ack_dropped(who, self.now_ns, counters)
        flags = ACK | (PSH if data else 0) | (FIN if fin else 0)
        for event in self.table.ring[told:]:
            self.table.ring[-1] = event._replace(
                payload_length=data, tcp_flags=flags, counters=counters
            )

    def filter(self, who: FourTuple, data: int = 0) -> None:
        """A segment of a client is dropped before TCP; after a try it counts as the answer."""
        told = len(self.table.ring)
        self.table.ack_filtered(who, self.now_ns)
        for event in self.table.ring[told:]:
            self.table.ring[-1] = event._replace(payload_length=data)

    def complete(self, who: FourTuple, accept_queue: int) -> None:
        """A client's ACK makes the connection; so many were in the accept queue before."""
        told = len(self.table.ring)
        self.table.ack(who, self.now_ns)
        self.completed[who] = self.now_ns
        for event in self.table.ring[told:]:
            self.table.ring[-1] = event._replace(
                accept_queue=accept_queue, accept_queue_limit=BACKLOG
            )

    def take_in(self) -> None:
        """Drain the ring buffer, tell what is new, plan."""
        events, self.table.ring[:] = list(self.table.ring), []
        for event in events:
            self.rescuer.observe(event)
            self.correlate.observe(event)
        self._tell()

    def sweep(self) -> None:
        """Read the table, tell what is new, plan."""
        self.take_in()
        self.correlate.observe(self.table.sweep(self.now_ns))
        self._tell()

    def _tell(self) -> None:
        for report in self.correlate.advance(self.now_ns):
            self.rescuer.report(report)
        self._act()

    def _act(self) -> None:
        """Plan until nothing is due: what is not sent makes way for the next at once."""
        while True:
            plans = self.rescuer.plan(self.now_ns, self._is_known)
            attempts = [self._attempt(plan) for plan in plans]
            self.rescuer.attempted(attempts)
            unanswered = self.rescuer.unanswered()
            assert all(self.tries[identity] == MAX_TRIES for identity in unanswered)
            self.unanswered += unanswered
            assert all(tries <= MAX_TRIES for tries in self.tries.values())
            due_ns = self.rescuer.due_ns
            if due_ns is None or due_ns > self.now_ns:
                return
            assert plans, "due at once, and nothing to do"

    def _attempt(self, plan: Plan) -> Attempt:
        self.check(plan)
        self.plans.append((self.now_ns, plan))
        self.tries[plan.handshake_id] += 1
        self._owed.add(plan.handshake_id)
        if self.outcome == ATTEMPT_SENT:
            due_ns = self.now_ns + ROUND_TRIP_NS
            heapq.heappush(self._answers, (due_ns, plan.handshake_id))
        return Attempt(plan.handshake_id, self.now_ns, plan.number, self.outcome)

    def _arrive(self, identity: HandshakeId) -> None:
        who = identity.four_tuple
        entry = self.table.entries.get(who)
        if entry is None or entry.first_syn_ns != identity.first_syn_ns or entry.ending:
            return
        answer = self._answer(who, self.now_ns)
        if answer == COMPLETES:
            self.complete(who, getattr(self._answer, "length", 1) - 1)
        elif answer == OVERFLOWS:
            self.drop(who)
        elif answer == OUT_OF_MEMORY:
            self.drop(who, OF_MEMORY)
        elif answer == FILTERED:
            self.filter(who)

    def run_until(self, until_ns: int) -> None:
        """Let time pass: answers arrive, the tool sweeps each second and wakes when it is due."""
        while True:
            due_ns = self.rescuer.due_ns
            times = [self._next_sweep_ns] + ([due_ns] if due_ns is not None else [])
            next_ns = min([*times, self._answers[0][0]] if self._answers else times)
            if next_ns > until_ns:
                break
            self.now_ns = max(self.now_ns, next_ns)
            while self._answers and self._answers[0][0] <= self.now_ns:
                self._arrive(heapq.heappop(self._answers)[1])
            if self._next_sweep_ns <= self.now_ns:
                self._next_sweep_ns = self.now_ns + SECOND_NS
                self.sweep()
            else:
                self.take_in()
        self.now_ns = max(self.now_ns, until_ns)


class Room:
    """An accept queue with room that never changes."""

    length = 1

    def __call__(self, _who: FourTuple, _now_ns: int) -> str:
        return COMPLETES


class QueueAnswers:
    """Answers by an accept queue."""

    def __init__(self, queue: Queue) -> None:
        self._queue = queue

    @property
    def length(self) -> int:
        """Length of the accept queue, including the connection of the answer."""
        return self._queue.length

    def __call__(self, _who: FourTuple, now_ns: int) -> str:
        return self._queue.answer(now_ns)


def always(answer: str) -> Callable[[FourTuple, int], str]:
    return lambda _who, _now_ns: answer


def sent_to(world: RescueWorld) -> list[FourTuple]:
    return [plan.handshake_id.four_tuple for _, plan in world.plans]


def silent_world(policy: RescuePolicy | None = None, known: bool = True) -> RescueWorld:
    return RescueWorld(
        RescuePolicy() if policy is None else policy,
        answer=always(SILENT),
        is_known=lambda _: known,
    )
