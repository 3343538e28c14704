"""Whatever happens to connections: what --client --rescue plans keeps to its rules."""

from __future__ import annotations

import ipaddress
import itertools
import random
from collections import defaultdict
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tcpstuck_bpf.client.actions import Action, Attempt, Candidate, Outcome, Plan
from tcpstuck_bpf.client.facts import NOBODY, ClientSocket
from tcpstuck_bpf.client.planner import (
    ASK_AGAIN_NS,
    ASK_FROM_NS,
    BURST_PER_SERVER,
    CHALLENGE_UNTIL_NS,
    LEAST_BETWEEN_NS,
    MOST_ASKED_AT_ONCE,
    MOST_CHALLENGES,
    MOST_UNANSWERED,
    RESET_UNASKED_NS,
    Key,
    MendPolicy,
    Planner,
)
from tcpstuck_bpf.model import SECOND_NS
from tcpstuck_bpf.rescue.policy import RescuePolicy
from tests.unit.client.world import BEGIN_NS, client_socket, owned

SERVERS = ("10.9.0.1", "10.9.0.7", "fd09::1")
EXCLUDED = "10.9.0.7"
ANSWERS = (
    *(Outcome.KNOWS, Outcome.NO_ANSWER, Outcome.REFUSED, Outcome.NOT_OURS, Outcome.GONE),
    *(Outcome.CHANGED, Outcome.FORGOT),
)
CHALLENGED = (Outcome.SENT, Outcome.SENT, Outcome.SENT, Outcome.CHANGED, Outcome.FAILED)
TOUCHED = ({"bytes_received": 9}, {"data_segs_out": 1}, {"unsent": 3}, {"unread": 3})
NEVER_TOUCHED = (*TOUCHED, {"bytes_acked": 0}, {"is_subflow": 1})

policies = st.builds(
    lambda rate, per_server, late, reset, excluded: MendPolicy(
        RescuePolicy(
            rate=rate,
            rate_per_address=per_server,
            after_expiry=late,
            excluded=(ipaddress.ip_network(EXCLUDED),) if excluded else (),
        ),
        reset,
    ),
    st.integers(1, 20),
    st.integers(1, 10),
    *[st.booleans()] * 3,
)


@dataclass
class World:
    """Connections, the planner, and all that it has planned."""

    policy: MendPolicy
    now_ns: int = BEGIN_NS
    born_ns: dict[int, int] = field(default_factory=dict)
    facts: dict[int, dict[str, int]] = field(default_factory=dict)
    owned: dict[int, bool] = field(default_factory=dict)
    knowing: set[Key] = field(default_factory=set)
    waiting: list[Plan] = field(default_factory=list)
    history: defaultdict[Key, list[tuple[int, Plan]]] = field(
        default_factory=lambda: defaultdict(list)
    )
    answers: defaultdict[Key, list[Outcome]] = field(default_factory=lambda: defaultdict(list))
    times: defaultdict[object, list[int]] = field(default_factory=lambda: defaultdict(list))

    def __post_init__(self) -> None:
        self.planner = Planner(self.policy)

    def socket(self, number: int) -> ClientSocket:
        age_s = (self.now_ns - self.born_ns[number]) / SECOND_NS
        server = SERVERS[number % len(SERVERS)]
        return client_socket(number, age_s, server=server, **self.facts[number])

    def poll(self) -> None:
        sockets = [self.socket(number) for number in self.born_ns]
        self.planner.renew(
            [
                Candidate(
                    one,
                    self.now_ns,
                    owned() if self.owned[one.cookie] else NOBODY,
                    one.key in self.knowing,
                )
                for one in sockets
            ],
            self.now_ns,
        )

    def act(self) -> None:
        for plan in self.planner.plan(self.now_ns):
            self.check(plan)
            key = plan.socket.key
            self.history[key].append((self.now_ns, plan))
            for place in ("all", plan.socket.four_tuple.server_address):
                self.times[place].append(self.now_ns)
            self.waiting.append(plan)
        asked = [one for one in self.waiting if one.action is Action.QUESTION]
        assert len(asked) <= MOST_ASKED_AT_ONCE

    def check(self, plan: Plan) -> None:
        socket, key = plan.socket, plan.socket.key
        before = [(when, one) for when, one in self.history[key] if one.action is plan.action]
        assert socket.waits
        assert not socket.is_subflow
        assert key not in {one.socket.key for one in self.waiting}
        excluded = bool(self.policy.limits.excluded)
        assert not (excluded and socket.four_tuple.server_ip == EXCLUDED)
        assert plan.number == 1 + len(before)
        if plan.action is Action.CHALLENGE:
            late = self.policy.limits.after_expiry
            assert socket.age_ns < (ASK_FROM_NS if late else CHALLENGE_UNTIL_NS)
            assert len(before) < MOST_CHALLENGES
            assert all(self.now_ns - when >= LEAST_BETWEEN_NS for when, _ in before)
            return
        assert socket.age_ns > 120 * SECOND_NS
        if plan.action is Action.QUESTION:
            assert plan.owners.processes
            assert all(self.now_ns - when >= ASK_AGAIN_NS for when, _ in before)
            silent = [one for one in self.answers[key] if one is not Outcome.KNOWS]
            assert len(silent) < MOST_UNANSWERED
            return
        assert self.policy.reset
        assert key not in self.knowing
        assert not before
        last = self.answers[key][-1:]
        asked_in_vain = last in ([Outcome.NO_ANSWER], [Outcome.REFUSED])
        assert asked_in_vain or socket.age_ns >= RESET_UNASKED_NS

    def answer(self, index: int, choice: int) -> None:
        plan = self.waiting.pop(index % len(self.waiting))
        key = plan.socket.key
        if plan.action is Action.CHALLENGE:
            outcome = CHALLENGED[choice % len(CHALLENGED)]
        elif plan.action is Action.QUESTION:
            outcome = ANSWERS[choice % len(ANSWERS)]
            self.answers[key].append(outcome)
            if outcome is Outcome.KNOWS:
                self.knowing.add(key)
        else:
            outcome = Outcome.ENDED
        self.planner.note(Attempt(plan, self.now_ns, outcome, ""))
        if outcome in (Outcome.FORGOT, Outcome.ENDED):
            self.born_ns.pop(plan.socket.cookie, None)

    def check_rates(self) -> None:
        """Within any time, at most what the rate gives and one burst."""
        for place, times in self.times.items():
            limits = self.policy.limits
            rate = limits.rate if place == "all" else min(limits.rate_per_address, limits.rate)
            burst = rate if place == "all" else min(rate, BURST_PER_SERVER)
            lead = [i - rate * (t - BEGIN_NS) / SECOND_NS for i, t in enumerate(times)]
            least = itertools.accumulate(lead, min)
            # From any action to any later one: last - first + 1 <= burst + rate * seconds between.
            assert all(last + 1 - burst <= first + 1e-6 for last, first in zip(lead, least))


