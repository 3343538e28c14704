"""A whole run whose firewall rules are read late: what is told first, and what is told then."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tcpstuck_bpf import analysis
from tcpstuck_bpf.app.playback import run_replay
from tcpstuck_bpf.host import kallsyms
from tcpstuck_bpf.host.ruleset_reader import read_ruleset
from tcpstuck_bpf.host.ruleset_watch import RulesetWatch
from tcpstuck_bpf.kernel import drop_names
from tcpstuck_bpf.model import Ending, Event, EventKind, Handshake, Row
from tcpstuck_bpf.output.render import TableRenderer
from tcpstuck_bpf.output.writers import JsonOutput, Selection, TableOutput
from tcpstuck_bpf.recording.replay import Replay
from tcpstuck_bpf.rulesets import DropRule, Ruleset
from tests.builders import (
    NF_PLACE,
    NF_REASON,
    SECOND_NS,
    ack_filtered,
    at,
    ended,
    event,
    four_tuple,
    handshake,
    header,
)
from tests.scripted_run import FakeKernel, live

RULE = DropRule("inet", "guard", "acks", "input", "handle", 4, (("dport", "3311"),))
LATER = RULE._replace(table="other", number=9)
REJECTING = RULE._replace(may_reset=True)
DROPPED = ack_filtered(handshake(), at(0.1))


@pytest.fixture(autouse=True)
def _symbols(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "kallsyms"
    path.write_text(f"{NF_PLACE - 0xA2:016x} T nf_hook_slow\n")
    monkeypatch.setattr(kallsyms, "_SYMBOLS", path)


class Machine(FakeKernel):
    """Its rules, which change at given times, and a reader that takes its time for them.

    A reading finds what is there when it ends.
    """

    def __init__(self, reading_s: float, *rules: tuple[float, DropRule]) -> None:
        super().__init__()
        self.reading_ns = int(reading_s * SECOND_NS)
        self.rules = rules
        self.readings_begun = 0
        self.jobs: list[tuple[int, Callable[[], None]]] = []
        self.read: Callable[[int], Ruleset] = self.read_own
        self.watch = RulesetWatch(lambda n: self.read(n), lambda: self.now_ns, self.begin)
        self.namer = drop_names.Namer({NF_REASON: "NETFILTER_DROP"}, lambda _n: (), self.watch)

    def read_own(self, _netns: int) -> Ruleset:
        there = [rule for since, rule in self.rules if at(since) <= self.now_ns]
        return Ruleset(tuple(there[-1:]), ())

    def begin(self, job: Callable[[], None]) -> None:
        self.readings_begun += 1
        self.jobs.append((self.now_ns + self.reading_ns, job))

    def poll(self, timeout_ns: int) -> list[Event]:
        events = super().poll(timeout_ns)
        due = [job for done_ns, job in self.jobs if done_ns <= self.now_ns]
        self.jobs = [item for item in self.jobs if item[0] > self.now_ns]
        for job in due:
            job()
        return events

    def drop(self, entry: Handshake = DROPPED) -> None:
        moment = entry.last_ack_filtered_ns
        self.at(moment, entry, event(EventKind.ACK_FILTERED, entry, moment))


def run(machine: Machine, seconds: float, tmp_path: Path) -> list[dict[str, Any]]:
    """The lines of a run, which its recording gives as well."""
    path = str(tmp_path / "recording")
    lines = live(machine, seconds, record=path, name=machine.namer)
    stream = io.StringIO()
    run_replay(Replay(path), JsonOutput(stream, header().clock, Selection([], nothing=False)))
    assert [json.loads(line) for line in stream.getvalue().splitlines()] == lines
    return lines


def test_rules_that_are_read_in_time_need_no_second_verdict(tmp_path: Path) -> None:
    machine = Machine(1, (0, RULE))
    machine.drop()
    told, summary = run(machine, 12, tmp_path)
    assert (told["drop"]["rule"], told["updates"]) == ({"handle": 4}, None)
    assert not told["to_be_updated"]
    assert machine.readings_begun == 1
    assert summary["losses"]["causes_not_updated"] == 0


@pytest.mark.parametrize("reading_s", [4, 30])
def test_a_verdict_does_not_wait_for_the_rules_and_is_told_again_with_them(
    reading_s: float, tmp_path: Path
) -> None:
    machine = Machine(reading_s, (0, RULE))
    machine.drop()
    first, second, summary = run(machine, 60, tmp_path)
    assert (first["verdict"], first["drop"]["rule"]) == ("ack-filtered", None)
    assert (first["certainty"], first["to_be_updated"]) == ("likely", True)
    assert "are being read" in " ".join(first["evidence"])
    assert (second["verdict"], second["updates"]) == ("ack-filtered", "ack-filtered")
    assert (second["drop"]["rule"], second["certainty"]) == ({"handle": 4}, "certain")
    assert not second["to_be_updated"]
    same = ("client_port", "syn_time", "verdict_time", "age_ms", "timeline", "stuck")
    assert [first[key] for key in same] == [second[key] for key in same]
    assert summary["verdicts"]["ack-filtered"] == summary["stuck"] == 1
    assert machine.readings_begun == 1


def test_what_was_read_before_the_drop_is_no_proof_and_is_corrected(tmp_path: Path) -> None:
    """A namespace rests between two readings: the second one ends after the second verdict."""
    machine = Machine(3, (0, RULE), (4, LATER))
    machine.drop()
    other = ack_filtered(handshake(at(3)), at(3.1))
    machine.script.append(
        (
            at(3.1),
            four_tuple(1),
            other,
            event(EventKind.ACK_FILTERED, other, at(3.1), four_tuple(1)),
        )
    )
    *lines, summary = run(machine, 60, tmp_path)
    mine, first, second = lines
    assert mine["drop"]["rule"] == {"handle": 4}
    assert first["client_ip"] == second["client_ip"] != mine["client_ip"]
    assert first["drop"]["rule"] is None
    assert [c["table"] for c in first["drop"]["rule_candidates"]] == ["guard"]
    assert "read before that drop" in " ".join(first["evidence"])
    assert (second["drop"]["table"], second["drop"]["rule"]) == ("other", {"handle": 9})
    assert second["updates"] == "ack-filtered"
    assert summary["verdicts"]["ack-filtered"] == 2


def test_rules_that_changed_between_drop_and_reading_are_told_with_their_age(
    tmp_path: Path,
) -> None:
    """The change cannot be seen, but the verdict says how late the reading was."""
    machine = Machine(5, (0, RULE), (2, LATER))
    machine.drop()
    _, second, _ = run(machine, 60, tmp_path)
    assert second["drop"]["table"] == "other"
    assert 0 <= second["drop"]["rules_read_ms"] < 5000


def test_a_rule_that_answers_by_rst_makes_the_second_verdict_less_sure(tmp_path: Path) -> None:
    machine = Machine(5, (0, REJECTING))
    machine.drop()
    first, second, _ = run(machine, 60, tmp_path)
    assert [first["certainty"], second["certainty"]] == ["likely", "possible"]


def test_a_namespace_that_is_gone_is_said_so(tmp_path: Path) -> None:
    machine = Machine(5)
    machine.read = lambda _netns: read_ruleset(1)
    machine.drop()
    first, second, summary = run(machine, 60, tmp_path)
    assert first["to_be_updated"]
    assert not second["to_be_updated"]
    assert second["drop"]["rule"] is None
    assert "the network namespace is gone" in " ".join(second["evidence"])
    assert summary["losses"]["causes_not_updated"] == 0


def test_rules_that_are_never_read_are_counted_and_the_end_waits_no_longer_than_it_says(
    tmp_path: Path,
) -> None:
    machine = Machine(1000, (0, RULE))
    machine.drop()
    told, summary = run(machine, 20, tmp_path)
    assert told["to_be_updated"]
    assert summary["losses"]["causes_not_updated"] == 1
    assert machine.now_ns <= at(22)


def test_the_end_waits_a_moment_for_rules_that_are_nearly_read(tmp_path: Path) -> None:
    machine = Machine(4.5, (0, RULE))
    machine.drop()
    *_, told, summary = run(machine, 4, tmp_path)
    assert (told["drop"]["rule"], told["updates"]) == ({"handle": 4}, "ack-filtered")
    assert summary["losses"]["causes_not_updated"] == 0


def test_who_got_in_meanwhile_is_not_told_as_stuck_again(tmp_path: Path) -> None:
    machine = Machine(10, (0, RULE))
    machine.drop()
    done = ended(DROPPED, Ending.COMPLETED, at(6))
    machine.at(at(6), done, event(EventKind.COMPLETED, done, at(6)))
    *told, summary = run(machine, 60, tmp_path)
    assert [line["verdict"] for line in told] == ["ack-filtered", "recovered"]
    assert told[1]["updates"] == "ack-filtered"
    assert (summary["stuck"], summary["verdicts"].get("ack-filtered")) == (0, None)
    assert summary["losses"]["causes_not_updated"] == 0


def test_who_finds_no_room_to_wait_is_told_so_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(analysis, "MAX_RULES_AWAITED", 3)
    machine = Machine(10, (0, RULE))
    machine.drop()
    machine.crowd = [Row(four_tuple(number), DROPPED) for number in range(1, 5)]
    *told, summary = run(machine, 60, tmp_path)
    first = [line for line in told if line["updates"] is None]
    assert [line["to_be_updated"] for line in first].count(True) == 3
    refused = [line for line in first if not line["to_be_updated"]]
    assert all("no update will follow" in " ".join(line["evidence"]) for line in refused)
    again = {line["client_ip"] for line in told if line["updates"] is not None}
    assert again == {line["client_ip"] for line in first if line["to_be_updated"]}
    assert summary["losses"]["causes_not_updated"] == len(refused) == 2
    assert summary["verdicts"]["ack-filtered"] == 5


def test_the_table_says_what_is_to_come_and_what_came(tmp_path: Path) -> None:
    machine = Machine(5, (0, RULE))
    machine.drop()
    run(machine, 60, tmp_path)
    replay = Replay(str(tmp_path / "recording"))
    stream = io.StringIO()
    renderer = TableRenderer(
        clock=replay.header.clock,
        width=200,
        colour=False,
        verbose=False,
        own_netns=four_tuple().netns,
        netns_names={},
    )
    run_replay(replay, TableOutput(stream, renderer, Selection([], nothing=False)))
    rows = [line for line in stream.getvalue().splitlines() if "!ack-filtered" in line]
    assert "[rules being read]" in rows[0]
    assert "guard" not in rows[0]
    assert "netfilter, inet guard acks, rule handle 4 [updated]" in rows[1]
    assert len(rows) == 2
