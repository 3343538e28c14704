"""Decides what is done to a connection that waits, by its age. Pure: no clock, no I/O.

Below 58 s it gets a challenge, at most 2: the cookie is valid, so the third ACK makes the
connection. From 58 to 121 s it gets nothing: the cookie may have expired, and a challenge may draw
an RST; with `late` it gets its challenges there too. Above 121 s the server is asked. With `reset`,
what stays silent after that is ended.

The age is the time since the connection was established, by the kernel. The SYN is older, so no
cookie is younger than the age says. An age that began again after 49.7 days, or stood still in a
suspend, is too low: then a challenge may draw an RST where a question would have.

Times are CLOCK_MONOTONIC nanoseconds.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from tcpstuck_bpf.client.actions import Action, Attempt, Candidate, Outcome, Plan
from tcpstuck_bpf.client.facts import ClientSocket
from tcpstuck_bpf.client.words import server_answered_ns
from tcpstuck_bpf.model import SECOND_NS
from tcpstuck_bpf.rescue.pace import AddressPace, TokenBucket
from tcpstuck_bpf.rescue.policy import RescuePolicy

CHALLENGE_UNTIL_NS = 58 * SECOND_NS
"""A cookie lives for 60 s at least, from the SYN; the rest is for the way there."""
ASK_FROM_NS = 121 * SECOND_NS
"""No cookie is older than 120 s (`borrowed_socket.COOKIE_LIFE_S`)."""
MOST_CHALLENGES = 2
CHALLENGE_AGAIN_NS = 10 * SECOND_NS
"""Time to the second challenge: by then a short fault may have passed."""
LEAST_BETWEEN_NS = SECOND_NS
"""Where the cookie would not live so long: a socket sends one challenge ACK in 500 ms."""
MOST_UNANSWERED = 3
"""Most questions without an answer: by keep-alive, each brings the application's own keep-alive
nearer to its limit."""
ASK_AGAIN_NS = 60 * SECOND_NS
ASK_A_KNOWING_SERVER_AGAIN_NS = 600 * SECOND_NS
"""A server that has the connection may forget it later, by a restart."""
MOST_ASKED_AT_ONCE = 8
"""Each question takes a thread, for 3 s if no answer comes."""
RESET_UNASKED_NS = 600 * SECOND_NS
"""With `reset`, the age from which a connection is ended that cannot be asked about."""
PER_SERVER, BURST_PER_SERVER = 90, 25
"""Most actions per second for one server address, and most at once: a challenged client takes a
place in the accept queue, and the queue of a server with such clients is often short. Of 149
connections that a server forgot at once, the last is then challenged 1.4 s after the first."""
TICK_NS = SECOND_NS // 10
LOOK_COST_NS, LOOK_SHARE = 2_000, 20
"""The cost of a look at one connection; looks take at most one part in so many of the time."""
REMEMBERED_NS = 600 * SECOND_NS
"""How long the tries of a connection are remembered that no poll shows any more."""

EXCLUDED = "excluded"
AWAITS_ITS_AGE = "the cookie may have expired: asked from an age of 121 s on"
NO_OWNER = "no process is known from which its socket can be borrowed"
TRIED = "no effect so far"
KNOWN = "its server has it"
TO_COME = "its turn has not come"

Key = tuple[int, int]


class MendPolicy(NamedTuple):
    """What the user allows."""

    limits: RescuePolicy = RescuePolicy(rate_per_address=PER_SERVER)
    """Rates, excluded server addresses, and whether a challenge may come late."""
    reset: bool = False
    """Whether to end what stays silent."""


@dataclass
class _Tries:
    """What was tried on one connection."""

    seen_ns: int
    """The last poll that showed it."""
    challenges: int = 0
    challenged_ns: int = 0
    challenge_age_ns: int = 0
    """Its age at the last challenge."""
    questions: int = 0
    unanswered: int = 0
    answer: Outcome | None = None
    answered_ns: int = 0
    reset: bool = False
    busy: bool = False
    """An action is under way."""
    done: set[Action] = field(default_factory=set)


class Planner:
    """Takes the connections that wait, plans actions, and takes what came of them."""

    def __init__(self, policy: MendPolicy) -> None:
        self._policy = policy
        self._waiting: dict[Key, Candidate] = {}
        self._tries: dict[Key, _Tries] = {}
        self._excluded: OrderedDict[bytes, bool] = OrderedDict()
        self._bucket = TokenBucket(policy.limits.rate)
        self._servers = AddressPace(policy.limits.rate_per_address, BURST_PER_SERVER)
        self._asking = 0
        self._due_ns = 0
        self.touched: Counter[Action] = Counter()
        """Connections on which an action of each kind was done, once or more."""

    def renew(self, candidates: Iterable[Candidate], now_ns: int) -> None:
        """Take all reported connections that wait, as the last poll found them."""
        self._waiting = {one.socket.key: one for one in candidates}
        for key in self._waiting.keys() & self._tries.keys():
            self._tries[key].seen_ns = now_ns
        old = [
            key
            for key, one in self._tries.items()
            if now_ns - one.seen_ns > REMEMBERED_NS and not one.busy
        ]
        for key in old:
            del self._tries[key]

    def plan(self, now_ns: int) -> list[Plan]:
        """The actions that are due now, those on the oldest connections first.

        The result of each must come back by `note`. Before that the connection gets no other.
        """
        if now_ns < self._due_ns:
            return []
        self._due_ns = now_ns + max(TICK_NS, LOOK_SHARE * LOOK_COST_NS * len(self._waiting))
        due = []
        for key, candidate in self._waiting.items():
            action = self._action(self._tries.get(key), candidate, now_ns)
            if action is not None:
                due.append((candidate.aged(now_ns).age_ns, key, action))
        due.sort(key=lambda one: -one[0])
        plans = []
        for _, key, action in due:
            plan = self._begin(key, action, now_ns)
            if plan is not None:
                plans.append(plan)
        return plans

    def note(self, attempt: Attempt) -> None:
        """Take what came of a plan."""
        plan = attempt.plan
        tries = self._tries.get(plan.socket.key)
        if tries is None:
            return
        tries.busy = False
        if attempt.done and plan.action not in tries.done:
            tries.done.add(plan.action)
            self.touched[plan.action] += 1
        dry = attempt.outcome is Outcome.WOULD
        if plan.action is Action.CHALLENGE:
            tries.challenged_ns = attempt.time_ns
            tries.challenges = MOST_CHALLENGES if dry else tries.challenges
        elif plan.action is Action.QUESTION:
            self._asking -= 1
            tries.answer, tries.answered_ns = attempt.outcome, attempt.time_ns
            tries.unanswered += attempt.outcome is not Outcome.KNOWS
            tries.unanswered = MOST_UNANSWERED if dry else tries.unanswered

    def left_alone(self, now_ns: int) -> Mapping[str, int]:
        """The connections that wait, by why nothing is done to them at this moment."""
        reasons = (self._why(key, one, now_ns) for key, one in self._waiting.items())
        return dict(Counter(reasons))

    def _action(self, tries: _Tries | None, candidate: Candidate, now_ns: int) -> Action | None:
        """What is due for a connection, by its age and by what was tried."""
        socket = candidate.aged(now_ns)
        tries = tries or _Tries(now_ns)
        if tries.busy or not may_be_touched(socket) or self._excludes(socket):
            return None
        if may_challenge(socket, late=self._policy.limits.after_expiry):
            return Action.CHALLENGE if _challenge_is_due(tries, candidate, now_ns) else None
        if not may_ask(socket):
            return None
        if self._policy.reset and _is_to_be_ended(tries, candidate, socket):
            return Action.RESET
        return Action.QUESTION if _question_is_due(tries, candidate, now_ns) else None

    def _excludes(self, socket: ClientSocket) -> bool:
        """Whether the server's address is excluded; remembered, because there are few servers."""
        server = socket.four_tuple.server_address
        known = self._excluded.get(server)
        if known is None:
            known = self._excluded[server] = self._policy.limits.excludes(server)
            if len(self._excluded) > 4096:
                self._excluded.popitem(last=False)
        return known

    def _begin(self, key: Key, action: Action, now_ns: int) -> Plan | None:
        """Count an action as begun, if the rates allow it."""
        candidate = self._waiting[key]
        if action is Action.QUESTION and self._asking >= MOST_ASKED_AT_ONCE:
            return None
        who = candidate.socket.four_tuple
        # A bucket of the pace is an address's: here it is the server's.
        server = self._servers.bucket(who._replace(client_address=who.server_address), now_ns)
        if server.next_ns(now_ns) > now_ns or not self._bucket.take(now_ns):
            return None
        server.take(now_ns)
        tries = self._tries.setdefault(key, _Tries(now_ns))
        tries.busy = True
        socket = candidate.aged(now_ns)
        number = 1
        if action is Action.CHALLENGE:
            tries.challenges += 1
            tries.challenged_ns, tries.challenge_age_ns = now_ns, socket.age_ns
            number = tries.challenges
        elif action is Action.QUESTION:
            self._asking += 1
            tries.questions += 1
            number = tries.questions
        else:
            tries.reset = True
        return Plan(action, socket, candidate.owners, number)

    def _why(self, key: Key, candidate: Candidate, now_ns: int) -> str:
        tries = self._tries.get(key)
        socket = candidate.aged(now_ns)
        if self._excludes(socket):
            return EXCLUDED
        if candidate.server_knows or server_answered_ns(socket) is not None:
            return KNOWN
        late = self._policy.limits.after_expiry
        if not may_challenge(socket, late=late) and not may_ask(socket):
            return AWAITS_ITS_AGE
        if may_ask(socket) and not candidate.owners.processes:
            return NO_OWNER
        return TRIED if tries is not None else TO_COME


