"""What the live view shows on a screen of a given size, and what each key does."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tcpstuck_bpf.judge.stuck_now import StuckGroup
from tcpstuck_bpf.output.render import TableRenderer
from tcpstuck_bpf.view.frame import Frame
from tcpstuck_bpf.view.rows import OPENED, ORDERS, Row, Section, Style
from tcpstuck_bpf.view.snapshot import Snapshot
from tcpstuck_bpf.view.state import Page, Press, State
from tests.builders import four_tuple
from tests.unit.view.world import World, a_header, busy_world, frames

BUSY = busy_world().snapshot(15, "tcpstuck-trace: nobody listens on port 25")
EMPTY = World().snapshot(1)


def played(
    snapshot: Snapshot | None, keys: list[Press], width: int = 80, height: int = 24
) -> tuple[Frame, State]:
    """The screen after these keys; it is drawn after each."""
    laid_out, state = frames(), State()
    frame, state = laid_out.frame(snapshot, state, width, height)
    for key in keys:
        state = laid_out.press(snapshot, state, key, width, height)
        frame, state = laid_out.frame(snapshot, state, width, height)
    return frame, state


def is_cause(row: Row) -> bool:
    """Whether a row is that of a cause."""
    return row.key is not None and isinstance(row.key.item, StuckGroup)


def text(frame: Frame) -> str:
    """All its rows."""
    return "\n".join(row.text for row in frame.rows)


@settings(max_examples=40)
@given(
    snapshot=st.sampled_from([BUSY, EMPTY, None]),
    keys=st.lists(st.sampled_from(Press), max_size=25),
    width=st.integers(1, 250),
    height=st.integers(1, 70),
)
def test_a_screen_of_any_size_is_filled_and_never_exceeded(
    snapshot: Snapshot | None, keys: list[Press], width: int, height: int
) -> None:
    frame, state = played(snapshot, keys, width, height)
    assert len(frame.rows) == height
    assert max(len(row.text) for row in frame.rows) <= width
    assert all(row.text.isprintable() for row in frame.rows)
    if frame.cursor is not None:
        assert frame.rows[frame.cursor].key == state.cursor


@settings(max_examples=40)
@given(
    keys=st.lists(st.sampled_from(Press), max_size=25),
    width=st.integers(40, 250),
    height=st.integers(6, 70),
)
def test_in_the_list_the_cursor_is_always_in_sight(
    keys: list[Press], width: int, height: int
) -> None:
    frame, state = played(BUSY, keys, width, height)
    assert (frame.cursor is not None) == (state.page is Page.LIST)


def test_the_answer_is_on_top_in_the_words_of_the_summary() -> None:
    frame, _ = played(BUSY, [], 200)
    one = a_header()
    renderer = TableRenderer(
        clock=one.clock, width=200, colour=False, verbose=False, own_netns=1, netns_names={}
    )
    words = next(line for line in renderer.summary(BUSY.summary) if line)
    assert words.startswith("140 clients of greeter (pid 7) at 192.0.2.1:3311 in network namespace")
    assert frame.rows[0].text.startswith(words[:60])


def test_the_first_screen_answers_on_eighty_columns() -> None:
    """What is stuck, why, at which listener, and what to do, without a key."""
    frame, _ = played(BUSY, [])
    shown = text(frame)
    for words in ("140 clients of greeter", "accept queue full", "192.0.2.1:3311", "ack-filtered"):
        assert words in shown
    assert "    do: find out why the server does not accept" in shown
    chosen = frame.rows[frame.cursor or 0].text
    assert chosen.split()[:2] == ["120", "accept-queue-full"]


def test_a_run_without_news_says_so() -> None:
    frame, _ = played(EMPTY, [])
    assert "nothing to see" in frame.rows[0].text
    assert played(None, [])[0].rows[0].text == "tcpstuck-trace: no figures yet"


def test_enter_on_a_cause_lists_its_newest_clients() -> None:
    frame, state = played(BUSY, [Press.OPEN], height=60)
    (opened,) = state.opened
    assert isinstance(opened, StuckGroup)
    assert opened.verdict == "accept-queue-full"
    lines = text(frame).splitlines()
    at = next(n for n, line in enumerate(lines) if line.startswith("    verdict at"))
    listed = [line.split()[1] for line in lines[at + 1 : at + 1 + OPENED]]
    newest = [finding.four_tuple.client_ip for finding in BUSY.causes[0].clients[:OPENED]]
    assert listed == [f"{address}:40000" for address in newest]
    assert lines[at + 1 + OPENED] == "    and 110 more clients (all of them in --json)"
    closed, _ = played(BUSY, [Press.OPEN, Press.OPEN], height=60)
    assert text(closed) == text(played(BUSY, [], height=60)[0])


def test_left_on_a_client_of_an_opened_cause_closes_the_cause() -> None:
    frame, state = played(BUSY, [Press.OPEN, *[Press.DOWN] * 4, Press.BACK], height=60)
    assert state.opened == frozenset()
    assert isinstance(state.cursor.item, StuckGroup)
    assert text(frame) == text(played(BUSY, [], height=60)[0])


@pytest.mark.parametrize("number", [0, 1, 2])
def test_the_cause_under_the_cursor_is_shown_in_full_with_what_to_do(number: int) -> None:
    frame, state = played(BUSY, [Press.DOWN] * number, height=60)
    lines = text(frame).splitlines()
    shown = [n for n, line in enumerate(lines) if line.startswith("    do: ")]
    assert len(shown) == 1
    assert isinstance(state.cursor.item, StuckGroup)
    advice = BUSY.causes[number].clients[0].advice
    assert advice.startswith(lines[shown[0]].removeprefix("    do: "))
    assert frame.cursor is not None
    assert frame.cursor < shown[0]


def test_the_listener_under_the_cursor_has_its_owner_in_full() -> None:
    laid_out, state = frames(), State()
    while state.cursor.section is not Section.LISTENERS or state.cursor.item is None:
        state = laid_out.press(BUSY, state, Press.DOWN, 80, 60)
    assert "    greeter (pid 7), in network namespace web" in text(
        laid_out.frame(BUSY, state, 80, 60)[0]
    )


def test_on_a_low_screen_the_answer_is_cut_with_a_sign_and_the_figures_stay() -> None:
    frame, _ = played(BUSY, [], 60, 12)
    lines = text(frame).splitlines()
    figures = next(n for n, line in enumerate(lines) if "nothing lost" in line)
    assert lines[figures - 1].endswith("...")
    assert all(row.style is Style.RED for row in frame.rows[:figures])


def test_enter_on_a_client_shows_its_timeline_and_left_goes_back_to_it() -> None:
    to_client = [Press.OPEN, Press.DOWN]
    before, at_client = played(BUSY, to_client)
    frame, state = played(BUSY, [*to_client, Press.OPEN], height=80)
    assert state.page is Page.CLIENT
    finding = BUSY.causes[0].clients[0]
    assert state.client == finding
    shown = text(frame)
    assert f"{finding.four_tuple.client_ip}:40000" in shown
    for entry in finding.timeline:
        assert entry.what in shown
    assert "advice: " in shown
    back, after = played(BUSY, [*to_client, Press.OPEN, Press.BACK])
    assert after.cursor == at_client.cursor
    assert text(back) == text(before)


def test_an_open_timeline_says_when_the_client_is_no_longer_stuck() -> None:
    laid_out = frames()
    state = State()
    for key in (Press.OPEN, Press.DOWN, Press.OPEN):
        state = laid_out.press(BUSY, state, key, 80, 24)
    frame, state = laid_out.frame(EMPTY, state, 80, 24)
    assert "no longer stuck" in text(frame)
    assert state.client is not None
    assert f"{state.client.four_tuple.client_ip}:40000" in text(frame)


IN_FULL = {
    line
    for number in range(5)
    for line in text(played(BUSY, [Press.DOWN] * number)[0]).splitlines()
    if line.startswith("    ")
}
"""The rows below a cause or a listener while the cursor is on it; folding moves the cursor."""


@pytest.mark.parametrize("section", list(Section))
def test_f_folds_the_section_under_the_cursor(section: Section) -> None:
    laid_out, height = frames(), 400
    state = State()
    while state.cursor.section is not section:
        state = laid_out.press(BUSY, state, Press.DOWN, 80, height)
    before = text(laid_out.frame(BUSY, state, 80, height)[0])
    state = laid_out.press(BUSY, state, Press.FOLD, 80, height)
    folded = text(laid_out.frame(BUSY, state, 80, height)[0])
    assert f"- {section.value}" in before
    assert f"+ {section.value}" in folded
    shown = set(folded.splitlines())
    assert {f"- {one.value}" for one in Section if one is not section} <= {
        line.partition(":")[0] for line in shown
    }
    assert len(shown) < len(set(before.splitlines()))
    state = laid_out.press(BUSY, state, Press.FOLD, 80, height)
    unfolded = laid_out.frame(BUSY, state, 80, height)[0]
    assert set(before.splitlines()) - set(text(unfolded).splitlines()) <= IN_FULL


def test_s_sorts_the_section_under_the_cursor_in_each_order_and_then_in_the_first_again() -> None:
    laid_out, state, height = frames(), State(), 400
    orders, firsts = [], []
    for _ in range(len(ORDERS[Section.CAUSES]) + 1):
        frame, state = laid_out.frame(BUSY, state, 80, height)
        lines = text(frame).splitlines()
        at = next(n for n, line in enumerate(lines) if line.startswith("- causes"))
        orders.append(lines[at].partition("(sorted by ")[2].rstrip(")"))
        firsts.append([row.text.split()[1] for row in frame.rows if is_cause(row)])
        state = laid_out.press(BUSY, state, Press.SORT, 80, height)
    assert orders == ["clients", "listener", "verdict", "clients"]
    by_number, _, by_verdict, again = firsts
    assert by_number == again == ["accept-queue-full", "ack-filtered", "ack-missing"]
    assert by_verdict == sorted(by_verdict)


def test_the_cursor_stays_on_its_cause_when_others_come_before_it() -> None:
    world = World()
    world.stuck(range(3), "ack-filtered")
    laid_out = frames()
    first = world.snapshot(5)
    state = laid_out.press(first, State(), Press.DOWN, 80, 24)
    state = laid_out.press(first, state, Press.UP, 80, 24)
    chosen = state.cursor
    world.stuck(range(100, 120), "accept-queue-full", began=6)
    frame, state = laid_out.frame(world.snapshot(11), state, 80, 24)
    assert state.cursor == chosen
    assert frame.cursor is not None
    assert frame.rows[frame.cursor].text.split()[:2] == ["3", "ack-filtered"]


def test_what_the_run_said_on_standard_error_is_among_the_notes() -> None:
    frame, _ = played(BUSY, [Press.LAST])
    assert "nobody listens on port 25" in text(frame)


def test_what_was_lost_is_on_the_first_screen() -> None:
    summary = BUSY.summary._replace(lost_events=12)
    frame, _ = played(BUSY._replace(summary=summary), [])
    assert "12 lost" in text(frame)
    assert "nothing lost" in text(played(BUSY, [])[0])


def test_the_clients_of_one_cause_can_be_sorted_by_age() -> None:
    laid_out, state, height = frames(), State(), 400
    while state.cursor.section is not Section.CLIENTS:
        state = laid_out.press(BUSY, state, Press.DOWN, 80, height)
    state = laid_out.press(BUSY, state, Press.SORT, 80, height)
    frame, _ = laid_out.frame(BUSY, state, 80, height)
    lines = text(frame).splitlines()
    at = next(n for n, line in enumerate(lines) if "(sorted by age)" in line)
    ages = [float(line.split()[-2]) for line in lines[at + 2 : at + 2 + len(BUSY.clients)]]
    assert ages == sorted(ages, reverse=True)
    assert len(set(ages)) > 1


def test_names_of_strangers_cannot_control_the_terminal() -> None:
    frame, _ = played(BUSY, [Press.OPEN], 200, 60)
    assert "web\\x1b[31m" in text(frame)
    assert four_tuple().netns in a_header().netns_names
