"""Clients of a network namespace that nothing leads to any more: told, and counted apart."""

from __future__ import annotations

import errno
import io
import json
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest

from tcpstuck_bpf.app.namespaces import LOOK_INTERVAL_NS
from tcpstuck_bpf.app.playback import run_replay
from tcpstuck_bpf.handshake.flow import State
from tcpstuck_bpf.host import netns
from tcpstuck_bpf.model import Ending, EventKind, KernelCounters
from tcpstuck_bpf.output.writers import JsonOutput, Selection
from tcpstuck_bpf.recording.replay import Replay
from tcpstuck_bpf.rescue.planner import Rescuer
from tcpstuck_bpf.rescue.policy import RescuePolicy
from tests.builders import (
    ack_dropped,
    at,
    correlator,
    ended,
    event,
    four_tuple,
    handshake,
    reports,
    sweep,
)
from tests.scripted_run import FakeKernel, live

NETNS = four_tuple().netns
SILENT = handshake()
DROPPED = ack_dropped(handshake(), at(0.1))


def test_a_stuck_client_is_told_anew_and_counted_apart() -> None:
    watching = correlator()
    assert reports([sweep(at(4), SILENT)], at(4), watching)[0].state is State.SILENT
    assert watching.netns_of_stuck == {NETNS}
    watching.note_gone({NETNS}, at(5))
    (told,) = watching.advance(at(5))
    assert (told.state, told.previous, told.decided_ns) == (
        State.NAMESPACE_GONE,
        State.SILENT,
        at(5),
    )
    stats = watching.stats()
    assert (stats.still_stuck, stats.ever_stuck) == (0, 1)
    assert stats.reported_now == {State.NAMESPACE_GONE: 1}
    assert watching.netns_of_stuck == set()


def test_it_stays_so_while_nothing_new_is_seen_of_it() -> None:
    watching = correlator()
    reports([sweep(at(4), SILENT)], at(4), watching)
    watching.note_gone({NETNS}, at(5))
    watching.advance(at(5))
    assert reports([sweep(at(6), SILENT)], at(6), watching) == []
    watching.note_gone({NETNS}, at(7))
    assert watching.advance(at(7)) == []
    assert watching.stats().still_stuck == 0


def test_what_comes_later_shows_that_it_is_there() -> None:
    """A socket in another namespace may hold one that nothing else leads to."""
    watching = correlator()
    reports([sweep(at(4), SILENT)], at(4), watching)
    watching.note_gone({NETNS}, at(5))
    watching.advance(at(5))
    late = ack_dropped(SILENT, at(6))
    reports([event(EventKind.ACK_DROPPED, late, at(6))], at(6), watching)
    (told,) = reports([sweep(at(12), late)], at(12), watching)
    assert (told.state, told.previous) == (State.ACK_DROPPED, State.NAMESPACE_GONE)
    assert watching.stats().still_stuck == 1
    watching.note_gone({NETNS}, at(13))
    watching.advance(at(13))
    end = ended(late, Ending.COMPLETED, at(14), 1)
    (told,) = reports([event(EventKind.COMPLETED, end, at(14))], at(14), watching)
    assert told.state is State.RECOVERED


def test_another_namespace_and_who_is_not_stuck_are_left_as_they_are() -> None:
    watching = correlator()
    reports([sweep(at(4), SILENT)], at(4), watching)
    watching.note_gone({NETNS + 1}, at(5))
    assert watching.advance(at(5)) == []
    assert watching.stats().still_stuck == 1


def test_the_rescue_leaves_it_alone_for_that_and_no_longer() -> None:
    watching, rescuer = correlator(), Rescuer(RescuePolicy())
    dropped = event(EventKind.ACK_DROPPED, DROPPED, at(0.1))
    for report in reports([dropped, sweep(at(4), DROPPED)], at(4), watching):
        rescuer.report(report)
    assert rescuer.pending == 1
    watching.note_gone({NETNS}, at(5))
    for report in watching.advance(at(5)):
        rescuer.report(report)
    assert rescuer.left_alone == {"its namespace is gone": 1}
    assert rescuer.plan(at(6), lambda _who: True) == []
    late = ack_dropped(DROPPED, at(7))
    again = event(EventKind.ACK_DROPPED, late, at(7))
    for told in reports([again, sweep(at(12), late)], at(12), watching):
        rescuer.report(told)
    assert rescuer.left_alone == {}
    assert rescuer.pending == 1


def run(gone: Collection[int], record: str | None = None) -> list[dict[str, Any]]:
    kernel = FakeKernel()
    kernel.at(at(0.1), DROPPED, event(EventKind.ACK_DROPPED, DROPPED, at(0.1)))
    return live(
        kernel, 6, record=record, find_gone=lambda wanted: frozenset(wanted).intersection(gone)
    )


