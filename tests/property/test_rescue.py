"""What the rescue never does, whatever happens in whatever order."""

from __future__ import annotations

import ipaddress

from hypothesis import given, settings
from hypothesis import strategies as st

from tcpstuck_bpf.model import FourTuple, HandshakeId
from tcpstuck_bpf.rescue.candidate import SPACING_NS
from tcpstuck_bpf.rescue.planner import Plan
from tcpstuck_bpf.rescue.policy import RescuePolicy
from tests.builders import SECOND_NS, four_tuple, seconds
from tests.rescue_world import (
    COMPLETES,
    OF_MEMORY,
    OUT_OF_MEMORY,
    OVERFLOWS,
    SILENT,
    RescueWorld,
)

CLIENTS = 8
COOKIE_LIFE_S = 60
"""What the kernel guarantees: TCP_SYNCOOKIE_PERIOD (include/net/tcp.h)."""
EXCLUDED = ipaddress.ip_network("10.0.0.0/32")


def who_is(number: int) -> FourTuple:
    """Two clients of each address, of two listeners."""
    return four_tuple(number // 2)._replace(
        client_port=40_000 + number, server_port=3311 + number % 4 // 2
    )


def is_known(who: FourTuple) -> bool:
    """The addresses whose number is odd."""
    return bool(who.client_address[-1] % 2)


STEPS = (
    "syn",
    "new syn",
    "syn dropped",
    "syn taken",
    "ack",
    "overflow",
    "overflow",
    "no memory",
    "data",
    "fin",
    "reset",
    "rejected",
    "stuck",
    "stuck",
)
GAPS = st.one_of(st.integers(0, 900), st.integers(900, 20_000)).map(lambda ms: ms * 1_000_000)
steps = st.lists(st.tuples(st.integers(0, CLIENTS - 1), st.sampled_from(STEPS), GAPS), max_size=40)
answers = st.lists(
    st.sampled_from([COMPLETES, OVERFLOWS, OVERFLOWS, OUT_OF_MEMORY, SILENT, SILENT]), max_size=30
)
policies = st.builds(
    RescuePolicy,
    include_unknown=st.booleans(),
    rate=st.sampled_from([1, 2, 100]),
    rate_per_address=st.sampled_from([1, 20]),
    excluded=st.sampled_from([(), (EXCLUDED,)]),
    after_expiry=st.booleans(),
)


class Truth:
    """What each client's present handshake has done, kept apart from the tool and its table."""

    def __init__(self, policy: RescuePolicy, drawn: list[str]) -> None:
        self._drawn = list(drawn)
        self.policy = policy
        self.isns = dict.fromkeys(range(CLIENTS), 1)
        self.began_ns: dict[FourTuple, int] = {}
        self.cookie_ns: dict[FourTuple, int] = {}
        self.last_syn_ns: dict[FourTuple, int] = {}
        self.syns: dict[FourTuple, int] = {}
        self.last_drop_ns: dict[FourTuple, int] = {}
        self.talks: set[FourTuple] = set()
        self.world = RescueWorld(policy, answer=self._answer, is_known=is_known)
        self.world.check = self.check

    def _answer(self, who: FourTuple, now_ns: int) -> str:
        answer = self._drawn.pop() if self._drawn else SILENT
        if answer in (OVERFLOWS, OUT_OF_MEMORY):
            self.last_drop_ns[who] = now_ns
        return answer

    def _begin(self, who: FourTuple) -> None:
        self.began_ns[who] = self.world.now_ns
        self.syns[who] = 0
        self.last_drop_ns.pop(who, None)
        self.talks.discard(who)

    def _syn(self, number: int, fresh: bool) -> None:
        who, table, now_ns = who_is(number), self.world.table, self.world.now_ns
        self.isns[number] += fresh
        entry = table.entries.get(who)
        if entry is None or entry.ending or entry.client_isn != self.isns[number]:
            self._begin(who)
        table.syn(who, self.isns[number], now_ns)
        self.syns[who] += 1
        self.last_syn_ns[who] = self.cookie_ns[who] = now_ns

    def _drop(self, who: FourTuple, what: str) -> None:
        if who not in self.world.table.entries or self.world.table.entries[who].ending:
            return
        self.last_drop_ns[who] = self.world.now_ns
        data = 5 if what == "data" else 0
        if what in ("data", "fin"):
            self.talks.add(who)
        counters = {} if what != "no memory" else {"counters": OF_MEMORY}
        self.world.drop(who, data=data, fin=what == "fin", **counters)

    def play(self, number: int, step: str, gap_ns: int) -> None:
        world, who = self.world, who_is(number)
        world.run_until(world.now_ns + gap_ns)
        if step in ("syn", "new syn"):
            self._syn(number, step == "new syn")
        elif step == "stuck":
            self._syn(number, fresh=True)
            self._drop(who, "overflow")
        elif step in ("overflow", "no memory", "data", "fin"):
            self._drop(who, step)
        elif step == "syn dropped":
            world.table.syn_dropped(who, self.isns[number], world.now_ns)
            if who in self.syns:
                self.syns[who] += 1
                self.last_syn_ns[who] = world.now_ns
        elif step == "syn taken":
            world.table.syn_taken(who, self.isns[number], world.now_ns)
        elif step == "ack":
            world.complete(who, accept_queue=0)
        elif step == "reset":
            world.table.reset(who, world.now_ns)
        else:
            world.table.ack_rejected(who, world.now_ns)
        world.take_in()

    def check(self, plan: Plan) -> None:
        """Whether this SYN-ACK may be sent, by what truly happened."""
        who, now_ns = plan.handshake_id.four_tuple, self.world.now_ns
        assert plan.handshake_id.first_syn_ns == self.began_ns[who]
        assert not self.world.table.entries[who].ending
        assert who not in self.talks
        in_excluded = ipaddress.ip_address(who.client_ip) in EXCLUDED
        assert not (self.policy.excluded and in_excluded)
        if who in self.last_drop_ns:
            assert self.syns[who] == 1 or self.last_syn_ns[who] <= self.last_drop_ns[who]
        else:
            assert self.syns[who] == 1
            assert is_known(who) or self.policy.include_unknown
        if not self.policy.after_expiry:
            assert now_ns - self.cookie_ns[who] < seconds(COOKIE_LIFE_S)


