"""A run on the client's side, over scripted polls and a clock of its own."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path

import pytest

from tcpstuck_bpf.client.actions import Action, Attempt, Candidate, Outcome, Plan, Totals
from tcpstuck_bpf.client.analysis import ClientAnalysis
from tcpstuck_bpf.client.facts import ClientSocket, Owners, Poll
from tcpstuck_bpf.client.recording import ClientRecorder
from tcpstuck_bpf.client.summary import ClientSummary, Status, exit_status
from tcpstuck_bpf.client.waits import Change
from tcpstuck_bpf.client.watch import LONGEST_NAP_NS, Watch
from tcpstuck_bpf.model import SECOND_NS
from tests.unit.client.world import BEGIN_NS, client_socket, header, owned, poll

COST_NS = SECOND_NS // 1000


class ScriptedMending:
    """Challenges what it is given at once, and asks; the answer comes at the end of the run."""

    def __init__(self) -> None:
        self.given: list[list[int]] = []
        self.asked: list[Plan] = []
        self.challenged: set[int] = set()
        self.acts = 0

    def renew(self, candidates: Iterable[Candidate], now_ns: int) -> None:
        found = [one.socket for one in candidates]
        self.given.append([one.cookie for one in found])
        self.asked = self.asked or [Plan(Action.QUESTION, one) for one in found]
        self.now_ns = now_ns

    def act(self) -> list[Attempt]:
        self.acts += 1
        plans = [
            Plan(Action.CHALLENGE, one.socket)
            for one in self.asked
            if one.socket.cookie not in self.challenged
        ]
        self.challenged |= {one.socket.cookie for one in plans}
        return [Attempt(one, self.now_ns, Outcome.SENT, "") for one in plans]

    def finish(self) -> list[Attempt]:
        return [Attempt(one, self.now_ns, Outcome.FORGOT, "an RST came") for one in self.asked]

    def totals(self, _now_ns: int) -> Totals:
        return Totals(False, {}, len(self.challenged), len(self.asked), {}, {})


class Machine:
    """Sockets, a clock that only sleeping and polling move, and an output that remembers."""

    def __init__(
        self,
        *sockets: ClientSocket,
        cost_ns: int = COST_NS,
        mending: ScriptedMending | None = None,
        recorder: ClientRecorder | None = None,
    ) -> None:
        self.now_ns = BEGIN_NS
        self.sockets = sockets
        self.cost_ns = cost_ns
        self.polls: list[int] = []
        self.asked: list[frozenset[int]] = []
        self.printed: list[Change] = []
        self.attempted: list[Attempt] = []
        self.shown: list[Status] = []
        self.ended = False
        self.beyond = 0
        self.at_poll: Callable[[int], None] = lambda _number: None
        self.watch = Watch(
            self,
            ClientAnalysis(header()),
            self,
            self.owners_of,
            recorder=recorder,
            clock_ns=lambda: self.now_ns,
            cpu_ns=lambda: self.now_ns,
            sleep=self.sleep,
            mending=mending,
        )

    def read(self, keep: Callable[[ClientSocket], bool]) -> Poll:
        self.at_poll(len(self.polls))
        self.polls.append(self.now_ns)
        self.now_ns += self.cost_ns
        passed_ns = self.now_ns - BEGIN_NS
        aged = (
            one._replace(age_ns=one.age_ns + passed_ns * (one.bytes_received == 0))
            for one in self.sockets
        )
        kept = [one for one in aged if keep(one)]
        return poll(0, *kept, established=len(self.sockets))._replace(time_ns=self.now_ns)

    def sleep(self, seconds: float) -> None:
        assert 0 < seconds <= LONGEST_NAP_NS / SECOND_NS
        self.now_ns += round(seconds * SECOND_NS)

    def owners_of(self, inodes: Collection[int]) -> dict[int, Owners]:
        self.asked.append(frozenset(inodes))
        return {inode: owned(pid=inode) for inode in inodes}

    def changes(self, changes: Sequence[Change], _now_ns: int) -> None:
        self.printed += changes

    def attempts(self, attempts: Sequence[Attempt]) -> None:
        self.attempted += attempts

    def status(self, status: Status) -> None:
        self.shown.append(status)

    def summary(self, summary: ClientSummary, _now_ns: int) -> None:
        self.summed = summary

    def close(self) -> None:
        pass

    def run(self, duration_s: float | None = 5) -> ClientSummary:
        duration_ns = None if duration_s is None else round(duration_s * SECOND_NS)
        summary = self.watch.run(duration_ns, None)
        assert summary is self.summed
        return summary


def test_it_polls_twice_a_second_and_once_more_at_the_end() -> None:
    machine = Machine()
    machine.run(5)
    steps = [after - before for before, after in zip(machine.polls, machine.polls[1:])]
    assert {*steps[:-1]} == {SECOND_NS // 2 + COST_NS}
    assert machine.polls[-1] == BEGIN_NS + 5 * SECOND_NS


@pytest.mark.parametrize("cost_ms", [1, 25, 80, 400, 3_000])
def test_polls_take_at_most_a_twentieth_of_the_time(cost_ms: int) -> None:
    machine = Machine(cost_ns=cost_ms * 1_000_000)
    machine.run(600)
    spent_ns = machine.cost_ns * (len(machine.polls) - 1)
    assert spent_ns / (machine.polls[-1] - machine.polls[0]) <= 0.05


def test_a_long_search_for_owners_delays_the_next_poll_by_five_times_as_much() -> None:
    machine = Machine(client_socket(1, 60))

    def search(inodes: Collection[int]) -> dict[int, Owners]:
        machine.now_ns += 2 * SECOND_NS
        return {inode: owned() for inode in inodes}

    machine.watch._owners_of = search
    machine.run(60)
    first, second, third, *_ = machine.polls
    assert second - first == COST_NS + 12 * SECOND_NS
    assert third - second == COST_NS + SECOND_NS // 2


def test_owners_are_asked_for_once_and_only_for_what_is_told() -> None:
    machine = Machine(client_socket(1, 60), client_socket(2, 60), client_socket(3, 0))
    machine.run(5)
    assert machine.asked == [{7_001, 7_002}, {7_003}]
    assert {one.owners.processes[0].pid for one in machine.printed} == {7_001, 7_002, 7_003}
    assert len(machine.summed.groups) == 3


def test_a_later_verdict_has_the_owner_of_the_first() -> None:
    machine = Machine(client_socket(1, 60))

    def greet(number: int) -> None:
        if number == 2:
            machine.sockets = (client_socket(1, 0, bytes_received=25),)

    machine.at_poll = greet
    machine.run(5)
    assert [one.verdict for one in machine.printed] == ["greeting-missing", "recovered"]
    assert machine.printed[1].owners == machine.printed[0].owners
    assert exit_status(machine.summed) == 1


def test_a_signal_ends_the_run_with_a_last_poll_and_the_summary() -> None:
    machine = Machine(client_socket(1, 0))

    def interrupt(number: int) -> None:
        machine.watch.stop = number == 3

    machine.at_poll = interrupt
    summary = machine.run(None)
    assert summary.polls == 5
    assert (summary.young, summary.nothing_judged, exit_status(summary)) == (1, True, 4)


def test_one_that_is_closed_right_before_the_end_does_not_wait() -> None:
    machine = Machine(client_socket(1, 60))

    def close(number: int) -> None:
        machine.watch.stop = number >= 3
        if number == 4:
            machine.sockets = ()

    machine.at_poll = close
    summary = machine.run(None)
    assert (summary.stuck, summary.closed, summary.groups) == (0, 1, ())


def test_one_that_the_last_poll_alone_misses_waits_on() -> None:
    machine = Machine(client_socket(1, 60))

    def miss(number: int) -> None:
        machine.watch.stop = number >= 3
        machine.sockets = () if number == 4 else (client_socket(1, 60),)

    machine.at_poll = miss
    assert machine.run(None).stuck == 1


def test_the_end_of_the_process_ends_the_run() -> None:
    machine = Machine()

    def end(number: int) -> None:
        machine.ended = number == 2

    machine.at_poll = end
    assert machine.run(None).notes == ("the process of --pid has ended",)


def test_a_failure_after_the_start_is_told_with_what_was_found() -> None:
    machine = Machine(client_socket(1, 60))

    def fail(number: int) -> None:
        if number == 2:
            raise OSError(12, "Cannot allocate memory")

    machine.at_poll = fail
    summary = machine.run(None)
    assert summary.stuck == 1
    assert summary.notes == ("the run ended early: Cannot allocate memory",)
    assert machine.watch.failure is not None


def test_verdicts_whose_owners_could_not_be_looked_for_are_told_without() -> None:
    machine = Machine(client_socket(1, 60), client_socket(2, 2))

    def search(inodes: Collection[int]) -> dict[int, Owners]:
        if inodes == {7_002}:
            raise OSError(24, "Too many open files")
        return machine.owners_of(inodes)

    machine.watch._owners_of = search
    summary = machine.run(5)
    assert [one.socket.cookie for one in machine.printed] == [1, 2]
    assert [one.owners.sought for one in machine.printed] == [True, False]
    assert summary.stuck == 2
    assert summary.notes == ("the run ended early: Too many open files",)


def test_a_failure_at_the_start_is_an_error() -> None:
    machine = Machine()

    def fail(_number: int) -> None:
        raise OSError(1, "Operation not permitted")

    machine.at_poll = fail
    with pytest.raises(OSError, match="not permitted"):
        machine.run()


def test_an_output_that_fails_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(client_socket(1, 2))

    def fail(changes: Sequence[Change], _now_ns: int) -> None:
        if changes:
            raise BrokenPipeError

    monkeypatch.setattr(machine, "changes", fail)
    with pytest.raises(BrokenPipeError):
        machine.run()


def test_losses_are_the_most_that_a_poll_had() -> None:
    machine = Machine()

    def beyond(number: int) -> None:
        machine.beyond = 7 if number == 2 else 0

    machine.at_poll = beyond
    assert machine.run().losses["namespaces_beyond"] == 7
    assert exit_status(machine.summed) == 4


def test_the_ready_file_is_there_once_the_first_poll_is_done(tmp_path: Path) -> None:
    machine = Machine()
    ready = tmp_path / "ready"
    seen: list[bool] = []
    machine.at_poll = lambda _number: seen.append(ready.exists())
    machine.watch.run(SECOND_NS, str(ready))
    assert seen == [False, True, True]


def test_what_is_reported_is_mended_between_the_polls_and_at_the_end() -> None:
    mending = ScriptedMending()
    machine = Machine(client_socket(1, 60), client_socket(2, 0), mending=mending)

    def end(number: int) -> None:
        if number == 4:  # the RST came
            machine.sockets = (client_socket(2, 0),)

    machine.at_poll = end
    summary = machine.run(2)
    assert mending.given[0] == [1]
    assert mending.acts > len(machine.polls)
    assert [one.outcome for one in machine.attempted] == [Outcome.SENT, Outcome.FORGOT]
    assert [one.verdict for one in machine.printed] == ["greeting-missing", "server-forgot"]
    assert summary.mending == Totals(False, {}, 1, 1, {}, {})
    assert (summary.stuck, summary.ever_stuck) == (0, 1)


def test_a_greeting_after_a_challenge_is_a_rescue() -> None:
    machine = Machine(client_socket(1, 60), mending=ScriptedMending())

    def greet(number: int) -> None:
        if number == 2:
            machine.sockets = (client_socket(1, 0, bytes_received=25),)

    machine.at_poll = greet
    machine.run(5)
    assert [one.verdict for one in machine.printed] == ["greeting-missing", "rescued"]
