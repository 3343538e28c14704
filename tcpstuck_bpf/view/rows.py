"""The rows of the live view's list: causes, stuck clients, listeners, losses. Pure.

A row with a key can be chosen with the cursor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import Enum
from typing import Any, NamedTuple, TypeVar

from tcpstuck_bpf.judge.evidence import duration_text
from tcpstuck_bpf.judge.rules import RULES
from tcpstuck_bpf.judge.stuck_now import StuckGroup
from tcpstuck_bpf.judge.verdict import Finding
from tcpstuck_bpf.model import HandshakeId, ListenerId, address_text
from tcpstuck_bpf.output.answer import advice_for
from tcpstuck_bpf.output.page import INDENT, Page, counted, endpoint, grouped
from tcpstuck_bpf.output.summary_text import gaps_of, losses_of
from tcpstuck_bpf.terminal import printable
from tcpstuck_bpf.view.snapshot import Cause, ListenerView, Snapshot, identity_of

_Item = TypeVar("_Item", Cause, Finding, ListenerView)

_MEANING = {rule.name: rule.meaning for rule in RULES}


OPENED = 10
"""Largest number of clients listed below an opened cause."""


class Style(Enum):
    """How a row is drawn. Without colour, RED is drawn as BOLD is."""

    PLAIN = "plain"
    BOLD = "bold"
    RED = "red"


class Section(Enum):
    """The sections of the list, by their headings."""

    CAUSES = "causes of stuck clients"
    LISTENERS = "listeners that sent cookies"
    CLIENTS = "stuck clients, the newest"
    UNSEEN = "losses, gaps and notes"


class Key(NamedTuple):
    """Names a row that can be chosen, however the rows around it change."""

    section: Section
    item: StuckGroup | HandshakeId | ListenerId | int | None = None
    """None: the heading of the section. A number: a line of the last section."""


class Row(NamedTuple):
    """One line of the screen."""

    text: str
    style: Style = Style.PLAIN
    key: Key | None = None


class Order(NamedTuple):
    """A way to sort a section's rows."""

    name: str
    rank: Callable[[Any], Any]
    """Gives the value to sort by, the smallest first."""


ORDERS: dict[Section, tuple[Order, ...]] = {
    Section.CAUSES: (
        Order("clients", lambda cause: -cause.number),
        Order("listener", lambda cause: (cause.group.server_ip, cause.group.server_port)),
        Order("verdict", lambda cause: cause.group.verdict),
    ),
    Section.CLIENTS: (
        Order("time", lambda finding: -finding.verdict_ns),
        Order("age", lambda finding: finding.first_syn_ns),
        Order("client", lambda finding: finding.four_tuple),
    ),
    Section.LISTENERS: (
        Order("stuck clients", lambda one: -one.stuck),
        Order("cookies per second", lambda one: -one.cookies_per_second),
        Order("accept queue", lambda one: -_fullness(one)),
        Order("address", lambda one: (one.seen.facts.server_address, one.seen.facts.server_port)),
    ),
}
"""The orders of each section that can be sorted; the first one is the default."""


def _fullness(one: ListenerView) -> float:
    """Length of the accept queue as a share of its limit: the present one, else the highest."""
    facts = one.seen.facts
    length = facts.peak_accept_queue if one.accept_queue is None else one.accept_queue
    return length / max(1, facts.limit)


