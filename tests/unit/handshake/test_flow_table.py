"""What leaves the kernel's table, and what is forgotten where there is no room for all."""

from __future__ import annotations

import pytest

from tcpstuck_bpf.handshake.correlate import Correlator
from tcpstuck_bpf.handshake.flow import State
from tcpstuck_bpf.model import Ending, EventKind, FourTuple, HandshakeId, Row, Sweep
from tests.builders import (
    START_NS,
    TIMEOUT_NS,
    ack_dropped,
    at,
    correlator,
    ended,
    event,
    four_tuple,
    handshake,
    repeated,
    reports,
    seconds,
    sweep,
)

SYN_ONCE = handshake()


def leaving(
    watching: Correlator, now_ns: int, table_rows: int, table_capacity: int
) -> list[FourTuple]:
    """Whose entries may leave the kernel's table."""
    return [gone.four_tuple for gone in watching.flows.expired(now_ns, table_rows, table_capacity)]


class TestExpired:
    """Which entries user space takes out of the kernel's table."""

    ROOMY = 1_000

    def test_an_ended_entry_goes_once_it_is_told(self) -> None:
        watching = correlator()
        watching.observe(sweep(at(1), ended(SYN_ONCE, Ending.RESET, at(1))))
        assert leaving(watching, at(1), 1, self.ROOMY) == []
        assert len(watching.advance(at(1))) == 1
        assert watching.flows.expired(at(1), 1, self.ROOMY) == [
            HandshakeId(four_tuple(), SYN_ONCE.first_syn_ns)
        ]
        assert leaving(watching, at(1), 1, self.ROOMY) == []

    def test_what_the_syn_queue_took_over_stays_as_long_as_a_cookie_of_it_is_valid(self) -> None:
        """Its ACK may come yet, and be dropped: gone, that client would be stuck unseen."""
        valid_s = 2 * 60
        watching = correlator()
        taken = ended(SYN_ONCE, Ending.TAKEN_OVER, at(1))
        assert reports([sweep(at(1), taken)], at(1), watching) == []
        assert leaving(watching, at(valid_s), 1, self.ROOMY) == []
        assert leaving(watching, at(valid_s) + 1, 1, self.ROOMY) == [four_tuple()]

    def test_an_entry_that_is_still_there_goes_again(self) -> None:
        watching = correlator()
        rows = sweep(at(1), ended(SYN_ONCE, Ending.RESET, at(1)))
        for time_ns in (at(1), at(2)):
            told = reports([rows._replace(time_ns=time_ns)], time_ns, watching)
            assert len(told) == (time_ns == at(1))
            assert leaving(watching, time_ns, 1, self.ROOMY) == [four_tuple()]

    def test_a_completion_whose_event_was_lost_goes_untold(self) -> None:
        watching = correlator()
        done = ended(SYN_ONCE, Ending.COMPLETED, at(0.1))
        assert reports([sweep(at(1), done)], at(1), watching) == []
        assert leaving(watching, at(1), 1, self.ROOMY) == [four_tuple()]

    def test_a_completion_that_was_told_is_gone_already(self) -> None:
        watching = correlator()
        done = ended(SYN_ONCE, Ending.COMPLETED, at(2.5))
        reports([event(EventKind.COMPLETED, done, at(2.5))], at(3), watching)
        assert leaving(watching, at(3), 0, self.ROOMY) == []

    def test_an_open_entry_goes_when_its_last_syn_is_too_old(self) -> None:
        life_ns = seconds(60)
        watching = correlator(row_life_ns=life_ns)
        entry = repeated(SYN_ONCE, at(1))
        reports([sweep(at(9), entry)], at(9), watching)
        last = entry.last_syn_ns
        assert leaving(watching, last + life_ns, 1, self.ROOMY) == []
        assert leaving(watching, last + life_ns + 1, 1, self.ROOMY) == [four_tuple()]
        assert watching.stats().let_go == 1
        assert watching.stats().still_stuck == 1

    def test_an_entry_let_go_is_not_told_again_by_a_late_sweep(self) -> None:
        watching = correlator(row_life_ns=seconds(60))
        reports([sweep(at(9), SYN_ONCE)], at(9), watching)
        leaving(watching, at(61), 1, self.ROOMY)
        assert reports([sweep(at(60.9), SYN_ONCE)], at(61.1), watching) == []

    @pytest.mark.parametrize(("rows", "leave"), [(7, 0), (75, 0), (76, 26), (100, 50)])
    def test_a_full_table_is_emptied_to_half_by_the_oldest_judged(
        self, rows: int, leave: int
    ) -> None:
        entries = [handshake(START_NS - n) for n in range(rows)]
        watching = correlator()
        reports([sweep(at(3), *entries)], at(3), watching)
        oldest_first = [four_tuple(n) for n in reversed(range(rows))]
        assert leaving(watching, at(3), rows, 100) == oldest_first[:leave]

    def test_who_was_turned_away_stays_longer_than_who_may_be_spoofed(self) -> None:
        """The rescue needs the entry of a client that waits for a full queue, amid a flood."""
        watching = correlator()
        stuck = ack_dropped(handshake(START_NS - 1), START_NS)
        reports([sweep(at(4), stuck, SYN_ONCE, SYN_ONCE)], at(4), watching)
        assert leaving(watching, at(4), 3, 3) == [four_tuple(1), four_tuple(2)]

    def test_what_is_not_judged_stays_however_full_the_table_is(self) -> None:
        watching = correlator()
        young = [repeated(handshake(at(2)), at(2.5)), handshake(at(2))]
        reports([sweep(at(3), SYN_ONCE, *young)], at(3), watching)
        assert leaving(watching, at(3), 3, 3) == [four_tuple(0)]

    def test_flows_that_left_the_table_are_forgotten_but_stay_counted(self) -> None:
        watching = correlator()
        unsure = event(EventKind.SYN_REPEATED, repeated(SYN_ONCE, at(1)), at(1), four_tuple(1))
        reports([sweep(at(1), ended(SYN_ONCE, Ending.RESET, at(1))), unsure], at(1), watching)
        leaving(watching, at(1), 1, self.ROOMY)
        assert watching.stats().flows == 2
        assert leaving(watching, at(120), 0, self.ROOMY) == []
        stats = watching.stats()
        assert (stats.flows, stats.reported_now, stats.unresolved) == (0, {State.RESET: 1}, 1)


