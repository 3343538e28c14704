"""What `--client --rescue` does to a connection, and what came of it. Pure."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import NamedTuple

from tcpstuck_bpf.client.facts import NOBODY, ClientSocket, Owners


class Action(enum.Enum):
    """What is done to a connection that waits."""

    CHALLENGE = "challenge"
    """The client's own kernel repeats the third ACK (`challenge`)."""
    QUESTION = "question"
    """The server is asked whether it has the connection (`borrowed_socket`)."""
    RESET = "reset"
    """The connection is ended on this host (`socket_reset`)."""


class Outcome(enum.Enum):
    """What came of an action; the value is its name in JSON."""

    SENT = "sent"
    """A challenge has left; whether it helped, data will show."""
    WOULD = "would"
    """Nothing was done: it is a dry run."""
    CHANGED = "changed"
    """Nothing was done: the connection had ended, or data had gone by, when it was read again."""
    FAILED = "failed"
    """The machine refused a challenge or a reset."""
    FORGOT = "server-forgot"
    KNOWS = "server-knows"
    NO_ANSWER = "no-answer"
    NOT_OURS = "not-ours"
    """No process from which the socket may be borrowed."""
    GONE = "gone"
    REFUSED = "refused"
    ENDED = "ended"
    """A reset was done."""


_DONE = frozenset({Outcome.SENT, Outcome.FORGOT, Outcome.KNOWS, Outcome.NO_ANSWER, Outcome.ENDED})


class Plan(NamedTuple):
    """An action that is due."""

    action: Action
    socket: ClientSocket
    """As the last poll found it."""
    owners: Owners = NOBODY
    number: int = 1
    """How many actions of this kind the connection has had with this one."""


class Attempt(NamedTuple):
    """A plan that was carried out, or was not. `time_ns` is CLOCK_MONOTONIC, when it began."""

    plan: Plan
    time_ns: int
    outcome: Outcome
    reason: str
    """Why, in words; empty where the outcome says all."""

    @property
    def done(self) -> bool:
        """Whether a packet left, or the connection was ended."""
        return self.outcome in _DONE


class Candidate(NamedTuple):
    """A reported connection that waits."""

    socket: ClientSocket
    """As the last poll found it."""
    seen_ns: int
    """The time of that poll, CLOCK_MONOTONIC."""
    owners: Owners = NOBODY
    server_knows: bool = False
    """Whether the server has answered that it has the connection."""

    def aged(self, now_ns: int) -> ClientSocket:
        """The socket with the age that it has by now, if nothing has happened to it."""
        passed_ns = max(0, now_ns - self.seen_ns)
        one = self.socket
        return one._replace(age_ns=one.age_ns + passed_ns, last_ack_ns=one.last_ack_ns + passed_ns)


class Totals(NamedTuple):
    """What a run did, and what it left alone."""

    dry_run: bool
    done: Mapping[tuple[Action, Outcome], int]
    """Actions by their outcome."""
    challenged: int
    """Connections to which at least one challenge was sent."""
    asked: int
    """Connections whose server was asked at least once."""
    reasons: Mapping[str, int]
    """Actions without effect, by the reason in words."""
    left_alone: Mapping[str, int]
    """Connections that wait at the end and of which no more is asked now, by the reason."""

    def count(self, action: Action, *outcomes: Outcome) -> int:
        """How many actions of a kind had one of these outcomes; without any, all of them."""
        wanted = outcomes or tuple(Outcome)
        return sum(self.done.get((action, one), 0) for one in wanted)