def may_be_touched(socket: ClientSocket) -> bool:
    """Whether not a byte has gone either way, and the connection is not a part of another one."""
    return socket.waits and not socket.is_subflow


def may_challenge(socket: ClientSocket, *, late: bool) -> bool:
    """Whether a connection of this age may be challenged; `late`: up to the age for questions."""
    return socket.age_ns < (ASK_FROM_NS if late else CHALLENGE_UNTIL_NS)


def may_ask(socket: ClientSocket) -> bool:
    """Whether no cookie of this connection can be valid any more."""
    return socket.age_ns >= ASK_FROM_NS


def _challenge_is_due(tries: _Tries, candidate: Candidate, now_ns: int) -> bool:
    if candidate.server_knows or server_answered_ns(candidate.socket) is not None:
        return False
    if tries.challenges >= MOST_CHALLENGES:
        return False
    if not tries.challenges:
        return True
    passed_ns = now_ns - tries.challenged_ns
    room_ns = CHALLENGE_UNTIL_NS - SECOND_NS - tries.challenge_age_ns
    pause_ns = min(CHALLENGE_AGAIN_NS, room_ns) if room_ns > 0 else CHALLENGE_AGAIN_NS
    return passed_ns >= max(LEAST_BETWEEN_NS, pause_ns)


def _question_is_due(tries: _Tries, candidate: Candidate, now_ns: int) -> bool:
    if not candidate.owners.processes or tries.reset:
        return False
    if tries.answer is None:
        return True
    passed_ns = now_ns - tries.answered_ns
    if tries.answer is Outcome.KNOWS:
        return passed_ns >= ASK_A_KNOWING_SERVER_AGAIN_NS
    return tries.unanswered < MOST_UNANSWERED and passed_ns >= ASK_AGAIN_NS


def _is_to_be_ended(tries: _Tries, candidate: Candidate, socket: ClientSocket) -> bool:
    """Whether a connection is silent still, after its question or after RESET_UNASKED_NS."""
    if tries.reset or candidate.server_knows or server_answered_ns(socket) is not None:
        return False
    if tries.answer in (Outcome.NO_ANSWER, Outcome.REFUSED):
        return True
    unasked = not candidate.owners.processes or tries.answer in (Outcome.NOT_OURS, Outcome.GONE)
    return unasked and socket.age_ns >= RESET_UNASKED_NS
