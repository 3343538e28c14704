"""Decides which stuck clients get their SYN-ACK again, and when. Pure: no clock, sockets or BCC.

An established client answers a repeated SYN-ACK with a challenge ACK (tcp_validate_incoming, RFC
5961 section 4). It carries the cookie, so the listener accepts it as the missing ACK. A client
sends one challenge ACK per 500 ms (tcp_invalid_ratelimit). If the client has sent data, its
challenge ACK does not validate, and the resulting RST ends a connection that would have recovered
by itself. The rescue never sends to such a client.

Events and reports move a client between the active ones, which may be tried, and those left alone.
`plan` walks through the active ones at most once per `TICK_NS`. Their number is bounded by what can
be sent before their cookies expire.

Times are CLOCK_MONOTONIC nanoseconds.
"""

from __future__ import annotations

import bisect
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
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
    ListenerId,
    listener_of,
)
from tcpstuck_bpf.rescue import candidate
from tcpstuck_bpf.rescue.accept_queues import ANSWER_NS, AcceptQueues
from tcpstuck_bpf.rescue.candidate import ACK_KINDS, COOKIE_LIFE_S, Candidate, overflowed
from tcpstuck_bpf.rescue.pace import AddressPace, TokenBucket
from tcpstuck_bpf.rescue.policy import RescuePolicy

TICK_NS = SECOND_NS // 10
"""Least time between two passes over the active clients."""
LOOK_COST_NS = 2_000
"""Approximate cost of a pass per client. Passes take at most one part in `LOOK_SHARE` of the
time."""
LOOK_SHARE = 10
LOOK_AGAIN_NS = 2 * SECOND_NS
"""Time between two checks of the left-alone clients for changes that cause no event: an address
becomes known, or a place becomes free."""
MAX_UNKNOWN_ADDRESSES = 1000
"""Most addresses looked up per check, so that a flood of spoofed addresses costs little."""
MAX_LEFT_ALONE = 32_768

_NEVER_NS = -1


class Plan(NamedTuple):
    """A SYN-ACK to send now."""

    handshake_id: HandshakeId
    handshake: Handshake
    number: int
    """Attempt number for the handshake, from 1."""


