"""Which findings make one line, and when it is printed."""

from __future__ import annotations

import pytest

from tcpstuck_bpf.judge.verdict import Finding
from tcpstuck_bpf.model import SECOND_NS, FourTuple
from tcpstuck_bpf.output import fold
from tcpstuck_bpf.output.fold import (
    GATHER_NS,
    LONGEST_REPEAT_NS,
    MAX_ADDRESSES,
    REPEAT_NS,
    Folding,
    Group,
)
from tests.builders import at, four_tuple
from tests.unit.output.test_render import finding, lines

BEGIN_NS = at(4)


def found(verdict_ns: int = BEGIN_NS, who: FourTuple | None = None, **changes: object) -> Finding:
    return finding(who or four_tuple())._replace(verdict_ns=verdict_ns, **changes)


def taken(folding: Folding, *findings: Finding) -> list[tuple[int, int]]:
    """Number and growth of each group that is printed meanwhile."""
    return [(g.number, g.growth) for one in findings for g in folding.take(one)]


def test_what_says_the_same_makes_one_group() -> None:
    folding = Folding()
    assert taken(folding, *[found(who=four_tuple(n)) for n in range(500)]) == []
    assert [(g.number, g.growth) for g in folding.rest()] == [(500, 500)]


@pytest.mark.parametrize(
    "changes",
    [
        {"verdict": "ack-failed"},
        {"certainty": "likely"},
        {"meaning": "another rule"},
        {"updates": "ack-missing"},
        {"to_be_updated": True},
        {"flood_suspected": True},
        {"four_tuple": four_tuple()._replace(netns=2)},
        {"four_tuple": four_tuple()._replace(server_port=25)},
        {"four_tuple": four_tuple()._replace(server_address=bytes(15) + b"\1")},
    ],
)
def test_what_says_something_else_does_not(changes: dict[str, object]) -> None:
    folding = Folding()
    taken(folding, found(), found()._replace(**changes))
    assert [g.number for g in folding.rest()] == [1, 1]


def test_the_socket_of_a_shared_port_is_no_reason_for_another_line() -> None:
    """Its backlog is the summary's; half of the clients at either would be two lines for one."""
    folding = Folding()
    taken(folding, found(listener_socket=1), found(listener_socket=2))
    assert [g.number for g in folding.rest()] == [2]


def test_a_group_is_printed_soon_and_then_ever_more_rarely() -> None:
    folding = Folding()
    tenth = SECOND_NS // 10
    printed = [
        (tenths, *group)
        for tenths in range(750)
        for group in taken(folding, found(BEGIN_NS + tenths * tenth))
    ]
    soon = GATHER_NS // tenth
    rarely = REPEAT_NS // tenth
    times = [soon, soon + rarely, soon + 3 * rarely, soon + 7 * rarely]
    assert [time for time, _, _ in printed] == times
    assert [number for _, number, _ in printed] == times
    assert [growth for _, _, growth in printed] == [soon, rarely, 2 * rarely, 4 * rarely]


def test_a_group_that_grows_for_long_is_still_printed_now_and_then() -> None:
    folding = Folding()
    times = [
        at_s
        for at_s in range(0, 8000, 2)
        for _ in taken(folding, found(BEGIN_NS + at_s * SECOND_NS))
    ]
    gaps = [later - earlier for earlier, later in zip(times, times[1:])]
    assert gaps[-3:] == [LONGEST_REPEAT_NS // SECOND_NS] * 3
    assert gaps == sorted(gaps)


def test_further_rows_name_the_cause_and_the_time_of_the_latest_client() -> None:
    """Two rules at one listener: only the cause tells their rows apart."""
    first = found(who=client(0), cause="rule handle 7", verdict="ack-filtered")
    later = first._replace(verdict_ns=first.verdict_ns + REPEAT_NS, four_tuple=client(5))
    rows = lines(
        [first, first._replace(verdict_ns=first.verdict_ns + GATHER_NS), later], 200, each=False
    )
    begun, *more = (row for row in rows if "!ack-filtered" in row)
    assert more
    assert all(row.endswith(": rule handle 7") for row in more)
    times = [row.split()[0] for row in (begun, *more)]
    assert times == sorted(times)
    assert times[-1] > times[0]


def test_more_is_since_the_latest_client_of_the_row_before_however_late_that_was_printed() -> None:
    """A busy machine prints a verdict seconds after its time."""
    first = found(who=client(0))
    late = found(BEGIN_NS + 15 * SECOND_NS, who=client(1), verdict="ack-missing")
    more = found(who=client(2))
    last = found(BEGIN_NS + 60 * SECOND_NS, who=client(3), verdict="ack-missing")
    rows = lines([first, late, more, last], 200, each=False)
    (text,) = (row for row in rows if " more since " in row and first.verdict in row)
    at_time, *_ = text.split()
    assert f"1 more since {at_time}" in text


def test_who_asks_gets_what_is_new_at_once_and_the_rest_when_it_is_due() -> None:
    folding = Folding()
    taken(folding, found())
    assert [g.number for g in folding.new(BEGIN_NS)] == [1]
    assert list(folding.new(BEGIN_NS)) == []
    taken(folding, found(BEGIN_NS + 1))
    assert list(folding.new(BEGIN_NS + REPEAT_NS - 1)) == []
    assert [(g.number, g.growth) for g in folding.new(BEGIN_NS + REPEAT_NS)] == [(2, 1)]
    assert list(folding.rest()) == []


def test_one_more_after_a_long_silence_is_due_at_once() -> None:
    folding = Folding()
    taken(folding, found())
    assert len(list(folding.new(BEGIN_NS))) == 1
    taken(folding, found(BEGIN_NS + 2 * REPEAT_NS))
    assert [g.number for g in folding.due(BEGIN_NS + 2 * REPEAT_NS)] == [2]


def test_a_suspected_flood_waits_however_new_it_is() -> None:
    folding = Folding()
    taken(folding, found(flood_suspected=True))
    assert list(folding.new(BEGIN_NS + REPEAT_NS - 1)) == []
    assert [g.number for g in folding.new(BEGIN_NS + REPEAT_NS)] == [1]


def test_times_and_corrections_of_a_line_are_those_since_the_line_before() -> None:
    folding = Folding()
    seen: list[Group] = []
    for second in (1, 2):
        syn = {"first_syn_ns": at(second), "flood_suspected": True}
        taken(folding, found(at(4), updates="ack-missing", **syn), found(at(4), **syn))
        for group in folding.rest():
            seen.append(group)
            assert (group.from_ns, group.until_ns) == (at(second), at(second))
            assert (group.growth, group.corrected) == (2, 1)
    assert seen[0] is seen[1]


def test_memory_is_bounded_and_nothing_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fold, "MAX_GROUPS", 10)
    folding = Folding()
    number = 0
    for port in range(1, 101):
        one = found(who=four_tuple()._replace(server_port=port))
        number += sum(growth for _, growth in taken(folding, one))
        assert len(folding._groups) <= 10
    number += sum(group.growth for group in folding.rest())
    assert number == 100
    for n in range(2 * MAX_ADDRESSES):
        taken(folding, found(who=four_tuple(n)))
    (group,) = (one for one in folding._groups.values() if one.number > 1)
    assert (len(group.addresses), group.number) == (MAX_ADDRESSES, 2 * MAX_ADDRESSES)


