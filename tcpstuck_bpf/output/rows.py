"""Rows of the table: one per finding, or one per group of equal findings.

The table is printed live, so columns never shrink: each is as wide as its widest cell so far. Text
that does not fit into the row goes below it. The header is printed once, and again when a column
widens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from tcpstuck_bpf.judge.evidence import duration_text
from tcpstuck_bpf.judge.rules import RULES
from tcpstuck_bpf.judge.verdict import Finding
from tcpstuck_bpf.model import SECOND_NS
from tcpstuck_bpf.output.fold import EXAMPLES, Group
from tcpstuck_bpf.output.page import INDENT, Page, counted, endpoint, grouped

ENDPOINT_WIDTH = len("255.255.255.255:65535")
NARROW = 100
"""Below this page width in columns, age, SYNs and meaning go below each row."""
AGE_WIDTH = len("23 h 59 min")
VERDICT_WIDTH = max(len(rule.name) for rule in RULES)
VERDICT_HEADING = " verdict (! stuck)"
MEANING_WIDTH = 45
_BELOW = " " * 10


class Column(NamedTuple):
    """A column of the table."""

    heading: str
    width: int | None
    """In characters; None: as wide as the widest endpoint so far."""
    gap: str = "  "
    """Text after the column."""


GROUP_COLUMNS = (
    Column("time", 8, " "),
    Column(VERDICT_HEADING, VERDICT_WIDTH + 1, " "),
    Column("clients", 7, " "),
    Column("from", None),
    Column("at", None),
)
EACH_COLUMNS = (
    Column("time", 8),
    Column("client", None),
    Column("server", None),
    Column(VERDICT_HEADING, VERDICT_WIDTH + 1),
)
WIDE_COLUMNS = (Column("age".rjust(AGE_WIDTH), AGE_WIDTH), Column("SYNs", 4))
"""Additional columns if the page is wide enough."""


def _marked(finding: Finding) -> str:
    return ("!" if finding.stuck else " ") + finding.verdict


def _endpoints(finding: Finding) -> tuple[str, str]:
    who = finding.four_tuple
    return endpoint(who.client_ip, who.client_port), endpoint(who.server_ip, who.server_port)


def _syns(finding: Finding) -> str:
    return counted(finding.syn_count, "SYN") if finding.syn_count else "SYN not seen"


def meaning(finding: Finding) -> str:
    """A verdict's meaning, its certainty, and the earlier verdict that it updates."""
    words = [finding.meaning]
    if finding.certainty != "certain" and finding.certainty not in finding.meaning:
        words.append(f"({finding.certainty})")
    if finding.delay_ns is not None:
        words.append(f"({duration_text(finding.delay_ns)} after the SYN)")
    if finding.updates == finding.verdict:
        words.append("[updated]")
    elif finding.updates is not None:
        words.append(f"[was {finding.updates}]")
    if finding.to_be_updated:
        words.append("[rules being read]")
    return " ".join(words)