def run(played: list[tuple[int, str, int]], drawn: list[str], policy: RescuePolicy) -> RescueWorld:
    truth = Truth(policy, drawn)
    for step in played:
        truth.play(*step)
        rescuer = truth.world.rescuer
        stuck = truth.world.correlate.stats().still_stuck
        assert rescuer.pending + sum(rescuer.left_alone.values()) == stuck
        assert all(number > 0 for number in rescuer.left_alone.values())
    truth.world.run_until(truth.world.now_ns + seconds(70))
    return truth.world


@settings(max_examples=300, deadline=None)
@given(steps, answers, policies)
def test_nothing_is_sent_that_must_not_be(
    played: list[tuple[int, str, int]], drawn: list[str], policy: RescuePolicy
) -> None:
    """`Truth.check` looks at each plan, the world at the tries, `run` at the whereabouts."""
    world = run(played, drawn, policy)
    times = [time_ns for time_ns, _ in world.plans]
    for first, begin_ns in enumerate(times):
        for last in range(first, len(times)):
            elapsed_ns = times[last] - begin_ns
            assert (last - first + 1) * SECOND_NS <= policy.rate * (elapsed_ns + SECOND_NS)
    by_handshake: dict[HandshakeId, list[tuple[int, int]]] = {}
    for time_ns, plan in world.plans:
        by_handshake.setdefault(plan.handshake_id, []).append((time_ns, plan.number))
    for tries in by_handshake.values():
        assert [number for _, number in tries] == list(range(1, len(tries) + 1))
        gaps = [later - earlier for (earlier, _), (later, _) in zip(tries, tries[1:])]
        assert all(gap >= SPACING_NS for gap in gaps)
    assert len(set(world.unanswered)) == len(world.unanswered)


@settings(max_examples=50, deadline=None)
@given(steps, answers, policies)
def test_it_is_deterministic(
    played: list[tuple[int, str, int]], drawn: list[str], policy: RescuePolicy
) -> None:
    one, other = (run(played, drawn, policy) for _ in range(2))
    assert one.plans == other.plans
    assert one.unanswered == other.unanswered
    assert one.rescuer.left_alone == other.rescuer.left_alone


@settings(max_examples=50, deadline=None)
@given(steps, policies)
def test_after_all_tries_and_the_cookies_life_nobody_is_pending(
    played: list[tuple[int, str, int]], policy: RescuePolicy
) -> None:
    """No client is forgotten in a corner: each is tried or named."""
    world = run(played, [], policy)
    world.run_until(world.now_ns + seconds(70))
    assert world.rescuer.pending == 0
    assert sum(world.rescuer.left_alone.values()) == world.correlate.stats().still_stuck