class ListRows:
    """Makes the rows of one snapshot for one width.

    `chosen`: the row under the cursor, which is shown in full. `folded`: sections of which only
    the heading is shown. `opened`: causes whose clients are shown. `sorted_by`: the number of the
    chosen order, by section.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        page: Page,
        chosen: Key | None,
        folded: frozenset[Section],
        opened: frozenset[StuckGroup],
        sorted_by: dict[Section, int],
    ) -> None:
        self._snapshot = snapshot
        self._page = page
        self._chosen = chosen
        self._folded = folded
        self._opened = opened
        self._sorted_by = sorted_by

    def rows(self) -> Iterator[Row]:
        """All rows, in order."""
        shown = self._snapshot
        yield from self._section(Section.CAUSES, len(shown.causes), self._causes)
        yield from self._section(Section.LISTENERS, len(shown.listeners), self._listeners)
        more = sum(cause.number for cause in shown.causes) - len(shown.clients)
        yield from self._section(Section.CLIENTS, len(shown.clients), self._clients, more)
        unseen = list(self._unseen())
        yield from self._section(Section.UNSEEN, len(unseen), lambda: self._wrapped(unseen))

    def _section(
        self, section: Section, number: int, rows: Callable[[], Iterator[Row]], more: int = 0
    ) -> Iterator[Row]:
        folded = section in self._folded
        heading = (
            f"{'+' if folded else '-'} {section.value}: {grouped(number) if number else 'none'}"
        )
        if more > 0:
            heading += f" of {grouped(number + more)}"
        order = self._order(section)
        if order is not None and number > 1:
            heading += f" (sorted by {order.name})"
        yield Row(heading, Style.BOLD, Key(section))
        if not folded:
            yield from rows()

    def _order(self, section: Section) -> Order | None:
        orders = ORDERS.get(section)
        return None if orders is None else orders[self._sorted_by.get(section, 0) % len(orders)]

    def _sorted(self, section: Section, some: Sequence[_Item]) -> list[_Item]:
        order = self._order(section)
        assert order is not None, section
        return sorted(some, key=order.rank)

    def _causes(self) -> Iterator[Row]:
        causes = self._sorted(Section.CAUSES, self._snapshot.causes)
        cells = [self._cause_cells(cause) for cause in causes]
        lines = _columns([("clients", "verdict", "at", "why"), *cells], "rlll")
        yield from (Row(next(lines), Style.BOLD) for _ in causes[:1])
        for cause, line in zip(causes, lines):
            key = Key(Section.CAUSES, cause.group)
            yield Row(line, Style.RED, key)
            is_open = cause.group in self._opened
            if is_open or key == self._chosen:
                yield from self._what_to_do(cause)
            if is_open:
                yield from self._opened_cause(cause)

    def _cause_cells(self, cause: Cause) -> tuple[str, ...]:
        group = cause.group
        why = group.cause or _MEANING[group.verdict]
        if group.certainty != "certain" and group.certainty not in why:
            why += f" ({group.certainty})"
        at = endpoint(group.server_ip, group.server_port)
        return (grouped(cause.number), group.verdict, at, why + self._page.in_netns(group.netns))

    def _what_to_do(self, cause: Cause) -> Iterator[Row]:
        """The cause in full, and what to do."""
        *_, why = self._cause_cells(cause)
        told = cause.clients[0].advice if cause.clients else ""
        advice = advice_for(self._snapshot.summary, cause.group, told)
        for text, first in ((why, f"{INDENT}why: "), (advice, f"{INDENT}do: ")):
            if text:
                yield from (Row(line) for line in self._page.wrapped(text, first))

    def _opened_cause(self, cause: Cause) -> Iterator[Row]:
        """The newest clients of a cause."""
        shown = cause.clients[:OPENED]
        yield from self._client_rows(Section.CAUSES, shown)
        more = cause.number - len(shown)
        if more > 0:
            yield Row(f"{INDENT}and {counted(more, 'more client')} (all of them in --json)")

    def _clients(self) -> Iterator[Row]:
        yield from self._client_rows(
            Section.CLIENTS, self._sorted(Section.CLIENTS, self._snapshot.clients)
        )

    def _client_rows(self, section: Section, findings: Sequence[Finding]) -> Iterator[Row]:
        cells = [self._client_cells(finding) for finding in findings]
        heading = ("verdict at", "client", "server", "verdict", "age")
        lines = _columns([heading, *cells], "llllr")
        yield from (Row(f"{INDENT}{next(lines)}", Style.BOLD) for _ in findings[:1])
        for finding, line in zip(findings, lines):
            yield Row(f"{INDENT}{line}", Style.PLAIN, Key(section, identity_of(finding)))

    def _client_cells(self, finding: Finding) -> tuple[str, ...]:
        who = finding.four_tuple
        age_ns = self._snapshot.now_ns - finding.first_syn_ns
        return (
            self._page.time(finding.verdict_ns),
            endpoint(who.client_ip, who.client_port),
            endpoint(who.server_ip, who.server_port),
            finding.verdict,
            duration_text(max(0, age_ns)),
        )

    def _listeners(self) -> Iterator[Row]:
        listeners = self._sorted(Section.LISTENERS, self._snapshot.listeners)
        heading = (
            ("", "SYN queue", "accept", "accept", "", "", "", ""),
            ("listener", "peak", "now", "peak", "limit", "cookies/s", "stuck", "owner"),
        )
        lines = _columns([*heading, *map(self._listener_cells, listeners)], "lrrrrrrl")
        yield from (Row(next(lines), Style.BOLD) for _ in heading if listeners)
        for one, line in zip(listeners, lines):
            key = Key(Section.LISTENERS, one.listener)
            yield Row(line, Style.RED if one.stuck else Style.PLAIN, key)
            if key == self._chosen:
                who = ", ".join(one.seen.owners) or "owner unknown"
                where = self._page.netns(one.seen.facts.netns)
                text = f"{who}, in network namespace {where}"
                yield from (Row(below) for below in self._page.wrapped(text, INDENT))

    def _listener_cells(self, one: ListenerView) -> tuple[str, ...]:
        facts = one.seen.facts
        where = endpoint(address_text(one.seen.bound or facts.server_address), facts.server_port)
        return (
            where,
            grouped(facts.peak_syn_queue),
            "-" if one.accept_queue is None else grouped(one.accept_queue),
            grouped(facts.peak_accept_queue),
            grouped(facts.limit),
            f"{one.cookies_per_second:.1f}",
            grouped(one.stuck),
            ", ".join(one.seen.owners) + self._page.in_netns(facts.netns),
        )

    def _unseen(self) -> Iterator[str]:
        summary = self._snapshot.summary
        yield from [counted(summary.lost_events, "lost event")] * bool(summary.lost_events)
        yield from (*losses_of(summary), *gaps_of(summary))
        yield from (*summary.notes, *self._snapshot.remarks)

    def _wrapped(self, sentences: Iterable[str]) -> Iterator[Row]:
        lines = (line for sentence in sentences for line in self._page.wrapped(sentence, INDENT))
        # With a key, so that the cursor can scroll to the last line.
        yield from (Row(line, key=Key(Section.UNSEEN, n)) for n, line in enumerate(lines))


def _columns(rows: Iterable[Sequence[str]], alignment: str) -> Iterator[str]:
    """The rows as aligned lines. `alignment` has `l` or `r` for each column."""
    # Imported only where it is used: it would delay the start.
    from tabulate import tabulate

    cells = [[printable(cell) for cell in row] for row in rows]
    if not cells:
        return
    table = tabulate(
        cells,
        tablefmt="plain",
        disable_numparse=True,
        colalign=["right" if one == "r" else "left" for one in alignment],
    )
    yield from (line.rstrip() for line in table.split("\n"))
