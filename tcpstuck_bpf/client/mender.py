"""Carries out the planner's plans: reads each socket again, then challenges, asks or ends it.

A question waits up to 3 s for its answer, so each has a thread, `planner.MOST_ASKED_AT_ONCE` of
them. Challenges and resets take no time and are done by the thread that polls.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from tcpstuck_bpf.client import borrowed_socket
from tcpstuck_bpf.client.actions import Action, Attempt, Candidate, Outcome, Plan, Totals
from tcpstuck_bpf.client.borrowed_socket import Answer
from tcpstuck_bpf.client.challenge import challenge
from tcpstuck_bpf.client.facts import ClientSocket
from tcpstuck_bpf.client.planner import (
    MOST_ASKED_AT_ONCE,
    Planner,
    may_ask,
    may_be_touched,
    may_challenge,
)
from tcpstuck_bpf.client.socket_reset import Reset, end_socket
from tcpstuck_bpf.errors import words_of
from tcpstuck_bpf.model import SECOND_NS, FourTuple

OWNERS_TRIED = 3
"""Most processes that a socket is borrowed from in turn."""

Result = tuple[Outcome, str]

_ANSWERS = {
    Answer.SERVER_FORGOT: Outcome.FORGOT,
    Answer.SERVER_KNOWS: Outcome.KNOWS,
    Answer.NO_ANSWER: Outcome.NO_ANSWER,
    Answer.NOT_OURS: Outcome.NOT_OURS,
    Answer.GONE: Outcome.GONE,
    Answer.REFUSED: Outcome.REFUSED,
}
_RESETS: Mapping[Reset, Result] = {
    Reset.DONE: (Outcome.ENDED, ""),
    Reset.GONE: (Outcome.CHANGED, "the connection has ended"),
    Reset.NOT_PERMITTED: (Outcome.FAILED, "ending it takes CAP_NET_ADMIN in its namespace"),
    Reset.NOT_SUPPORTED: (Outcome.FAILED, "the kernel lacks CONFIG_INET_DIAG_DESTROY"),
}


class Sender(Protocol):
    """Sends packets; the real one is `rescue.raw_socket.Resender`."""

    def send(self, four_tuple: FourTuple, packet: bytes) -> None:
        """Send a packet to the client of a 4-tuple, within its namespace. Raises OSError."""

    def close_old(self) -> None:
        """Close what has been open for some seconds."""

    def close(self) -> None:
        """Close everything."""


class _NotTouchedError(Exception):
    def __init__(self, outcome: Outcome, reason: str) -> None:
        super().__init__(reason)
        self.result: Result = (outcome, reason)


class Mender:
    """The mending of one run.

    `again` reads a socket once more, in any thread (`sockets.SocketReader.again`). `late`: whether
    a challenge may come after the cookie's life.
    """

    def __init__(
        self,
        planner: Planner,
        again: Callable[[ClientSocket], ClientSocket | None],
        sender: Sender,
        clock_ns: Callable[[], int],
        *,
        dry_run: bool,
        late: bool,
        ask: Callable[..., borrowed_socket.Outcome] = borrowed_socket.ask,
        end: Callable[[FourTuple, int, int], Reset] = end_socket,
    ) -> None:
        self._planner = planner
        self._sender = sender
        self._clock_ns = clock_ns
        self._dry_run = dry_run
        self._late = late
        self._again = again
        self._ask = ask
        self._end = end
        self._pool: ThreadPoolExecutor | None = None
        self._questions: list[tuple[Plan, int, Future[Result]]] = []
        self._done: Counter[tuple[Action, Outcome]] = Counter()
        self._reasons: Counter[str] = Counter()

    def renew(self, candidates: Iterable[Candidate], now_ns: int) -> None:
        """Take the reported connections that wait, as a poll found them."""
        self._planner.renew(candidates, now_ns)

    def act(self) -> list[Attempt]:
        """Do what is due. Returns what was done, with the answers that came since the last call."""
        attempts = self._answers()
        for plan in self._planner.plan(self._clock_ns()):
            begun_ns = self._clock_ns()
            if plan.action is Action.QUESTION and not self._dry_run:
                self._begin(plan, begun_ns)
            else:
                attempts.append(self._noted(plan, begun_ns, self._result(plan)))
        self._sender.close_old()
        return attempts

    def finish(self) -> list[Attempt]:
        """Wait for the answers to the last questions, up to 3 s. Nothing more is begun."""
        for _, _, question in self._questions:
            question.exception()
        return self._answers()

    def close(self) -> None:
        """Close what is open. Questions under way end by themselves, and restore every option."""
        if self._pool is not None:
            self._pool.shutdown(wait=False)
        self._sender.close()

    def totals(self, now_ns: int) -> Totals:
        """What was done so far, and what is left alone now."""
        return Totals(
            self._dry_run,
            dict(self._done),
            self._planner.touched[Action.CHALLENGE],
            self._planner.touched[Action.QUESTION],
            dict(self._reasons),
            self._planner.left_alone(now_ns),
        )

    def _begin(self, plan: Plan, begun_ns: int) -> None:
        """Ask in a thread; without one, what comes of it is an error."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(MOST_ASKED_AT_ONCE, "question")
        question: Future[Result]
        try:
            question = self._pool.submit(self._asked, plan)
        except RuntimeError as error:
            question = Future()
            question.set_exception(error)
        self._questions.append((plan, begun_ns, question))

    def _answers(self) -> list[Attempt]:
        """The answers that have come."""
        waiting, attempts = [], []
        for one in self._questions:
            plan, begun_ns, question = one
            if not question.done():
                waiting.append(one)
                continue
            error = question.exception()
            result = question.result() if error is None else (Outcome.REFUSED, words_of(error))
            attempts.append(self._noted(plan, begun_ns, result))
        self._questions = waiting
        return attempts

    def _noted(self, plan: Plan, begun_ns: int, result: Result) -> Attempt:
        attempt = Attempt(plan, begun_ns, *result)
        self._planner.note(attempt)
        self._done[plan.action, attempt.outcome] += 1
        if attempt.reason and attempt.outcome not in (Outcome.FORGOT, Outcome.KNOWS):
            self._reasons[attempt.reason] += 1
        return attempt

    def _result(self, plan: Plan) -> Result:
        """Challenge or end a connection, or find out whether it could be done in a dry run."""
        try:
            found = self._found(plan)
            if self._dry_run:
                return Outcome.WOULD, ""
            if plan.action is Action.CHALLENGE:
                return self._challenged(found)
            return _RESETS[self._end(found.four_tuple, found.cookie, found.interface)]
        except _NotTouchedError as error:
            return error.result
        except (OSError, ValueError) as error:
            return Outcome.FAILED, words_of(error)

    def _challenged(self, found: ClientSocket) -> Result:
        self._sender.send(found.four_tuple, challenge(found.four_tuple))
        return Outcome.SENT, ""

    def _asked(self, plan: Plan) -> Result:
        """Ask the server, in a thread of its own."""
        try:
            found = self._found(plan)
        except _NotTouchedError as error:
            return error.result
        result = (Outcome.NOT_OURS, "no process is known that has the socket open")
        for owner in plan.owners.processes[:OWNERS_TRIED]:
            wanted = borrowed_socket.Wanted(owner.pid, owner.fd, found.inode, found.cookie)
            answer, reason = self._ask(wanted, found.age_ns / SECOND_NS)
            result = (_ANSWERS[answer], reason)
            if answer not in (Answer.GONE, Answer.NOT_OURS):
                break
        return result

    def _found(self, plan: Plan) -> ClientSocket:
        """The socket right before the action. Raises _NotTouchedError if it must be left alone."""
        try:
            found = self._again(plan.socket)
        except (OSError, ValueError) as error:
            raise _NotTouchedError(Outcome.FAILED, words_of(error)) from error
        if found is None:
            raise _NotTouchedError(Outcome.CHANGED, "the connection has ended")
        if not may_be_touched(found):
            raise _NotTouchedError(Outcome.CHANGED, "data has gone by since")
        if plan.action is Action.CHALLENGE:
            fits = may_challenge(found, late=self._late)
        else:
            fits = may_ask(found)
        if not fits:
            raise _NotTouchedError(Outcome.CHANGED, "its age does not fit any more")
        return found