def client(number: int, port: int = 40_000) -> FourTuple:
    return four_tuple(number)._replace(client_port=port, netns=1)


def test_the_first_screen_says_what_is_wrong_and_what_to_do() -> None:
    """500 stuck clients of one cause on 80 columns: one row, and the advice once."""
    shown = lines([found(who=client(0, 40_000 + n)) for n in range(500)], 80, each=False)
    text = " ".join(" ".join(shown).split())
    assert sum("accept-queue-full" in line for line in shown) == 1
    assert "!accept-queue-full 500 10.0.0.0 192.0.2.1:3311" in text
    assert "ACK came, dropped: accept queue full" in text
    assert "ports 40000, 40001, 40002 ..." in text
    assert text.count("do: find out why the server does not accept") == 1
    assert len(shown) < 12


def test_many_addresses_are_counted_and_the_busiest_named() -> None:
    findings = [found(who=client(n % 7, 40_000 + n)) for n in range(20)]
    findings += [found(who=client(3, 50_000 + n)) for n in range(9)]
    text = " ".join(" ".join(lines(findings, 200, each=False)).split())
    assert "29 7 addresses 192.0.2.1:3311" in text
    assert "10.0.0.3 (12), 10.0.0.0 (3), 10.0.0.1 (3) ..." in text


def test_advice_is_given_once_for_each_cause() -> None:
    findings = [
        found(who=four_tuple()._replace(server_port=port), advice=advice)
        for port in (1, 2)
        for advice in ("do this", "do that")
    ]
    findings = [one._replace(meaning=one.advice) for one in findings]
    shown = lines(findings, 80, each=False)
    assert [line.strip() for line in shown if "do: " in line] == ["do: do this", "do: do that"]


def test_a_single_client_is_named_with_its_port() -> None:
    heading, row, *below = lines([found(who=client(0))], 80, each=False)
    assert heading.split() == ["time", "verdict", "(!", "stuck)", "clients", "from", "at"]
    assert row.split()[1:] == ["!accept-queue-full", "1", "10.0.0.0:40000", "192.0.2.1:3311"]
    assert "3.1 s, 1 SYN" in " ".join(below)


def test_the_header_does_not_repeat() -> None:
    findings = [
        found(who=client(0)._replace(netns=n % 2 + 1, server_port=n)) for n in range(1, 200)
    ]
    for each in (False, True):
        shown = lines(findings, 80, each=each)
        assert sum(line.startswith("time") for line in shown) == 1


def test_before_the_summary_only_what_no_line_has_named_is_printed() -> None:
    folding = Folding()
    flood = {"flood_suspected": True}
    taken(folding, found(), found(**flood))
    assert [g.number for g in folding.rest()] == [1, 1]
    taken(folding, found(), found(**flood), found(verdict="ack-filtered"))
    growing = [(g.key.flood_suspected, g.number, g.growth) for g in folding.unseen()]
    assert growing == [(True, 2, 1), (False, 1, 1)]
    assert list(folding.rest()) == []
