"""Plans are carried out on what the kernel says right before, and never on anything else."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from lab.patience import COMMAND_S, patient
from lab.scenarios.catalogue import SMALL_BACKLOG
from tcpstuck_bpf.client.actions import Action, Attempt, Candidate, Outcome
from tcpstuck_bpf.client.borrowed_socket import Answer, Wanted
from tcpstuck_bpf.client.borrowed_socket import Outcome as Said
from tcpstuck_bpf.client.challenge import challenge
from tcpstuck_bpf.client.facts import ClientSocket, Owner, Owners
from tcpstuck_bpf.client.mender import Mender
from tcpstuck_bpf.client.planner import MendPolicy, Planner
from tcpstuck_bpf.client.socket_reset import Reset
from tcpstuck_bpf.model import SECOND_NS, FourTuple
from tests.unit.client.world import BEGIN_NS, client_socket, owned

YOUNG_S, OLD_S = 10, 130
TWO = Owners((Owner("a", 1, 3, ""), Owner("b", 2, 4, "")), 0, False)


class Machine:
    """Sockets, and a record of all that was done to them."""

    def __init__(self, *, dry_run: bool = False, reset: bool = False) -> None:
        self.now_ns = BEGIN_NS
        self.sent: list[tuple[FourTuple, bytes]] = []
        self.asked: list[tuple[Wanted, float]] = []
        self.ended: list[tuple[FourTuple, int, int]] = []
        self.again: Callable[[ClientSocket], ClientSocket | None] = lambda socket: socket
        self.answer: Callable[[Wanted], Said] = lambda _wanted: Said(Answer.SERVER_KNOWS, "an ACK")
        self.refusal: OSError | None = None
        self.result = Reset.DONE
        self.mender = Mender(
            Planner(MendPolicy(reset=reset)),
            lambda socket: self.again(socket),
            self,
            lambda: self.now_ns,
            dry_run=dry_run,
            late=False,
            ask=self.ask,
            end=self.end,
        )

    def send(self, four_tuple: FourTuple, packet: bytes) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.sent.append((four_tuple, packet))

    def close_old(self) -> None:
        pass

    def close(self) -> None:
        pass

    def ask(self, wanted: Wanted, since_last_syn_s: float) -> Said:
        self.asked.append((wanted, since_last_syn_s))
        return self.answer(wanted)

    def end(self, four_tuple: FourTuple, cookie: int, interface: int) -> Reset:
        self.ended.append((four_tuple, cookie, interface))
        return self.result

    def run(self, *candidates: Candidate, after_s: float = 0) -> list[Attempt]:
        """Everything that is due, with all answers."""
        self.now_ns += round(after_s * SECOND_NS)
        self.mender.renew([one._replace(seen_ns=self.now_ns) for one in candidates], self.now_ns)
        return [*self.mender.act(), *self.mender.finish()]


def waiting(age_s: float, owners: Owners | None = None, **facts: int) -> Candidate:
    return Candidate(client_socket(1, age_s, **facts), 0, owned() if owners is None else owners)


def outcomes(attempts: list[Attempt]) -> list[tuple[Action, Outcome]]:
    return [(one.plan.action, one.outcome) for one in attempts]


def test_a_young_one_is_challenged_and_nothing_else() -> None:
    machine = Machine(reset=True)
    candidate = waiting(YOUNG_S)
    who = candidate.socket.four_tuple
    assert outcomes(machine.run(candidate)) == [(Action.CHALLENGE, Outcome.SENT)]
    assert (machine.sent, machine.asked, machine.ended) == ([(who, challenge(who))], [], [])


def test_an_old_one_is_asked_with_the_age_that_it_has_then() -> None:
    machine = Machine()
    candidate = waiting(OLD_S)
    machine.again = lambda socket: socket._replace(age_ns=socket.age_ns + SECOND_NS)
    assert outcomes(machine.run(candidate)) == [(Action.QUESTION, Outcome.KNOWS)]
    assert machine.asked == [(Wanted(288, 6, 7_001, 1), OLD_S + 1.0)]
    assert machine.sent == []


@pytest.mark.parametrize("age_s", [YOUNG_S, OLD_S])
@pytest.mark.parametrize(
    ("again", "reason"),
    [
        (lambda _socket: None, "has ended"),
        (lambda socket: socket._replace(bytes_received=1), "data has gone by"),
        (lambda socket: socket._replace(unread=1), "data has gone by"),
        (lambda socket: socket._replace(data_segs_out=1), "data has gone by"),
        (lambda socket: socket._replace(unsent=1), "data has gone by"),
        (lambda socket: socket._replace(is_subflow=True), "data has gone by"),
        (lambda socket: socket._replace(bytes_acked=0), "data has gone by"),
        (lambda socket: socket._replace(age_ns=90 * SECOND_NS), "its age"),
    ],
)
def test_what_is_another_by_then_is_left_alone(
    age_s: float, again: Callable[[ClientSocket], ClientSocket | None], reason: str
) -> None:
    machine = Machine()
    machine.again = again
    (attempt,) = machine.run(waiting(age_s))
    assert attempt.outcome is Outcome.CHANGED
    assert reason in attempt.reason
    assert (machine.sent, machine.asked) == ([], [])


def test_one_that_cannot_be_read_again_is_left_alone() -> None:
    machine = Machine()

    def fail(_socket: ClientSocket) -> ClientSocket:
        raise OSError(2, "the network namespace is gone")

    machine.again = fail
    for age_s in (YOUNG_S, OLD_S):
        (attempt,) = machine.run(waiting(age_s), after_s=100)
        assert (attempt.outcome, attempt.reason) == (
            Outcome.FAILED,
            "the network namespace is gone",
        )
    assert (machine.sent, machine.asked) == ([], [])


def test_a_dry_run_does_nothing_and_says_each_once() -> None:
    machine = Machine(dry_run=True, reset=True)
    young, old, lone = waiting(YOUNG_S), waiting(OLD_S), waiting(700, Owners((), 0, True))
    some = [
        one._replace(socket=one.socket._replace(cookie=number))
        for number, one in enumerate((young, old, lone), 1)
    ]
    found = machine.run(*some)
    assert sorted((one.plan.action.value, one.outcome) for one in found) == [
        (name, Outcome.WOULD) for name in ("challenge", "question", "reset")
    ]
    assert machine.run(*some, after_s=30) == []
    assert (machine.sent, machine.asked, machine.ended) == ([], [], [])
    assert machine.mender.totals(machine.now_ns).challenged == 0


@pytest.mark.parametrize("first", [Answer.GONE, Answer.NOT_OURS])
def test_the_next_owner_is_tried(first: Answer) -> None:
    machine = Machine()
    machine.answer = lambda wanted: Said(
        first if wanted.pid == 1 else Answer.SERVER_FORGOT, "a reason"
    )
    (attempt,) = machine.run(waiting(OLD_S, TWO))
    assert attempt.outcome is Outcome.FORGOT
    assert [wanted.pid for wanted, _ in machine.asked] == [1, 2]


@pytest.mark.parametrize("answer", [Answer.NO_ANSWER, Answer.REFUSED])
def test_what_stays_silent_is_ended_if_that_was_asked_for(answer: Answer) -> None:
    for reset in (False, True):
        machine = Machine(reset=reset)
        machine.answer = lambda _wanted: Said(answer, "a reason")
        candidate = waiting(OLD_S, interface=7)
        assert [one.reason for one in machine.run(candidate)] == ["a reason"]
        ended = machine.run(candidate, after_s=1)
        assert outcomes(ended) == [(Action.RESET, Outcome.ENDED)] * reset
        assert machine.ended == [(candidate.socket.four_tuple, 1, 7)] * reset


def test_one_whose_server_knows_it_is_never_ended() -> None:
    machine = Machine(reset=True)
    candidate = waiting(OLD_S)
    machine.run(candidate)
    machine.answer = lambda _wanted: Said(Answer.NO_ANSWER, "nothing came")
    for _ in range(20):
        machine.run(candidate._replace(server_knows=True), after_s=700)
    assert (len(machine.asked), machine.ended) == (4, [])


@pytest.mark.parametrize(
    ("result", "outcome"),
    [
        (Reset.GONE, Outcome.CHANGED),
        (Reset.NOT_PERMITTED, Outcome.FAILED),
        (Reset.NOT_SUPPORTED, Outcome.FAILED),
    ],
)
def test_a_reset_that_is_refused_is_told_once(result: Reset, outcome: Outcome) -> None:
    machine = Machine(reset=True)
    machine.result = result
    nobody = waiting(700, Owners((), 0, True))
    (attempt,) = machine.run(nobody)
    assert attempt.outcome is outcome
    assert attempt.reason
    assert machine.run(nobody, after_s=1000) == []


def test_errors_are_told_and_counted() -> None:
    machine = Machine()
    machine.refusal = OSError(105, "No buffer space available")

    def fail(_wanted: Wanted) -> Said:
        raise ValueError("unforeseen")

    machine.answer = fail
    (sent,) = machine.run(waiting(YOUNG_S))
    assert (sent.outcome, sent.reason) == (Outcome.FAILED, "No buffer space available")
    (asked,) = machine.run(waiting(OLD_S), after_s=1)
    assert (asked.outcome, asked.reason) == (Outcome.REFUSED, "unforeseen")
    totals = machine.mender.totals(machine.now_ns)
    assert dict(totals.reasons) == {"No buffer space available": 1, "unforeseen": 1}
    assert (totals.challenged, totals.asked) == (0, 0)


def test_questions_do_not_stop_the_polling() -> None:
    machine = Machine()
    go_on = threading.Event()

    def slowly(_wanted: Wanted) -> Said:
        assert go_on.wait(patient(COMMAND_S))
        return Said(Answer.SERVER_FORGOT, "an RST")

    machine.answer = slowly
    many = [
        Candidate(client_socket(number, OLD_S), machine.now_ns, owned()) for number in range(20)
    ]
    machine.mender.renew(many, machine.now_ns)
    assert machine.mender.act() == []
    machine.now_ns += SECOND_NS
    assert machine.mender.act() == []
    assert machine.mender.totals(machine.now_ns).asked == 0
    go_on.set()
    assert len(machine.mender.finish()) == 8
    assert machine.mender.totals(machine.now_ns).asked == 8


def test_149_that_a_server_forgot_are_challenged_within_2_s_and_not_in_one_burst() -> None:
    machine = Machine()
    crowd = [Candidate(client_socket(number, YOUNG_S), 0, owned()) for number in range(1, 150)]
    at_once = [len(machine.run(*crowd, after_s=0.1)) for _ in range(15)]
    assert len({who for who, _ in machine.sent}) == len(machine.sent) == len(crowd)
    assert max(at_once) <= SMALL_BACKLOG // 2
