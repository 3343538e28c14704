"""What is recorded of the client's side is what is read, whatever was seen and in what order."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from tcpstuck_bpf.client.actions import Action, Attempt, Outcome, Plan, Totals
from tcpstuck_bpf.client.codecs import step_of, values_of
from tcpstuck_bpf.client.facts import ClientSocket, Owner, Owners, Poll
from tcpstuck_bpf.client.recorded_sockets import RecordedSockets
from tcpstuck_bpf.client.steady import SteadyPolls
from tcpstuck_bpf.client.steps import Attempted, ClientStep, Owned, Polled, WatchEnded
from tcpstuck_bpf.json_text import json_text
from tcpstuck_bpf.model import SECOND_NS
from tests.unit.client.world import BEGIN_NS, client_socket

NUMBERS = st.integers(0, (1 << 64) - 1)
TIMES = st.integers(0, 1 << 62)
FEW = st.integers(0, 3)
TEXTS = st.text(st.characters(blacklist_categories=["Cs"]), max_size=8)
NAMESPACES = st.frozensets(st.integers(1, 4), max_size=3)

sockets = st.builds(
    lambda who, **facts: client_socket(who, server="fd09::1", client="fd09::2")._replace(**facts),
    st.integers(1, 6),
    # Near each other and far apart: what counts on evenly, and what does not.
    age_ns=st.sampled_from([0, SECOND_NS, 2 * SECOND_NS, 3 * SECOND_NS + 7, 1 << 40]),
    last_ack_ns=st.sampled_from([0, SECOND_NS, 2 * SECOND_NS]),
    keepalive_ns=st.sampled_from([None, 0, SECOND_NS, 2 * SECOND_NS]),
    bytes_received=st.sampled_from([0, 0, 0, 20]),
    segs_in=st.sampled_from([1, 1, 2]),
    is_subflow=st.booleans(),
    interface=FEW,
)
polls = st.builds(
    Poll,
    st.integers(0, 2),  # the time since the poll before, in seconds
    st.lists(sockets, max_size=6).map(tuple),
    NUMBERS,
    NAMESPACES,
    NAMESPACES,
    FEW,
    FEW,
    FEW,
    st.dictionaries(FEW, TEXTS, max_size=2),
)
owners = st.builds(
    Owners,
    st.lists(st.builds(Owner, TEXTS, NUMBERS, FEW, TEXTS), max_size=3).map(tuple),
    FEW,
    st.booleans(),
    st.booleans(),
)
attempts = st.builds(
    Attempt,
    st.builds(Plan, st.sampled_from(Action), sockets, owners, FEW),
    TIMES,
    st.sampled_from(Outcome),
    TEXTS,
)
steps = st.lists(
    st.one_of(
        st.builds(Polled, polls, FEW),
        st.builds(Owned, st.dictionaries(NUMBERS, owners, max_size=3)),
        st.builds(Attempted, TIMES, st.lists(attempts, max_size=3).map(tuple)),
    ),
    max_size=12,
)
totals = st.builds(
    Totals,
    st.booleans(),
    st.dictionaries(st.tuples(st.sampled_from(Action), st.sampled_from(Outcome)), NUMBERS),
    FEW,
    FEW,
    st.dictionaries(TEXTS, NUMBERS, max_size=3),
    st.dictionaries(TEXTS, NUMBERS, max_size=3),
)
ends = st.builds(
    WatchEnded,
    TIMES,
    st.lists(TEXTS, max_size=3).map(tuple),
    st.none() | NUMBERS,
    st.none() | NUMBERS,
    st.none() | totals,
    st.just(False),
)


def of_a_run(seen: list[ClientStep]) -> list[ClientStep]:
    """The steps with polls as a run has them: one after the other, and steady."""
    steady, now_ns = SteadyPolls(), BEGIN_NS
    played: list[ClientStep] = []
    for step in seen:
        if isinstance(step, Polled):
            now_ns += step.poll.time_ns * SECOND_NS
            step = step._replace(poll=steady.take(step.poll._replace(time_ns=now_ns)))
        played.append(step)
    return played


@given(steps, ends)
def test_any_steps_come_back(seen: list[ClientStep], end: WatchEnded) -> None:
    writer, reader = RecordedSockets(), RecordedSockets()
    for step in (*of_a_run(seen), end):
        line = json_text(values_of(step, writer))
        assert step_of(json.loads(line), reader) == step


@given(st.lists(polls, min_size=2, max_size=6))
def test_a_socket_that_merely_ages_is_written_once(seen: list[Poll]) -> None:
    """The first poll again and again: each time all that is written of its sockets is numbers."""
    steady, writer = SteadyPolls(), RecordedSockets()
    waiting = tuple(one for one in seen[0].sockets if one.waits and one.keepalive_ns is None)
    for number in range(3):
        passed_ns = number * SECOND_NS
        aged = tuple(
            one._replace(age_ns=one.age_ns + passed_ns, last_ack_ns=one.last_ack_ns + passed_ns)
            for one in waiting
        )
        poll = steady.take(seen[0]._replace(time_ns=BEGIN_NS + passed_ns, sockets=aged))
        values = writer.values_of(Polled(poll))
        assert len(values["sockets"]) == (len(poll.sockets) if number == 0 else 0)
        assert len(values["kept"]) == (number > 0 and len(poll.sockets) > 0)


# More than are there, in any order: what a recorder never writes.
runs = st.lists(st.lists(st.integers(-1, 8), min_size=1, max_size=3), max_size=5)


@given(st.lists(sockets, max_size=6, unique_by=lambda one: one.key), runs)
def test_runs_give_each_socket_once_or_are_refused(
    seen: list[ClientSocket], runs: list[list[int]]
) -> None:
    reader = RecordedSockets()
    first = RecordedSockets().values_of(Polled(Poll(1, tuple(seen), 0, frozenset())))
    reader.step_of(json.loads(json.dumps(first)))
    values = {"poll": 1, "sockets": [], "kept": runs, "established": 0}
    try:
        read = reader.step_of(values).poll.sockets
    except (KeyError, ValueError):
        return
    assert len(set(read)) == len(read) == sum(last - first + 1 for first, last in runs)
    assert set(read) <= set(seen)