def test_the_run_tells_it_and_so_does_its_replay(tmp_path: Path) -> None:
    path = str(tmp_path / "recording")
    first, second, summary = run({NETNS}, path)
    assert (first["verdict"], first["stuck"]) == ("accept-queue-full", True)
    assert (second["verdict"], second["stuck"]) == ("namespace-gone", False)
    assert second["updates"] == "accept-queue-full"
    assert (summary["stuck"], summary["ever_stuck"], summary["namespace_gone"]) == (0, 1, 1)
    assert summary["verdicts"] == {"completed": 0, "namespace-gone": 1}
    replay, stream = Replay(path), io.StringIO()
    run_replay(replay, JsonOutput(stream, replay.header.clock, Selection([], nothing=False)))
    assert [json.loads(line) for line in stream.getvalue().splitlines()] == [
        first,
        second,
        summary,
    ]


def test_nothing_is_told_of_a_namespace_that_is_there() -> None:
    first, summary = run(())
    assert first["stuck"]
    assert (summary["stuck"], summary["namespace_gone"]) == (1, 0)


def test_no_namespace_is_looked_for_where_nobody_is_stuck() -> None:
    asked: list[Collection[int]] = []

    def find_gone(wanted: Collection[int]) -> frozenset[int]:
        asked.append(wanted)
        return frozenset()

    live(FakeKernel(), 5, find_gone=find_gone)
    assert asked == []


