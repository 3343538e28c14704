"""The table and the summary of the client's side."""

from __future__ import annotations

import io
import json
import time

import pytest

from tcpstuck_bpf.client.actions import Action, Attempt, Outcome, Plan, Totals
from tcpstuck_bpf.client.export import summary_line, verdict_line
from tcpstuck_bpf.client.facts import NOBODY, ClientSocket, Owner, Owners
from tcpstuck_bpf.client.output import JsonOutput, TableOutput, selection, status_text
from tcpstuck_bpf.client.rows import SHOWN_AT_ONCE, Rows
from tcpstuck_bpf.client.summary import ClientSummary, Status, exit_status
from tcpstuck_bpf.client.waits import Change, Waits
from tcpstuck_bpf.model import SECOND_NS
from tcpstuck_bpf.output.page import Page
from tests.unit.client.world import BEGIN_NS, CLOCK, NETNS, OTHER_NETNS, client_socket, owned, poll


@pytest.fixture(autouse=True)
def utc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()


def page(width: int = 80) -> Page:
    names = {OTHER_NETNS: "shop"}
    return Page(clock=CLOCK, width=width, colour=False, own_netns=NETNS, netns_names=names)


def change(
    socket: ClientSocket, owners: Owners = NOBODY, verdict: str = "greeting-missing"
) -> Change:
    return Change(verdict, socket, BEGIN_NS, socket.age_ns, owners)


def summary_of(waits: Waits, after_s: float = 0, **changes: object) -> ClientSummary:
    now_ns = BEGIN_NS + round(after_s * SECOND_NS)
    summary = ClientSummary(
        watched="port 3306",
        duration_ns=5 * SECOND_NS,
        verdicts=dict(+waits.verdicts),
        stuck=waits.stuck,
        ever_stuck=waits.ever_stuck,
        closed=waits.closed,
        young=waits.young,
        established=waits.established,
        seen_any=waits.seen_any,
        groups=tuple(waits.groups(now_ns)),
        polls=10,
        longest_poll_ns=1_000_000,
        pause_ns=SECOND_NS // 2,
        losses={},
        unread={},
        notes=(),
    )
    return summary._replace(**changes)


def printed(waits: Waits, width: int = 80, **changes: object) -> str:
    stream = io.StringIO()
    output = TableOutput(
        stream, page(width), Rows(page(width), each=False, verbose=False), selection([], False)
    )
    output.summary(summary_of(waits, **changes), BEGIN_NS)
    return stream.getvalue()


def waiting(*ages_s: float) -> Waits:
    waits = Waits(3 * SECOND_NS)
    sockets = [client_socket(number, age) for number, age in enumerate(ages_s, 1)]
    waits.take(poll(0, *sockets))
    waits.note_owners({one.inode: owned() for one in sockets})
    return waits


def test_connections_of_one_process_to_one_server_are_one_row() -> None:
    rows = Rows(page(), each=False, verbose=False)
    changes = [change(client_socket(number, 60 * number), owned()) for number in range(1, 13)]
    lines = list(rows.changes(changes, BEGIN_NS))
    assert lines[:4] == [
        "time      verdict (! stuck) number      waited to",
        "22:13:20 !greeting-missing      12      12 min 10.9.0.1:3306",
        "          of python3 (pid 288): connected, and not a byte either way (likely);",
        "          from 10.9.0.2, ports 40001, 40002, 40003 ...",
    ]
    assert lines[4].startswith("          do: to end the hang, ")
    assert max(map(len, lines)) <= 80


def test_a_row_that_grew_is_printed_again_ever_more_rarely() -> None:
    rows = Rows(page(), each=False, verbose=False)
    printed_at = []
    for second in range(100):
        now_ns = BEGIN_NS + second * SECOND_NS
        lines = list(rows.changes([change(client_socket(second, 60), owned())], now_ns))
        if lines:
            printed_at.append(second)
    assert printed_at == [0, 10, 30, 70]
    (row, text) = rows.rest(BEGIN_NS + 100 * SECOND_NS)
    assert row.split()[:3] == ["22:15:00", "!greeting-missing", "29"]
    assert text == "          of python3 (pid 288): more since 22:14:30; 100 in all"


