"""The table's rows: one for a server, verdict and owner, or one for each connection. Pure."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from tcpstuck_bpf.client.actions import Attempt, Outcome
from tcpstuck_bpf.client.waits import Change, Group, group_of
from tcpstuck_bpf.client.words import (
    Told,
    attempt_text,
    group_owners_text,
    owners_text,
    told,
    why_unknown,
)
from tcpstuck_bpf.judge.evidence import duration_text
from tcpstuck_bpf.judge.rules import VERDICT_NAMES
from tcpstuck_bpf.model import SECOND_NS, address_text
from tcpstuck_bpf.output.page import INDENT, Page, endpoint, grouped

REPEAT_NS = 10 * SECOND_NS
"""Least time from the first row of a group to the second; it doubles with each row."""
LONGEST_REPEAT_NS = 600 * SECOND_NS
MAX_GROUPS = 4096
"""Most groups. Beyond it the oldest are removed; one that was removed and grows counts as new."""
EXAMPLES = 3
SHOWN_AT_ONCE = 1000
"""Most single rows of one poll; a line stands for the others."""

_TOLD_ELSEWHERE = frozenset(
    {Outcome.SENT, Outcome.CHANGED, Outcome.FORGOT, Outcome.KNOWS, Outcome.ENDED}
)
_VERDICT_HEADING = " verdict (! stuck)"
_VERDICT_WIDTH = 1 + max(map(len, VERDICT_NAMES))
_WAITED_WIDTH = len("59 min 59 s")
_BELOW = " " * 10


class _Key(NamedTuple):
    group: Group
    verdict: str
    certainty: str


class _Fold:
    """The connections of one row."""

    def __init__(self, words: Told) -> None:
        self.words = words
        self.number = self.printed = 0
        """Connections so far, and how many of them the last row counted."""
        self.printed_ns = 0
        self.oldest_ns = 0
        self.clients: list[tuple[str, int]] = []
        """The first EXAMPLES clients: address and port."""
        self.why = ""
        """Why no owner is known."""
        self._pause_ns = REPEAT_NS

    @property
    def growth(self) -> int:
        return self.number - self.printed

    def take(self, change: Change) -> None:
        self.number += 1
        self.oldest_ns = max(self.oldest_ns, change.waited_ns)
        who = change.socket.four_tuple
        if len(self.clients) < EXAMPLES:
            self.clients.append((who.client_ip, who.client_port))
        self.why = why_unknown(change.owners, change.socket)

    def is_due(self, now_ns: int) -> bool:
        waited = not self.printed or now_ns - self.printed_ns >= self._pause_ns
        return self.growth > 0 and waited

    def note_printed(self, now_ns: int) -> None:
        if self.printed:
            self._pause_ns = min(2 * self._pause_ns, LONGEST_REPEAT_NS)
        self.printed, self.printed_ns = self.number, now_ns
        self.oldest_ns = 0


class Rows:
    """The rows of one page. `each`: a row for each connection; `verbose`: all that is known too."""

    def __init__(self, page: Page, *, each: bool, verbose: bool) -> None:
        self._page = page
        self._each = each or verbose
        self._verbose = verbose
        self._folds: OrderedDict[_Key, _Fold] = OrderedDict()
        self._headed = False
        self._netns_shown = page.own_netns
        self._advised: set[str] = set()

    @property
    def advised(self) -> bool:
        """Whether a row said what to do."""
        return bool(self._advised)

    def changes(self, changes: Sequence[Change], now_ns: int) -> Iterator[str]:
        """Rows for these verdicts, and for groups that grew before and are due."""
        if self._each:
            for change in changes[:SHOWN_AT_ONCE]:
                yield from self._single(change)
            if len(changes) > SHOWN_AT_ONCE:
                more = grouped(len(changes) - SHOWN_AT_ONCE)
                yield f"... and {more} more connections (all of them in --json)"
            return
        for change in changes:
            words = told(change)
            key = _Key(group_of(change.socket, change.owners), words.verdict, words.certainty)
            if key not in self._folds and len(self._folds) >= MAX_GROUPS:
                oldest, fold = self._folds.popitem(last=False)
                yield from self._print([(oldest, fold)], now_ns)
            self._folds.setdefault(key, _Fold(words)).take(change)
        yield from self._print(
            [item for item in self._folds.items() if item[1].is_due(now_ns)], now_ns
        )

    def attempts(self, attempts: Sequence[Attempt]) -> Iterator[str]:
        """Lines for what failed, would be done or has no answer, and with -v for every action."""
        told_here = [one for one in attempts if self._verbose or one.outcome not in _TOLD_ELSEWHERE]
        for one in told_here[:SHOWN_AT_ONCE]:
            who = one.plan.socket.four_tuple
            between = (
                f"{endpoint(who.client_ip, who.client_port)} to "
                f"{endpoint(who.server_ip, who.server_port)}"
            )
            text = f"rescue: {between}: {attempt_text(one)}"
            yield from self._page.wrapped(text, f"{self._page.time(one.time_ns)}  ")
        if len(told_here) > SHOWN_AT_ONCE:
            yield f"... and {grouped(len(told_here) - SHOWN_AT_ONCE)} more (all of them in --json)"

    def rest(self, now_ns: int) -> Iterator[str]:
        """Rows for the groups that grew since they were printed."""
        yield from self._print([*self._folds.items()], now_ns)

    def _print(self, folds: Iterable[tuple[_Key, _Fold]], now_ns: int) -> Iterator[str]:
        for key, fold in folds:
            if fold.growth:
                yield from self._group(key, fold, now_ns)
                fold.note_printed(now_ns)

    def _group(self, key: _Key, fold: _Fold, now_ns: int) -> Iterator[str]:
        group, words = key.group, fold.words
        yield from self._before(group.netns, ("number", "waited"), "to")
        cells = [grouped(fold.growth).rjust(6), duration_text(fold.oldest_ns).rjust(_WAITED_WIDTH)]
        to = endpoint(address_text(group.server_address), group.server_port)
        yield from self._row(now_ns, words, cells, to)
        if fold.printed:
            since = self._page.time(fold.printed_ns)
            more = f"more since {since}; {grouped(fold.number)} in all"
        else:
            more = f"{_meaning(words)}; {_clients(fold)}"
        yield from self._page.wrapped(f"of {group_owners_text(group)}: {more}", _BELOW)
        if fold.why and not fold.printed:
            yield from self._page.wrapped(f"owner: {fold.why}", _BELOW)
        if words.stuck and words.advice not in self._advised:
            self._advised.add(words.advice)
            yield from self._page.wrapped(words.advice, f"{_BELOW}do: ")

    def _single(self, change: Change) -> Iterator[str]:
        words, who = told(change), change.socket.four_tuple
        yield from self._before(who.netns, ("waited",), "client and server")
        between = (
            f"{endpoint(who.client_ip, who.client_port)} to "
            f"{endpoint(who.server_ip, who.server_port)}"
        )
        cells = [duration_text(change.waited_ns).rjust(_WAITED_WIDTH)]
        yield from self._row(change.time_ns, words, cells, between)
        owners = owners_text(change.owners, change.socket.uid)
        yield from self._page.wrapped(f"of {owners}: {_meaning(words)}", _BELOW)
        if not self._verbose:
            return
        for one in change.owners.processes:
            what = f"{one.name} (pid {one.pid}), descriptor {one.fd}"
            what += f", in {one.container}" * bool(one.container)
            yield from self._page.wrapped(what, f"{INDENT}owner: ")
        why = why_unknown(change.owners, change.socket)
        if why:
            yield from self._page.wrapped(why, f"{INDENT}owner: ")
        for sentence in words.evidence:
            yield from self._page.wrapped(sentence, f"{INDENT}seen: ")
        yield from self._page.wrapped(words.cannot_prove, f"{INDENT}cannot prove: ")
        yield from self._page.wrapped(words.advice, f"{INDENT}advice: ")
        self._advised.add(words.advice)
        yield ""

    def _before(self, netns: int, columns: Sequence[str], last: str) -> Iterator[str]:
        """The network namespace, if it changed, and the heading, if it is due."""
        if netns != self._netns_shown:
            self._netns_shown = netns
            yield f"in network namespace {self._page.netns(netns)}:"
        if not self._headed:
            self._headed = True
            widths = (6, _WAITED_WIDTH)[-len(columns) :]
            cells = [name.rjust(width) for name, width in zip(columns, widths)]
            heading = " ".join(["time".ljust(8), _VERDICT_HEADING.ljust(_VERDICT_WIDTH), *cells])
            beside = f"{heading} {last}"
            yield self._page.bold(beside if len(beside) <= self._page.width else heading)

    def _row(self, time_ns: int, words: Told, cells: Sequence[str], last: str) -> Iterator[str]:
        """A row; its last cell goes below if the page is too narrow for it."""
        verdict = ("!" if words.stuck else " ") + words.verdict
        row = " ".join([self._page.time(time_ns), verdict.ljust(_VERDICT_WIDTH), *cells])
        beside = len(row) + 1 + len(last) <= self._page.width
        yield self._page.red(f"{row} {last}" if beside else row, words.stuck)
        if not beside:
            yield from self._page.wrapped(last, _BELOW)


def _meaning(words: Told) -> str:
    certainty = f" ({words.certainty})" if words.certainty != "certain" else ""
    was = f" [was {words.updates}]" if words.updates else ""
    return f"{words.meaning}{certainty}{was}"


def _clients(fold: _Fold) -> str:
    """The first clients of a group: their ports, with an address if there are several."""
    more = " ..." * (fold.number > len(fold.clients))
    addresses = {address for address, _ in fold.clients}
    if len(addresses) == 1:
        several = "s" * (len(fold.clients) > 1)
        ports = ", ".join(str(port) for _, port in fold.clients)
        return f"from {addresses.pop()}, port{several} {ports}{more}"
    return f"from {', '.join(endpoint(*client) for client in fold.clients)}{more}"
