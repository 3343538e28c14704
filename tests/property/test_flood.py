"""Spoofed SYNs do not hide who is stuck, and clients that are all stuck are no flood."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tests.flood_world import FloodWorld, real, spoofed, with_dropped_ack

FLOOD = 20_000
STUCK = 50
SENDERS: dict[str, dict[str, Callable[..., int]]] = {
    "all at random": {},
    "from one /16": {"address": lambda chosen, _: 0xC612_0000 + chosen.randrange(2**16)},
    "2000 addresses in turn": {"address": lambda _, n: 0xC612_0000 + n % 2000},
    "ports that count up": {"port": lambda _, n: 1024 + n % 64_000},
    "one sequence number": {"isn": lambda *_: 0},
}
WITH_A_PATTERN = ("ports that count up", "one sequence number")


# The same worlds every time, because by chance a spoofed address may recur as often as a real one
# would; tests/unit/handshake/test_flood_chance.py holds how rarely. Each is a test of its own,
# because it takes some 10 s of CPU time.
@pytest.mark.parametrize(
    ("sender", "seed", "addresses", "lasted_s"),
    [
        ("all at random", 0, 1, 4.0),
        ("from one /16", 221, 1, 15.0),
        ("2000 addresses in turn", 1437, 1, 15.0),
        ("ports that count up", 7, 5, 4.0),
        ("one sequence number", 41, 3, 4.0),
    ],
)
def test_the_real_ones_in_a_flood_are_told_as_ever(
    sender: str, seed: int, addresses: int, lasted_s: float
) -> None:
    # Every address sends some ACK: nothing else tells a dozen of its SYNs from a flood's.
    stuck = [
        with_dropped_ack(one) if n // addresses % 2 == 0 else one
        for n, one in enumerate(real(STUCK, addresses, 3, seed))
    ]
    syns = spoofed(FLOOD, lasted_s, seed, **SENDERS[sender])
    world = FloodWorld([*syns, *stuck], 0 if sender in WITH_A_PATTERN else 5, seed)
    summary = world.watch()
    found = {who for who, finding in world.at_last.items() if finding.stuck}
    # Two of them may have drawn the same port.
    clients = {one.four_tuple for one in stuck}
    assert found == clients
    assert {world.at_last[who].certainty for who in found} <= {"likely", "certain"}
    assert (summary.still_stuck, summary.ever_stuck) == (len(clients), len(clients))
    assert sum(number for _, number in summary.stuck) == len(clients)
    assert summary.flood_suspected == len({one.four_tuple for one in syns})


REAL: dict[str, dict[str, Any]] = {
    "a pool": {"number": 300, "addresses": 10, "seconds": 2},
    "one client": {"number": 1, "addresses": 1, "seconds": 0},
    "an address each, over a minute": {"number": 300, "addresses": 300, "seconds": 60},
    "an address each, at once": {"number": 300, "addresses": 300, "seconds": 2},
    "a thousand addresses": {"number": 3000, "addresses": 1000, "seconds": 5},
}


@settings(max_examples=20, deadline=None, phases=(Phase.explicit, Phase.generate))
@given(st.sampled_from(sorted(REAL)), st.integers(0, 2**16), st.sampled_from([0, 1000]))
def test_real_clients_whose_acks_are_all_lost_are_told_as_ever(
    who: str, seed: int, acks_a_second: int
) -> None:
    """No ACK gets through, or other clients' ACKs are as frequent as the silent clients."""
    world = FloodWorld(real(seed=seed, **REAL[who]), acks_a_second, seed)
    summary = world.watch()
    assert {(f.verdict, f.stuck, f.certainty) for f in world.reported} == {
        ("ack-missing", True, "likely")
    }
    assert len(world.reported) == summary.still_stuck == len(world.clients)
    assert summary.flood_suspected == 0
