"""What must hold of the correlator whatever comes, and whatever does not come."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from tcpstuck_bpf.handshake.correlate import Correlator
from tcpstuck_bpf.handshake.entry import is_remarkable, merge
from tcpstuck_bpf.handshake.flow import ENDED_STATES, STUCK_STATES, FlowReport, State
from tcpstuck_bpf.judge.rules import RULES
from tcpstuck_bpf.judge.verdict import judge
from tcpstuck_bpf.model import (
    Coverage,
    Ending,
    Event,
    EventKind,
    Handshake,
    HandshakeId,
    Row,
    Sweep,
)
from tests.builders import SECOND_NS, TIMEOUT_NS, Table, correlator, four_tuple, handshake, seconds
from tests.property.history import Truth
from tests.property.world import CLIENTS, World

NO_PROBES = Coverage("none")
CONNECTED_STATES = frozenset({State.COMPLETED, State.RECOVERED, State.RESCUED, State.DATA_LOST})

# Values near each other, near the edges of their fields and far beyond sense.
TIMES = st.one_of(
    st.integers(0, 8).map(lambda n: n * SECOND_NS),
    st.sampled_from([0, 1, 2**63, 2**64 - 1]),
    st.integers(0, 2**64 - 1),
)
NUMBERS = st.one_of(st.integers(0, 5), st.integers(0, 2**32 - 1))
BYTES = st.one_of(st.integers(0, 7), st.integers(0, 255))
CLIENT_TUPLES = st.integers(0, 9).map(four_tuple)

nonsense_entries = st.builds(
    Handshake,
    *[TIMES] * 9,
    *[NUMBERS] * 13,
    mss=st.integers(0, 2**16 - 1),
    ending=BYTES,
    drop_counters=BYTES,
    end_counters=BYTES,
    filter_device=NUMBERS,
    socket=NUMBERS,
)
nonsense_events = st.builds(
    Event,
    CLIENT_TUPLES,
    nonsense_entries,
    time_ns=TIMES,
    sequence=NUMBERS,
    acknowledgement=NUMBERS,
    accept_queue=NUMBERS,
    accept_queue_limit=NUMBERS,
    payload_length=st.integers(0, 2**16 - 1),
    tcp_flags=BYTES,
    counters=BYTES,
    kind=BYTES,
)
nonsense_sweeps = st.builds(
    Sweep, TIMES, st.lists(st.builds(Row, CLIENT_TUPLES, nonsense_entries), max_size=6).map(tuple)
)


@given(
    st.lists(st.one_of(nonsense_events, nonsense_sweeps, TIMES), max_size=40),
    st.integers(1, 6),
    st.booleans(),
    st.integers(0, 100),
)
def test_anything_is_taken_in_bounded_memory_and_judged_by_one_rule(
    steps: list[Event | Sweep | int], max_flows: int, tell_healthy: bool, table_rows: int
) -> None:
    correlate = Correlator(TIMEOUT_NS, tell_healthy, max_flows, row_life_ns=5 * SECOND_NS)
    told: list[FlowReport] = []
    for step in steps:
        if isinstance(step, int):
            now = correlate.advance(step)
            assert len(now) <= 2 * max_flows
            told += now
            assert len(correlate.flows.expired(step, table_rows, 50)) <= 2 * max_flows
        else:
            correlate.observe(step)
        assert correlate.stats().flows <= max_flows
    # What a new handshake of the same 4-tuple had settled is told with the next step.
    told += correlate.advance(0)
    for report in told:
        assert sum(rule.condition(report) for rule in RULES) == 1
        finding = judge(report, NO_PROBES)
        assert finding is not None
        assert finding.age_ns >= 0
        assert all(sentence.strip() for sentence in finding.evidence)
    stats = correlate.stats()
    assert 0 <= stats.still_stuck <= stats.ever_stuck
    assert sum(stats.reported_now.values()) <= len(told) + stats.evicted
    assert all(number > 0 for number in (*stats.reported_now.values(), *stats.unreported.values()))


@given(st.lists(nonsense_entries.map(lambda e: e._replace(first_syn_ns=7)), min_size=3, max_size=3))
def test_merging_is_a_join(entries: list[Handshake]) -> None:
    a, b, c = entries
    assert merge(a, a) == a
    assert merge(a, b) == merge(b, a)
    assert merge(merge(a, b), c) == merge(a, merge(b, c))
    for view in (a, b):
        joined = merge(a, b)
        assert joined.syn_count >= view.syn_count
        assert joined.acks_dropped >= view.acks_dropped
        assert joined.bytes_missed >= view.bytes_missed
        assert joined.acks_filtered >= view.acks_filtered
        assert joined.last_ack_filtered_ns >= view.last_ack_filtered_ns
        assert joined.last_ack_dropped_ns >= view.last_ack_dropped_ns
        assert not (view.ending == Ending.COMPLETED and joined.ending != Ending.COMPLETED)


SEGMENTS = (
    "syn",
    "new syn",
    "syn dropped",
    "syn taken",
    "new syn dropped",
    "new syn taken",
    "ack",
    "ack too late",
    "ack dropped",
    "ack filtered",
    "ack rejected",
    "no listener",
    "reset",
)
# Silence is what matters most: gaps from a millisecond up to well beyond any deadline.
GAPS = st.one_of(st.integers(1, 400), st.integers(400, 12_000)).map(lambda ms: ms * 1_000_000)
segment_steps = st.tuples(st.integers(0, CLIENTS - 1), st.sampled_from(SEGMENTS), GAPS)
steps_of_one_handshake = st.lists(
    st.tuples(
        st.just(0),
        st.sampled_from([s for s in SEGMENTS if not s.startswith("new ") and s != "syn taken"]),
        GAPS,
    ),
    max_size=12,
)


WATCHING = ("drain", "sweep", "begin sweep", "advance", "tidy")
world_steps = st.lists(st.one_of(segment_steps, st.sampled_from(WATCHING)), max_size=50)


def _watched(
    steps: Sequence[tuple[int, str, int] | str], lost: list[bool], tell_healthy: bool
) -> World:
    world = World(lost, tell_healthy)
    for step in steps:
        if isinstance(step, str):
            world.watch(step)
        else:
            world.play(*step)
    world.finish()
    return world


@settings(max_examples=400)
@given(world_steps, st.lists(st.booleans(), max_size=50), st.booleans())
@example([(0, "syn", 1), (0, "syn", seconds(1)), (0, "ack", 1), "advance"], [False, True], False)
@example([(0, "syn", 1), (0, "ack dropped", 1), "drain", (0, "ack", 1), "advance"], [], False)
@example([(0, "syn", 1), (0, "reset", 1), "tidy", (0, "new syn", 1)], [], False)
@example([(0, "syn", 1), (0, "ack rejected", 1), "tidy", "drain", (0, "ack", 1)], [], False)
@example([(0, "syn", 1), (0, "syn taken", 1), "tidy", "drain", (0, "ack too late", 1)], [], False)
def test_verdicts_are_what_truly_happened(
    steps: list[tuple[int, str, int] | str], lost: list[bool], tell_healthy: bool
) -> None:
    """Whatever events are lost and however late the others and the sweeps arrive."""
    world = _watched(steps, lost, tell_healthy)
    for report in world.reported:
        assert report.decided_ns <= world.now_ns
        if report.state in STUCK_STATES:
            truth = world.history.at(report.four_tuple, report.decided_ns)
            assert truth.first_syn_ns == report.handshake.first_syn_ns
            assert truth.over is None
            assert truth.syns < 3 or truth.acks_dropped or truth.acks_filtered
            assert (report.state is State.ACK_DROPPED) == bool(truth.acks_dropped)
            filtered = bool(truth.acks_filtered and not truth.acks_dropped)
            assert (report.state is State.ACK_FILTERED) == filtered
            assert report.decided_ns - truth.first_syn_ns >= TIMEOUT_NS
    for client in range(CLIENTS):
        _assert_last_handshake_is_judged_right(world, client)


TAKEN_OVER_LATE = ((0, "syn", 1), (1, "syn", seconds(4)), "tidy", (0, "syn taken", 1), "tidy")


@given(world_steps, st.booleans())
@example([*TAKEN_OVER_LATE, (0, "ack", 1), "tidy"], False)
@example([*TAKEN_OVER_LATE, (0, "ack dropped", 1), "tidy", (0, "ack", 1)], False)
@example([*TAKEN_OVER_LATE, (0, "ack dropped", 1), (1, "reset", seconds(9)), "tidy"], True)
@example([*TAKEN_OVER_LATE, (0, "new syn", 1), (0, "ack", 1)], False)
def test_who_is_told_as_connected_is_counted_once(
    steps: list[tuple[int, str, int] | str], tell_healthy: bool
) -> None:
    """`completed` is the programs' count of cookies, plus clients connected without one."""
    world = _watched(steps, [], tell_healthy)
    assume(not world.let_go and not world.correlator.stats().late)
    told = {
        HandshakeId(report.four_tuple, report.handshake.first_syn_ns): report.state
        for report in world.reported
    }
    truths = world.history.ends()
    completed = {name for name in told if truths[name].over in ("ack", "ack too late")}
    connected = {name for name, state in told.items() if state in CONNECTED_STATES}
    assert completed <= connected
    assert world.correlator.stats().taken_over == len(connected - completed)


