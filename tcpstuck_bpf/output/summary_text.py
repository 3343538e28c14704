"""The summary of a run as lines of text: the answer, then the supporting figures. Prints nothing.

tabulate formats its tables.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from tcpstuck_bpf.judge.evidence import duration_text
from tcpstuck_bpf.judge.rules import RULES
from tcpstuck_bpf.judge.stuck_now import StuckGroup
from tcpstuck_bpf.output.answer import stuck_sentence, what_to_do
from tcpstuck_bpf.output.page import INDENT, Page, counted, endpoint, grouped
from tcpstuck_bpf.summary import RescueTotals, Summary
from tcpstuck_bpf.terminal import printable

SILENT_VERDICT = "ack-missing"
_STUCK = {rule.name: rule.stuck for rule in RULES}
_LOSSES = {
    "namespaces_uncounted": "segments in network namespaces without room in the counts: traced, "
    "but not compared with the kernel's counters",
    "cookies_unmatched": "cookies chosen outside tcp_conn_request: not traced",
    "listeners_unknown": "segments of listeners without room in the table: missing in the figures",
    "listeners_let_go": "idle listeners removed to make room: missing in the figures",
    "listeners_forgotten": "listeners whose figures were dropped to make room",
    "stacks_unknown": "dropped ACKs without a call stack (stack table full): their hook is unknown",
    "tasks_unknown": "segments in softirqs of tasks without room in the table: not traced",
    "programs_not_run": "times the kernel skipped a program because another one ran on that CPU",
    "kernel_log_overruns": "times lines of the kernel's log were overwritten before they were read",
    "undecodable_events": "events that could not be decoded",
    "flows_evicted": "flows dropped to make room",
    "entries_let_go": "open table entries removed for age or to make room",
    "flows_unresolved": "flows dropped without a verdict",
    "children_stillborn": "server sockets made but not left ESTABLISHED",
    "causes_not_updated": "verdicts not updated: the firewall's rules were not read after the drop",
    "table_busy": "handshakes not tracked: their table entry was being changed",
}


def silent_syns(number: int) -> str:
    """The phrase for the number of clients in a suspected SYN flood."""
    one = number == 1
    return f"{grouped(number)} silent SYN{'' if one else 's'} look{'s' * one} like a flood"


def losses_of(summary: Summary) -> Iterator[str]:
    """A phrase for everything that was lost or not seen; lost events are not among them."""
    lost = [
        (summary.pending, "handshakes too young for a verdict at the end"),
        (summary.superseded, "stuck clients that gave up and reused their port"),
        (
            summary.untracked - summary.losses.get("table_busy", 0),
            "handshakes not tracked: the table was full (--max-handshakes)",
        ),
        (
            summary.unseen_syn,
            "ACKs whose SYN was not seen (before tracing began, or entry removed)",
        ),
        *(
            (number, _LOSSES.get(name, name.replace("_", " ")))
            for name, number in summary.losses.items()
        ),
    ]
    for number, what in lost:
        if number:
            yield f"{grouped(number)} {what}"


def gaps_of(summary: Summary) -> Iterator[str]:
    """A sentence for each probe that could not be attached."""
    for gap in summary.gaps:
        yield f"gap: no {gap.probe} ({gap.why}): {gap.lost}"


def _nothing_stuck(summary: Summary) -> str:
    """Why nothing is stuck, or why nothing is known."""
    if summary.saw_nothing and summary.selection:
        return f"nothing to see: no listener of {summary.selection} is seen to send a SYN cookie"
    if summary.saw_nothing:
        return "nothing to see: no SYN cookie was sent, so no client could get stuck under one"
    if summary.nothing_judged:
        several = f"all {grouped(summary.pending)} handshakes are"
        who = "the only handshake is" if summary.pending == 1 else several
        return f"nothing is known yet: {who} too young for a verdict"
    young = f"; {counted(summary.pending, 'handshake')} too young for a verdict"
    return f"nothing stuck{young * bool(summary.pending)}"


class SummaryText:
    """Lines of the summary, for one page.

    `height`: number of lines of the terminal; None if the lines do not go to one. `advice`: what to
    do about each group of stuck clients. `advise`: say it below the answer, because no row said it.
    """

    def __init__(
        self,
        page: Page,
        height: int | None = None,
        advice: Mapping[StuckGroup, str] | None = None,
        *,
        advise: bool = False,
    ) -> None:
        self._page = page
        self._height = height
        self._advice = advice or {}
        self._advise = advise

    def lines(self, summary: Summary, above: int = 0) -> Iterator[str]:
        """The answer, then the supporting figures. `above`: number of lines above these.

        The last screen of a terminal has the answer and what to do. If the rows that said what to
        do have scrolled off it, the answer says it; if the answer has too, both are repeated.
        """
        lines = [*self._lines(summary, advise=self._advise)]
        if self._height is not None and above + len(lines) >= self._height:
            advised = [*self._lines(summary, advise=True)]
            if len(advised) < self._height:
                yield from advised
                return
            lines += ["", *self.verdict(summary), *self._what_to_do(summary)]
        yield from lines

    def _what_to_do(self, summary: Summary) -> Iterator[str]:
        advised = [*what_to_do(summary, self._advice)]
        for verdict, text in advised:
            what = f" ({verdict})" if len(advised) > 1 else ""
            yield from self._page.wrapped(text, f"{INDENT}do{what}: ")

    def _lines(self, summary: Summary, *, advise: bool) -> Iterator[str]:
        # Imported only where it is used: it would delay every start, and JSON needs no tables.
        from tabulate import tabulate

        yield ""
        yield from self.answer(summary)
        if advise:
            yield from self._what_to_do(summary)
        yield ""
        rows = list(self._verdict_rows(summary))
        table = tabulate(
            rows,
            headers=("verdict", "connections", "client stuck"),
            tablefmt="simple",
            disable_numparse=True,
            colalign=("left", "right", "left") if rows else None,
        )
        # A part of a recording may have no verdict at all, not even `completed`.
        yield from (*table.splitlines(), "") if rows else ()
        if summary.rescue is not None:
            yield from self._rescue(summary.rescue)
        yield from self._listeners(summary)
        yield from self._losses(summary)
        yield from self._reconciliation(summary)
        for note in summary.notes:
            yield from self._page.wrapped(f"note: {note}", "")

    @staticmethod
    def _verdict_rows(summary: Summary) -> Iterator[tuple[str, str, str]]:
        for verdict, number in summary.verdicts.items():
            flooding = summary.flood_suspected if verdict == SILENT_VERDICT else 0
            if number > flooding or not flooding:
                stuck = "yes" if _STUCK.get(verdict) else "no"
                yield (verdict, grouped(number - flooding), stuck)
            if flooding:
                yield (f"{verdict} (flood suspected)", grouped(flooding), "likely not")

    @staticmethod
    def _no_longer(summary: Summary) -> Iterator[str]:
        if summary.rescue is not None and summary.rescue.rescued:
            yield f"{grouped(summary.rescue.rescued)} rescued"
        if summary.recovered:
            yield f"{grouped(summary.recovered)} recovered"
        if summary.namespace_gone:
            yield f"{grouped(summary.namespace_gone)} in a removed network namespace"
        if summary.data_lost:
            yield f"{grouped(summary.data_lost)} connected with data lost"

    def answer(self, summary: Summary) -> Iterator[str]:
        """The answer: which clients are stuck, or why none is, and how many cookies were seen."""
        yield from self.verdict(summary)
        seen = (
            f"{counted(summary.cookies_sent, 'cookie')} sent in "
            f"{duration_text(summary.duration_ns)} at {summary.watched}, traced by {summary.mode}"
        )
        yield from self._page.wrapped(seen, "")

    def verdict(self, summary: Summary) -> Iterator[str]:
        """The answer without the figures."""
        flood = f"; {silent_syns(summary.flood_suspected)}" if summary.flood_suspected else ""
        if summary.still_stuck:
            line = stuck_sentence(summary, self._page)
            line += "".join(f"; {ended}" for ended in self._no_longer(summary)) + flood
            yield from map(self._page.red, self._page.wrapped(line, ""))
        elif summary.data_lost and not summary.ever_stuck:
            line = f"nothing stuck, {', '.join(self._no_longer(summary))}{flood}"
            yield self._page.red(line)
        elif summary.ever_stuck:
            ended = ", ".join(self._no_longer(summary)) or "their clients gave up"
            yield f"nothing is stuck any more: {ended}{flood}"
        elif not summary.unwatched:
            yield from self._page.wrapped(f"{_nothing_stuck(summary)}{flood}", "")
        if summary.unwatched:
            yield from self._unwatched(summary)
        if summary.cut_off_ns is not None:
            until = self._page.time(summary.cut_off_ns)
            yield f"The recording ends early, at {until}: this summary covers the time until then."

    def _unwatched(self, summary: Summary) -> Iterator[str]:
        number = summary.unwatched
        plural = "handshake" if number == 1 else "handshakes"
        nothing = "" if summary.ever_stuck or summary.data_lost else "nothing was seen stuck, but "
        flood = summary.flood_suspected if nothing else 0
        line = f"{nothing}{grouped(number)} {plural} went untraced: some may be stuck"
        line += f"; {silent_syns(flood)}" if flood else ""
        for wrapped in self._page.wrapped(line, ""):
            yield self._page.red(wrapped)

    def _rescue(self, totals: RescueTotals) -> Iterator[str]:
        if totals.not_sent:
            done = f"{grouped(totals.not_sent)} times a SYN-ACK would have been sent (dry run)"
        else:
            done = f"SYN-ACKs sent: {grouped(totals.sent)}, rescued: {grouped(totals.rescued)}"
        yield from self._page.wrapped(f"rescue: {done}", "")
        for why, number in sorted(totals.failed.items()):
            yield from self._page.wrapped(f"{grouped(number)} SYN-ACKs not sent: {why}", INDENT)
        for why, number in sorted(totals.left_alone.items()):
            yield from self._page.wrapped(f"{grouped(number)} left alone: {why}", INDENT)
        yield ""

    def _listeners(self, summary: Summary) -> Iterator[str]:
        """Lines for the listeners that sent cookies or dropped segments for a full queue."""
        for listener in summary.listeners:
            if not listener.suffered:
                continue
            facts = listener.facts
            where = ", ".join(endpoint(address, listener.port) for address in listener.addresses)
            owners = f" of {', '.join(listener.owners)}" if listener.owners else ""
            yield from self._page.wrapped(
                f"listener {where}{owners}{self._page.in_netns(listener.netns)}: "
                f"limit {grouped(facts.limit)}, at most {grouped(facts.peak_syn_queue)} in the "
                f"SYN queue and {grouped(facts.peak_accept_queue)} in the accept queue",
                "",
            )
            if listener.sockets > 1:
                one_of = f"socket {listener.socket}, one of " if listener.socket else ""
                share = "that share" if listener.socket else "share"
                yield from self._page.wrapped(
                    f"{one_of}{listener.sockets} sockets {share} this address (SO_REUSEPORT)",
                    INDENT,
                )
            if facts.cookies_sent:
                why = listener.cookie_reason
                yield f"{INDENT}{counted(facts.cookies_sent, 'cookie')} sent: {why}"
            if facts.syns_refused or facts.acks_refused:
                yield from self._page.wrapped(
                    f"dropped for a full accept queue: {grouped(facts.syns_refused)} SYNs, "
                    f"{grouped(facts.acks_refused)} ACKs",
                    INDENT,
                )
            for sentence in (*listener.working, *listener.advice):
                yield from self._page.wrapped(sentence, INDENT)
            yield ""

    def _losses(self, summary: Summary) -> Iterator[str]:
        yield f"lost events: {grouped(summary.lost_events)}, untracked handshakes: " + grouped(
            summary.untracked
        )
        for sentence in (*losses_of(summary), *gaps_of(summary)):
            yield from self._page.wrapped(sentence, "")
        yield ""

    def _reconciliation(self, summary: Summary) -> Iterator[str]:
        if not summary.reconciliation:
            yield "The kernel's own counters did not move, and nothing was traced."
            return
        places = {row.netns for row in summary.reconciliation}
        headers = ["counter", "traced", "kernel", "agrees"]
        rows = []
        for row in summary.reconciliation:
            low, high = row.kernel or (0, 0)
            kernel = (
                "unknown" if row.kernel is None else str(low) if low == high else f"{low}..{high}"
            )
            agrees = {True: "yes", False: "NO", None: "?"}[row.agrees]
            rows.append([printable(row.counter), str(row.traced), kernel, agrees])
            if summary.filtered:
                rows[-1].insert(2, str(row.outside))
            if len(places) > 1:
                rows[-1].insert(0, self._page.netns(row.netns))
        if summary.filtered:
            headers.insert(2, "outside\nfilter")
        if len(places) > 1:
            headers.insert(0, "netns")
        else:
            yield from self._page.wrapped(f"counters{self._page.in_netns(places.pop())}:", "")
        from tabulate import tabulate  # imported here for the reason in `lines`

        table = tabulate(rows, headers=headers, tablefmt="simple", disable_numparse=True)
        yield from (line.rstrip() for line in table.splitlines())
        for row in summary.reconciliation:
            if row.note:
                where = f"{self._page.netns(row.netns)} {row.counter}"
                yield from self._page.wrapped(f"{where}: {row.note}", INDENT)
        if summary.filtered:
            yield from self._page.wrapped(
                "The kernel's counters cover all ports: expect traced + outside filter = kernel.",
                "",
            )
