"""What looks like a SYN flood and what does not, and what is told of it in numbers and lines."""

from __future__ import annotations

import io
import json
import re

import pytest

from tcpstuck_bpf.handshake import flood
from tcpstuck_bpf.handshake.flood import FLOOD_SILENT, MANY_SILENT, FloodWatch
from tcpstuck_bpf.output.export import summary_line, verdict_line
from tcpstuck_bpf.output.render import TableRenderer
from tcpstuck_bpf.output.writers import JsonOutput, Selection, TableOutput
from tcpstuck_bpf.steps import WallClock
from tests.builders import SECOND_NS, START_NS
from tests.flood_world import (
    Client,
    FloodWorld,
    one_sender,
    real,
    spoofed,
    with_dropped_ack,
)

CLOCK = WallClock(START_NS, 1_700_000_000 * SECOND_NS)


def later(clients: list[Client], seconds: float) -> list[Client]:
    def moved(one: Client) -> Client:
        time_ns = one.entry.first_syn_ns + round(seconds * SECOND_NS)
        return one._replace(entry=one.entry._replace(first_syn_ns=time_ns, last_syn_ns=time_ns))

    return [moved(one) for one in clients]


@pytest.mark.parametrize(("number", "suspected"), [(FLOOD_SILENT, 0), (FLOOD_SILENT + 1, 101)])
def test_as_many_as_the_rescue_takes_for_a_flood_look_like_one(number: int, suspected: int) -> None:
    assert FloodWorld(one_sender(number)).watch().flood_suspected == suspected


@pytest.mark.parametrize(("acks_a_second", "suspected"), [(0, 0), (5, 3000), (200, 0)])
def test_many_without_a_pattern_are_a_flood_only_beside_few_acks_of_others(
    acks_a_second: int, suspected: int
) -> None:
    """No ACKs: maybe none gets here. As many ACKs: maybe one of several paths loses them."""
    assert FloodWorld(spoofed(3000, 5), acks_a_second).watch().flood_suspected == suspected


def test_so_many_as_may_be_real_are_no_flood_without_a_pattern() -> None:
    assert FloodWorld(real(MANY_SILENT - 1, MANY_SILENT - 1, 1), 5).watch().flood_suspected == 0


def test_one_port_for_all_is_no_pattern() -> None:
    clients = spoofed(500, 1, port=lambda *_: 5060)
    assert FloodWorld(clients).watch().still_stuck == 500


def test_a_lonely_client_after_a_flood_is_likely_stuck() -> None:
    lonely = later(real(1, 1, 0), 15)
    world = FloodWorld([*one_sender(500), *lonely])
    assert world.watch().still_stuck == 1
    assert world.at_last[lonely[0].four_tuple].certainty == "likely"


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MAX_ADDRESSES", "MAX_LISTENERS", "MAX_SECONDS", "MAX_REVISED"):
        monkeypatch.setattr(flood, name, 20)
    watch = FloodWatch()
    for n, (who, entry) in enumerate(one_sender(2000, 200)):
        at_one_of_many = who._replace(server_port=n % 50)
        watch.note(at_one_of_many, entry)
        watch.note_real(who)
        watch.note_acks(n, entry.first_syn_ns, n)
        watch.settle()
    kept = (watch._listeners, watch._sources, watch._real, watch._acks)
    assert [len(one) for one in kept] == [20] * 4


def table(world: FloodWorld, *, only: tuple[str, ...] = ()) -> str:
    stream = io.StringIO()
    renderer = TableRenderer(
        clock=CLOCK, width=200, colour=False, verbose=True, own_netns=None, netns_names={}
    )
    output = TableOutput(stream, renderer, Selection(only, nothing=False))
    summary = world.watch()
    output.findings(world.reported)
    output.summary(summary)
    return stream.getvalue()


def test_the_table_has_one_line_for_a_flood_and_says_what_is_stuck() -> None:
    stuck = [with_dropped_ack(one) for one in real(2, 1, 1)]
    shown = table(FloodWorld([*one_sender(20_000, 4), *stuck]))
    (line,) = (line for line in shown.splitlines() if line.startswith("... "))
    assert line.startswith("... 20 000 silent SYNs, 5 000 a second at 192.0.2.1:3311")
    assert shown.count("!ack-failed") == 2
    assert re.search(r"^2 clients of .* are stuck: .*; 20 000 silent SYNs look like a", shown, re.M)
    assert "ack-missing (flood suspected)         20 000  likely not" in shown


def test_a_flood_alone_is_nothing_stuck() -> None:
    shown = table(FloodWorld(one_sender(20_000, 4)))
    assert "\nnothing stuck; 20 000 silent SYNs look like a flood\n" in shown


def test_a_long_flood_has_a_line_every_ten_seconds() -> None:
    shown = table(FloodWorld(one_sender(3000, 25)))
    assert shown.count("... ") == 3


def test_only_shows_no_flood_but_corrections_of_what_it_showed() -> None:
    world = FloodWorld(one_sender(200, 2))
    while not world.reported:
        world.look()
    before = len(world.reported)
    world.watch()
    chosen = Selection(("ack-missing",), nothing=False).of(world.reported)
    assert len(world.reported) == 200 + before
    assert len(chosen) == 2 * before


def test_json_has_each_of_a_flood() -> None:
    world = FloodWorld(one_sender(300))
    summary = world.watch()
    stream = io.StringIO()
    JsonOutput(stream, CLOCK, Selection((), nothing=False)).findings(world.reported)
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert sum(line["flood_suspected"] for line in lines) >= 300
    assert json.loads(verdict_line(world.reported[-1], CLOCK))["stuck"] is False
    last = json.loads(summary_line(summary, CLOCK))
    assert (last["stuck"], last["ever_stuck"], last["flood_suspected"]) == (0, 0, 300)
