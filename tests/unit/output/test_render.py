"""What a tired person sees, at the widths people have; and the JSON's times."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from datetime import datetime, timezone

import pytest

from tcpstuck_bpf.analysis import Analysis
from tcpstuck_bpf.judge.reconcile import Reconciled
from tcpstuck_bpf.judge.stuck_now import StuckGroup, group_of
from tcpstuck_bpf.judge.verdict import Finding, judge
from tcpstuck_bpf.model import (
    CROWDED_NETNS,
    GONE_NETNS,
    SECOND_NS,
    FourTuple,
    address_bytes,
)
from tcpstuck_bpf.output.export import listener_line, verdict_line
from tcpstuck_bpf.output.page import Page
from tcpstuck_bpf.output.render import SHOWN_AT_ONCE, TableRenderer
from tcpstuck_bpf.output.rows import meaning
from tcpstuck_bpf.output.summary_text import SummaryText
from tcpstuck_bpf.output.writers import Selection, TableOutput
from tcpstuck_bpf.steps import Ended, TallyTaken, WallClock
from tcpstuck_bpf.summary import Status
from tests.builders import (
    START_NS,
    ack_dropped,
    at,
    four_tuple,
    handshake,
    header,
    reports,
    sweep,
    tally,
)
from tests.unit.judge.test_listener import facts, judged, overflown

CLOCK = WallClock(START_NS, 1_700_000_000_123_456_789)
LONG_IPV4 = FourTuple(
    address_bytes("192.168.122.101"), address_bytes("192.168.122.250"), 54321, 65535, 1
)
LONG_IPV6 = FourTuple(
    address_bytes("2001:db8:1234:5678:9abc:def0:1234:5678"),
    address_bytes("2001:db8:aaaa:bbbb:cccc:dddd:eeee:ffff"),
    54321,
    65535,
    1,
)


def finding(who: FourTuple) -> Finding:
    """An accept-queue-full of that client."""
    (report,) = reports([sweep(at(4), ack_dropped(handshake(), at(0.1)))], at(4))
    found = judge(report._replace(four_tuple=who), header().coverage)
    assert found is not None
    return found


def lines(
    findings: Sequence[Finding],
    width: int,
    colour: bool = False,
    verbose: bool = False,
    each: bool = True,
) -> list[str]:
    """The table, seen from network namespace 1."""
    renderer = TableRenderer(
        clock=CLOCK,
        width=width,
        colour=colour,
        verbose=verbose,
        own_netns=1,
        netns_names={},
        each=each,
    )
    return [*renderer.findings(findings), *renderer.rest()]


@pytest.mark.parametrize("width", [60, 80, 100, 120, 200])
@pytest.mark.parametrize(("verbose", "each"), [(False, False), (False, True), (True, True)])
@pytest.mark.parametrize("number", [1, 12_345])
def test_no_line_is_wider_than_the_terminal(
    width: int, verbose: bool, each: bool, number: int
) -> None:
    findings = [finding(LONG_IPV4)] * (number if not each else 1)
    for line in lines(findings, max(width, 80), verbose=verbose, each=each):
        assert len(line) <= max(width, 80)


@pytest.mark.parametrize("each", [False, True])
def test_ipv6_is_never_cut(each: bool) -> None:
    text = "\n".join(lines([finding(LONG_IPV6)], 80, each=each))
    assert "[2001:db8:1234:5678:9abc:def0:1234:5678]:54321" in text
    assert "[2001:db8:aaaa:bbbb:cccc:dddd:eeee:ffff]:65535" in text


def test_a_wide_terminal_has_one_line_each() -> None:
    heading, row = lines([finding(LONG_IPV4)], 200)
    for column in ("client", "server", "SYNs"):
        assert column in heading
    assert heading.index("client") == row.index("192.168.122.101")
    assert row.endswith("ACK came, dropped: accept queue full")


def test_colour_only_where_asked_and_a_mark_always() -> None:
    assert not any("\x1b" in line for line in lines([finding(LONG_IPV4)], 80))
    assert any("\x1b" in line for line in lines([finding(LONG_IPV4)], 80, colour=True))
    assert any("!accept-queue-full" in line for line in lines([finding(LONG_IPV4)], 80))


def test_a_flood_is_folded_after_a_thousand() -> None:
    flood = [finding(four_tuple(n)) for n in range(SHOWN_AT_ONCE + 7)]
    shown = lines(flood, 200)
    assert shown[-1].startswith("... and 7 more accept-queue-full at 192.0.2.1:3311")
    assert sum("10.0." in line for line in shown) == SHOWN_AT_ONCE


def test_another_namespace_is_named() -> None:
    assert lines([finding(LONG_IPV4._replace(netns=2))], 80)[0] == "in network namespace 2:"


def status_line(width: int, status: Status) -> str:
    renderer = TableRenderer(
        clock=CLOCK, width=width, colour=False, verbose=False, own_netns=1, netns_names={}
    )
    line = renderer.status(status)
    assert len(line) < width
    return line


def test_the_status_is_one_line_of_the_terminal() -> None:
    status = Status("port 3311", 123456, 123450, 6, 0, at(1) - START_NS, at(1))
    line = status_line(120, status)
    assert line.startswith("nothing stuck, watching port 3311 for 1.0 s: 123 456 cookies sent")
    assert status_line(60, status).startswith("nothing stuck, 1.0 s: 123 456 cookies")
    assert ": 1 cookie sent, " in status_line(120, status._replace(cookies_sent=1))


@pytest.mark.parametrize("stuck", [0, 12345])
@pytest.mark.parametrize(
    "watched",
    ["every port", "ports 25, 465, 587, 3306, 3311 at 2001:db8:1234:5678:9abc::25 over IPv6"],
)
def test_a_long_run_keeps_its_figures_at_80_columns(watched: str, stuck: int) -> None:
    hours = 8 * 3600 + 5 * 60
    status = Status(watched, 1234567, 1234001, 456, stuck, hours * 1_000_000_000, at(hours))
    line = status_line(80, status)
    for figure in ("1 234 567", "1 234 001", "456 waiting", "8 h 05 min"):
        assert figure in line
    assert line.startswith("12 345 STUCK" if stuck else "nothing stuck")


def test_the_status_is_cut_where_it_matters_least() -> None:
    watched = "ports 25, 465, 587, 3306, 3311 at 2001:db8::25 over IPv6"
    line = status_line(40, Status(watched, 123456, 123000, 456, 12345, at(1) - START_NS, at(1)))
    assert "12 345 STUCK" in line


@pytest.mark.parametrize("stuck", [0, 7])
def test_data_lost_is_in_the_status(stuck: int) -> None:
    """It is worse than stuck: the exit status is 1, and nobody waits."""
    status = Status("port 3311", 41, 41, 0, stuck, SECOND_NS, at(1), data_lost=2)
    for width in (40, 80, 200):
        assert "2 with DATA LOST" in status_line(width, status)


def test_a_delay_is_since_the_syn() -> None:
    recovered = finding(LONG_IPV4)._replace(delay_ns=576_200_000)
    assert "(576.2 ms after the SYN)" in meaning(recovered)


def test_a_long_age_keeps_the_columns() -> None:
    old = finding(LONG_IPV4)._replace(age_ns=12 * 60_000_000_000 + 5_000_000_000)
    heading, row, _, young, _ = lines([old, finding(LONG_IPV4)], 120)
    assert "12 min 05 s" in row
    assert len(heading) == len(row) == len(young)


def test_json_times_are_utc_of_the_same_moments() -> None:
    told = finding(LONG_IPV4)
    line = json.loads(verdict_line(told, CLOCK))
    for key, moment_ns in (("syn_time", told.first_syn_ns), ("verdict_time", told.verdict_ns)):
        parsed = datetime.strptime(line[key], "%Y-%m-%dT%H:%M:%S.%fZ").replace(tzinfo=timezone.utc)
        expected_us = CLOCK.realtime(moment_ns) // 1000
        assert round(parsed.timestamp() * 1_000_000) == expected_us
    assert line["age_ms"] == told.age_ns / 1_000_000


def summed_up(width: int = 80, **changes: object) -> list[str]:
    """The summary of an empty run, with changes, seen from network namespace 1."""
    renderer = TableRenderer(
        clock=CLOCK,
        width=width,
        colour=False,
        verbose=False,
        own_netns=1,
        netns_names={2: "tcpstuck-273-1-server"},
    )
    analysis = Analysis(header())
    analysis.take(TallyTaken(tally(at(0))))
    return list(renderer.summary(analysis.summary(Ended(at(9), {}, ()))._replace(**changes)))


def sent(traced: int, kernel: int, *, agrees: bool | None = None) -> Reconciled:
    """SyncookiesSent, by us and by the kernel; ten were outside the filters."""
    return Reconciled(2, "SyncookiesSent", traced, 10, (kernel, kernel), agrees, "")


def test_nothing_stuck_is_said_only_where_every_handshake_was_watched() -> None:
    agreed = (sent(5, 15, agrees=True),)
    assert "nothing stuck" in summed_up(200, cookies_sent=5, reconciliation=agreed)
    unsure = "nothing was seen stuck, but 7 handshakes went untraced: some may be stuck"
    for changes in (
        {"reconciliation": (sent(5, 22, agrees=False),)},
        {"untracked": 7},
        {"losses": {"cookies_unmatched": 7}},
        {"untracked": 3, "reconciliation": (sent(5, 19, agrees=False),)},
    ):
        shown = summed_up(200, **changes)
        assert unsure in shown
        assert "nothing stuck" not in shown


def test_what_passed_untraced_is_said_beside_what_is_stuck() -> None:
    shown = summed_up(200, still_stuck=2, ever_stuck=2, untracked=1)
    assert shown[1:3] == [
        "2 clients are stuck",
        "1 handshake went untraced: some may be stuck",
    ]


def test_a_lower_bound_is_no_reason_to_doubt() -> None:
    rows = (sent(5, 99), sent(5, 12, agrees=False), sent(0, 0, agrees=True))
    assert "nothing stuck" in summed_up(200, cookies_sent=5, reconciliation=rows)


def test_a_run_that_saw_no_cookie_is_no_all_clear() -> None:
    shown = "\n".join(summed_up(200))
    assert "nothing stuck" not in shown
    assert "no SYN cookie was sent, so no client could get stuck under one" in shown
    for seen in ({"unseen_syn": 1}, {"cookies_sent": 1}, {"verdicts": {"client-reset": 1}}):
        assert "nothing stuck" in summed_up(200, **seen)


def test_who_is_too_young_is_said_beside_the_all_clear() -> None:
    some = {"cookies_sent": 9, "verdicts": {"completed": 8}}
    assert "nothing stuck" in summed_up(200, **some)
    shown = summed_up(200, **some, pending=1)
    assert "nothing stuck; 1 handshake too young for a verdict" in shown


STUCK_TWICE = {
    "still_stuck": 15,
    "ever_stuck": 15,
    "stuck": (
        (StuckGroup(1, "10.9.0.1", 3311, 0, "accept-queue-full", "certain", ""), 10),
        (StuckGroup(1, "10.9.0.1", 3311, 0, "ack-missing", "likely", ""), 5),
    ),
}


def ending(height: int | None, above: int = 0, *, advise: bool = False) -> list[str]:
    """The summary of a run with two causes, on a terminal of this height."""
    page = Page(clock=CLOCK, width=80, colour=False, own_netns=1, netns_names={})
    analysis = Analysis(header())
    analysis.take(TallyTaken(tally(at(0))))
    summary = analysis.summary(Ended(at(9), {}, ()))._replace(**STUCK_TWICE)
    groups = [group for group, _ in summary.stuck]
    advice = dict(zip(groups, ("raise the backlog", "look for drops")))
    return list(SummaryText(page, height, advice, advise=advise).lines(summary, above))


def test_an_answer_that_has_scrolled_off_the_terminal_comes_again_with_what_to_do() -> None:
    whole = ending(None)
    answer = whole[1:3]
    assert answer[0].startswith("15 clients of 10.9.0.1:3311 are stuck: accept queue full (10 ")
    assert ending(len(whole) + 1) == whole
    for height in (3, len(whole)):
        assert ending(height) == [
            *whole,
            "",
            *answer,
            "    do (accept-queue-full): raise the backlog",
            "    do (ack-missing): look for drops",
        ]


def test_if_only_the_rows_have_scrolled_off_the_terminal_the_answer_says_what_to_do() -> None:
    advised, whole = ending(None, advise=True), ending(None)
    height = len(advised) + 1
    assert ending(height, height - len(whole) - 1) == whole
    for above in (height - len(whole), 1000):
        assert ending(height, above) == advised


def test_what_to_do_is_in_the_summary_where_no_row_has_said_it() -> None:
    assert "    do (ack-missing): look for drops" in ending(None, advise=True)


@pytest.mark.parametrize("nothing", [False, True])
def test_with_a_summary_alone_what_to_do_is_said_all_the_same(nothing: bool) -> None:
    stream = io.StringIO()
    renderer = TableRenderer(
        clock=CLOCK, width=200, colour=False, verbose=False, own_netns=1, netns_names={}
    )
    output = TableOutput(stream, renderer, Selection([], nothing))
    told = finding(LONG_IPV4)
    output.findings([told])
    analysis = Analysis(header())
    analysis.take(TallyTaken(tally(at(0))))
    stuck = ((group_of(told), 1),)
    summary = analysis.summary(Ended(at(9), {}, ()))
    output.summary(summary._replace(still_stuck=1, ever_stuck=1, stuck=stuck))
    assert stream.getvalue().count("do: find out why the server does not accept") == 1


@pytest.mark.parametrize("width", range(60, 90))
def test_no_number_is_cut_in_two(width: int) -> None:
    told = judged(facts(limit=4096, syns=2_345_678, cookies_sent=2_345_678, syns_refused=12_345))
    text = "\n".join(summed_up(width, listeners=(told,), losses={"flows_evicted": 1_234_567}))
    for number in ("4 096", "12 345", "1 234 567"):
        assert number in text


def test_a_full_table_is_told_from_one_that_was_being_changed() -> None:
    shown = summed_up(200, untracked=5, losses={"table_busy": 2})
    assert "lost events: 0, untracked handshakes: 5" in shown
    assert "3 handshakes not tracked: the table was full (--max-handshakes)" in shown
    assert "2 handshakes not tracked: their table entry was being changed" in shown
    busy = summed_up(200, untracked=2, losses={"table_busy": 2})
    assert not any("the table was full" in line for line in busy)


def test_figures_that_belong_to_no_namespace_are_named() -> None:
    rows = [
        Reconciled(netns, "SyncookiesSent", 5, 0, None, None, "")
        for netns in (GONE_NETNS, CROWDED_NETNS)
    ]
    shown = "\n".join(summed_up(200, reconciliation=tuple(rows)))
    assert "(gone)" in shown
    assert "(no entry)" in shown


@pytest.mark.parametrize(
    "name", ["namespaces_uncounted", "listeners_let_go", "listeners_forgotten"]
)
def test_a_table_that_was_full_is_said(name: str) -> None:
    (line,) = (line for line in summed_up(300, losses={name: 7}) if line.startswith("7 "))
    assert name.replace("_", " ") not in line


def test_the_reconciliation_fits_a_terminal_of_80_columns() -> None:
    note = "traced is a lower bound without cookie_v6_check, tcp_check_req, tcp_rcv_state_process"
    rows = (
        Reconciled(2, "SyncookiesFailed", 149, 12_345, (150, 152), True, ""),
        Reconciled(2, "ListenOverflows", 149, 0, (150, 150), False, note),
        Reconciled(2, "SyncookiesRecv", 149, 0, None, None, "cannot be read: it is gone"),
    )
    for filtered in (True, False):
        shown = summed_up(reconciliation=rows, filtered=filtered)
        assert max(map(len, shown)) <= 80
        text = " ".join(" ".join(shown).split())
        assert f"tcpstuck-273-1-server ListenOverflows: {note}" in text
        assert "tcpstuck-273-1-server SyncookiesRecv: cannot be read: it is gone" in text


def test_the_listeners_of_the_summary_fit_and_json_says_the_same() -> None:
    told = judged(overflown(syns_refused=3), silent=20, owner="mariadbd (pid 12345)")
    renderer = TableRenderer(
        clock=CLOCK, width=80, colour=False, verbose=False, own_netns=1, netns_names={}
    )
    ended = Ended(at(9), {}, ())
    analysis = Analysis(header())
    analysis.take(TallyTaken(tally(at(0))))
    summary = analysis.summary(ended)._replace(listeners=(told, judged(facts(syns=9))))
    shown = list(renderer.summary(summary))
    assert max(map(len, shown)) <= 80
    text = " ".join(" ".join(shown).split())
    for sentence in (*told.working, *told.advice):
        assert sentence in text
    assert text.count("listener ") == 1
    line = json.loads(listener_line(told))
    assert line["type"] == "listener"
    assert line["advised_backlog"] == told.advised_backlog
    assert line["working"] == list(told.working)
    assert (line["cookies_sent"], line["syns_refused"], line["silent_clients"]) == (149, 3, 20)


def test_of_sockets_that_share_an_address_each_has_a_row_that_says_which() -> None:
    told = judged(overflown())._replace(owners=("greeter (pid 1)",), sockets=2)
    other = told._replace(owners=("greeter (pid 2)",), socket=9500)
    shown = summed_up(200, listeners=(told, other))
    assert [line.split(" in ")[0] for line in shown if line.startswith("listener")] == [
        "listener 192.0.2.1:3311 of greeter (pid 1)",
        "listener 192.0.2.1:3311 of greeter (pid 2)",
    ]
    text = "\n".join(line.strip() for line in shown)
    assert "\n2 sockets share this address (SO_REUSEPORT)" in text
    assert "\nsocket 9500, one of 2 sockets that share this address (SO_REUSEPORT)" in text
    lines = [json.loads(listener_line(one)) for one in (told, other)]
    assert [(line["socket"], line["sockets"]) for line in lines] == [(None, 2), (9500, 2)]
