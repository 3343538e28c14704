"""What is reported of a flood, and how reports are corrected when later handshakes tell more."""

from __future__ import annotations

import pytest

from tcpstuck_bpf.model import Ending
from tcpstuck_bpf.steps import Advanced, Vanished
from tests.builders import ended
from tests.flood_world import Client, FloodWorld, client, one_sender, with_dropped_ack


def test_a_flood_is_possible_and_nobody_is_stuck() -> None:
    world = FloodWorld(one_sender(500))
    summary = world.watch()
    assert (summary.still_stuck, summary.ever_stuck, summary.flood_suspected) == (0, 0, 500)
    assert summary.verdicts == {"ack-missing": 500, "completed": 0}
    told = world.reported[-1]
    assert (told.verdict, told.stuck, told.certainty) == ("ack-missing", False, "possible")
    assert any("source ports increase" in sentence for sentence in told.evidence)


def test_who_was_told_before_the_flood_was_seen_is_told_anew() -> None:
    world = FloodWorld(one_sender(200, 2))
    while not world.reported:
        world.look()
    early = list(world.reported)
    assert early
    assert {finding.stuck for finding in early} == {True}
    summary = world.watch()
    corrected = [finding for finding in world.reported if finding.updates == "ack-missing"]
    assert {f.four_tuple for f in corrected} == {f.four_tuple for f in early}
    assert {f.flood_suspected for f in corrected} == {True}
    assert (summary.still_stuck, summary.ever_stuck, summary.flood_suspected) == (0, 0, 200)


def test_an_address_that_answers_later_was_stuck_all_the_time() -> None:
    clients = one_sender(500)
    world = FloodWorld(clients)
    world.watch()
    who = clients[7]
    same_address = client(
        int.from_bytes(who.four_tuple.client_address[-4:], "big"), 50_000, 1, world.now_ns + 1
    )
    world.clients.append(with_dropped_ack(same_address))
    summary = world.watch()
    assert world.at_last[who.four_tuple].stuck
    assert world.at_last[who.four_tuple].updates == "ack-missing"
    assert (summary.still_stuck, summary.flood_suspected) == (2, 499)


def test_a_client_that_repeats_its_syn_is_none_of_a_flood() -> None:
    clients = one_sender(500)
    world = FloodWorld(clients)
    world.watch()
    who, entry = world.clients[0]
    entry = entry._replace(syn_count=2, last_syn_ns=world.now_ns)
    world.clients[0] = Client(who, entry)
    world.look()
    assert world.at_last[who].stuck
    assert world.summary().flood_suspected == 499


@pytest.mark.parametrize(
    ("ending", "stuck", "ever_stuck"),
    [(Ending.NONE, 1, 1), (Ending.COMPLETED, 0, 1), (Ending.RESET, 0, 0)],
)
def test_who_is_silent_no_more_is_none_of_a_flood(
    ending: Ending, stuck: int, ever_stuck: int
) -> None:
    world = FloodWorld(one_sender(500))
    world.watch()
    who, entry = world.clients[0]
    if ending == Ending.NONE:
        world.clients[0] = with_dropped_ack(world.clients[0])
    else:
        world.clients[0] = Client(who, ended(entry, ending, world.now_ns))
    world.look()
    summary = world.watch() if ending == Ending.NONE else world.summary()
    found = world.at_last[who]
    assert (found.stuck, found.flood_suspected) == (bool(stuck), False)
    assert (summary.still_stuck, summary.ever_stuck) == (stuck, ever_stuck)
    assert summary.flood_suspected == 499


def test_a_flood_in_a_namespace_that_is_gone_leaves_nobody_stuck() -> None:
    world = FloodWorld(one_sender(500))
    world.watch()
    netns = world.clients[0].four_tuple.netns
    world.analysis.take(Vanished(world.now_ns, (netns,)))
    world.analysis.take(Advanced(world.now_ns))
    summary = world.summary()
    assert (summary.still_stuck, summary.ever_stuck, summary.flood_suspected) == (0, 0, 0)
