"""Findings, status and summary as lines of text. Reads nothing from the system, prints nothing."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence

from tcpstuck_bpf.handshake.timeline import attempt_text
from tcpstuck_bpf.judge.evidence import duration_text
from tcpstuck_bpf.judge.stuck_now import StuckGroup, group_of
from tcpstuck_bpf.judge.verdict import Finding
from tcpstuck_bpf.model import Attempt
from tcpstuck_bpf.output.fold import MAX_GROUPS, Folding, Group
from tcpstuck_bpf.output.page import Page, counted, endpoint, grouped
from tcpstuck_bpf.output.rows import Rows
from tcpstuck_bpf.output.summary_text import SummaryText, silent_syns
from tcpstuck_bpf.steps import WallClock
from tcpstuck_bpf.summary import Status, Summary
from tcpstuck_bpf.terminal import printable

SHOWN_AT_ONCE = 1000
"""Most rows of one verdict and server in one batch; a single line stands for the rest."""


def watching(watched: str, mode: str) -> str:
    """The line that is printed once if there is no terminal for a status line."""
    return f"watching {watched} by {mode}; Ctrl-C ends with a summary"


class TableRenderer:
    """Lines for a terminal or a pipe of a given width in columns.

    `each` prints a row per finding; without it, equal findings make one group. `verbose` prints all
    details. The clients of a suspected SYN flood are always a group. `height` is the terminal's
    number of lines; None if the lines do not go to one.
    """

    def __init__(
        self,
        *,
        clock: WallClock,
        width: int,
        colour: bool,
        verbose: bool,
        own_netns: int | None,
        netns_names: Mapping[int, str],
        each: bool = False,
        height: int | None = None,
    ) -> None:
        self._page = Page(
            clock=clock, width=width, colour=colour, own_netns=own_netns, netns_names=netns_names
        )
        self._verbose = verbose
        self._each = each or verbose
        self._rows = Rows(self._page, each=self._each, verbose=verbose)
        self._folding = Folding()
        self._height = height
        self._advice: OrderedDict[StuckGroup, str] = OrderedDict()

    def note(self, findings: Iterable[Finding]) -> None:
        """Note what to do about the findings, shown or not; the summary may say it."""
        for finding in findings:
            if finding.stuck and not finding.flood_suspected:
                self._advice[group_of(finding)] = finding.advice
        while len(self._advice) > MAX_GROUPS:
            self._advice.popitem(last=False)

    def findings(self, findings: Sequence[Finding]) -> Iterator[str]:
        """Rows of these findings, or of the groups that are due at their times."""
        shown: Counter[tuple[str, str]] = Counter()
        for finding in findings:
            if finding.flood_suspected or not self._each:
                yield from self._groups(self._folding.take(finding))
                continue
            server = endpoint(finding.four_tuple.server_ip, finding.four_tuple.server_port)
            shown[finding.verdict, server] += 1
            if shown[finding.verdict, server] <= SHOWN_AT_ONCE:
                yield from self._rows.finding(finding)
        for (verdict, server), number in shown.items():
            if number > SHOWN_AT_ONCE:
                more = grouped(number - SHOWN_AT_ONCE)
                yield f"... and {more} more {verdict} at {server} (all of them in --json)"

    def _groups(self, groups: Iterator[Group]) -> Iterator[str]:
        for group in groups:
            yield from self._rows.group(group)

    def due(self, now_ns: int) -> Iterator[str]:
        """Rows of the groups that are new, and of those that grew and are due."""
        yield from self._groups(self._folding.new(now_ns))

    def rest(self) -> Iterator[str]:
        """Rows of the groups that grew since they were printed. Called at the end of the run."""
        yield from self._groups(self._folding.rest())

    def attempts(self, attempts: Sequence[Attempt]) -> Iterator[str]:
        """Lines for attempts that sent nothing, or with -v for all attempts."""
        for attempt in attempts:
            if attempt.sent and not self._verbose:
                continue
            who = attempt.handshake.four_tuple
            yield from self._page.wrapped(
                f"rescue: {endpoint(who.client_ip, who.client_port)}: {attempt_text(attempt)}",
                f"{self._page.time(attempt.time_ns)}  ",
            )

    def status(self, status: Status) -> str:
        """The status line. If it is too long, it omits what is watched, then the last figures."""
        stuck = "nothing stuck" if status.cookies_sent else "no cookies yet"
        if status.still_stuck:
            stuck = f"{grouped(status.still_stuck)} STUCK"
        if status.data_lost:
            stuck += f", {grouped(status.data_lost)} with DATA LOST"
        if status.flood_suspected:
            stuck += f", {silent_syns(status.flood_suspected)}"
        running = duration_text(status.running_ns)
        sent = counted(status.cookies_sent, "cookie")
        rest = f"{grouped(status.completed)} completed, {grouped(status.waiting)} waiting"
        lines = (
            f"{stuck}, watching {status.watched} for {running}: {sent} sent, {rest}",
            f"{stuck} after {running}: {sent} sent, {rest}",
            f"{stuck}, {running}: {sent}, {rest}",
            f"{stuck}, {running}: {sent}",
            f"{stuck}, {running}",
            stuck,
        )
        fitting = (line for line in map(printable, lines) if len(line) < self._page.width)
        return next(fitting, printable(lines[-1])[: self._page.width - 1])

    def summary(self, summary: Summary, *, above: int = 0, advise: bool = False) -> Iterator[str]:
        """The rows of groups that were never printed, then the summary.

        `above`: number of lines above these. `advise`: say what to do, because no row said it.
        """
        rows = [*self._groups(self._folding.unseen())]
        yield from rows
        text = SummaryText(self._page, self._height, self._advice, advise=advise)
        yield from text.lines(summary, above + len(rows))