def _assert_last_handshake_is_judged_right(world: World, client: int) -> None:
    key = four_tuple(client)
    truth = world.history.at(key, world.now_ns)
    told = [
        report.state
        for report in world.reported
        if report.four_tuple == key and report.handshake.first_syn_ns == truth.first_syn_ns
    ]
    # One that the SYN queue seemed to have connected may be stuck, and connected, again.
    assert len(set(told)) == len(told) or State.RECOVERED in told[:-1]
    assert all(one is not other for one, other in zip(told, told[1:]))
    last = told[-1] if told else None
    if truth.first_syn_ns == 0:
        assert not told
    elif truth.over in ("ack", "syn taken"):
        _assert_connected(told, HandshakeId(key, truth.first_syn_ns) in world.let_go)
    elif truth.over == "ack too late":
        gone = HandshakeId(key, truth.first_syn_ns) in world.let_go
        assert last is State.DATA_LOST or (gone and (last is None or last in ENDED_STATES))
    elif truth.over == "replaced":
        assert last is not State.RECOVERED
    elif truth.over == "reset":
        assert last is State.RESET
    elif truth.over == "ack rejected":
        assert last is State.REJECTED
    elif truth.over == "no listener":
        assert last is State.NO_LISTENER
    else:
        gone = HandshakeId(key, truth.first_syn_ns) in world.let_go
        unseen = gone and (last is None or last in ENDED_STATES)
        assert unseen or last is _state_of_an_open_one(truth)


