"""Which stuck clients get their SYN-ACK once more, and when. Pure: no clock, no sockets, no BCC.

An established client answers a repeated SYN-ACK by a challenge ACK (tcp_validate_incoming, RFC
5961, 4), which carries the cookie: at the listener it is the ACK that was missing. It does so once
in 500 ms (tcp_invalid_ratelimit). Where it has sent data, that ACK does not validate and the RST
it draws would end the client's connection, which would have mended itself: such a client is never
written to.

Whatever needs no time is worked out as facts come in; `plan` looks only at what is due.

Times are CLOCK_MONOTONIC nanoseconds.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from tcpstuck_bpf.handshake.flood import SilenceRate
from tcpstuck_bpf.handshake.flow import STUCK_STATES, FlowReport
from tcpstuck_bpf.model import (
    ATTEMPT_NOT_SENT,
    SECOND_NS,
    Attempt,
    Ending,
    Event,
    EventKind,
    FourTuple,
    Handshake,
    HandshakeId,
    listener_of,
)
from tcpstuck_bpf.rescue import candidate
from tcpstuck_bpf.rescue.addresses import AddressPace
from tcpstuck_bpf.rescue.candidate import (
    ACK_KINDS,
    COOKIE_LIFE_NS,
    MAX_TRIES,
    Candidate,
    Stage,
    overflowed,
)
from tcpstuck_bpf.rescue.pacing import KeyedHeap, TokenBucket
from tcpstuck_bpf.rescue.policy import RescuePolicy
from tcpstuck_bpf.rescue.turns import ANSWER_NS, Listeners
from tcpstuck_bpf.rescue.unknown_clients import UnknownClients

SPACING_NS = ANSWER_NS
"""The least time between two tries."""
LAST_TRY_AFTER_NS = 20 * SECOND_NS
"""Between the last two tries of a silent client: what made it silent may pass, and its cookie lives
for three times as long."""
EXPIRY_MARGIN_NS = 2 * SECOND_NS
"""For the answer to arrive before the cookie expires."""
MAX_CANDIDATES = 131_072

_NEVER_NS = -1


class Plan(NamedTuple):
    """A SYN-ACK to send now."""

    handshake_id: HandshakeId
    handshake: Handshake
    number: int
    """Of this handshake's attempts, from 1."""