def test_it_is_looked_for_no_more_often_than_every_few_seconds_and_at_the_end() -> None:
    kernel = FakeKernel()
    kernel.at(at(0.1), DROPPED, event(EventKind.ACK_DROPPED, DROPPED, at(0.1)))
    looked_ns: list[int] = []

    def find_gone(_wanted: Collection[int]) -> frozenset[int]:
        looked_ns.append(kernel.now_ns)
        return frozenset()

    live(kernel, 20, find_gone=find_gone)
    *regular, last = looked_ns
    assert last == kernel.now_ns
    assert len(regular) > 1
    assert all(b - a >= LOOK_INTERVAL_NS for a, b in zip(regular, regular[1:]))


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A /proc of the initial PID namespace, without a process; no names either."""
    monkeypatch.setattr(netns, "_of_process_1", lambda: (0xEFFFFFFC, 1))
    monkeypatch.setattr(netns, "own_netns", lambda: 1)
    monkeypatch.setattr(netns, "with_names", dict)
    monkeypatch.setattr(netns, "_PROC", tmp_path)
    return tmp_path


def process(proc: Path, pid: int, mounts: str = "") -> Path:
    task = proc / str(pid) / "task" / str(pid) / "ns"
    task.mkdir(parents=True)
    (task / "net").touch()
    (task / "mnt").touch()
    (proc / str(pid) / "mountinfo").write_text(mounts)
    return task / "net"


def test_what_nothing_leads_to_is_gone(host: Path) -> None:
    process(host, 7)
    assert netns.gone([4711]) == {4711}


def test_a_thread_leads_to_it(host: Path) -> None:
    process(host, 7)
    thread = host / "7" / "task" / "8" / "ns"
    thread.mkdir(parents=True)
    (thread / "net").touch()
    (thread / "mnt").touch()
    assert netns.gone([(thread / "net").stat().st_ino, 4711]) == {4711}


def test_a_name_or_a_mount_leads_to_it(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(netns, "with_names", lambda: {4711: Path("/run/netns/web")})
    process(host, 7, "99 25 0:4 net:[4712] /run/docker/netns/0123 rw - nsfs nsfs rw\n")
    assert netns.gone([4711, 4712, 4713]) == {4713}


@pytest.mark.usefixtures("host")
def test_our_own_is_never_gone() -> None:
    assert netns.gone([1]) == frozenset()


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("init", [None, (0xF0000001, 1)])
def test_where_not_every_process_is_seen_nothing_is_known(
    init: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(netns, "_of_process_1", lambda: init)
    assert netns.gone([4711]) == frozenset()


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM])
def test_what_may_not_be_looked_at_is_not_gone(
    number: int, host: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbidden = process(host, 7)
    stat = Path.stat

    def refused(path: Path, **more: Any) -> os.stat_result:
        if path == forbidden:
            raise OSError(number, os.strerror(number))
        return stat(path, **more)

    monkeypatch.setattr(Path, "stat", refused)
    assert netns.gone([4711]) == frozenset()


def test_a_process_that_ends_meanwhile_leads_nowhere(host: Path) -> None:
    process(host, 7).unlink()
    assert netns.gone([4711]) == {4711}


def test_a_number_used_again_ends_those_who_were_seen_while_it_was_the_old_ones() -> None:
    watching = correlator()
    reports([sweep(at(9), SILENT, handshake(at(5)))], at(9), watching)
    watching.note_gone({NETNS}, at(10), until_ns=at(4))
    (told,) = watching.advance(at(10))
    assert (told.state, told.four_tuple) == (State.NAMESPACE_GONE, four_tuple())
    assert watching.stats().still_stuck == 1


def test_an_ack_that_came_later_is_the_new_ones() -> None:
    watching = correlator()
    dropped = ack_dropped(handshake(), at(5))
    reports([sweep(at(9), dropped)], at(9), watching)
    watching.note_gone({NETNS}, at(10), until_ns=at(4))
    assert watching.advance(at(10)) == []


def test_the_run_finds_that_a_number_was_used_again_and_so_does_its_replay(tmp_path: Path) -> None:
    kernel = FakeKernel()
    kernel.at(at(0.1), DROPPED, event(EventKind.ACK_DROPPED, DROPPED, at(0.1)))

    def find_living(wanted: Collection[int]) -> dict[int, int]:
        return {netns: 71 if kernel.now_ns < at(12) else 72 for netns in wanted}

    path = str(tmp_path / "recording")
    lines = live(kernel, 20, record=path, find_gone=gone_are(), find_living=find_living)
    assert [line["verdict"] for line in lines if line["type"] == "verdict"] == [
        "accept-queue-full",
        "namespace-gone",
    ]
    assert (lines[-1]["namespace_gone"], lines[-1]["stuck"]) == (1, 0)
    stream = io.StringIO()
    replay = Replay(path)
    run_replay(replay, JsonOutput(stream, replay.header.clock, Selection([], nothing=False)))
    assert [json.loads(line) for line in stream.getvalue().splitlines()] == lines


def test_a_number_used_again_that_a_reading_of_the_counters_found_is_not_forgotten() -> None:
    class Reused(FakeKernel):
        def counters(self, wanted: Collection[int] | None) -> KernelCounters:
            self.cookie = 71 if self.now_ns < at(1) else 72
            return super().counters(wanted)

    kernel = Reused()
    kernel.table[four_tuple()] = SILENT
    *_, summary = live(kernel, 20, find_gone=gone_are(), find_living=lambda _wanted: {})
    assert (summary["namespace_gone"], summary["stuck"]) == (1, 0)


def test_where_the_number_is_the_same_namespaces_all_the_time_nobody_is_gone() -> None:
    kernel = FakeKernel()
    kernel.at(at(0.1), DROPPED, event(EventKind.ACK_DROPPED, DROPPED, at(0.1)))
    *_, summary = live(
        kernel, 20, find_gone=gone_are(), find_living=lambda wanted: dict.fromkeys(wanted, 71)
    )
    assert (summary["namespace_gone"], summary["stuck"]) == (0, 1)


CROWD = frozenset({4711, 4712, 4713})


def gone_are(*gone: int) -> Callable[[Collection[int]], frozenset[int]]:
    return lambda wanted: frozenset(wanted).intersection(gone)


def test_where_tables_fill_those_that_are_gone_make_room() -> None:
    kernel = FakeKernel()
    kernel.crowded = CROWD
    live(kernel, 5, find_gone=gone_are(4711, 4713))
    assert kernel.freed[0][1] == {4711, 4713}
    assert kernel.crowded == {4712}


def test_whose_numbers_are_taken_is_asked_of_those_that_are_not_gone() -> None:
    kernel = FakeKernel()
    kernel.crowded = CROWD
    asked: list[set[int]] = []

    def find_living(wanted: Collection[int]) -> dict[int, int]:
        asked.append({*wanted})
        return {4712: 72}

    live(kernel, 5, find_gone=gone_are(4711, 4713), find_living=find_living)
    assert asked[0] == {4712}
    assert kernel.freed_beside[0] == {4712: 72}


def test_nobody_is_told_as_gone_for_a_table_that_fills() -> None:
    kernel = FakeKernel()
    kernel.crowded = CROWD
    kernel.at(at(0.1), DROPPED, event(EventKind.ACK_DROPPED, DROPPED, at(0.1)))
    *_, summary = live(kernel, 5, find_gone=gone_are(*CROWD))
    assert (summary["namespace_gone"], summary["stuck"]) == (0, 1)


def test_room_is_made_no_more_often_than_namespaces_may_be_looked_for() -> None:
    kernel = FakeKernel()
    kernel.crowded = CROWD
    live(kernel, 20, find_gone=gone_are())
    *regular, last = [time_ns for time_ns, _ in kernel.freed]
    assert last == kernel.now_ns
    assert len(regular) > 1
    assert all(b - a >= LOOK_INTERVAL_NS for a, b in zip(regular, regular[1:]))


def test_counts_are_asked_for_with_the_cookies_of_those_that_are_there() -> None:
    kernel = FakeKernel()
    kernel.cookie = 71
    live(kernel, 2)
    assert kernel.living[0] == kernel.living[-1] == {NETNS: 71}
