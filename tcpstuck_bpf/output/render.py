"""Renders findings and the summary as lines of text. Looks nothing up, prints nothing.

Foreign strings become part of a line here, so they are escaped here (`terminal`).

The table is printed live, so a column never shrinks. A meaning that does not fit goes below its
row. The summary's tables are made by tabulate.
"""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime

from tcpstuck_bpf.handshake.timeline import attempt_text
from tcpstuck_bpf.judge.evidence import duration_text
from tcpstuck_bpf.judge.verdict import RULES, Finding
from tcpstuck_bpf.model import CROWDED_NETNS, GONE_NETNS, SECOND_NS, Attempt
from tcpstuck_bpf.steps import WallClock
from tcpstuck_bpf.summary import RescueTotals, Status, Summary
from tcpstuck_bpf.terminal import BOLD, PLAIN, RED, printable

SHOWN_AT_ONCE = 1000
"""Largest number of rows of one verdict and server in one batch; one line stands for the rest."""
FLOOD_FOLDED_NS = 10 * SECOND_NS
"""Time for which one line stands for all silent clients of a SYN flood."""
ROWS_PER_HEADING = 40
ENDPOINT_WIDTH = len("255.255.255.255:65535")
NARROW = 100
"""Width in columns below which age, SYNs and meaning go below each row."""
VERDICT_WIDTH = max(len(rule.name) for rule in RULES)
MEANING_WIDTH = 45
INDENT = "    "

_GROUP = re.compile(r"(?<=\d) (?=\d{3}(?!\d))")
"""The space inside a number that `_grouped` wrote."""
_UNBREAKABLE = "\xa0"

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


_NO_NAMESPACE = {GONE_NETNS: "(gone)", CROWDED_NETNS: "(no entry)"}
"""Names for the figures of removed namespaces, and of those without an entry in the table."""


def watching(watched: str, mode: str) -> str:
    """The line that is printed once if there is no terminal for a status line."""
    return f"watching {watched} by {mode}; Ctrl-C ends with a summary"


def endpoint(ip: str, port: int) -> str:
    """Address and port, IPv6 in brackets (RFC 3986)."""
    return f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}"


class _Folded:
    """Silent clients of one listener that look like a SYN flood's and share one line."""

    def __init__(self, first: Finding) -> None:
        self.number = self.corrected = 0
        self.from_ns = self.until_ns = first.first_syn_ns
        self.since_ns = first.verdict_ns

    def take_in(self, finding: Finding) -> None:
        """Add a client."""
        self.number += 1
        self.corrected += finding.updates is not None
        self.from_ns = min(self.from_ns, finding.first_syn_ns)
        self.until_ns = max(self.until_ns, finding.first_syn_ns)

    @property
    def rate_text(self) -> str:
        """SYNs per second, as text; empty if all came within one second."""
        lasted_ns = self.until_ns - self.from_ns
        rate = self.number * SECOND_NS // lasted_ns if lasted_ns >= SECOND_NS else 0
        return f", {_grouped(rate)} a second" if rate else ""


def _grouped(number: int) -> str:
    return f"{number:,}".replace(",", " ")


def _silent_syns(number: int) -> str:
    one = number == 1
    return f"{_grouped(number)} silent SYN{'' if one else 's'} look{'s' * one} like a flood"


