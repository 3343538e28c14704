"""The pure part of the metrics: what is exported of a recording, and of a crowd."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from lab.golden import RECORDINGS
from lab.golden_files import LINES, kept_file, kept_truth
from tcpstuck_bpf.analysis import Analysis
from tcpstuck_bpf.app.live import Live
from tcpstuck_bpf.app.printer import Printer
from tcpstuck_bpf.judge.reconcile import Reconciled
from tcpstuck_bpf.judge.rules import RULES
from tcpstuck_bpf.judge.stuck_now import StuckNow
from tcpstuck_bpf.judge.verdict import Finding, judge
from tcpstuck_bpf.model import (
    CoverageGap,
    EventKind,
    FourTuple,
    HandshakeId,
    ListenerSeen,
    address_bytes,
)
from tcpstuck_bpf.output import metric_families as families
from tcpstuck_bpf.output.metric_families import FAMILIES, OTHER, Family, Sample, Snapshot
from tcpstuck_bpf.output.metric_listeners import (
    IDLE_NS,
    MOST_CHARACTERS,
    MOST_LISTENERS,
    ListenerBook,
    cause_of,
    owner_names,
)
from tcpstuck_bpf.output.metrics import COST_SHARE, INTERVAL_NS, MOST_REASONS, Metrics
from tcpstuck_bpf.summary import RescueTotals, Status, Summary
from tests.builders import (
    SECOND_NS,
    ack_dropped,
    at,
    ended,
    event,
    four_tuple,
    handshake,
    header,
    reports,
    sweep,
)
from tests.exported import exported, golden_snapshot, summed
from tests.scripted_run import FakeKernel
from tests.unit.judge.test_listener import facts, seen

MOST_COMBINATIONS = 64
"""Pairs of verdict and cause at one listener: every verdict, and every word for a cause, once."""
STUCK = {rule.name for rule in RULES if rule.stuck}


def printed(name: str, kind: str) -> list[dict[str, Any]]:
    """The committed lines of a recording."""
    text = kept_file(name, LINES).read_text(encoding="utf-8")
    return [line for line in map(json.loads, text.splitlines()) if line["type"] == kind]


@pytest.mark.parametrize("name", RECORDINGS)
def test_the_figures_of_a_recording_are_those_of_its_summary(name: str, tmp_path: Path) -> None:
    (summary,) = printed(name, "summary")
    found = exported(golden_snapshot(name, tmp_path))
    told = summary["verdicts"]
    plain = {
        families.STUCK: summary["stuck"],
        families.FLOOD: summary["flood_suspected"],
        families.PENDING: summary["pending"],
        families.COOKIES: summary["cookies_sent"],
        families.COMPLETED: sum(
            told.get(one, 0) for one in ("completed", "recovered", "rescued", "data-lost")
        ),
        families.UNTRACKED: summary["untracked"],
        families.UNWATCHED: summary["unwatched"],
        families.GAPS: len(summary["coverage_gaps"]),
        families.RUNNING: 0,
        families.FOLDED: 0,
    }
    assert {family.name: found[family.name] for family in plain} == {
        family.name: {(): value} for family, value in plain.items()
    }
    losses = {(loss,): number for loss, number in summary["losses"].items()}
    losses |= {("lost_events",): summary["lost_events"], ("unseen_syn",): summary["unseen_syn"]}
    assert found["tcpstuck_losses_total"] == losses
    assert found["tcpstuck_traced_seconds"][()] == pytest.approx(
        summary["duration_ms"] / 1000, abs=0.001
    )
    assert found["tcpstuck_run_info"] == {(summary["watched"], summary["mode"]): 1}
    counters = {(row["counter"],) for row in summary["reconciliation"]}
    assert set(found["tcpstuck_reconciliation_difference"]) == counters


@pytest.mark.parametrize("name", RECORDINGS)
def test_the_verdicts_are_those_of_the_lines(name: str, tmp_path: Path) -> None:
    found = exported(golden_snapshot(name, tmp_path))[families.VERDICTS.name]
    expected = Counter(
        (
            str(line["server_port"]),
            line["verdict"],
            "syn-flood" if line["flood_suspected"] else (line["drop"] or {}).get("what") or "",
        )
        for line in printed(name, "verdict")
        if line["updates"] != line["verdict"]
    )
    assert summed(found, families.VERDICTS, "port", "verdict", "cause") == expected


@pytest.mark.parametrize("name", RECORDINGS)
def test_who_is_stuck_at_a_listener_is_who_the_lab_left_stuck(name: str, tmp_path: Path) -> None:
    """By the oracle of the lab, which asked the clients."""
    found = exported(golden_snapshot(name, tmp_path))
    last = {
        (one["client_ip"], one["client_port"]): one["verdict"] for one in printed(name, "verdict")
    }
    truth = {
        (one.client_ip, one.client_port): verdict
        for one, verdict in kept_truth(name).expected.items()
    }
    left = Counter((verdict,) for who, verdict in truth.items() if last[who] in STUCK)
    assert summed(found[families.LISTENER_STUCK.name], families.LISTENER_STUCK, "verdict") == left
    assert found[families.STUCK.name] == {(): sum(left.values())}


@pytest.mark.parametrize("name", RECORDINGS)
def test_a_listener_has_its_line_s_figures(name: str, tmp_path: Path) -> None:
    found = exported(golden_snapshot(name, tmp_path))
    lines = printed(name, "listener")
    assert lines
    for line in lines:
        by_name = {labels[1:]: labels for labels in found[families.BACKLOG.name]}
        owner = ",".join(sorted({one.split(" (")[0] for one in line["owners"]}))
        labels = by_name[line["addresses"][0], str(line["port"]), owner]
        for family, key in (
            (families.LISTENER_SYNS, "syns"),
            (families.LISTENER_COOKIES, "cookies_sent"),
            (families.SYNS_REFUSED, "syns_refused"),
            (families.ACKS_REFUSED, "acks_refused"),
            (families.ACCEPT_QUEUE, "peak_accept_queue"),
            (families.SYN_QUEUE, "peak_syn_queue"),
            (families.BACKLOG, "limit"),
        ):
            assert found[family.name][labels] == line[key], family.name


def test_what_a_rescue_did_is_exported_and_nothing_where_there_was_none(tmp_path: Path) -> None:
    (summary,) = printed("overflow-rescued", "summary")
    found = exported(golden_snapshot("overflow-rescued", tmp_path))
    assert found["tcpstuck_rescue_synacks_total"] == {
        ("sent",): summary["rescue"]["sent"],
        ("would_send",): 0,
        ("failed",): 0,
    }
    assert found["tcpstuck_rescue_rescued_total"] == {(): summary["rescue"]["rescued"]}
    without = exported(golden_snapshot("overflow", tmp_path))
    assert [name for name in without if name.startswith("tcpstuck_rescue") and without[name]] == []


def test_no_label_holds_a_client_s_address(tmp_path: Path) -> None:
    for name in RECORDINGS:
        clients = {one["client_ip"] for one in printed(name, "verdict")}
        values = {
            value
            for _, samples in golden_snapshot(name, tmp_path)
            for sample in samples
            for value in sample.labels
        }
        assert values.isdisjoint(clients), name


# Names and bounds.


def test_names_are_as_prometheus_wants_them() -> None:
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)
    for family in FAMILIES:
        assert re.fullmatch(r"tcpstuck_[a-z]+(_[a-z]+)*", family.name)
        assert (family.kind == "counter") == family.name.endswith("_total")
        assert (family.kind == "info") == family.name.endswith("_info")
        assert not re.search(r"_(ms|ns|milliseconds|count)(_|$)", family.name)
        assert family.help.endswith(".")
        assert {"client", "client_ip", "client_port", "instance", "job"}.isdisjoint(family.labels)


def finding(who: FourTuple, socket: int = 0) -> Finding:
    """An accept-queue-full of that client."""
    entry = ack_dropped(handshake(socket=socket), at(0.1))
    (report,) = reports([sweep(at(4), entry)], at(4))
    found = judge(report._replace(four_tuple=who), header().coverage)
    assert found is not None
    return found


ONE = finding(four_tuple())
COMPLETED = ONE._replace(verdict="completed", stuck=False, drop=None)


Found = dict[Family, list[Sample]]
NO_END = 1 << 30


class Book(ListenerBook):
    """A book, and beside it who is stuck as a run would tell it."""

    def __init__(
        self,
        is_suspected: Callable[[HandshakeId], bool] = lambda _who: True,
        netns: str = "web",
    ) -> None:
        super().__init__({four_tuple().netns: netns}, is_suspected, 131_072)
        self.stuck = StuckNow()

    def take(self, findings: Iterable[Finding]) -> None:
        for one in findings:
            super().take([one])
            self.stuck.take(one)


def samples(
    one: Book, listeners: list[ListenerSeen], now_ns: int = 0, flood: int = NO_END
) -> Found:
    """Where the run knows of as many suspects, they are looked at by time alone."""
    return one.samples(listeners, now_ns, one.stuck.groups(), flood)


book = Book


def values(found: Found, family: Family) -> dict[tuple[str, ...], float]:
    return dict(map(tuple, found.get(family, ())))  # type: ignore[arg-type]


def size(found: Found) -> int:
    return sum(map(len, found.values()))


def test_ten_thousand_clients_are_no_more_label_sets_than_one() -> None:
    of_one, of_all = book(), book()
    of_one.take([ONE])
    of_all.take(ONE._replace(four_tuple=four_tuple(n)) for n in range(10_000))
    of_all.take(
        ONE._replace(four_tuple=four_tuple(n), flood_suspected=True, stuck=False)
        for n in range(10_000, 20_000)
    )
    listeners = [seen(facts(syns=1))]
    few, many = samples(of_one, listeners, 0), samples(of_all, listeners, 0)
    # The flood is another verdict's sample.
    assert size(many) == size(few) + 1
    (labels,) = values(many, families.BACKLOG)
    what = ("accept-queue-full", "accept-queue")
    assert values(many, families.LISTENER_STUCK) == {(*labels, *what): 10_000}
    assert values(many, families.LISTENER_FLOOD) == {labels: 10_000}


def crowd(number: int, **changes: Any) -> list[ListenerSeen]:
    return [
        seen(facts(server_port=1024 + n, cookies_sent=3, syns=5, **changes)) for n in range(number)
    ]


def at_port(port: int) -> Finding:
    return ONE._replace(four_tuple=four_tuple()._replace(server_port=port))


def test_listeners_without_end_have_bounded_places_and_nothing_is_lost() -> None:
    one = book()
    number = 10 * MOST_LISTENERS
    one.take(at_port(1024 + n) for n in range(number))
    found = samples(one, crowd(number), 0)
    assert size(found) <= (MOST_LISTENERS + 1) * (MOST_COMBINATIONS + len(FAMILIES))
    for family, expected in (
        (families.LISTENER_SYNS, 5 * number),
        (families.LISTENER_COOKIES, 3 * number),
        (families.VERDICTS, number),
    ):
        assert sum(values(found, family).values()) == expected
    assert len(values(found, families.LISTENER_SYNS)) == MOST_LISTENERS + 1
    assert values(found, families.FOLDED) == {(): number - MOST_LISTENERS}
    assert values(found, families.LISTENER_SYNS)[OTHER, "", "", ""] > 0


def test_half_of_the_places_are_for_those_that_suffered() -> None:
    one = book()
    healthy = [seen(facts(server_port=1024 + n, syns=1)) for n in range(2 * MOST_LISTENERS)]
    quiet = samples(one, healthy, 0)
    assert len(values(quiet, families.BACKLOG)) == MOST_LISTENERS // 2
    ill = seen(facts(server_port=7, syns=2, cookies_sent=1))
    found = samples(one, [*healthy, ill], 0)
    assert ("web", "192.0.2.1", "7", "greeter") in values(found, families.BACKLOG)


def test_who_was_idle_for_an_hour_gives_its_place_up_and_the_sum_stays() -> None:
    one = book()
    samples(one, crowd(MOST_LISTENERS), 0)
    new = seen(facts(server_port=7, syns=2, cookies_sent=1))
    for now_ns, has_place in ((IDLE_NS - 1, False), (IDLE_NS, True)):
        fresh = new._replace(facts=new.facts._replace(syns=2 + now_ns, server_port=7))
        found = samples(one, [*crowd(MOST_LISTENERS), fresh], now_ns)
        ports = {labels[2] for labels in values(found, families.BACKLOG)}
        assert ("7" in ports) == has_place
    # `crowd` makes new readings of the same figures: nothing was counted twice.
    total = sum(values(found, families.LISTENER_SYNS).values())
    assert total == 5 * MOST_LISTENERS + 2 + IDLE_NS


def test_a_label_is_printable_and_short() -> None:
    hostile = "\x1b[2J\udcff\n" + "x" * 1000
    one = book(netns=hostile)
    found = samples(one, [seen(facts(syns=1), owner=f"{hostile} (pid 7)")], 0)
    ((netns, _, _, owner),) = values(found, families.BACKLOG)
    for text in (netns, owner):
        assert text.startswith("\\x1b[2J\\xff\\x0axxx")
        assert text.isprintable()
        assert len(text) <= MOST_CHARACTERS
        text.encode("utf-8")


def test_an_owner_is_a_name_whatever_its_number() -> None:
    assert owner_names(["nginx (pid 2)", "nginx (pid 1)"]) == "nginx"
    assert owner_names(["b (pid 2)", "a (pid 1)"]) == "a,b"
    assert owner_names(["x (pid 1) (pid 9)"]) == "x (pid 1)"
    assert owner_names([]) == ""
    assert owner_names([f"{letter} (pid 1)" for letter in "edcba"]) == "a,b,c,d,..."


# What becomes of a verdict, and of a listener.


def test_a_correction_of_the_words_is_no_second_verdict() -> None:
    one = book()
    one.take([ONE, ONE._replace(updates=ONE.verdict)])
    flood = ONE._replace(four_tuple=four_tuple(1), flood_suspected=True, stuck=False, drop=None)
    real = flood._replace(flood_suspected=False, stuck=True, updates=flood.verdict)
    one.take([flood, real])
    found = samples(one, [], 0)
    told = summed(values(found, families.VERDICTS), families.VERDICTS, "cause")
    assert told == {("accept-queue",): 1, ("syn-flood",): 1, ("",): 1}
    assert sum(values(found, families.LISTENER_STUCK).values()) == 2
    assert sum(values(found, families.LISTENER_FLOOD).values()) == 0


def test_who_is_no_longer_stuck_leaves_a_zero() -> None:
    one = book()
    one.take(ONE._replace(four_tuple=four_tuple(n)) for n in range(2))
    assert sum(values(samples(one, [], 0), families.LISTENER_STUCK).values()) == 2
    one.stuck.leave(HandshakeId(four_tuple(0), ONE.first_syn_ns))  # it gave up: nobody is told
    assert sum(values(samples(one, [], 0), families.LISTENER_STUCK).values()) == 1
    one.take([COMPLETED._replace(four_tuple=four_tuple(1))])
    found = samples(one, [], 0)
    assert list(values(found, families.LISTENER_STUCK).values()) == [0]
    assert summed(values(found, families.VERDICTS), families.VERDICTS, "verdict") == {
        ("accept-queue-full",): 2
    }


SUSPECT = ONE._replace(verdict="ack-missing", stuck=False, flood_suspected=True, drop=None)


def test_a_suspect_that_gave_up_is_none_once_the_run_knows_of_fewer() -> None:
    suspects = {four_tuple(0), four_tuple(1)}
    one = book(lambda who: who.four_tuple in suspects)
    one.take(SUSPECT._replace(four_tuple=four_tuple(n)) for n in range(2))
    assert list(values(samples(one, [], 0, 2), families.LISTENER_FLOOD).values()) == [2]
    suspects.remove(four_tuple(0))
    assert list(values(samples(one, [], 0, 1), families.LISTENER_FLOOD).values()) == [1]


def test_suspects_are_looked_at_once_a_minute_whatever_the_run_knows_of() -> None:
    """One gave up, and the run counts one more that there was no room for: the sums agree."""
    asked: list[HandshakeId] = []

    def is_suspected(who: HandshakeId) -> bool:
        asked.append(who)
        return False

    one = book(is_suspected)
    samples(one, [], 0)
    one.take([SUSPECT])
    for now_ns in (1, 59 * SECOND_NS):
        found = samples(one, [], now_ns)
        assert list(values(found, families.LISTENER_FLOOD).values()) == [1]
    assert asked == []
    found = samples(one, [], 60 * SECOND_NS)
    assert list(values(found, families.LISTENER_FLOOD).values()) == [0]
    assert asked == [HandshakeId(SUSPECT.four_tuple, SUSPECT.first_syn_ns)]


def test_a_suspect_that_is_told_again_is_counted_once() -> None:
    one = book()
    one.take([SUSPECT, SUSPECT._replace(updates=SUSPECT.verdict)])
    found = samples(one, [], 0)
    assert list(values(found, families.LISTENER_FLOOD).values()) == [1]
    assert list(values(found, families.VERDICTS).values()) == [1]


def test_a_verdict_goes_to_the_listener_by_its_socket() -> None:
    """A server at any address: its label is not where the client wrote to."""
    one = book()
    one.take([finding(four_tuple(), socket=99)])
    bound = seen(facts(syns=1, socket=99))._replace(bound=address_bytes("0.0.0.0"))
    found = samples(one, [bound], 0)
    ((*labels, verdict, _),) = values(found, families.VERDICTS)
    assert labels == ["web", "0.0.0.0", "3311", "greeter"]
    assert verdict == "accept-queue-full"


def test_a_restarted_server_goes_on_counting_with_the_limit_of_now() -> None:
    one = book()
    first = seen(facts(socket=1, syns=10, limit=50, peak_accept_queue=51))._replace(sockets=(1,))
    samples(one, [first], 0)
    second = seen(facts(socket=2, syns=4, limit=500, peak_accept_queue=3))._replace(sockets=(2,))
    found = samples(one, [first, second], 0)
    labels = ("web", "192.0.2.1", "3311", "greeter")
    assert values(found, families.LISTENER_SYNS) == {labels: 14}
    assert values(found, families.BACKLOG) == {labels: 500}
    assert values(found, families.ACCEPT_QUEUE) == {labels: 3}


def test_of_sockets_that_share_a_port_the_fullest_queue_is_told() -> None:
    one = book()
    together = [
        seen(facts(socket=n, syns=1, peak_accept_queue=10 * n))._replace(sockets=(1, 2))
        for n in (2, 1)
    ]
    found = samples(one, together, 0)
    assert list(values(found, families.ACCEPT_QUEUE).values()) == [20]


def test_figures_that_begin_anew_are_added() -> None:
    one = book()
    samples(one, [seen(facts(syns=100, cookies_sent=7))], 0)
    found = samples(one, [seen(facts(syns=3, cookies_sent=1))], 0)
    assert list(values(found, families.LISTENER_SYNS).values()) == [103]
    assert list(values(found, families.LISTENER_COOKIES).values()) == [8]


def test_the_cause_is_the_word_that_json_has() -> None:
    assert cause_of(ONE) == "accept-queue"
    assert cause_of(ONE._replace(drop=None)) == ""
    assert cause_of(ONE._replace(flood_suspected=True)) == "syn-flood"


# Snapshots of a run.


def summary(**changes: Any) -> Summary:
    plain: dict[str, Any] = dict.fromkeys(Summary._fields[:16], 0)
    plain |= {"watched": "port 25", "mode": "fentry", "verdicts": {}, "losses": {}, "gaps": ()}
    plain |= {"reconciliation": (), "filtered": False}
    return Summary(**{**plain, **changes})


class Exporting:
    """Metrics whose clocks and whose summary are ours."""

    def __init__(self) -> None:
        self.published: list[Snapshot] = []
        self.now_ns = 0
        self.cost_ns = 0
        self.summary = summary()
        self.metrics = Metrics(
            header(),
            self._so_far,
            lambda _who: True,
            self.published.append,
            lambda: self.now_ns,
            lambda: 1_700_000_000 * SECOND_NS + self.now_ns,
        )

    def _so_far(self, _now_ns: int) -> Summary:
        self.now_ns += self.cost_ns
        return self.summary

    def status(self, running_ns: int) -> None:
        self.metrics.status(Status("port 25", 0, 0, 0, 0, running_ns, self.now_ns))

    def last(self) -> dict[str, Any]:
        return dict(exported(self.published[-1]))


def test_a_snapshot_has_every_family_in_order() -> None:
    one = Exporting()
    one.status(0)
    assert tuple(samples.family for samples in one.published[0]) == FAMILIES


def test_a_costly_snapshot_is_taken_less_often() -> None:
    one = Exporting()
    for tenth in range(50):
        one.status(tenth * SECOND_NS // 10)
    assert len(one.published) == 5
    one = Exporting()
    one.cost_ns = INTERVAL_NS
    for whole in range(2 * COST_SHARE + 1):
        one.status(whole * SECOND_NS)
    assert len(one.published) == 3


def test_the_state_of_the_run_is_told() -> None:
    one = Exporting()
    one.status(0)
    assert one.last()["tcpstuck_running"] == {(): 1}
    assert one.last()["tcpstuck_last_update_timestamp_seconds"] == {(): 1_700_000_000}
    one.metrics.summary(summary(duration_ns=5 * SECOND_NS))
    assert one.last()["tcpstuck_running"] == {(): 0}
    assert one.last()["tcpstuck_traced_seconds"] == {(): 5}


def test_a_counter_never_falls() -> None:
    one = Exporting()
    found = []
    for number in (5, 3, 6):
        one.metrics.summary(summary(cookies_sent=number, losses={"entries_let_go": number}))
        found.append(
            (one.last()["tcpstuck_cookies_sent_total"], one.last()["tcpstuck_losses_total"])
        )
    assert [cookies[()] for cookies, _ in found] == [5, 5, 6]
    assert [losses["entries_let_go",] for _, losses in found] == [5, 5, 6]


def test_reasons_are_bounded_and_counted() -> None:
    one = Exporting()
    many = {f"failed: E{n}": 1 for n in range(10 * MOST_REASONS)}
    gaps = tuple(CoverageGap(f"p{n}", "w", "l") for n in range(10 * MOST_REASONS))
    totals = RescueTotals(1, 2, many, 3, dict.fromkeys(many, 2))
    one.metrics.summary(summary(rescue=totals, losses=many, gaps=gaps))
    last = one.last()
    for name, each in (("failures_total", 1), ("left_alone_clients", 2)):
        found = last[f"tcpstuck_rescue_{name}"]
        assert len(found) == MOST_REASONS + 1
        assert sum(found.values()) == each * len(many)
        assert found[OTHER,] == each * 9 * MOST_REASONS
    assert ("E0",) in last["tcpstuck_rescue_failures_total"]
    assert len(last["tcpstuck_losses_total"]) == MOST_REASONS + 1
    assert len(last["tcpstuck_coverage_gap_info"]) == MOST_REASONS
    assert last["tcpstuck_coverage_gaps"] == {(): len(gaps)}
    assert last["tcpstuck_rescue_synacks_total"]["failed",] == len(many)


def reconciled(counter: str, traced: int, low: int, high: int, agrees: bool | None) -> Reconciled:
    return Reconciled(7, counter, traced, 0, (low, high), agrees, "")


def test_what_the_kernel_counted_otherwise_is_told_by_counter() -> None:
    one = Exporting()
    rows = (
        reconciled("SyncookiesSent", 5, 7, 8, False),
        reconciled("SyncookiesSent", 5, 5, 5, True),
        reconciled("SyncookiesRecv", 9, 7, 8, False),
        reconciled("ListenOverflows", 9, 7, 8, None),
    )
    one.metrics.summary(summary(reconciliation=rows))
    assert one.last()["tcpstuck_reconciliation_disagreements"] == {
        ("SyncookiesSent",): 1,
        ("SyncookiesRecv",): 1,
        ("ListenOverflows",): 0,
    }
    assert one.last()["tcpstuck_reconciliation_difference"] == {
        ("SyncookiesSent",): -2,
        ("SyncookiesRecv",): 1,
        ("ListenOverflows",): 0,
    }


def test_a_live_run_tells_who_is_stuck_while_it_is_and_when_no_longer() -> None:
    kernel = FakeKernel()
    dropped = ack_dropped(handshake(), at(0.1))
    kernel.at(at(1), dropped, event(EventKind.ACK_DROPPED, dropped, at(1)))
    connected = ended(dropped, 1, at(5))  # type: ignore[arg-type]
    kernel.at(at(5), connected, event(EventKind.COMPLETED, connected, at(5)))
    analysis = Analysis(header())
    published: list[Snapshot] = []
    metrics = Metrics(
        header(),
        lambda now_ns: analysis.so_far(kernel.counts(), now_ns, kernel.losses()),
        analysis.correlator.flows.is_suspected,
        published.append,
        lambda: kernel.now_ns,
        lambda: kernel.now_ns,
    )
    run = Live(
        kernel, analysis, Printer(metrics), None, kernel.counters, clock_ns=lambda: kernel.now_ns
    )
    run.run(9 * SECOND_NS, None)
    told = [exported(one) for one in published]
    stuck = [int(one["tcpstuck_stuck_clients"][()]) for one in told]
    assert re.fullmatch("0+1+0+", "".join(map(str, stuck)))
    per_listener = [sum(one["tcpstuck_listener_stuck_clients"].values()) for one in told]
    assert per_listener == stuck
    assert list(told[-1]["tcpstuck_listener_stuck_clients"].values()) == [0]
    assert [one["tcpstuck_traced_seconds"][()] for one in told] == sorted(
        one["tcpstuck_traced_seconds"][()] for one in told
    )
    assert told[-2]["tcpstuck_traced_seconds"][()] == pytest.approx(9, abs=1)
    assert [int(one["tcpstuck_running"][()]) for one in told] == [1] * (len(told) - 1) + [0]
