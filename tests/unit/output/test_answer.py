"""The sentence that a person could send to a colleague."""

from __future__ import annotations

from typing import Any

from tcpstuck_bpf.analysis import Analysis
from tcpstuck_bpf.judge.backlog import ListenerReport
from tcpstuck_bpf.judge.stuck_now import StuckGroup
from tcpstuck_bpf.model import ListenerSeen, address_bytes
from tcpstuck_bpf.output.answer import stuck_sentence, what_to_do
from tcpstuck_bpf.output.page import Page
from tcpstuck_bpf.steps import Ended, TallyTaken
from tcpstuck_bpf.summary import Summary
from tests.builders import at, header, tally
from tests.unit.judge.test_listener import facts, judged
from tests.unit.output.test_render import CLOCK

FULL = StuckGroup(1, "10.9.0.1", 3311, 0, "accept-queue-full", "certain", "")
FILTERED = StuckGroup(
    2, "2001:db8::25", 25, 0, "ack-filtered", "certain", "netfilter, inet guard acks"
)
SILENT = StuckGroup(1, "10.9.0.1", 25, 0, "ack-missing", "likely", "")
LISTENER = judged(facts())._replace(
    netns=1,
    addresses=("10.9.0.1",),
    port=3311,
    owners=("mariadbd (pid 288)",),
    facts=facts(limit=50),
    advised_backlog=188,
    socket=0,
)


def a_summary(
    *stuck: tuple[StuckGroup, int],
    listeners: tuple[ListenerReport, ...] = (LISTENER,),
    seen: tuple[ListenerSeen, ...] = (),
) -> Summary:
    analysis = Analysis(header())
    analysis.take(TallyTaken(tally(at(0))))
    return analysis.summary(Ended(at(9), {}, ()))._replace(
        stuck=stuck,
        still_stuck=sum(number for _, number in stuck),
        listeners=listeners,
        seen=seen,
    )


def sentence(*stuck: tuple[StuckGroup, int], **more: Any) -> str:
    page = Page(clock=CLOCK, width=200, colour=False, own_netns=1, netns_names={2: "mail"})
    return stuck_sentence(a_summary(*stuck, **more), page)


def test_one_cause() -> None:
    assert sentence((FULL, 137)) == (
        "137 clients of mariadbd (pid 288) at 10.9.0.1:3311 are stuck: accept queue full "
        "(backlog 50, needs 188)"
    )


def test_one_client() -> None:
    assert sentence((SILENT, 1)) == (
        "1 client of 10.9.0.1:25 is stuck: no ACK got to this host (likely)"
    )


def test_several_causes_and_another_namespace() -> None:
    assert sentence((FULL, 1370), (FILTERED, 13)) == (
        "1 383 clients are stuck: 1 370 of mariadbd (pid 288) at 10.9.0.1:3311 (accept queue full, "
        "backlog 50, needs 188); 13 of [2001:db8::25]:25 in network namespace mail (this host "
        "dropped their ACKs before TCP, netfilter, inet guard acks)"
    )


def test_where_all_are_stuck_at_one_place_it_is_named_once() -> None:
    silent = SILENT._replace(server_port=3311)
    assert sentence((FULL, 340), (silent, 40)) == (
        "380 clients of mariadbd (pid 288) at 10.9.0.1:3311 are stuck: accept queue full "
        "(340 clients, backlog 50, needs 188); no ACK got to this host (40 clients, likely)"
    )


def test_while_it_runs_the_owner_and_the_limit_are_those_of_the_latest_reading() -> None:
    """The backlog that would be enough is calculated at the end only."""
    listening = facts(
        netns=1, server_address=address_bytes("10.9.0.1"), server_port=3311, limit=50, socket=9
    )
    seen = (ListenerSeen(listening, ("mariadbd (pid 288)",), (9,), {}),)
    at_socket = FULL._replace(socket=9)
    assert sentence((at_socket, 5), listeners=(), seen=seen) == (
        "5 clients of mariadbd (pid 288) at 10.9.0.1:3311 are stuck: accept queue full (backlog 50)"
    )
    other = FULL._replace(socket=10)
    assert "mariadbd" not in sentence((other, 5), listeners=(), seen=seen)


def test_what_to_do_is_said_once_for_each_cause_and_the_backlog_goes_before() -> None:
    listener = LISTENER._replace(advice=("Set back_log of MariaDB to 188 or more.",))
    advice = {FULL: "raise the backlog", SILENT: "look for drops", FILTERED: "look for drops"}
    summary = a_summary((FULL, 3), (SILENT, 2), (FILTERED, 1), listeners=(listener,))
    assert [*what_to_do(summary, advice)] == [
        ("accept-queue-full", "Set back_log of MariaDB to 188 or more."),
        ("ack-missing", "look for drops"),
    ]
    assert [*what_to_do(a_summary((FULL, 3), listeners=()), advice)] == [
        ("accept-queue-full", "raise the backlog")
    ]


def test_of_many_causes_the_largest_are_named_and_the_others_counted() -> None:
    many = [(FULL._replace(server_port=port), 100 - port) for port in range(1, 9)]
    text = sentence(*many)
    assert text.startswith("764 clients are stuck: 99 of 10.9.0.1:1 (accept queue full); 98 of")
    assert text.endswith("97 of 10.9.0.1:3 (accept queue full); 470 others")


def test_the_backlog_is_that_of_the_socket_that_they_are_stuck_at() -> None:
    """SO_REUSEPORT: sockets of one port have limits of their own."""
    paused = LISTENER._replace(socket=9016, facts=facts(limit=16), advised_backlog=90)
    healthy = LISTENER._replace(socket=9500, facts=facts(limit=500), advised_backlog=None)
    at_paused = FULL._replace(socket=9016)
    assert "(backlog 16, needs 90)" in sentence((at_paused, 5), listeners=(healthy, paused))


def test_a_listener_of_another_namespace_is_another_one() -> None:
    assert "mariadbd" not in sentence((FULL._replace(netns=3), 5))