class Rescuer:
    """Takes in events and reports, plans the SYN-ACKs to repeat, is told what became of them.

    No more than `max_candidates` that may be tried are held of the silent clients, as many of
    those whose ACK was dropped (a flood of silent ones takes no room from these), and as many
    that are left alone; of the last, the oldest are forgotten but stay counted.
    """

    def __init__(self, policy: RescuePolicy, max_candidates: int = MAX_CANDIDATES) -> None:
        self._policy = policy
        self._max_candidates = max_candidates
        self._now_ns = 0
        self._active: dict[FourTuple, Candidate] = {}
        self._active_by_budget: Counter[bool] = Counter()
        self._left: OrderedDict[FourTuple, Candidate] = OrderedDict()
        self._left_alone: Counter[str] = Counter()
        self._unasked: dict[FourTuple, None] = {}
        self._due: KeyedHeap[FourTuple] = KeyedHeap()
        self._expiring: KeyedHeap[FourTuple] = KeyedHeap()
        self._listeners = Listeners()
        self._addresses = AddressPace(policy.rate_per_address)
        self._bucket = TokenBucket(policy.rate)
        self._unknown_rate = SilenceRate()
        self._flood_ns = _NEVER_NS
        self._unknown = UnknownClients()
        self._unanswered: list[HandshakeId] = []

    @property
    def left_alone(self) -> Mapping[str, int]:
        """Stuck clients that are left alone, each once, by the reason that holds now."""
        return {why: number for why, number in self._left_alone.items() if number}

    @property
    def pending(self) -> int:
        """Stuck clients that are not left alone: a try is under way or may yet come."""
        return len(self._active)

    @property
    def due_ns(self) -> int | None:
        """When `plan` has something to do at the latest; None where only news can bring it."""
        if self._unasked or self._unanswered:
            return self._now_ns
        pacing = (self._addresses.waking, self._listeners.waking, self._unknown.asking)
        heaps = (self._due, self._expiring, *pacing)
        times = [first[0] for first in (heap.first() for heap in heaps) if first is not None]
        if self._listeners.open:
            times.append(self._bucket.next_ns(self._now_ns))
        return min(times, default=None)

    def report(self, report: FlowReport) -> None:
        """A flow came into another state worth telling."""
        client = self._tracked(report.four_tuple, report.handshake.first_syn_ns)
        if report.state in STUCK_STATES:
            if client is None:
                if report.four_tuple in self._active or report.four_tuple in self._left:
                    return
                client = Candidate(report, self._policy.excludes(report.four_tuple.client_address))
            else:
                client.absorb(report)
            client.stuck = True
            self._set_stage(client)
        elif client is not None and report.handshake.ending != Ending.NONE:
            self._remove(client)
        elif client is not None:
            client.absorb(report)
            # Who is left alone for a namespace that is gone is counted for that.
            client.stuck = client.stuck and client.gone
            self._set_stage(client)

    def observe(self, event: Event) -> None:
        """An event; those of a moment come before its reports."""
        client = self._tracked(event.four_tuple, event.handshake.first_syn_ns)
        is_answer = False
        if client is not None:
            client.note(event)
            if event.kind in ACK_KINDS:
                is_answer = client.note_answer(event)
        if event.kind == EventKind.ACK_DROPPED and overflowed(event):
            self._listeners.note_overflow(event, is_answer)
        elif event.kind == EventKind.COMPLETED:
            self._listeners.note_completion(event)
        if client is None:
            return
        if event.handshake.ending != Ending.NONE:
            self._remove(client)
            return
        if is_answer and client.stage is Stage.UNDER_WAY:
            self._rest(client)
        self._set_stage(client)

    def _tracked(self, four_tuple: FourTuple, first_syn_ns: int) -> Candidate | None:
        """The client of that handshake; one of an older handshake has given that up."""
        client = self._active.get(four_tuple) or self._left.get(four_tuple)
        if client is None or client.handshake.first_syn_ns == first_syn_ns:
            return client
        if client.handshake.first_syn_ns < first_syn_ns:
            self._remove(client)
        return None

    def _obstacle(self, client: Candidate) -> str | None:
        why = client.obstacle()
        if why is None and client.silent and client.known is False:
            return None if self._policy.include_unknown else candidate.NOT_KNOWN
        return why

    def _set_stage(self, client: Candidate) -> None:
        """Put a client where its facts put it."""
        why = self._obstacle(client)
        if why is not None or not client.stuck:
            self._leave_alone(client, why)
        elif client.stage is Stage.NEW or self._is_left_in_vain(client):
            self._activate(client)
        elif client.stage is Stage.BLOCKED and not client.silent:
            self._addresses.discard(client.four_tuple)
            self._make_ready(client)
        elif client.stage is Stage.RESTING and not client.silent:
            self._due.put(client.four_tuple, client.tried_ns + SPACING_NS)

    def _is_left_in_vain(self, client: Candidate) -> bool:
        """Whether a client is left alone for what was a fact and is none any more."""
        by_time = (candidate.TOO_LATE, candidate.FLOOD_SUSPECTED)
        lasting = client.reason in by_time and client.silent
        return client.stage is Stage.LEFT_ALONE and not lasting

    def _activate(self, client: Candidate) -> None:
        if self._active_by_budget[client.silent] >= self._max_candidates:
            self._leave_alone(client, candidate.NO_ROOM)
            return
        self._forget_left(client)
        client.budget = client.silent
        self._active[client.four_tuple] = client
        self._active_by_budget[client.budget] += 1
        if not self._policy.after_expiry:
            self._expiring.put(client.four_tuple, self._last_ns(client) + 1)
        if client.silent and client.known is None:
            client.stage = Stage.UNASKED
            self._unasked[client.four_tuple] = None
        elif client.number:
            client.stage = Stage.RESTING
            self._due.put(client.four_tuple, client.tried_ns + SPACING_NS)
        else:
            self._make_ready(client)

    def _last_ns(self, client: Candidate) -> int:
        """Until when its cookie is surely valid."""
        return client.cookie_ns + COOKIE_LIFE_NS - EXPIRY_MARGIN_NS

    def _make_ready(self, client: Candidate) -> None:
        client.stage = Stage.READY
        order = (client.tries, client.silent, client.handshake.first_syn_ns)
        listener = listener_of(client.four_tuple, client.handshake)
        self._listeners.add_ready(client.four_tuple, listener, *order)

    def _rest(self, client: Candidate) -> None:
        """Nothing is under way to it any more; its next turn stays when it was."""
        self._listeners.end_wait(client.four_tuple)
        client.stage = Stage.RESTING

    def _withdraw(self, client: Candidate) -> None:
        """Take an active client out of wherever it waits."""
        who = client.four_tuple
        self._unasked.pop(who, None)
        self._listeners.withdraw(who)
        if client.stage is Stage.BLOCKED:
            self._addresses.discard(who)
        self._due.discard(who)
        self._expiring.discard(who)
        del self._active[who]
        self._active_by_budget[client.budget] -= 1

    def _leave_alone(self, client: Candidate, why: str | None) -> None:
        """One that is not stuck is remembered, for its tries, and not counted."""
        reason = why if client.stuck else None
        if client.stage is Stage.LEFT_ALONE:
            if client.reason == reason:
                return
            self._forget_left(client)
        elif client.stage is not Stage.NEW:
            self._withdraw(client)
        client.stage = Stage.LEFT_ALONE
        client.reason = reason
        self._left[client.four_tuple] = client
        if client.reason is not None:
            self._left_alone[client.reason] += 1
        if client.reason == candidate.NOT_KNOWN:
            self._unknown.add(client.four_tuple, self._now_ns, self._last_ns(client))
        if len(self._left) > self._max_candidates:
            self._unknown.discard(self._left.popitem(last=False)[0])

    def _forget_left(self, client: Candidate) -> None:
        self._unknown.discard(client.four_tuple)
        if self._left.pop(client.four_tuple, None) is not None and client.reason is not None:
            self._left_alone[client.reason] -= 1

    def _remove(self, client: Candidate) -> None:
        """Its end: it is nobody's concern any more."""
        if client.stage is Stage.LEFT_ALONE:
            self._forget_left(client)
        else:
            self._withdraw(client)

    def plan(self, now_ns: int, is_known: Callable[[FourTuple], bool]) -> list[Plan]:
        """What to send now.

        `is_known` says whether a client's address has completed a handshake with its listener;
        it is asked once about each silent client, and again as long as one is left alone for that.
        """
        now_ns = self._now_ns = max(now_ns, self._now_ns)
        self._ask(now_ns, is_known)
        self._ask_again(now_ns, is_known)
        self._end_waits(now_ns)
        for who in self._expiring.pop_due(now_ns):
            self._expire(self._active[who], now_ns)
        for who in self._addresses.pop_due(now_ns):
            self._make_ready(self._active[who])
        self._listeners.wake(now_ns)
        plans: list[Plan] = []
        while self._bucket.tokens(now_ns):
            client = self._next(now_ns)
            if client is None:
                break
            self._bucket.take(now_ns)
            plans.append(self._try(client, now_ns))
        return plans

    def _ask(self, now_ns: int, is_known: Callable[[FourTuple], bool]) -> None:
        asked, self._unasked = self._unasked, {}
        for who in asked:
            client = self._active[who]
            if client.silent:
                client.known = is_known(who)
                client.asked_ns = now_ns
                if not client.known:
                    self._note_unknown(now_ns)
            why = self._obstacle(client)
            if why is not None:
                self._leave_alone(client, why)
            else:
                self._make_ready(client)

    def _ask_again(self, now_ns: int, is_known: Callable[[FourTuple], bool]) -> None:
        for clients in self._unknown.pop_due(now_ns):
            if is_known(clients[0]):
                for who in clients:
                    self._left[who].known = True
                    self._set_stage(self._left[who])

    def _note_unknown(self, now_ns: int) -> None:
        self._unknown_rate.note(now_ns)
        if self._unknown_rate.is_high(now_ns):
            self._flood_ns = now_ns

    def _end_waits(self, now_ns: int) -> None:
        for who in self._due.pop_due(now_ns):
            client = self._active[who]
            if client.stage is Stage.UNDER_WAY:
                self._rest(client)
            why = self._obstacle(client)
            if why is None:
                self._try_again(client, now_ns)
                continue
            self._leave_alone(client, why)
            if why == candidate.NO_ANSWER and not client.told_unanswered:
                client.told_unanswered = True
                self._unanswered.append(client.id)

    def _try_again(self, client: Candidate, now_ns: int) -> None:
        """Its turn has come, or comes later: nobody but its own silence is in its way."""
        again_ns = client.tried_ns + LAST_TRY_AFTER_NS
        if client.silent and client.tries == MAX_TRIES - 1 and now_ns < again_ns:
            self._due.put(client.four_tuple, again_ns)
        else:
            self._make_ready(client)

    def _expire(self, client: Candidate, now_ns: int) -> None:
        last_ns = self._last_ns(client)
        if client.stage is Stage.UNDER_WAY:
            last_ns = max(last_ns, client.tried_ns + ANSWER_NS)
        if now_ns > last_ns:
            self._leave_alone(client, candidate.TOO_LATE)
        else:
            self._expiring.put(client.four_tuple, last_ns + 1)

    def _next(self, now_ns: int) -> Candidate | None:
        """The next client whose turn it is, its address's token taken."""
        while True:
            who = self._listeners.pop_ready(now_ns)
            if who is None:
                return None
            client = self._active[who]
            if not self._policy.after_expiry and now_ns > self._last_ns(client):
                self._leave_alone(client, candidate.TOO_LATE)
            elif client.silent and not client.known and client.asked_ns <= self._flood_ns:
                self._leave_alone(client, candidate.FLOOD_SUSPECTED)
            elif not client.silent or self._take_of_address(client, now_ns):
                return client

    def _take_of_address(self, client: Candidate, now_ns: int) -> bool:
        if self._addresses.take(client.four_tuple, now_ns):
            return True
        client.stage = Stage.BLOCKED
        order = (client.tries, client.handshake.first_syn_ns)
        self._addresses.block(client.four_tuple, now_ns, *order)
        return False

    def _try(self, client: Candidate, now_ns: int) -> Plan:
        client.number += 1
        client.tries += 1
        client.tried_ns = now_ns
        client.answer_owed = True
        client.stage = Stage.UNDER_WAY
        self._listeners.begin_wait(client.four_tuple)
        self._due.put(client.four_tuple, now_ns + ANSWER_NS)
        return Plan(client.id, client.handshake, client.number)

    def attempted(self, attempts: Iterable[Attempt]) -> None:
        """What became of the plans. One that was not sent is not waited for."""
        for attempt in attempts:
            client = self._active.get(attempt.handshake.four_tuple)
            if attempt.sent or client is None or client.id != attempt.handshake:
                continue
            client.answer_owed = False
            if attempt.outcome == ATTEMPT_NOT_SENT:
                client.would_send = True
            else:
                client.failed += 1
            if client.stage is Stage.UNDER_WAY:
                self._rest(client)
            self._set_stage(client)

    def unanswered(self, now_ns: int) -> list[HandshakeId]:
        """Handshakes all of whose tries were made and drew nothing, each once."""
        self._end_waits(now_ns)
        found, self._unanswered = self._unanswered, []
        return found