class Rows:
    """The rows of one page. `each`: groups are used for suspected floods only."""

    def __init__(self, page: Page, *, each: bool, verbose: bool) -> None:
        self._page = page
        self._each = each
        self._verbose = verbose
        self._endpoint_width = ENDPOINT_WIDTH
        self._netns_shown = page.own_netns
        self._narrow = page.width < NARROW
        self._columns: tuple[Column, ...] = GROUP_COLUMNS
        if each:
            self._columns = EACH_COLUMNS if self._narrow else (*EACH_COLUMNS, *WIDE_COLUMNS)
        self._headed = False
        self._advised: set[str] = set()

    def finding(self, finding: Finding) -> Iterator[str]:
        """A row for one finding; with `verbose`, all its details below."""
        client, server = _endpoints(finding)
        yield from self._before(finding.four_tuple.netns, client, server)
        time, age = self._page.time(finding.verdict_ns), duration_text(finding.age_ns)
        cells = [time, client, server, _marked(finding)]
        if self._narrow:
            yield self._page.red(self._laid_out(cells), finding.stuck)
            below = f"{age}, {_syns(finding)}: {meaning(finding)}"
            yield from self._page.wrapped(below, _BELOW)
        else:
            cells += [age.rjust(AGE_WIDTH), str(finding.syn_count).rjust(4)]
            yield from self._with_text(cells, [meaning(finding)], finding.stuck)
        if self._verbose:
            yield from self._details(finding)

    def group(self, group: Group) -> Iterator[str]:
        """A row for the unprinted findings of a group."""
        if group.key.flood_suspected:
            yield from self._flood(group)
            return
        first = group.first
        client, server = _endpoints(first)
        addresses = list(group.addresses)
        if len(addresses) > 1:
            client = f"{grouped(len(addresses))} addresses"
        elif group.number > 1:
            client = addresses[0]
        yield from self._before(group.key.netns, client, server)
        time = self._page.time(group.latest_ns if group.printed else group.since_ns)
        cells = [time, _marked(first), grouped(group.number).rjust(7), client, server]
        if group.printed:
            more = f"{grouped(group.growth)} more since {self._page.time(group.shown_ns)}"
            texts = [more + f": {first.cause}" * bool(first.cause)]
        elif group.number == 1:
            texts = [meaning(first), f"{duration_text(first.age_ns)}, {_syns(first)}"]
        else:
            texts = [meaning(first._replace(delay_ns=None)), self._members(group)]
        yield from self._with_text(cells, texts, first.stuck)
        if first.stuck and first.advice not in self._advised:
            self._advised.add(first.advice)
            yield from self._page.wrapped(first.advice, f"{_BELOW}do: ")

    def _members(self, group: Group) -> str:
        """The times of a group's SYNs and its most frequent clients."""
        times = self._page.time(group.from_ns), self._page.time(group.until_ns)
        when = f"SYNs {times[0]} to {times[1]}" if times[0] != times[1] else f"SYNs at {times[0]}"
        if len(group.addresses) == 1:
            named = [str(who.client_port) for who in group.examples]
            more = group.number > len(named)
            return f"{when}; ports {', '.join(named)}{' ...' * more}"
        most = group.addresses.most_common(EXAMPLES)
        named = [address + f" ({grouped(n)})" * (n > 1) for address, n in most]
        return f"{when}; {', '.join(named)}{' ...' * (len(group.addresses) > EXAMPLES)}"

    def _flood(self, group: Group) -> Iterator[str]:
        lasted_ns = group.until_ns - group.from_ns
        rate = group.growth * SECOND_NS // lasted_ns if lasted_ns >= SECOND_NS else 0
        at = endpoint(group.key.server_ip, group.key.server_port)
        also = f"; {grouped(group.corrected)} of them are listed above as stuck"
        yield from self._page.wrapped(
            f"{grouped(group.growth)} silent SYNs{f', {grouped(rate)} a second' * (rate > 0)} at "
            f"{at}{self._page.in_netns(group.key.netns)}, "
            f"{self._page.time(group.from_ns)} to {self._page.time(group.until_ns)}: likely a SYN "
            f"flood, not counted as stuck{also * (group.corrected > 0)} (each in --json)",
            "... ",
        )

    def _before(self, netns: int, *endpoints: str) -> Iterator[str]:
        """The network namespace, if it changed, and the header, if it is due.

        Columns never shrink, so that most rows on the screen stay aligned.
        """
        widest = max(map(len, endpoints))
        if widest > self._endpoint_width:
            self._endpoint_width = widest
            self._headed = False
        if netns != self._netns_shown:
            self._netns_shown = netns
            yield f"in network namespace {self._page.netns(netns)}:"
        if not self._headed:
            self._headed = True
            yield self._page.bold(self._heading())

    def _heading(self) -> str:
        names = [column.heading for column in self._columns]
        line = self._laid_out(names)
        if not self._narrow and len(line) + 2 + MEANING_WIDTH <= self._page.width:
            line = self._laid_out(names, "what it means")
        return line

    def _laid_out(self, cells: Sequence[str], text: str = "") -> str:
        """Lay out a row. tabulate would choose new widths for each batch."""
        assert len(cells) == len(self._columns), cells
        row = "".join(
            cell.ljust(column.width or self._endpoint_width) + column.gap
            for cell, column in zip(cells, self._columns)
        )
        return row + text if text else row.rstrip()

    def _with_text(self, cells: Sequence[str], texts: Sequence[str], stuck: bool) -> Iterator[str]:
        """A row with as many of the texts on its line as fit; the others go below."""
        for beside in (len(texts), 1, 0) if not self._narrow else (0,):
            row = self._laid_out(cells, "; ".join(texts[:beside]))
            if len(row) <= self._page.width or not beside:
                yield self._page.red(row, stuck)
                yield from self._page.wrapped("; ".join(texts[beside:]), _BELOW)
                return

    def _details(self, finding: Finding) -> Iterator[str]:
        for entry in finding.timeline:
            offset = (entry.time_ns - finding.first_syn_ns) / 1_000_000
            yield from self._page.wrapped(
                f"{entry.what}  {entry.detail}".rstrip(), f"{INDENT}{offset:+11.1f} ms  "
            )
        if finding.timeline_omitted:
            yield f"{INDENT}({finding.timeline_omitted} entries left out in the middle)"
        for sentence in finding.evidence:
            yield from self._page.wrapped(sentence, f"{INDENT}seen: ")
        yield from self._page.wrapped(finding.cannot_prove, f"{INDENT}cannot prove: ")
        yield from self._page.wrapped(finding.advice, f"{INDENT}advice: ")
        yield ""
