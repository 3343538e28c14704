"""The state that keys change: page, cursor, folded sections, order. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum
from typing import NamedTuple

from tcpstuck_bpf.judge.stuck_now import StuckGroup
from tcpstuck_bpf.judge.verdict import Finding
from tcpstuck_bpf.model import HandshakeId
from tcpstuck_bpf.view.rows import ORDERS, Key, Row, Section


class Press(Enum):
    """What a key asks for."""

    UP = "up"
    DOWN = "down"
    PAGE_UP = "page up"
    PAGE_DOWN = "page down"
    FIRST = "first"
    LAST = "last"
    OPEN = "open"
    BACK = "back"
    FOLD = "fold"
    SORT = "sort"
    HELP = "help"
    QUIT = "quit"


class Page(Enum):
    """The pages of the view."""

    LIST = "list"
    CLIENT = "client"
    HELP = "help"


class State(NamedTuple):
    """What the user has chosen."""

    page: Page = Page.LIST
    moved: bool = False
    """Whether a key was pressed. Until then the cursor stays on the first cause."""
    cursor: Key = Key(Section.CAUSES)
    cursor_at: int = 0
    """Number of the cursor's row. If that row disappears, the cursor stays near this place."""
    top: int = 0
    """Number of the first row shown of the list."""
    client: Finding | None = None
    """The client whose timeline is open."""
    scrolled: int = 0
    """Number of the first row shown of another page."""
    folded: frozenset[Section] = frozenset()
    opened: frozenset[StuckGroup] = frozenset()
    sorted_by: Mapping[Section, int] = {}


def place(state: State, rows: Sequence[Row], height: int) -> State:
    """The state with the cursor on a row that exists, and with that row in sight.

    `height`: number of rows that fit on the screen.
    """
    at = next((n for n, row in enumerate(rows) if row.key == chosen(state, rows)), None)
    if at is None:
        with_key = [n for n, row in enumerate(rows) if row.key is not None]
        if not with_key:
            return state._replace(cursor_at=0, top=0)
        at = min(with_key, key=lambda n: abs(n - state.cursor_at))
    key = rows[at].key
    assert key is not None
    return state._replace(cursor=key, cursor_at=at, top=_top(state.top, at, len(rows), height))


def chosen(state: State, rows: Sequence[Row]) -> Key | None:
    """The row under the cursor; before a key was pressed, the first one that is no heading."""
    return state.cursor if state.moved else _first_item(rows)


def _first_item(rows: Sequence[Row]) -> Key | None:
    """The first row that is no heading, else the first heading; None if there is neither."""
    keys = [row.key for row in rows if row.key is not None]
    return next((key for key in keys if key.item is not None), keys[0] if keys else None)


def _top(top: int, at: int, length: int, height: int) -> int:
    """The first row to show, so that row `at` is in sight. It changes as little as possible."""
    top = min(top, max(0, length - height))
    if at < top:
        # With the rows above that have no key, such as column headings, as the screen allows.
        return max(0, at - min(2, height - 1)) if at <= 2 else at
    return max(top, at - height + 1)


def press(
    state: State,
    key: Press,
    rows: Sequence[Row],
    height: int,
    clients: Mapping[HandshakeId, Finding],
) -> State:
    """The state after a key. `rows`: all rows of the present page."""
    state = state._replace(moved=True)
    if key is Press.HELP:
        page = Page.LIST if state.page is Page.HELP else Page.HELP
        return state._replace(page=page, scrolled=0)
    if state.page is not Page.LIST:
        if key is Press.BACK:
            return state._replace(page=Page.LIST, client=None, scrolled=0)
        return state._replace(scrolled=_moved(state.scrolled, key, height, len(rows) - height))
    if key is Press.OPEN:
        return _open(state, clients)
    if key is Press.BACK:
        return _close(state, rows)
    if key is Press.FOLD:
        return state._replace(
            folded=state.folded ^ {state.cursor.section},
            cursor=Key(state.cursor.section),
        )
    if key is Press.SORT:
        section = state.cursor.section
        chosen = (state.sorted_by.get(section, 0) + 1) % max(1, len(ORDERS.get(section, ())))
        return state._replace(sorted_by={**state.sorted_by, section: chosen})
    return _move(state, key, rows, height)


def _moved(at: int, key: Press, height: int, last: int) -> int:
    """A row number after a key that moves."""
    by = {
        Press.UP: -1,
        Press.DOWN: 1,
        Press.PAGE_UP: -max(1, height - 1),
        Press.PAGE_DOWN: max(1, height - 1),
        Press.FIRST: -at,
        Press.LAST: last - at,
    }.get(key, 0)
    return max(0, min(at + by, last))


def _move(state: State, key: Press, rows: Sequence[Row], height: int) -> State:
    chosen = [n for n, row in enumerate(rows) if row.key is not None]
    wanted = _moved(state.cursor_at, key, height, len(rows) - 1)
    if not chosen or wanted == state.cursor_at:
        return state
    ahead = [n for n in chosen if (n >= wanted if wanted > state.cursor_at else n <= wanted)]
    at = min(ahead or chosen, key=lambda n: abs(n - wanted))
    found = rows[at].key
    assert found is not None
    return state._replace(cursor=found, cursor_at=at)


def _open(state: State, clients: Mapping[HandshakeId, Finding]) -> State:
    """Open a client's timeline, or open or close a cause; on a heading, fold or unfold."""
    item = state.cursor.item
    if item is None:
        return state._replace(folded=state.folded ^ {state.cursor.section})
    if isinstance(item, StuckGroup):
        return state._replace(opened=state.opened ^ {item})
    finding = clients.get(item) if isinstance(item, HandshakeId) else None
    if finding is None:
        return state
    return state._replace(page=Page.CLIENT, client=finding, scrolled=0)


def _close(state: State, rows: Sequence[Row]) -> State:
    """Close the cause under the cursor, or the one whose client is under the cursor."""
    if state.cursor.section is not Section.CAUSES:
        return state
    for row in reversed(rows[: state.cursor_at + 1]):
        if row.key is not None and isinstance(row.key.item, StuckGroup):
            return state._replace(
                opened=state.opened - {row.key.item}, cursor=row.key, cursor_at=state.cursor_at
            )
    return state
