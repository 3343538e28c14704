"""The summary of a run on the client's side, and its text. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from tcpstuck_bpf.client.actions import Action, Outcome, Totals
from tcpstuck_bpf.client.rows import Rows
from tcpstuck_bpf.client.waits import (
    GREETING_MISSING,
    RESCUED,
    SERVER_FORGOT,
    SERVER_SLOW,
    Group,
    Waiting,
)
from tcpstuck_bpf.client.words import group_owners_text
from tcpstuck_bpf.errors import EXIT_NOT_KNOWN, EXIT_NOTHING_STUCK, EXIT_STUCK
from tcpstuck_bpf.judge.evidence import duration_text
from tcpstuck_bpf.judge.rules import ALL_RULES
from tcpstuck_bpf.model import address_text
from tcpstuck_bpf.output.page import INDENT, Page, counted, endpoint, grouped

NAMED = 3
"""Number of groups that the sentence lists."""
_ADVICE = {rule.name: rule.advice for rule in ALL_RULES}


class Status(NamedTuple):
    """The figures of the status line."""

    watched: str
    stuck: int
    young: int
    established: int
    running_ns: int


class ClientSummary(NamedTuple):
    """The summary of a run."""

    watched: str
    duration_ns: int
    verdicts: Mapping[str, int]
    """Connections by their last verdict."""
    stuck: int
    """Connections that were reported and wait still."""
    ever_stuck: int
    """Connections that were reported, without those whose client spoke after all."""
    closed: int
    """Reported connections that were closed without a byte either way."""
    young: int
    """Connections that wait, but not long enough for a verdict."""
    established: int | None
    """Connections to the wanted ports at the last poll; None for a part of a recording."""
    seen_any: bool
    """Whether any poll found a connection to the wanted ports; in a part of a recording, whether
    one was seen that had no byte either way."""
    groups: tuple[tuple[Group, Waiting], ...]
    polls: int
    longest_poll_ns: int | None
    """None in a recording that ends early, as the next one."""
    pause_ns: int | None
    """The longest pause between two polls."""
    losses: Mapping[str, int]
    """What was not seen, by name; zeros are left out."""
    unread: Mapping[int, str]
    """Why a network namespace could not be read at the last poll, by its inode number."""
    notes: tuple[str, ...]
    slow: int = 0
    """Those of `stuck` whose server has answered that it has them."""
    closed_slow: int = 0
    """Those of `closed` whose server had answered so."""
    mending: Totals | None = None
    """What --rescue did; None without it, and in a recording that ends early."""
    cut_off_ns: int | None = None
    """The last time in a recording that ends early; None for a complete one."""
    selection: str = ""
    """The part of a recording that is summed up, as text; empty if it is all."""

    @property
    def not_seen(self) -> bool:
        """Whether something may have waited unseen."""
        return bool(self.unread) or any(self.losses.values())

    @property
    def nothing_judged(self) -> bool:
        """Whether every connection was too young for a verdict when the run ended.

        In a part of a recording healthy ones are not told apart, so none is assumed.
        """
        others = 0 if self.established is None else self.established - self.young
        return bool(self.young) and not others and not self.ever_stuck


def exit_status(summary: ClientSummary) -> int:
    """The exit status for a summary, as listed in README.md."""
    if summary.ever_stuck:
        return EXIT_STUCK
    unknown = summary.not_seen or summary.nothing_judged
    return EXIT_NOT_KNOWN if unknown else EXIT_NOTHING_STUCK


def waiting_sentence(summary: ClientSummary, page: Page) -> str:
    """One sentence on the connections that wait, fit to be sent to a colleague.

    For example: 12 connections of python3 (pid 288) to 10.9.0.1:3306 wait for the server's first
    byte, the oldest for 4 h 12 min.
    """
    total = summary.stuck
    verb = "waits" if total == 1 else "wait"
    oldest = duration_text(max(one.oldest_ns for _, one in summary.groups))
    since = f"for {oldest}" if total == 1 else f"the oldest for {oldest}"
    of = f" {_where(summary.groups[0][0], page)}" if len(summary.groups) == 1 else ""
    sentence = (
        f"{counted(total, 'connection')}{of} {verb} for the server's first byte"
        f"{',' * (total > 1)} {since}"
    )
    if len(summary.groups) > 1:
        named = [f"{grouped(one.number)} {_where(group, page)}" for group, one in summary.groups]
        others = total - sum(one.number for _, one in summary.groups[:NAMED])
        sentence += f": {'; '.join(named[:NAMED])}"
        sentence += f"; {grouped(others)} others" if others > 0 else ""
    return sentence + _server_says(summary)


def _server_says(summary: ClientSummary) -> str:
    """What the server answered of the connections that wait."""
    if not summary.slow:
        return ""
    if summary.slow == summary.stuck:
        which = "it" if summary.stuck == 1 else "all of them"
    else:
        which = f"{grouped(summary.slow)} of them"
    return f". The server answered that it has {which}, so it is slow or paused"


def _where(group: Group, page: Page) -> str:
    to = endpoint(address_text(group.server_address), group.server_port)
    return f"of {group_owners_text(group)} to {to}{page.in_netns(group.netns)}"


def _calm_sentence(summary: ClientSummary) -> str:
    """Why no connection is reported as waiting."""
    if summary.ever_stuck:
        said = ["no reported connection waits any more"]
        if rescued := summary.verdicts.get(RESCUED):
            said.append(f"{grouped(rescued)} got the server's data after our challenge")
        if forgot := summary.verdicts.get(SERVER_FORGOT):
            said.append(f"of {grouped(forgot)} the server had no record")
        return "; ".join(said)
    if not summary.seen_any and summary.selection:
        return (
            f"no connection of {summary.selection} is seen to wait. Whether there were any others "
            "is not known: a recording counts them, but does not tell them apart"
        )
    if not summary.seen_any:
        return (
            f"no connection to {summary.watched} was seen: nothing is known about this server. Are "
            "port and network namespace right?"
        )
    if summary.nothing_judged:
        return (
            "nothing is known yet: every connection is younger than the time-out "
            f"({grouped(summary.young)} wait)"
        )
    unseen = ", but not everything was seen" if summary.not_seen else ""
    return f"no connection waits for the server's first byte{unseen}"


def summary_lines(summary: ClientSummary, page: Page, rows: Rows, now_ns: int) -> Iterator[str]:
    """The last rows, then the answer and the figures behind it."""
    yield from rows.rest(now_ns)
    yield ""
    if summary.stuck:
        yield from map(page.red, page.wrapped(waiting_sentence(summary, page), ""))
    else:
        yield from page.wrapped(_calm_sentence(summary), "")
    if summary.cut_off_ns is not None:
        until = page.time(summary.cut_off_ns)
        early = f"The recording ends early, at {until}: this summary covers the time until then."
        yield from page.wrapped(early, "")
    if summary.stuck and not rows.advised:
        yield from page.wrapped(_ADVICE[GREETING_MISSING], f"{INDENT}do: ")
    yield from page.wrapped(_figures(summary), "")
    for verdict, number in summary.verdicts.items():
        slow = summary.closed_slow
        gone = {GREETING_MISSING: summary.closed - slow, SERVER_SLOW: slow}.get(verdict, 0)
        ended = f", {grouped(gone)} of them closed since" if gone else ""
        yield from page.wrapped(f"{verdict}: {counted(number, 'connection')}{ended}", INDENT)
    if summary.mending is not None:
        yield from _mending_lines(summary.mending, page)
    for sentence in not_seen(summary, page):
        yield from page.wrapped(sentence, "")
    for note in summary.notes:
        yield from page.wrapped(f"note: {note}", "")


def _figures(summary: ClientSummary) -> str:
    """What was read, and how many connections there were at the end."""
    read = (
        f"{counted(summary.polls, 'poll')} in {duration_text(summary.duration_ns)} of "
        f"{summary.watched}; at the last"
    )
    silent = f"{grouped(summary.young + summary.stuck)}"
    if summary.established is None:
        return f"{read}, {silent} of {summary.selection} without a byte either way"
    connections = counted(summary.established, "connection")
    return f"{read}, {connections}, of which {silent} without a byte either way"


def _mending_lines(totals: Totals, page: Page) -> Iterator[str]:
    """What --rescue did, and what it left alone."""
    if totals.dry_run:
        would = [
            f"{grouped(number)} {plural}"
            for action, plural in _PLURALS.items()
            if (number := totals.count(action, Outcome.WOULD))
        ]
        yield from page.wrapped(
            f"rescue (dry run), would be done: {', '.join(would) or 'none'}", ""
        )
    else:
        ended = totals.count(Action.RESET, Outcome.ENDED)
        no_answer = totals.count(Action.QUESTION, Outcome.NO_ANSWER)
        yield from page.wrapped(
            f"rescue: {counted(totals.challenged, 'connection')} challenged, "
            f"{grouped(totals.asked)} asked about, {grouped(ended)} ended; "
            f"{counted(no_answer, 'question')} not answered",
            "",
        )
    for why, number in sorted(totals.reasons.items()):
        yield from page.wrapped(f"{grouped(number)} without effect: {why}", INDENT)
    for why, number in sorted(totals.left_alone.items()):
        yield from page.wrapped(f"{grouped(number)} wait, left alone now: {why}", INDENT)


_PLURALS = {
    Action.CHALLENGE: "challenges",
    Action.QUESTION: "questions",
    Action.RESET: "resets",
}
_LOSSES = {
    "untracked": "waiting connections were too many to be remembered",
    "unreadable": "sockets lack the counts that are needed (a kernel before 4.6?)",
    "subflows": "silent subflows of MPTCP were left out: another may carry the data",
    "namespaces_beyond": "network namespaces were too many to be read",
}
"""What each loss of a summary means."""


def not_seen(summary: ClientSummary, page: Page) -> Iterator[str]:
    """Sentences on what may have waited unseen."""
    for name, number in summary.losses.items():
        if number:
            yield f"{grouped(number)} {_LOSSES[name]}"
    for inode, why in summary.unread.items():
        yield f"network namespace {page.netns(inode)} could not be read: {why}"