class TestEviction:
    """More flows than there is room for."""

    def test_the_oldest_told_go_first_and_are_counted(self) -> None:
        watching = correlator(max_flows=3)
        told = [handshake(START_NS - 1), handshake(START_NS - 2)]
        reports([sweep(at(3), *told)], at(3), watching)
        newer = [repeated(handshake(START_NS - age), at(2)) for age in (5, 4)]
        rows = tuple(Row(four_tuple(n), e) for n, e in enumerate(newer, len(told)))
        assert reports([Sweep(at(3.1), rows)], at(3.1), watching) == []
        stats = watching.stats()
        assert (stats.flows, stats.evicted, stats.still_stuck) == (3, 1, 2)
        # Still in the table and told: it must not come back with the next sweep.
        assert leaving(watching, at(3.1), 4, 100) == [four_tuple(1)]

    def test_one_that_was_turned_away_goes_after_one_that_may_be_spoofed(self) -> None:
        watching = correlator(max_flows=2)
        stuck = ack_dropped(handshake(START_NS - 1), START_NS)
        reports([sweep(at(4), stuck, SYN_ONCE)], at(4), watching)
        watching.observe(event(EventKind.SYN_REPEATED, SYN_ONCE, at(4), four_tuple(7)))
        assert leaving(watching, at(4), 3, 100) == [four_tuple(1)]

    def test_an_ended_flow_makes_room_before_a_stuck_one_and_loses_nothing(self) -> None:
        watching = correlator(max_flows=2)
        reset = ended(handshake(START_NS), Ending.RESET, at(1))
        reports([sweep(at(3), handshake(START_NS - 9), reset)], at(3), watching)
        one_more = event(EventKind.SYN_REPEATED, repeated(SYN_ONCE, at(1)), at(1), four_tuple(7))
        watching.observe(one_more)
        assert watching.stats().evicted == 0
        assert leaving(watching, at(3), 3, 100) == [four_tuple(1)]

    def test_an_undecided_flow_that_is_evicted_is_found_again(self) -> None:
        watching = Correlator(TIMEOUT_NS, max_flows=1)
        entries = [ended(SYN_ONCE, Ending.RESET, at(1))] * 2
        told = {r.four_tuple for r in reports([sweep(at(1), *entries)], at(1), watching)}
        told |= {r.four_tuple for r in reports([sweep(at(2), *entries)], at(2), watching)}
        told |= {r.four_tuple for r in reports([sweep(at(3), entries[0])], at(3), watching)}
        assert told == {four_tuple(0), four_tuple(1)}

    def test_of_an_evicted_flow_that_left_the_table_no_entry_is_to_go(self) -> None:
        watching = correlator(max_flows=1)
        reports([sweep(at(3), SYN_ONCE)], at(3), watching)
        done = ended(SYN_ONCE, Ending.COMPLETED, at(4))
        told = reports([event(EventKind.COMPLETED, done, at(4))], at(4), watching)
        assert [report.state for report in told] == [State.RECOVERED]
        watching.observe(event(EventKind.SYN_REPEATED, SYN_ONCE, at(4), four_tuple(7)))
        assert leaving(watching, at(4), 1, 100) == []