def _state_of_an_open_one(truth: Truth) -> State:
    if truth.acks_dropped:
        return State.ACK_DROPPED
    if truth.acks_filtered:
        return State.ACK_FILTERED
    return State.REPEATING if truth.syns >= 3 else State.SILENT


def _assert_connected(told: Sequence[State], gone: bool) -> None:
    """`gone`: out of the table before it was connected, so that nobody can know."""
    if gone and told and told[-1] in ENDED_STATES:
        return
    if any(state in STUCK_STATES for state in told):
        assert told[-1] is State.RECOVERED
    elif told:
        assert told[-1] is State.COMPLETED


@given(steps_of_one_handshake, st.randoms(use_true_random=False), st.booleans())
def test_order_of_delivery_changes_nothing(
    steps: list[tuple[int, str, int]], shuffle: random.Random, tell_healthy: bool
) -> None:
    world = World(tell_healthy=tell_healthy)
    world.play(0, "syn", 1)
    observations: list[Event | Sweep] = [world.table.sweep(world.now_ns)]
    for step in steps:
        if world.table.entries and not world.table.entries[four_tuple()].ending:
            world.play(*step)
            observations.append(world.table.sweep(world.now_ns + 1))
    world.now_ns += 100 * SECOND_NS
    observations += [*world.table.ring, world.table.sweep(world.now_ns)]
    expected = _told(observations, world.now_ns, tell_healthy)
    shuffle.shuffle(observations)
    assert _told(observations, world.now_ns, tell_healthy) == expected


def _told(
    observations: Iterable[Event | Sweep], now_ns: int, tell_healthy: bool
) -> list[FlowReport]:
    watching = correlator(tell_healthy=tell_healthy)
    for observation in observations:
        watching.observe(observation)
    return watching.advance(now_ns)


recorded_steps = st.lists(
    st.one_of(segment_steps, st.sampled_from(("drain", "sweep"))), min_size=1, max_size=30
)


def _recording(steps: Sequence[tuple[int, str, int] | str]) -> list[tuple[int, Event | Sweep]]:
    """What a source would have given, each with the time it was given at."""
    world = World()
    given_: list[tuple[int, Event | Sweep]] = []
    for step in (*steps, "drain", "sweep"):
        if step == "drain":
            given_ += [(world.now_ns, event) for event in world.table.ring]
            world.table.ring.clear()
        elif isinstance(step, str):
            given_.append((world.now_ns, world.table.sweep(world.now_ns)))
        else:
            world.play(*step)
    return given_


@given(recorded_steps)
def test_a_recording_gives_the_same_reports_and_counts_again(
    steps: list[tuple[int, str, int] | str],
) -> None:
    recording = _recording(steps)

    def replay() -> tuple[object, object]:
        watching = correlator()
        told = []
        for now_ns, observation in recording:
            watching.observe(observation)
            told.append(watching.advance(now_ns))
        return told, watching.stats()

    assert replay() == replay()