def test_other_owners_servers_and_namespaces_have_rows_of_their_own() -> None:
    rows = Rows(page(), each=False, verbose=False)
    changes = [
        change(client_socket(1), owned()),
        change(client_socket(2), owned("php", 9, container="pod shop/cart")),
        change(client_socket(3, server="fd09:1111:2222:3333:4444:5555:6666:7777"), owned()),
        change(client_socket(4, netns=OTHER_NETNS), owned()),
    ]
    lines = list(rows.changes(changes, BEGIN_NS))
    assert sum("!greeting-missing" in line for line in lines) == 4
    assert (
        "          of php (pid 9) in pod shop/cart: connected, and not a byte either way" in lines
    )
    assert "in network namespace shop:" in lines
    assert "          [fd09:1111:2222:3333:4444:5555:6666:7777]:3306" in lines
    assert sum("do: " in line for line in lines) == 1
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("width", [50, 80, 200])
@pytest.mark.parametrize("verbose", [False, True])
def test_each_connection_fits_the_page(width: int, verbose: bool) -> None:
    rows = Rows(page(width), each=True, verbose=verbose)
    six = client_socket(2, server="fd09:1111::1", client="fd09:1111::2", keepalive_ns=9 * SECOND_NS)
    hidden = Owners((), 0, True)
    lines = list(rows.changes([change(client_socket(1), owned()), change(six, hidden)], BEGIN_NS))
    assert max(map(len, lines)) <= width
    text = " ".join(" ".join(lines).split())
    for needed in (
        "10.9.0.2:40001 to 10.9.0.1:3306",
        "[fd09:1111::2]:40002 to [fd09:1111::1]:3306",
    ):
        assert needed in text
    assert "of an unknown process of user 1000" in text
    assert ("descriptor 6" in text) == verbose
    assert ("as root, the tool finds the owner" in text) == verbose
    assert ("within a SYN cookie's life" in text) == verbose


def test_a_flood_of_single_rows_is_cut() -> None:
    rows = Rows(page(), each=True, verbose=False)
    many = [change(client_socket(number)) for number in range(SHOWN_AT_ONCE + 5)]
    assert list(rows.changes(many, BEGIN_NS))[-1].startswith("... and 5 more connections")


def test_a_server_that_acknowledged_since_is_slow_and_the_verdict_weaker() -> None:
    slow = client_socket(1, 60, last_ack_ns=2 * SECOND_NS)
    line = json.loads(verdict_line(change(slow), CLOCK))
    assert line["certainty"] == "possible"
    assert any("it has this connection" in sentence for sentence in line["evidence"])
    same = client_socket(1, 60, last_ack_ns=59_999_000_000)
    assert json.loads(verdict_line(change(same), CLOCK))["certainty"] == "likely"


@pytest.mark.parametrize(
    ("keepalive_s", "warned"), [(10, True), (59, True), (61, False), (7_200, False)]
)
def test_a_keep_alive_within_the_cookie_s_life_is_told(keepalive_s: int, warned: bool) -> None:
    one = client_socket(1, 60, keepalive_ns=keepalive_s * SECOND_NS)
    evidence = " ".join(json.loads(verdict_line(change(one), CLOCK))["evidence"])
    assert "TCP keep-alive is on" in evidence
    assert ("one byte early" in evidence) == warned


def test_the_first_sentence_says_who_waits_where_and_since_when() -> None:
    text = " ".join(printed(waiting(60, 15_120, 100), width=200).split())
    assert text.startswith(
        "3 connections of python3 (pid 288) to 10.9.0.1:3306 wait for the server's first byte, the "
        "oldest for 4 h 12 min do: to end the hang, "
    )
    text = printed(waiting(60), width=200)
    assert "1 connection of python3 (pid 288) to 10.9.0.1:3306 waits for the" in text
    assert "first byte for 1 min\n" in text