PASSES_S = (0.05, 0.1, 0.3, 0.3, 1.2, 12, 61, 61, 130)
"""Times between two steps, in seconds."""


def live(world: World, chance: random.Random, steps: int) -> None:
    """Connections come, speak and age; plans are made, and answered late or not at all."""

    def open_one() -> None:
        number = 1 + len(world.facts)
        age_s = chance.choice((0, 40, 56, 90, 119, 121, 500, 700)) + 2 * chance.random()
        touched = dict(chance.choice(NEVER_TOUCHED)) if chance.random() < 0.2 else {}
        world.born_ns[number] = world.now_ns - round(age_s * SECOND_NS)
        world.owned[number], world.facts[number] = chance.random() < 0.8, touched

    silent = chance.random() < 0.5
    for _ in range(steps):
        for _ in range(chance.choice((0, 0, 1, 25))):
            open_one()
        if world.born_ns and chance.random() < 0.1:
            world.facts[chance.choice([*world.born_ns])] = dict(chance.choice(TOUCHED))
        if chance.random() < 0.8:
            world.poll()
            world.act()
        for _ in range(chance.choice((0, 1, 30))):
            if world.waiting:
                index = chance.randrange(len(world.waiting))
                # Of ANSWERS, 0 is an ACK and 1 is silence.
                world.answer(index, 1 if silent else chance.choice((0, 0, 1, 2, 3, 4, 5, 6)))
        world.now_ns += round(chance.choice(PASSES_S) * SECOND_NS)


@settings(deadline=None, max_examples=40)
@given(policies, st.integers(0, 1 << 32))
def test_plans_keep_to_the_rules(policy: MendPolicy, seed: int) -> None:
    world = World(policy)
    live(world, random.Random(seed), steps=40)
    world.check_rates()


@pytest.mark.parametrize(
    ("reset", "questions", "resets"), [(False, MOST_UNANSWERED, 0), (True, 1, 1)]
)
def test_the_world_leads_to_every_action(reset: bool, questions: int, resets: int) -> None:
    """Otherwise the rules above would be kept by doing nothing."""
    world = World(MendPolicy(RescuePolicy(rate=20, rate_per_address=10), reset))
    live(world, random.Random(7), steps=300)
    most = dict.fromkeys(Action, 0)
    for some in world.history.values():
        for _, plan in some:
            most[plan.action] = max(most[plan.action], plan.number)
    assert most[Action.CHALLENGE] == MOST_CHALLENGES
    assert most[Action.QUESTION] >= questions
    assert most[Action.RESET] == resets
