"""The live view's screen as rows of text, for any size of terminal. Pure.

At the top is the answer, in the words of the summary at the end; at the bottom are the keys.
Between them is a list that scrolls, one client's timeline, or the help.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from tcpstuck_bpf.judge.evidence import duration_text
from tcpstuck_bpf.judge.verdict import Finding
from tcpstuck_bpf.model import HandshakeId
from tcpstuck_bpf.output import page as text_page
from tcpstuck_bpf.output.page import grouped
from tcpstuck_bpf.output.rows import Rows
from tcpstuck_bpf.output.summary_text import SummaryText
from tcpstuck_bpf.terminal import printable
from tcpstuck_bpf.view.rows import Key, ListRows, Row, Style
from tcpstuck_bpf.view.snapshot import Snapshot, identity_of
from tcpstuck_bpf.view.state import Page, Press, State, chosen, place, press

KEYS = {
    Page.LIST: "Enter open  f fold  s sort  ? help  q quit",
    Page.CLIENT: "Left back  Up Down scroll  q quit",
    Page.HELP: "Left back  Up Down scroll  q quit",
}
_HELP = """\
Up Down k j           move the cursor, or scroll
PageUp PageDown       move by a screen
Home End g G          move to the first or the last row
Enter Right           on a cause: list its newest clients
                      on a client: show its timeline and evidence
                      on a heading: fold or unfold the section
Left Esc Backspace    go back, or close the cause
f                     fold or unfold the section
s                     sort the section in another way
?                     show or leave this help
q Ctrl-C              end the run, and print its summary

Queue lengths are in connections. An accept queue is full when it is longer
than its limit. Its present length is read about once a second; a recording
does not have it. The kernel does not show the present length of a SYN queue.
Peaks are those of the whole run. Rates are averages of the last 10 s, and of
the whole run at the end of a recording.
"""


class Frame(NamedTuple):
    """What is on the screen."""

    rows: tuple[Row, ...]
    """Exactly as many as the screen has lines, none longer than it has columns."""
    cursor: int | None
    """Number of the row with the cursor; None if no row has it."""


class Frames:
    """Lays out snapshots.

    `page` makes the helpers for a width in columns; they must not use colours.
    """

    def __init__(self, page: Callable[[int], text_page.Page]) -> None:
        self._page = page

    def frame(
        self, snapshot: Snapshot | None, state: State, width: int, height: int
    ) -> tuple[Frame, State]:
        """The screen, and the state with the cursor where it is drawn.

        `snapshot`: None before the first one.
        """
        page = self._page(width)
        head, foot = self._edges(snapshot, state, page, height)
        space = max(0, height - len(head) - len(foot))
        rows = self._middle(snapshot, state, page)
        cursor = None
        if state.page is Page.LIST:
            state = place(state, rows, max(1, space))
            top = state.top
            if rows and state.cursor_at < top + space:
                cursor = len(head) + state.cursor_at - top
        else:
            top = max(0, min(state.scrolled, len(rows) - space))
        shown = list(rows[top : top + space])
        shown += [Row("")] * (space - len(shown))
        cut = [row._replace(text=_cut(row.text, width)) for row in (*head, *shown, *foot)]
        if cursor is not None and cursor >= height:
            cursor = None
        return Frame(tuple(cut[:height]), cursor), state

    def press(
        self, snapshot: Snapshot | None, state: State, key: Press, width: int, height: int
    ) -> State:
        """The state after a key, for a screen of this size."""
        page = self._page(width)
        head, foot = self._edges(snapshot, state, page, height)
        space = max(1, height - len(head) - len(foot))
        rows = self._middle(snapshot, state, page)
        if state.page is Page.LIST:
            state = place(state, rows, space)
        return press(state, key, rows, space, _clients(snapshot))

    def _edges(
        self, snapshot: Snapshot | None, state: State, page: text_page.Page, height: int
    ) -> tuple[list[Row], list[Row]]:
        """The rows above and below the middle. On a low screen the answer is cut."""
        foot = [Row(KEYS[state.page], Style.BOLD)] if height > 2 else []
        if snapshot is None:
            return [Row("tcpstuck-trace: no figures yet", Style.BOLD)], foot
        summary = snapshot.summary
        bad = summary.still_stuck or summary.data_lost or summary.unwatched
        style = Style.RED if bad else Style.BOLD
        answer = [Row(line, style) for line in SummaryText(page).verdict(summary)]
        most = max(1, height // 3 - 1)
        if len(answer) > most:
            answer[most - 1 :] = [Row(f"{answer[most - 1].text} ...", style)]
        return [*answer, *self._figures(snapshot, page)][: max(1, height - 2)], foot

    @staticmethod
    def _figures(snapshot: Snapshot, page: text_page.Page) -> Iterator[Row]:
        """One line of figures, and an empty one."""
        summary = snapshot.summary
        lost = summary.lost_events + summary.untracked
        rate = f"{snapshot.cookies_per_second:.1f} cookies/s{' on average' * snapshot.ended}"
        figures = (
            f"{grouped(lost)} lost" if lost else "nothing lost",
            f"{grouped(summary.cookies_sent)} cookies",
            rate,
            f"{grouped(summary.verdicts.get('completed', 0))} completed",
            f"{grouped(summary.pending)} waiting",
            *([f"{grouped(summary.rescue.rescued)} rescued"] if summary.rescue else []),
            f"{summary.watched} by {summary.mode}",
        )
        ran = duration_text(summary.duration_ns)
        when = f"end, after {ran}" if snapshot.ended else f"{page.time(snapshot.now_ns)}, {ran}"
        yield Row(f"{when}: {', '.join(figures)}", Style.RED if lost else Style.PLAIN)
        yield Row("")

    def _middle(
        self, snapshot: Snapshot | None, state: State, page: text_page.Page
    ) -> Sequence[Row]:
        if state.page is Page.HELP:
            return [Row(line) for line in _HELP.splitlines()]
        if snapshot is None:
            return []
        if state.page is Page.CLIENT and state.client is not None:
            return list(_timeline(snapshot, state.client, page))
        return self._list(snapshot, state, page)

    @staticmethod
    def _list(snapshot: Snapshot, state: State, page: text_page.Page) -> list[Row]:
        """The list, with the row under the cursor in full."""

        def rows(under_cursor: Key | None) -> list[Row]:
            order = dict(state.sorted_by)
            made = ListRows(snapshot, page, under_cursor, state.folded, state.opened, order)
            return list(made.rows())

        return rows(state.cursor) if state.moved else rows(chosen(state, rows(None)))


def _clients(snapshot: Snapshot | None) -> dict[HandshakeId, Finding]:
    causes = () if snapshot is None else snapshot.causes
    return {identity_of(one): one for cause in causes for one in cause.clients}


def _timeline(snapshot: Snapshot, finding: Finding, page: text_page.Page) -> Iterator[Row]:
    """One client's timeline, evidence and advice, as by -v."""
    latest = _clients(snapshot).get(identity_of(finding))
    if latest is None:
        yield Row("no longer stuck, or too many newer clients; this is how it was", Style.BOLD)
    finding = latest or finding
    for line in Rows(page, each=True, verbose=True).finding(finding):
        yield Row(line)
    age_ns = max(0, snapshot.now_ns - finding.first_syn_ns)
    yield Row(f"first SYN {duration_text(age_ns)} ago")


def _cut(text: str, width: int) -> str:
    """The text as one line of at most `width` columns."""
    text = printable(text)
    return text if len(text) <= width else text[: max(0, width - 3)] + "..."[:width]
