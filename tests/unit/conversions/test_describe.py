"""The description of a plot: what was played is what is drawn, at the very times."""

from __future__ import annotations

import contextlib
import io
import os
from collections import Counter
from pathlib import Path
from unittest.mock import patch

import pytest

from tcpstuck_bpf.cli import main
from tcpstuck_bpf.conversions import describe, handshakes
from tcpstuck_bpf.conversions.picture import FLOOD, MOST_PANELS, Count, MarkKind, Span
from tcpstuck_bpf.model import SECOND_NS, Attempt, EventKind, HandshakeId, Rescue, address_bytes
from tcpstuck_bpf.narrowing import NarrowedReplay
from tcpstuck_bpf.recording_part import Wanted
from tcpstuck_bpf.steps import Listened
from tests.builders import ack_dropped, at, four_tuple, handshake
from tests.flood_world import FloodWorld, one_sender
from tests.unit.conversions.scene import Scene, crowd, marks, picture_of
from tests.unit.judge.test_listener import facts, overflown, seen

SYN, COOKIE = MarkKind.SYN, MarkKind.COOKIE


def spans(*parts: tuple[float, float, str]) -> tuple[Span, ...]:
    """Parts of a line, in seconds."""
    return tuple(Span(round(a * SECOND_NS), round(b * SECOND_NS), name) for a, b, name in parts)


def verdicts(lane: describe.Lane) -> list[tuple[float, str]]:
    return [(passed.time_ns / SECOND_NS, passed.verdict) for passed in lane.verdicts]


def test_a_client_whose_acks_find_the_accept_queue_full_is_stuck_to_the_end() -> None:
    scene = Scene()
    scene.play(1, "syn", 0)
    scene.play(1.25, "ack dropped", 0)
    scene.play(1.5, "ack dropped", 0)
    scene.look(5)
    scene.play(6, "ack dropped", 0)
    scene.look(7)
    scene.end(30)
    picture = scene.picture()
    (lane,) = picture.lanes
    dropped = MarkKind.ACK_DROPPED
    assert marks(lane) == [(0, SYN), (0, COOKIE), (0.25, dropped), (0.5, dropped), (5, dropped)]
    assert verdicts(lane) == [(3.25, "accept-queue-full")]
    assert lane.goes_on
    assert picture.end_ns == 5 * SECOND_NS + 5 * SECOND_NS // 8
    assert lane.spans == spans((0, 3.25, ""), (3.25, 5.625, "accept-queue-full"))
    assert lane.label == "10.0.0.0:40000"
    assert picture.counts == (Count("accept-queue-full", 1, 1, 1, stuck=True),)
    assert any("at 29.0 s" in sentence for sentence in picture.caption)


def test_what_only_the_table_shows_is_drawn_too() -> None:
    """Events may get lost; the entry has the first and the last ACK."""
    scene = Scene()
    scene.play(1, "syn", 0)
    for when in (1.25, 1.5, 1.75):
        scene.play(when, "ack dropped", 0)
    scene.steps = [step for step in scene.steps if not hasattr(step, "events")]
    scene.look(5)
    scene.end(6)
    (lane,) = scene.picture().lanes
    dropped = MarkKind.ACK_DROPPED
    assert marks(lane) == [(0, SYN), (0, COOKIE), (0.25, dropped), (0.75, dropped)]


def test_each_repeated_syn_has_its_cookie_and_a_dropped_one_has_none() -> None:
    scene = Scene()
    scene.play(1, "syn", 0)
    scene.play(2, "syn", 0)
    scene.play(4, "syn dropped", 0)
    scene.look(5)
    scene.end(6)
    (lane,) = scene.picture().lanes
    syn_dropped = (3, MarkKind.SYN_DROPPED)
    assert marks(lane) == [(0, SYN), (0, COOKIE), (1, SYN), (1, COOKIE), syn_dropped]
    assert verdicts(lane) == [(3, "synack-missing")]
    assert lane.spans == spans((0, 3, ""))
    assert not lane.goes_on