class TableRenderer:
    """Lines for a terminal or a pipe of a given width in columns."""

    def __init__(
        self,
        *,
        clock: WallClock,
        width: int,
        colour: bool,
        verbose: bool,
        own_netns: int | None,
        netns_names: Mapping[int, str],
    ) -> None:
        self._clock = clock
        self._width = max(40, width)
        self._colour = colour
        self._verbose = verbose
        self._own_netns = own_netns
        self._names = netns_names
        self._endpoint_width = ENDPOINT_WIDTH
        self._netns_shown: int | None = None
        self._narrow = width < NARROW
        self._rows_since_heading = ROWS_PER_HEADING
        self._floods: dict[tuple[int, str], _Folded] = {}

    def findings(self, findings: Sequence[Finding]) -> Iterator[str]:
        """Rows in the given order. One line stands for equal ones beyond SHOWN_AT_ONCE.

        Clients that look like a SYN flood's get no rows, but one line every FLOOD_FOLDED_NS and
        one at the end.
        """
        shown: Counter[tuple[str, str]] = Counter()
        for finding in findings:
            server = endpoint(finding.four_tuple.server_ip, finding.four_tuple.server_port)
            if finding.flood_suspected:
                yield from self._fold(finding, server)
                continue
            shown[finding.verdict, server] += 1
            if shown[finding.verdict, server] <= SHOWN_AT_ONCE:
                yield from self._finding(finding)
        for (verdict, server), number in shown.items():
            if number > SHOWN_AT_ONCE:
                more = _grouped(number - SHOWN_AT_ONCE)
                yield f"... and {more} more {verdict} at {server} (all of them in --json)"

    def _fold(self, finding: Finding, server: str) -> Iterator[str]:
        where = (finding.four_tuple.netns, server)
        folded = self._floods.setdefault(where, _Folded(finding))
        if finding.verdict_ns - folded.since_ns >= FLOOD_FOLDED_NS:
            yield from self._flood(where)
            folded = self._floods[where] = _Folded(finding)
        folded.take_in(finding)

    def floods(self) -> Iterator[str]:
        """Lines for floods that are not printed yet."""
        for where in list(self._floods):
            yield from self._flood(where)

    def _flood(self, where: tuple[int, str]) -> Iterator[str]:
        folded = self._floods.pop(where)
        netns, server = where
        place = "" if netns == self._own_netns else f" in network namespace {self._netns(netns)}"
        shown = f"; {_grouped(folded.corrected)} of them are listed above as stuck" * (
            folded.corrected > 0
        )
        times = f"{self._time(folded.from_ns)} to {self._time(folded.until_ns)}"
        yield from self._wrapped(
            f"{_grouped(folded.number)} silent SYNs{folded.rate_text} at {server}{place}, {times}: "
            f"likely a SYN flood, not counted as stuck{shown} (each in --json)",
            "... ",
        )

    def _time(self, monotonic_ns: int) -> str:
        moment = self._clock.realtime(monotonic_ns) // SECOND_NS
        return datetime.fromtimestamp(moment).strftime("%H:%M:%S")

    def _finding(self, finding: Finding) -> Iterator[str]:
        who = finding.four_tuple
        client, server = (
            endpoint(who.client_ip, who.client_port),
            endpoint(who.server_ip, who.server_port),
        )
        self._widen(max(len(client), len(server)))
        if who.netns != self._netns_shown:
            self._netns_shown = who.netns
            self._rows_since_heading = ROWS_PER_HEADING
        if self._rows_since_heading >= ROWS_PER_HEADING:
            self._rows_since_heading = 0
            yield from self._heading()
        self._rows_since_heading += 1
        time = self._time(finding.verdict_ns)
        verdict = ("!" if finding.stuck else " ") + finding.verdict
        age, meaning = duration_text(finding.age_ns), self._meaning(finding)
        if self._narrow:
            syns = {0: "SYN not seen", 1: "1 SYN"}.get(
                finding.syn_count, f"{finding.syn_count} SYNs"
            )
            yield self._painted(self._laid_out((time, client, server, verdict)), finding)
            yield from self._wrapped(f"{age}, {syns}: {meaning}", " " * 10)
        else:
            cells = (time, client, server, verdict, age.rjust(9), str(finding.syn_count).rjust(4))
            row = self._laid_out(cells)
            if len(row) + 2 + len(meaning) <= self._width:
                yield self._painted(f"{row}  {meaning}", finding)
            else:
                yield self._painted(row, finding)
                yield from self._wrapped(meaning, " " * 10)
        if self._verbose:
            yield from self._details(finding)

    def _widen(self, endpoint_length: int) -> None:
        """Widen the endpoint columns. They never shrink, so that rows stay aligned."""
        if endpoint_length > self._endpoint_width:
            self._endpoint_width = endpoint_length
            self._rows_since_heading = ROWS_PER_HEADING

    def _laid_out(self, cells: Sequence[str]) -> str:
        """Lay out a row. tabulate would choose new widths for each batch."""
        widths = (8, self._endpoint_width, self._endpoint_width, VERDICT_WIDTH + 1, 9, 4)
        padded = (cell.ljust(width) for cell, width in zip(cells, widths))
        return "  ".join(padded).rstrip()

    def _heading(self) -> Iterator[str]:
        if self._netns_shown is not None and self._netns_shown != self._own_netns:
            yield f"in network namespace {self._netns(self._netns_shown)}:"
        names = ["time", "client", "server", " verdict"]
        if not self._narrow:
            names += ["age".rjust(9), "SYNs"]
        line = self._laid_out(names)
        if not self._narrow and len(line) + 2 + MEANING_WIDTH <= self._width:
            line += "  what it means"
        yield f"{BOLD}{line}{PLAIN}" if self._colour else line

    def _painted(self, line: str, finding: Finding) -> str:
        return f"{RED}{line}{PLAIN}" if self._colour and finding.stuck else line

    def _meaning(self, finding: Finding) -> str:
        words = [finding.meaning]
        if finding.certainty != "certain" and finding.certainty not in finding.meaning:
            words.append(f"({finding.certainty})")
        if finding.delay_ns is not None:
            words.append(f"after {duration_text(finding.delay_ns)}")
        if finding.updates == finding.verdict:
            words.append("[updated]")
        elif finding.updates is not None:
            words.append(f"[was {finding.updates}]")
        if finding.to_be_updated:
            words.append("[rules being read]")
        return " ".join(words)

    def _netns(self, inode: int) -> str:
        return _NO_NAMESPACE.get(inode) or printable(self._names.get(inode, str(inode)))

    def _wrapped(self, text: str, first: str = INDENT) -> Iterator[str]:
        lines = textwrap.wrap(
            _GROUP.sub(_UNBREAKABLE, printable(text)),
            self._width,
            initial_indent=first,
            subsequent_indent=" " * len(first),
            break_long_words=False,
            break_on_hyphens=False,
        )
        yield from (line.replace(_UNBREAKABLE, " ") for line in lines)

    def _details(self, finding: Finding) -> Iterator[str]:
        for entry in finding.timeline:
            offset = (entry.time_ns - finding.first_syn_ns) / 1_000_000
            yield from self._wrapped(
                f"{entry.what}  {entry.detail}".rstrip(), f"{INDENT}{offset:+11.1f} ms  "
            )
        if finding.timeline_omitted:
            yield f"{INDENT}({finding.timeline_omitted} entries left out in the middle)"
        for sentence in finding.evidence:
            yield from self._wrapped(sentence, f"{INDENT}seen: ")
        yield from self._wrapped(finding.cannot_prove, f"{INDENT}cannot prove: ")
        yield from self._wrapped(finding.advice, f"{INDENT}advice: ")
        yield ""

    def attempts(self, attempts: Sequence[Attempt]) -> Iterator[str]:
        """Lines for attempts that sent nothing, or with -v for all attempts."""
        for attempt in attempts:
            if attempt.sent and not self._verbose:
                continue
            who = attempt.handshake.four_tuple
            yield from self._wrapped(
                f"rescue: {endpoint(who.client_ip, who.client_port)}: {attempt_text(attempt)}",
                f"{self._time(attempt.time_ns)}  ",
            )

    def status(self, status: Status) -> str:
        """The status line, cut to the width; the most important figures come first."""
        stuck = f"{_grouped(status.still_stuck)} STUCK" if status.still_stuck else "nothing stuck"
        if status.flood_suspected:
            stuck += f", {_silent_syns(status.flood_suspected)}"
        line = (
            f"{stuck}, watching {status.watched} for {duration_text(status.running_ns)}: "
            f"{_grouped(status.cookies_sent)} cookies sent, "
            f"{_grouped(status.completed)} completed, {_grouped(status.waiting)} waiting"
        )
        return printable(line)[: self._width - 1]

    def summary(self, summary: Summary) -> Iterator[str]:
        """The answer first, then what supports it."""
        # Imported only where it is used: it would delay every start, and JSON needs no tables.
        from tabulate import tabulate

        yield from self.floods()
        yield ""
        yield from self._answer(summary)
        yield ""
        rows = list(self._verdict_rows(summary))
        table = tabulate(
            rows,
            headers=("verdict", "connections", "client stuck"),
            tablefmt="simple",
            disable_numparse=True,
            colalign=("left", "right", "left"),
        )
        yield from table.splitlines()
        yield ""
        if summary.rescue is not None:
            yield from self._rescue(summary.rescue)
        yield from self._listeners(summary)
        yield from self._losses(summary)
        yield from self._reconciliation(summary)
        for note in summary.notes:
            yield from self._wrapped(f"note: {note}", "")

    @staticmethod
    def _verdict_rows(summary: Summary) -> Iterator[tuple[str, str, str]]:
        for verdict, number in summary.verdicts.items():
            flooding = summary.flood_suspected if verdict == SILENT_VERDICT else 0
            if number > flooding or not flooding:
                stuck = "yes" if _STUCK.get(verdict) else "no"
                yield (verdict, _grouped(number - flooding), stuck)
            if flooding:
                yield (f"{verdict} (flood suspected)", _grouped(flooding), "likely not")

    @staticmethod
    def _no_longer(summary: Summary) -> Iterator[str]:
        if summary.rescue is not None and summary.rescue.rescued:
            yield f"{_grouped(summary.rescue.rescued)} rescued"
        if summary.recovered:
            yield f"{_grouped(summary.recovered)} recovered"
        if summary.namespace_gone:
            yield f"{_grouped(summary.namespace_gone)} in a removed network namespace"
        if summary.data_lost:
            yield f"{_grouped(summary.data_lost)} connected with data lost"

    def _answer(self, summary: Summary) -> Iterator[str]:
        seen = (
            f"{_grouped(summary.cookies_sent)} cookies sent in "
            f"{duration_text(summary.duration_ns)} at {summary.watched}, traced by {summary.mode}"
        )
        flood = f"; {_silent_syns(summary.flood_suspected)}" if summary.flood_suspected else ""
        if summary.still_stuck:
            plural = "connection is" if summary.still_stuck == 1 else "connections are"
            line = f"{_grouped(summary.still_stuck)} {plural} stuck"
            line += "".join(f", {ended}" for ended in self._no_longer(summary))
            line += flood
            yield f"{RED}{line}{PLAIN}" if self._colour else line
        elif summary.data_lost and not summary.ever_stuck:
            line = f"nothing stuck, {', '.join(self._no_longer(summary))}{flood}"
            yield f"{RED}{line}{PLAIN}" if self._colour else line
        elif summary.ever_stuck:
            ended = ", ".join(self._no_longer(summary)) or "their clients gave up"
            yield f"nothing is stuck any more: {ended}{flood}"
        elif not summary.unwatched:
            yield f"nothing stuck{flood}"
        if summary.unwatched:
            yield from self._unwatched(summary)
        if summary.cut_off_ns is not None:
            until = self._time(summary.cut_off_ns)
            yield f"The recording ends early, at {until}: this summary covers the time until then."
        yield from self._wrapped(seen, "")

    def _unwatched(self, summary: Summary) -> Iterator[str]:
        number = summary.unwatched
        plural = "handshake" if number == 1 else "handshakes"
        nothing = "" if summary.ever_stuck or summary.data_lost else "nothing was seen stuck, but "
        flood = summary.flood_suspected if nothing else 0
        line = f"{nothing}{_grouped(number)} {plural} went untraced: some may be stuck"
        line += f"; {_silent_syns(flood)}" if flood else ""
        for wrapped in self._wrapped(line, ""):
            yield f"{RED}{wrapped}{PLAIN}" if self._colour else wrapped

    def _rescue(self, totals: RescueTotals) -> Iterator[str]:
        if totals.not_sent:
            done = f"{_grouped(totals.not_sent)} times a SYN-ACK would have been sent (dry run)"
        else:
            done = f"SYN-ACKs sent: {_grouped(totals.sent)}, rescued: {_grouped(totals.rescued)}"
        yield from self._wrapped(f"rescue: {done}", "")
        for why, number in sorted(totals.failed.items()):
            yield from self._wrapped(f"{_grouped(number)} SYN-ACKs not sent: {why}", INDENT)
        for why, number in sorted(totals.left_alone.items()):
            yield from self._wrapped(f"{_grouped(number)} left alone: {why}", INDENT)
        yield ""

    def _listeners(self, summary: Summary) -> Iterator[str]:
        """Lines for listeners that sent cookies or dropped something for a full queue."""
        for listener in summary.listeners:
            if not listener.suffered:
                continue
            facts = listener.facts
            where = ", ".join(endpoint(address, listener.port) for address in listener.addresses)
            owners = f" of {', '.join(listener.owners)}" if listener.owners else ""
            yield from self._wrapped(
                f"listener {where}{owners} in {self._netns(listener.netns)}: "
                f"limit {_grouped(facts.limit)}, at most {_grouped(facts.peak_syn_queue)} in the "
                f"SYN queue and {_grouped(facts.peak_accept_queue)} in the accept queue",
                "",
            )
            if listener.sockets > 1:
                one_of = f"socket {listener.socket}, one of " if listener.socket else ""
                share = "that share" if listener.socket else "share"
                yield from self._wrapped(
                    f"{one_of}{listener.sockets} sockets {share} this address (SO_REUSEPORT)",
                    INDENT,
                )
            if facts.cookies_sent:
                why = listener.cookie_reason
                yield f"{INDENT}{_grouped(facts.cookies_sent)} cookies sent: {why}"
            if facts.syns_refused or facts.acks_refused:
                yield from self._wrapped(
                    f"dropped for a full accept queue: {_grouped(facts.syns_refused)} SYNs, "
                    f"{_grouped(facts.acks_refused)} ACKs",
                    INDENT,
                )
            for sentence in (*listener.working, *listener.advice):
                yield from self._wrapped(sentence, INDENT)
            yield ""

    def _losses(self, summary: Summary) -> Iterator[str]:
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
        yield f"lost events: {_grouped(summary.lost_events)}, untracked handshakes: " + _grouped(
            summary.untracked
        )
        for number, what in lost:
            if number:
                yield from self._wrapped(f"{_grouped(number)} {what}", "")
        for gap in summary.gaps:
            yield from self._wrapped(f"gap: no {gap.probe} ({gap.why}): {gap.lost}", "")
        yield ""

    def _reconciliation(self, summary: Summary) -> Iterator[str]:
        if not summary.reconciliation:
            yield "The kernel's own counters did not move, and nothing was traced."
            return
        headers = ["netns", "counter", "traced", "kernel", "agrees"]
        rows = []
        for row in summary.reconciliation:
            low, high = row.kernel or (0, 0)
            kernel = (
                "unknown" if row.kernel is None else str(low) if low == high else f"{low}..{high}"
            )
            agrees = {True: "yes", False: "NO", None: "?"}[row.agrees]
            counter = printable(row.counter)
            rows.append([self._netns(row.netns), counter, str(row.traced), kernel, agrees])
            if summary.filtered:
                rows[-1].insert(3, str(row.outside))
        if summary.filtered:
            headers.insert(3, "outside\nfilter")
        from tabulate import tabulate  # imported here for the reason in `summary`

        table = tabulate(rows, headers=headers, tablefmt="simple", disable_numparse=True)
        yield from (line.rstrip() for line in table.splitlines())
        for row in summary.reconciliation:
            if row.note:
                where = f"{self._netns(row.netns)} {row.counter}"
                yield from self._wrapped(f"{where}: {row.note}", INDENT)
        if summary.filtered:
            yield from self._wrapped(
                "The kernel's counters cover all ports: expect traced + outside filter = kernel.",
                "",
            )