def test_several_groups_are_named_with_their_numbers() -> None:
    waits = Waits(3 * SECOND_NS)
    sockets = [client_socket(number, 60) for number in range(1, 12)]
    waits.take(poll(0, *sockets))
    waits.note_owners(
        {one.inode: owned("p", 1 + number // 3) for number, one in enumerate(sockets)}
    )
    text = printed(waits, width=300)
    assert (
        "11 connections wait for the server's first byte, the oldest for 1 min: 3 of p (pid 1) to "
        "10.9.0.1:3306; 3 of p (pid 2) to 10.9.0.1:3306; 3 of p (pid 3) to 10.9.0.1:3306; 2 others"
    ) in text


def test_an_owner_shared_by_many_is_cut() -> None:
    shared = Owners(tuple(Owner("nginx", pid, 3, "") for pid in range(5)), 7, False)
    rows = Rows(page(), each=False, verbose=False)
    text = "\n".join(rows.changes([change(client_socket(1), shared)], BEGIN_NS))
    assert "of nginx (pid 0), nginx (pid 1), 10 more:" in text


@pytest.mark.parametrize(
    ("ages", "healthy", "changes", "sentence", "status"),
    [
        ((), 0, {}, "no connection to port 3306 was seen: nothing is known", 0),
        ((), 4, {}, "no connection waits for the server's first byte\n", 0),
        ((1, 2), 0, {}, "nothing is known yet: every connection is younger", 4),
        ((1, 2), 1, {}, "no connection waits for the server's first byte\n", 0),
        ((), 4, {"losses": {"untracked": 3}}, "first byte, but not everything was seen\n", 4),
        ((), 4, {"unread": {9: "denied"}}, "network namespace 9 could not be read: denied", 4),
        ((9,), 4, {"unread": {9: "denied"}}, "1 connection of", 1),
        ((9,), 4, {"stuck": 0, "closed": 1}, "no reported connection waits any more", 1),
    ],
)
def test_an_all_clear_is_given_only_where_everything_was_seen(
    ages: tuple[float, ...],
    healthy: int,
    changes: dict[str, object],
    sentence: str,
    status: int,
) -> None:
    waits = waiting(*ages)
    waits.established += healthy
    waits.seen_any |= healthy > 0
    assert sentence in printed(waits, width=200, **changes)
    assert exit_status(summary_of(waits, **changes)) == status


def test_every_loss_has_its_sentence() -> None:
    names = ("untracked", "unreadable", "subflows", "namespaces_beyond")
    text = printed(waiting(), width=200, losses=dict.fromkeys(names, 1_234))
    assert text.count("1 234 ") == 4


def test_names_of_strangers_cannot_command_the_terminal() -> None:
    name = "\x1b[2Jroot\n\u202e\udcff"
    owners = Owners((Owner(name, 7, 3, f"pod {name}"),), 0, False)
    waits = waiting(60)
    waits.note_owners({client_socket(1).inode: owners})
    text = printed(waits, notes=(name,), unread={5: name})
    stream = io.StringIO()
    for verbose in (False, True):
        rows = Rows(page(), each=verbose, verbose=verbose)
        output = TableOutput(stream, page(), rows, selection([], False))
        output.changes([change(client_socket(1), owners)], BEGIN_NS)
    text += stream.getvalue()
    assert text.count("\\x1b[2Jroot\\x0a\\u202e\\xff") >= 4
    assert all(one.isprintable() for one in text.replace("\n", ""))


def test_only_what_was_asked_for_is_shown_and_all_is_counted() -> None:
    some = [
        change(client_socket(1)),
        change(client_socket(2, bytes_received=1), verdict="recovered"),
    ]
    for only, nothing, shown in (([], False, 2), (["recovered"], False, 1), ([], True, 0)):
        stream = io.StringIO()
        output = JsonOutput(stream, CLOCK, selection(only, nothing))
        output.changes(some, BEGIN_NS)
        output.status(Status("port 3306", 1, 0, 1, 0))
        output.close()
        assert len(stream.getvalue().splitlines()) == shown


def test_what_the_json_says_is_what_happened() -> None:
    socket = client_socket(1, 90, keepalive_ns=None)
    line = json.loads(verdict_line(change(socket, owned(container="pod a/b")), CLOCK))
    assert line["owners"] == [{"name": "python3", "pid": 288, "fd": 6, "container": "pod a/b"}]
    assert (line["age_ms"], line["stuck"], line["updates"]) == (90_000, True, None)
    assert line["established_time"] == "2023-11-14T22:11:50.000000Z"
    assert line["verdict_time"] == "2023-11-14T22:13:20.000000Z"
    assert (line["socket"], line["socket_cookie"], line["family"]) == (7_001, 1, 4)
    orphan = change(client_socket(1, inode=0))
    line = json.loads(verdict_line(orphan, CLOCK))
    assert line["owner_unknown"] == "no process has the socket open"
    assert line["socket"] is None
    summary = json.loads(summary_line(summary_of(waiting(60, 15_120)), CLOCK))
    (group,) = summary["stuck_groups"]
    assert (group["connections"], group["oldest_ms"]) == (2, 15_120_000)
    assert summary["verdicts"] == {"greeting-missing": 2}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_status_line_is_rewritten_in_place_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    rows = Rows(page(), each=False, verbose=False)
    output = TableOutput(stream, page(), rows, selection([], False))
    for stuck in (0, 1):
        output.changes([change(client_socket(1), owned())] if stuck else [], BEGIN_NS)
        output.status(Status("port 3306", stuck, 0, 1, 0))
    output.close()
    before, first, second, after = stream.getvalue().split("\r\x1b[K")[:4]
    assert before == ""
    assert first.startswith("nothing waits too long")
    assert second.startswith("time ")
    assert second.endswith("\n")
    assert after.startswith("1 WAITING")
    assert stream.getvalue().endswith("\r\x1b[K")


@pytest.mark.parametrize("width", [79, 60, 40, 20, 5])
def test_the_status_line_fits(width: int) -> None:
    text = status_text(Status("ports 3306, 3311", 1_234, 5, 10_000, 90 * SECOND_NS), width)
    assert len(text) <= width
    assert text.startswith("1 234 WAITING"[:width])


def attempt(outcome: Outcome, action: Action = Action.QUESTION, reason: str = "") -> Attempt:
    return Attempt(Plan(action, client_socket(1), number=2), BEGIN_NS, outcome, reason)


@pytest.mark.parametrize("verbose", [False, True])
def test_what_has_neither_a_row_nor_an_effect_is_said(verbose: bool) -> None:
    rows = Rows(page(200), each=False, verbose=verbose)
    some = [attempt(one, reason="a reason") for one in Outcome]
    lines = list(rows.attempts(some))
    assert len(lines) == (11 if verbose else 6)
    assert (
        "22:13:20  rescue: 10.9.0.2:40001 to 10.9.0.1:3306: question to the server 2: no answer "
        "(a reason)" in lines
    )
    many = [attempt(Outcome.NO_ANSWER)] * (SHOWN_AT_ONCE + 5)
    assert list(rows.attempts(many))[-1] == "... and 5 more (all of them in --json)"


@pytest.mark.parametrize(
    ("slow", "ending"),
    [
        (0, "for 1 min\n"),
        (1, "for 1 min. The server answered that it has 1 of them, so it is slow or paused\n"),
        (2, "for 1 min. The server answered that it has all of them, so it is slow or paused\n"),
    ],
)
def test_the_first_sentence_says_what_the_server_answered(slow: int, ending: str) -> None:
    text = printed(waiting(60, 60), width=200, slow=slow)
    assert f"wait for the server's first byte, the oldest {ending}" in text


def test_nobody_waits_any_more_and_the_server_had_no_record() -> None:
    waits = waiting(130, 130)
    for number in (1, 2):
        plan = Plan(Action.QUESTION, client_socket(number))
        waits.attempted(Attempt(plan, BEGIN_NS, Outcome.FORGOT, "an RST came"), BEGIN_NS)
    text = printed(waits, width=200)
    assert "no reported connection waits any more; of 2 the server had no record\n" in text
    mended = printed(waits, width=200, verdicts={"rescued": 3, "server-forgot": 2})
    assert (
        "no reported connection waits any more; 3 got the server's data after our challenge; of 2 "
        "the server had no record\n" in mended
    )
    assert "server-forgot: 2 connections\n" in text


@pytest.mark.parametrize("dry_run", [False, True])
def test_the_summary_says_what_was_done_and_what_was_not(dry_run: bool) -> None:
    done = {
        (Action.CHALLENGE, Outcome.WOULD if dry_run else Outcome.SENT): 1_300,
        (Action.QUESTION, Outcome.WOULD if dry_run else Outcome.NO_ANSWER): 7,
    }
    reasons, alone = {"no segment came within 3 s": 7}, {"excluded": 4}
    totals = Totals(dry_run, done, 1_200, 9, reasons, alone)
    text = printed(waiting(60), width=200, mending=totals)
    if dry_run:
        assert "rescue (dry run), would be done: 1 300 challenges, 7 questions\n" in text
    else:
        assert (
            "rescue: 1 200 connections challenged, 9 asked about, 0 ended; "
            "7 questions not answered\n" in text
        )
    assert "7 without effect: no segment came within 3 s\n" in text
    assert "4 wait, left alone now: excluded\n" in text


@pytest.mark.parametrize(("after_s", "certainty"), [(1, "likely"), (5, "likely"), (6, "possible")])
def test_a_rescue_is_the_less_certain_the_later_the_data_came(after_s: int, certainty: str) -> None:
    greeted = change(client_socket(1, 60, bytes_received=25), verdict="rescued")
    greeted = greeted._replace(challenged_ns=BEGIN_NS - after_s * SECOND_NS)
    line = json.loads(verdict_line(greeted, CLOCK))
    assert (line["certainty"], line["stuck"]) == (certainty, False)
    assert "a slow server may have spoken" in line["cannot_prove"]
    assert f"our last challenge was sent {after_s}.0 s before" in " ".join(line["evidence"])