def test_a_client_that_its_own_packet_connects_is_stuck_until_then() -> None:
    scene = Scene()
    scene.play(1, "syn", 0)
    scene.play(1.5, "ack filtered", 0)
    scene.look(5)
    scene.play(9, "ack", 0)
    scene.look(9.5)
    scene.end(20)
    picture = scene.picture()
    (lane,) = picture.lanes
    filtered, connected = MarkKind.ACK_FILTERED, MarkKind.CONNECTED
    assert marks(lane) == [(0, SYN), (0, COOKIE), (0.5, filtered), (8, connected)]
    assert verdicts(lane) == [(3.5, "ack-filtered"), (8, "recovered")]
    assert lane.spans == spans((0, 3.5, ""), (3.5, 8, "ack-filtered"))
    assert not lane.goes_on
    assert {count[:4] for count in picture.counts} == {
        ("ack-filtered", 1, 0, 1),
        ("recovered", 1, 1, 1),
    }


@pytest.mark.parametrize(
    ("segment", "kind", "verdict"),
    [
        ("reset", MarkKind.RESET, "client-reset"),
        ("ack rejected", MarkKind.ACK_REJECTED, "cookie-rejected"),
        ("no listener", MarkKind.NO_LISTENER, "no-listener"),
        ("ack too late", MarkKind.CONNECTED, "data-lost"),
    ],
)
def test_what_ends_a_handshake_ends_its_line(segment: str, kind: MarkKind, verdict: str) -> None:
    scene = Scene()
    scene.play(1, "syn", 0)
    scene.play(3, segment, 0)
    scene.look(5)
    scene.end(9)
    (lane,) = scene.picture().lanes
    assert marks(lane) == [(0, SYN), (0, COOKIE), (2, kind)]
    assert verdicts(lane) == [(2, verdict)]
    assert lane.spans == spans((0, 2, ""))


def test_the_syn_ack_of_a_rescue_is_drawn_if_it_was_sent() -> None:
    scene = Scene()
    scene.play(1, "syn", 0)
    scene.look(5)
    who = HandshakeId(four_tuple(0), at(1))
    attempts = (Attempt(who, at(5.5), 1, "failed: EPERM"), Attempt(who, at(6), 2, "sent"))
    scene.rescue(Rescue(attempts, (), {}))
    scene.play(6.5, "ack", 0)
    scene.look(7)
    scene.end(9)
    (lane,) = scene.picture().lanes
    rescue, connected = (5, MarkKind.RESCUE), (5.5, MarkKind.CONNECTED)
    assert marks(lane) == [(0, SYN), (0, COOKIE), rescue, connected]
    assert verdicts(lane) == [(3, "ack-missing"), (5.5, "rescued")]


def test_who_gives_up_and_uses_its_port_again_is_stuck_until_then() -> None:
    scene = Scene()
    scene.play(1, "syn", 0)
    scene.look(5)
    scene.play(8, "new syn", 0)
    scene.look(13)
    scene.end(14)
    first, second = scene.picture().lanes
    assert first.spans == spans((0, 3, ""), (3, 7, "ack-missing"))
    assert second.spans[0] == spans((7, 10, ""))[0]
    assert (first.goes_on, second.goes_on) == (False, True)


def test_a_new_handshake_that_only_a_sweep_shows_ends_the_old_one_as_well() -> None:
    scene = Scene()
    scene.play(1, "syn", 0)
    scene.look(5)
    scene.play(8, "new syn", 0)
    scene.steps = [step for step in scene.steps if not hasattr(step, "events")]
    scene.look(9)
    scene.end(9.5)
    first, second = scene.picture().lanes
    assert first.spans == spans((0, 3, ""), (3, 7, "ack-missing"))
    assert verdicts(second) == []


def test_who_is_too_young_for_a_verdict_waits() -> None:
    scene = Scene()
    scene.play(1, "syn", 0)
    scene.play(4.5, "syn", 1)
    scene.look(5)
    scene.end(5.5)
    picture = scene.picture()
    old, young = picture.lanes
    assert verdicts(old) == [(3, "ack-missing")]
    assert (verdicts(young), marks(young)) == ([], [(3.5, SYN), (3.5, COOKIE)])
    assert young.spans == spans((3.5, 4.0, ""))
    assert {count[:2] for count in picture.counts} == {("ack-missing", 1), ("", 1)}
    (only_old,) = scene.picture(only=["ack-missing"]).lanes
    assert only_old.label == old.label


def test_an_ack_whose_syn_nobody_saw_has_no_syn() -> None:
    entry = ack_dropped(handshake(at(1), syn_count=0), at(1))
    (only,) = handshakes.marks_of(handshakes.Facts(entry))
    assert only.kind is MarkKind.ACK_DROPPED