class Rescuer:
    """Takes events and reports, plans the SYN-ACKs to repeat, and takes their outcome.

    At most `max_candidates` silent clients are active at a time, and as many whose ACK was dropped:
    a flood of silent clients takes no place from the latter. The default is the number that the
    rate allows within a cookie's life. The oldest left-alone clients are forgotten but stay
    counted.
    """

    def __init__(self, policy: RescuePolicy, max_candidates: int | None = None) -> None:
        self._policy = policy
        self._max_candidates = max_candidates or policy.rate * COOKIE_LIFE_S
        self._now_ns = 0
        self._looked_ns = _NEVER_NS
        self._due_ns: int | None = None
        self._look_again_ns: int | None = None
        self._active: dict[FourTuple, Candidate] = {}
        self._active_by_budget: Counter[bool] = Counter()
        self._left: OrderedDict[FourTuple, Candidate] = OrderedDict()
        self._left_alone: Counter[str] = Counter()
        self._queues = AcceptQueues()
        self._last_turn = ListenerId(0, 0, b"", 0)
        self._addresses = AddressPace(policy.rate_per_address)
        self._bucket = TokenBucket(policy.rate)
        self._unknown_rate = SilenceRate()
        self._flood_ns = _NEVER_NS
        self._unanswered: list[HandshakeId] = []

    @property
    def left_alone(self) -> Mapping[str, int]:
        """Number of stuck clients that are left alone, by the reason that holds now."""
        return {why: number for why, number in self._left_alone.items() if number}

    @property
    def pending(self) -> int:
        """Number of active stuck clients: a try is in progress or may follow."""
        return len(self._active)

    @property
    def due_ns(self) -> int | None:
        """Latest time for the next call of `plan`; None if only events or reports can cause one."""
        return self._due_ns

    @property
    def _tick_ns(self) -> int:
        return max(TICK_NS, LOOK_SHARE * LOOK_COST_NS * len(self._active))

    def _note_news(self) -> None:
        soon_ns = 0 if self._looked_ns == _NEVER_NS else self._looked_ns + self._tick_ns
        self._due_ns = soon_ns if self._due_ns is None else min(self._due_ns, soon_ns)

    def report(self, report: FlowReport) -> None:
        """Take a report of the correlator."""
        client = self._tracked(report.four_tuple, report.handshake.first_syn_ns)
        if report.state in STUCK_STATES:
            if client is None:
                if report.four_tuple in self._active or report.four_tuple in self._left:
                    return
                client = Candidate(report, self._policy.excludes(report.four_tuple.client_address))
            else:
                client.absorb(report)
            client.stuck = True
            self._place(client)
        elif client is not None and report.handshake.ending != Ending.NONE:
            self._remove(client)
        elif client is not None:
            client.absorb(report)
            # A client in a removed namespace stays counted for that reason.
            client.stuck = client.stuck and client.gone
            self._place(client)

    def observe(self, event: Event) -> None:
        """Take an event. Events must come before the reports of the same moment."""
        client = self._tracked(event.four_tuple, event.handshake.first_syn_ns)
        is_answer = False
        if client is not None:
            client.note(event)
            if event.kind in ACK_KINDS:
                is_answer = client.note_answer(event)
        if event.kind == EventKind.ACK_DROPPED and overflowed(event):
            self._queues.note_overflow(event, is_answer)
            if self._queues.crowded:
                self._queues.forget_unused(set(map(_listener, self._active.values())))
        elif event.kind == EventKind.COMPLETED:
            self._queues.note_completion(event)
            if self._active:
                self._note_news()
        if client is None:
            return
        if event.handshake.ending != Ending.NONE:
            self._remove(client)
        else:
            self._place(client)

    def _tracked(self, four_tuple: FourTuple, first_syn_ns: int) -> Candidate | None:
        """The client of a handshake. A newer handshake of the same 4-tuple removes the old one."""
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

    def _place(self, client: Candidate) -> None:
        """Make a client active or leave it alone, according to its facts."""
        why = self._obstacle(client)
        # Only an ACK of the client overrides these two reasons.
        lasts = client.silent and client.reason in (candidate.TOO_LATE, candidate.FLOOD_SUSPECTED)
        if why is not None or not client.stuck:
            self._leave_alone(client, why)
        elif client.active:
            self._note_news()
        elif not lasts:
            self._activate(client)

    def _activate(self, client: Candidate) -> None:
        if self._active_by_budget[client.silent] >= self._max_candidates:
            self._leave_alone(client, candidate.NO_ROOM)
            return
        self._forget_left(client)
        client.active = True
        client.budget = client.silent
        self._active[client.four_tuple] = client
        self._active_by_budget[client.budget] += 1
        self._note_news()

    def _deactivate(self, client: Candidate) -> None:
        client.active = client.under_way = False
        del self._active[client.four_tuple]
        self._active_by_budget[client.budget] -= 1

    def _leave_alone(self, client: Candidate, why: str | None) -> None:
        """Keep a client and its tries. Only stuck clients are counted."""
        reason = why if client.stuck else None
        if client.active:
            self._deactivate(client)
        elif client.four_tuple in self._left and client.reason == reason:
            return
        else:
            self._forget_left(client)
        client.reason = reason
        self._left[client.four_tuple] = client
        if client.reason is not None:
            self._left_alone[client.reason] += 1
        if client.reason in _MAY_CHANGE and self._look_again_ns is None:
            self._look_again_ns = self._now_ns + LOOK_AGAIN_NS
            self._note_news()
        if len(self._left) > MAX_LEFT_ALONE:
            self._left.popitem(last=False)

    def _forget_left(self, client: Candidate) -> None:
        if self._left.pop(client.four_tuple, None) is not None and client.reason is not None:
            self._left_alone[client.reason] -= 1
        client.reason = None

    def _remove(self, client: Candidate) -> None:
        """Forget a client whose handshake has ended."""
        if client.active:
            self._deactivate(client)
        else:
            self._forget_left(client)

    def plan(self, now_ns: int, is_known: Callable[[FourTuple], bool]) -> list[Plan]:
        """The SYN-ACKs to send now.

        `is_known`: whether a client's address has completed a handshake with its listener.
        """
        now_ns = self._now_ns = max(now_ns, self._now_ns)
        if self._due_ns is None or now_ns < self._due_ns:
            return []
        self._looked_ns = now_ns
        self._look_at_left_alone(now_ns, is_known)
        for client in list(self._active.values()):
            self._look_at(client, now_ns, is_known)
        plans, waking = self._try_all(now_ns)
        self._due_ns = self._next_look_ns(now_ns, waking)
        return plans

    def _look_at_left_alone(self, now_ns: int, is_known: Callable[[FourTuple], bool]) -> None:
        if self._look_again_ns is None or now_ns < self._look_again_ns:
            return
        self._look_again_ns = None
        unknown: dict[tuple[int, bytes, bytes, int], list[Candidate]] = {}
        for client in [one for one in self._left.values() if one.reason in _MAY_CHANGE]:
            if now_ns > client.last_ns:
                continue
            self._look_again_ns = now_ns + LOOK_AGAIN_NS
            if client.reason == candidate.NO_ROOM:
                self._place(client)
                continue
            who = client.four_tuple
            key = (who.netns, who.client_address, who.server_address, who.server_port)
            if key in unknown or len(unknown) < MAX_UNKNOWN_ADDRESSES:
                unknown.setdefault(key, []).append(client)
        for clients in unknown.values():
            if is_known(clients[0].four_tuple):
                for client in clients:
                    client.known = True
                    self._place(client)

    def _look_at(
        self, client: Candidate, now_ns: int, is_known: Callable[[FourTuple], bool]
    ) -> None:
        """Look up the client's address; check for a missing answer and an expired cookie."""
        changed = client.under_way and now_ns >= client.tried_ns + ANSWER_NS
        if changed:
            client.under_way = False
        if client.silent and client.known is None:
            changed = True
            client.known = is_known(client.four_tuple)
            client.asked_ns = now_ns
            if not client.known:
                self._note_unknown(now_ns)
        why = self._obstacle(client) if changed else None
        expired = now_ns > client.last_ns and not self._policy.after_expiry
        if why is None and expired and not client.under_way:
            why = candidate.TOO_LATE
        if why is not None:
            self._leave_alone(client, why)
        if why == candidate.NO_ANSWER and not client.unanswered_reported:
            client.unanswered_reported = True
            self._unanswered.append(client.id)

    def _note_unknown(self, now_ns: int) -> None:
        self._unknown_rate.note(now_ns)
        if self._unknown_rate.is_high(now_ns):
            self._flood_ns = now_ns

    def _try_all(self, now_ns: int) -> tuple[list[Plan], list[int]]:
        """Plan the tries that are due. Returns the plans, and the times of later tries."""
        under_way: Counter[ListenerId] = Counter()
        ready: defaultdict[ListenerId, list[Candidate]] = defaultdict(list)
        for client in self._active.values():
            if client.under_way:
                under_way[_listener(client)] += 1
            elif client.next_try_ns <= now_ns:
                ready[_listener(client)].append(client)
        plans: list[Plan] = []
        waking: list[int] = []
        turns = self._in_turn(ready)
        while turns:
            listener, clients = turns.popleft()
            queue = self._queues.get(listener)
            if queue is not None and not queue.may_send(under_way[listener], now_ns):
                # Answers and completions cause a new pass themselves; only the retry time must
                # be awaited.
                waking += [queue.retry_ns] * (not under_way[listener])
                continue
            if self._bucket.next_ns(now_ns) > now_ns:
                waking.append(self._bucket.next_ns(now_ns))
                break
            chosen = self._choose(clients, now_ns, waking)
            if chosen is not None:
                self._bucket.take(now_ns)
                self._last_turn = listener
                under_way[listener] += 1
                plans.append(self._try(chosen, now_ns))
                turns.append((listener, clients))
        return plans, waking

    def _in_turn(
        self, ready: Mapping[ListenerId, list[Candidate]]
    ) -> deque[tuple[ListenerId, Iterator[Candidate]]]:
        """The listeners with their clients, in turn, beginning after the last one served."""
        listeners = sorted(ready)
        after = bisect.bisect_right(listeners, self._last_turn)
        return deque(
            (listener, _in_order(ready[listener]))
            for listener in listeners[after:] + listeners[:after]
        )

    def _choose(
        self, clients: Iterator[Candidate], now_ns: int, waking: list[int]
    ) -> Candidate | None:
        """The first client of a listener that may be tried now; takes its address's token."""
        for client in clients:
            if not client.silent:
                return client
            if not client.known and client.asked_ns <= self._flood_ns:
                self._leave_alone(client, candidate.FLOOD_SUSPECTED)
                continue
            bucket = self._addresses.bucket(client.four_tuple, now_ns)
            if bucket.take(now_ns):
                return client
            waking.append(bucket.next_ns(now_ns))
        return None

    def _try(self, client: Candidate, now_ns: int) -> Plan:
        client.number += 1
        client.tries += 1
        client.tried_ns = now_ns
        client.answer_owed = client.under_way = True
        return Plan(client.id, client.handshake, client.number)

    def _next_look_ns(self, now_ns: int, waking: Iterable[int]) -> int | None:
        times = [*waking]
        if self._look_again_ns is not None:
            times.append(self._look_again_ns)
        for client in self._active.values():
            if client.under_way:
                times.append(client.tried_ns + ANSWER_NS)
                continue
            if client.next_try_ns > now_ns:
                times.append(client.next_try_ns)
            if not self._policy.after_expiry:
                times.append(client.last_ns + 1)
        return max(min(times), now_ns + self._tick_ns) if times else None

    def attempted(self, attempts: Iterable[Attempt]) -> None:
        """Take the outcome of the plans. An answer is expected only if a packet was sent."""
        for attempt in attempts:
            client = self._active.get(attempt.handshake.four_tuple)
            if attempt.sent or client is None or client.id != attempt.handshake:
                continue
            client.answer_owed = client.under_way = False
            if attempt.outcome == ATTEMPT_NOT_SENT:
                client.would_send = True
            else:
                client.failed += 1
            self._place(client)

    def unanswered(self) -> list[HandshakeId]:
        """Handshakes with all tries made and none answered; each is returned once."""
        found, self._unanswered = self._unanswered, []
        return found


_MAY_CHANGE = frozenset({candidate.NOT_KNOWN, candidate.NO_ROOM})


def _listener(client: Candidate) -> ListenerId:
    return listener_of(client.four_tuple, client.handshake)


def _in_order(clients: list[Candidate]) -> Iterator[Candidate]:
    """Clients with fewer tries first. Sorted lazily: a full queue needs no order."""
    yield from sorted(clients, key=_order)


def _order(client: Candidate) -> tuple[int, bool, int, FourTuple]:
    return (client.tries, client.silent, client.handshake.first_syn_ns, client.four_tuple)