@given(recorded_steps)
def test_clients_do_not_influence_each_other(steps: list[tuple[int, str, int] | str]) -> None:
    recording = _recording(steps)
    together = correlator()
    told: list[FlowReport] = []
    alone = {four_tuple(client): correlator() for client in range(CLIENTS)}
    told_alone: list[FlowReport] = []
    for now_ns, observation in recording:
        together.observe(observation)
        told += together.advance(now_ns)
        for key, watching in alone.items():
            if isinstance(observation, Sweep):
                rows = tuple(row for row in observation.rows if row.four_tuple == key)
                watching.observe(observation._replace(rows=rows))
            elif observation.four_tuple == key:
                watching.observe(observation)
            told_alone += watching.advance(now_ns)
    assert sorted(map(repr, told)) == sorted(map(repr, told_alone))
    assert together.stats().ever_stuck == sum(c.stats().ever_stuck for c in alone.values())


@given(recorded_steps, st.lists(st.integers(0, CLIENTS), max_size=4))
def test_batch_borders_change_nothing(
    steps: list[tuple[int, str, int] | str], cuts: list[int]
) -> None:
    recording = _recording(steps)
    whole, batched = correlator(), correlator()
    for now_ns, observation in recording:
        whole.observe(observation)
        if isinstance(observation, Sweep):
            borders = [0, *sorted(cuts), len(observation.rows)]
            for start, end in zip(borders, borders[1:]):
                batched.observe(observation._replace(rows=observation.rows[start:end]))
        else:
            batched.observe(observation)
        assert whole.advance(now_ns) == batched.advance(now_ns)
        assert whole.stats() == batched.stats()


@given(st.lists(st.integers(0, 20_000), min_size=1, max_size=12), st.integers(1, 30_000))
def test_silence_is_told_from_its_deadline_on_and_never_before(
    ages_ms: list[int], later_ms: int
) -> None:
    now_ns = 1_000 * SECOND_NS
    entries = [handshake(now_ns - age * 1_000_000) for age in ages_ms]
    watching = correlator()
    for time_ns in (now_ns, now_ns + later_ms * 1_000_000):
        watching.observe(
            Sweep(time_ns, tuple(Row(four_tuple(n), e) for n, e in enumerate(entries)))
        )
        due = {
            e.first_syn_ns + TIMEOUT_NS for e in entries if time_ns - e.first_syn_ns >= TIMEOUT_NS
        }
        told = watching.advance(time_ns)
        assert all(report.state is State.SILENT for report in told)
        assert {report.decided_ns for report in told} <= due
        stats = watching.stats()
        assert stats.still_stuck == sum(time_ns - e.first_syn_ns >= TIMEOUT_NS for e in entries)
        assert stats.pending == len(entries) - stats.still_stuck
        assert stats.flows == stats.still_stuck


@given(nonsense_entries)
def test_what_is_held_of_the_young_is_only_what_is_remarkable(entry: Handshake) -> None:
    young = entry._replace(first_syn_ns=1_000 * SECOND_NS)
    watching = correlator()
    watching.observe(Sweep(young.first_syn_ns, (Row(four_tuple(), young),)))
    assert watching.stats().flows <= is_remarkable(young)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=60), st.integers(1, 16))
def test_a_table_of_any_size_is_worked_off(ages_s: list[int], max_flows: int) -> None:
    """With less room than entries, each sweep gets further: every entry is told and let go once."""
    now_ns = 1_000 * SECOND_NS
    table = Table()
    for n, age in enumerate(ages_s):
        table.syn(four_tuple(n), n, now_ns - seconds(age))
    watching = correlator(max_flows=max_flows)
    now_ns += TIMEOUT_NS
    told: list[FlowReport] = []
    for _ in range(2 * len(ages_s) + 2):
        watching.observe(table.sweep(now_ns))
        told += watching.advance(now_ns)
        table.forget(watching.flows.expired(now_ns, len(table.entries), 0))
        now_ns += SECOND_NS
    assert sorted(report.four_tuple for report in told) == sorted(
        map(four_tuple, range(len(ages_s)))
    )
    assert not table.entries
    assert watching.stats().still_stuck == len(ages_s)


def test_every_kind_of_event_is_played() -> None:
    """The model must be able to tell all that the kernel tells."""
    world = World(tell_healthy=True)
    for segment in ("syn", "syn", "syn dropped", "ack filtered", "ack dropped", "ack"):
        world.play(0, segment, 1)
    ends = ("ack rejected", "no listener", "reset", "syn taken", "new syn taken")
    for client, end in enumerate(ends):
        world.play(client, "syn", 1)
        world.play(client, end, 1)
    assert {event.kind for event in world.table.ring} == set(EventKind)