def test_every_event_has_a_mark() -> None:
    assert set(handshakes._MARK_OF) == set(EventKind)


def test_only_what_is_asked_for_is_drawn_with_all_that_became_of_it() -> None:
    scene = crowd(20)
    every = scene.picture()
    assert len(every.lanes) == 20
    chosen = scene.picture(only=["accept-queue-full"])
    assert {count.verdict for count in chosen.counts} == {"accept-queue-full", "recovered"}
    wanted = [lane for lane in every.lanes if lane.verdicts[0].verdict == "accept-queue-full"]
    assert [lane.label for lane in chosen.lanes] == [lane.label for lane in wanted]
    assert "Only accept-queue-full." in chosen.caption


def test_lines_are_in_the_order_of_the_first_syns() -> None:
    scene = Scene()
    for when, client in ((1, 5), (2, 3), (2.5, 9)):
        scene.play(when, "syn", client)
    scene.look(8)
    scene.end(9)
    labels = [lane.label for lane in scene.picture().lanes]
    assert labels == ["10.0.0.5:40000", "10.0.0.3:40000", "10.0.0.9:40000"]


def test_of_too_many_a_sample_of_the_stuck_ones_is_drawn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(describe, "MOST_LANES", 10)
    scene = Scene()
    for client in range(30):
        scene.play(1 + client / 100, "syn", client)
    for client in range(0, 30, 3):
        scene.play(2, "reset", client)
    scene.look(8)
    scene.end(9)
    picture = scene.picture()
    assert [lane.verdicts[0].verdict for lane in picture.lanes] == ["ack-missing"] * 10
    begins = [lane.marks[0].time_ns for lane in picture.lanes]
    assert (begins[0], len(set(begins))) == (0, 10)
    assert begins[-1] >= 15 * SECOND_NS // 100
    assert "20 of 30 handshakes are not drawn: there is room for 10" in picture.caption[0]
    assert {count[:4] for count in picture.counts} == {
        ("ack-missing", 20, 20, 10),
        ("client-reset", 10, 10, 0),
    }


def test_of_more_than_fit_into_memory_the_least_important_go_and_are_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(handshakes, "MOST_KEPT", 8)
    scene = Scene()
    for client in range(12):
        scene.play(1 + client / 100, "syn", client)
    for client in range(0, 12, 2):
        scene.play(2, "reset", client)
    scene.look(2.5)
    scene.look(8)
    scene.end(9)
    picture = scene.picture()
    assert sum(count.last for count in picture.counts) == 12
    assert [lane.verdicts[0].verdict for lane in picture.lanes] == ["ack-missing"] * 6
    assert "6 of 12 handshakes are not drawn" in picture.caption[0]


def test_the_sample_of_a_long_time_is_from_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handshakes, "MOST_KEPT", 100)
    monkeypatch.setattr(describe, "MOST_LANES", 40)
    scene = Scene()
    for client in range(1000):
        scene.play(1 + client / 10, "syn", client)
        if client % 20 == 19:
            scene.look(1 + client / 10)
    scene.look(105)
    scene.end(106)
    picture = scene.picture()
    origin_ns = min(lane.marks[0].time_ns for lane in picture.lanes)
    tenths = Counter(
        (lane.marks[0].time_ns - origin_ns) // (10 * SECOND_NS) for lane in picture.lanes
    )
    assert sum(count.last for count in picture.counts) == 1000
    assert len(picture.lanes) == 40
    assert len(tenths) >= 8, tenths
    assert max(tenths.values()) <= 10, tenths


def test_a_flood_has_a_name_of_its_own_and_is_not_stuck() -> None:
    world = FloodWorld(one_sender(500))
    world.watch()
    named = {handshakes.verdict_of(finding)[1:] for finding in world.at_last.values()}
    assert named == {(FLOOD, False)}


def test_the_title_is_the_answer_of_the_summary() -> None:
    scene = crowd(20)
    scene.listener(overflown(), "mariadbd (pid 288)")
    scene.steps.insert(-2, scene.steps.pop())
    picture = scene.picture()
    assert picture.title.startswith("14 clients of mariadbd (pid 288) at 192.0.2.1:3311 in ")
    assert "accept queue full (10 clients, backlog 50, needs 199)" in picture.title
    assert picture.subtitle == (
        "24 cookies sent in 12.0 s at port 3311, traced by fentry; "
        "0 s is 2023-11-14 22:13:21.123 UTC",
    )


def test_a_recording_without_an_end_says_so_in_utc() -> None:
    scene = Scene()
    scene.play(1, "syn", 0)
    scene.look(5)
    scene.end(6, cut_off=True)
    (told,) = [one for one in scene.picture().caption if "ends early" in one]
    assert "at 22:13:26.123 UTC" in told


def test_healthy_handshakes_are_counted_and_nothing_is_no_failure() -> None:
    scene = Scene()
    scene.end(6)
    picture = scene.picture()
    assert (picture.lanes, picture.counts, picture.panels) == ((), (), ())
    assert picture.title.startswith("nothing to see")
    assert picture.end_ns == 6 * SECOND_NS


def test_the_queues_are_those_that_packets_found() -> None:
    scene = Scene()
    for when, client, queues in ((1, 0, (10, 50)), (1.5, 1, (40, 51)), (2, 2, (51, 51))):
        scene.play(when, "syn", client, queues=queues)
    scene.look(2.2)
    scene.play(2.5, "ack dropped", 0, queues=(51, 0))
    scene.play(3, "ack filtered", 1, queues=(7, 7))
    scene.look(9)
    scene.end(9)
    (panel,) = scene.picture().panels
    assert [(one.time_ns / 1e9, one.entries) for one in panel.accept_queue] == [
        *((0, 10), (0.5, 40), (1, 51), (1.5, 51))
    ]
    assert [(one.time_ns / 1e9, one.entries) for one in panel.syn_queue] == [
        *((0, 50), (0.5, 51), (1, 51))
    ]
    assert [one.entries for one in panel.limit] == [50]
    assert panel.title == "listener 192.0.2.1:3311, in 4026531840"


def test_a_panel_names_the_listener_and_its_figures() -> None:
    scene = Scene(own_netns=four_tuple().netns)
    scene.play(1, "syn", 0)
    scene.listener(overflown(syn_need_ns=at(1.5), syn_need_syn_queue=44), "a\x1b[2J$ (pid 7)")
    scene.look(6)
    scene.end(9)
    (panel,) = scene.picture().panels
    assert panel.title == (
        "listener 192.0.2.1:3311 of a\\x1b[2J$ (pid 7): accept queue at most 51, "
        "SYN queue at most 50, limit 50"
    )
    assert (SECOND_NS // 2, 44) in panel.syn_queue


def test_the_listeners_with_the_most_stuck_clients_have_panels_and_the_others_are_counted() -> None:
    scene = Scene()
    scene.play(1, "syn", *range(6))
    scene.look(6)
    scene.end(9)
    others = tuple(
        seen(facts(server_port=4000 + n, cookies_sent=9 - n, syn_need_ns=at(1))) for n in range(4)
    )
    steps = [*scene.steps[:-2], Listened(others), *scene.steps[-2:]]
    picture = picture_of(scene.header, steps)
    assert len(picture.panels) == MOST_PANELS
    titles = [panel.title.split(":")[1].split()[0] for panel in picture.panels]
    assert [title.rstrip(",") for title in titles] == ["3311", "4000", "4001"]
    assert "2 more listeners have no panel." in picture.caption


def test_filters_choose_what_is_drawn(tmp_path: Path) -> None:
    path = crowd(12).record(tmp_path / "run")
    replay = NarrowedReplay(str(path), Wanted(address=address_bytes("192.0.2.9")))
    picture = picture_of(replay.header, replay.steps())
    assert picture.lanes == ()
    assert "Only address 192.0.2.9." in picture.caption


def test_the_title_is_what_the_table_prints(tmp_path: Path) -> None:
    scene = crowd(12)
    printed = io.StringIO()
    path = scene.record(tmp_path / "run")
    with contextlib.redirect_stdout(printed), patch.dict(os.environ, {"COLUMNS": "9999"}):
        main(["--replay", str(path), "--summary"])
    _, answer, seen_in, *_ = printed.getvalue().splitlines()
    picture = scene.picture()
    assert picture.title == answer
    assert picture.subtitle[0].startswith(f"{seen_in}; 0 s is ")
