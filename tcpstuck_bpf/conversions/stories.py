"""Collects what a replay shows of each handshake, until nothing more can come of it. Pure.

The correlator's flow has the merged facts. It keeps neither the cookies of earlier SYNs nor the
drop site of each ACK, so a story keeps these besides. A story ends when its flow leaves the
correlator. So there are about as many stories as flows.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Union

from tcpstuck_bpf.analysis import Analysis
from tcpstuck_bpf.conversions.packets import Cookie, Known, first_cookie
from tcpstuck_bpf.handshake.entry import is_torn
from tcpstuck_bpf.handshake.flow import Flow, FlowReport
from tcpstuck_bpf.judge.drop_cause import Drop, drop_at
from tcpstuck_bpf.judge.netfilter import rule_text
from tcpstuck_bpf.judge.verdict import Finding
from tcpstuck_bpf.model import (
    Event,
    EventKind,
    FourTuple,
    Handshake,
    HandshakeId,
    Row,
    Sweep,
    SweepPart,
)
from tcpstuck_bpf.rulesets import KernelNames
from tcpstuck_bpf.steps import Ended, Observed, Step, Swept

MOST_NOTES = 32
"""Largest number of cookies, and of drop sites, that a story keeps: more than segments are kept."""

Facts = Union[Flow, FlowReport]
Site = tuple[int, int]
"""Numbers of the place and the reason of a drop."""


_NO_COOKIES: Mapping[int, Cookie] = {}
_NO_SITES: Mapping[int, Site] = {}


@functools.lru_cache(maxsize=1024)
def _shared(names: tuple[str, ...]) -> tuple[str, ...]:
    """The cached tuple equal to this one, to save memory."""
    return names


class Story:
    """One handshake: its facts, its verdict, and what the facts leave out."""

    __slots__ = (
        "_cause",
        "_cookies",
        "_refusal",
        "_sites",
        "awaits_rules",
        "facts",
        "identity",
        "is_wanted",
        "verdicts",
        "words",
    )

    def __init__(self, identity: HandshakeId) -> None:
        self.identity = identity
        self.facts: Facts | None = None
        """The flow, or its last report if the flow had left by then; None if there is neither."""
        self.is_wanted = False
        self.awaits_rules = False
        self.verdicts: tuple[str, ...] = ()
        """Names of its verdicts, the last one last."""
        self.words = ""
        """The last verdict in words."""
        # Never changed in place: most stories are a flood's, and share the empty ones.
        self._cookies: Mapping[int, Cookie] = _NO_COOKIES
        self._sites: Mapping[int, Site] = _NO_SITES
        self._cause: tuple[Site, str] | None = None
        """What dropped the last ACK before TCP."""
        self._refusal: tuple[int, str] | None = None
        """Time of the last ACK that the cookie check dropped, and why it did."""

    def note_entry(self, entry: Handshake) -> None:
        """Keep the first SYN's cookie, if this view of the entry shows it."""
        cookie = first_cookie(entry)
        if cookie is not None and entry.first_syn_ns == self.identity.first_syn_ns:
            self._cookies = {entry.first_syn_ns: cookie, **self._cookies}

    def note_event(self, event: Event) -> None:
        """Keep what only this event shows."""
        entry, time_ns = event.handshake, event.time_ns
        self.note_entry(entry)
        if event.kind == EventKind.SYN_REPEATED:
            self._cookies = {**self._cookies, time_ns: Cookie(entry.cookie_isn, entry.mss)}
        if event.kind == EventKind.ACK_FILTERED:
            self._sites = {**self._sites, time_ns: (entry.filter_place, entry.filter_reason)}
        if self.facts is not None and max(len(self._cookies), len(self._sites)) > MOST_NOTES:
            kept = {self.identity.first_syn_ns, *(one.time_ns for one in self.facts.segments)}
            self._cookies = {at: one for at, one in self._cookies.items() if at in kept}
            self._sites = {at: one for at, one in self._sites.items() if at in kept}

    def note_finding(self, finding: Finding, *, wanted: bool) -> None:
        """Keep the verdict."""
        if self.verdicts[-1:] != (finding.verdict,):
            self.verdicts = _shared((*self.verdicts, finding.verdict))
        self.is_wanted |= wanted
        self.awaits_rules = finding.to_be_updated
        flood = ", suspected SYN flood" if finding.flood_suspected else ""
        before = f"; before: {', '.join(self.verdicts[:-1])}" if self.verdicts[1:] else ""
        self.words = sys.intern(
            f"verdict {finding.verdict} ({finding.certainty}{flood}): {finding.meaning}{before}"
        )
        if finding.drop is not None and self.facts is not None:
            self._note_drop(finding.drop, self.facts.handshake)

    def _note_drop(self, drop: Drop, entry: Handshake) -> None:
        if drop.cause is not None:
            self._cause = ((entry.filter_place, entry.filter_reason), cause_text(drop))
        elif drop.refusal is not None:
            self._refusal = (entry.last_ack_dropped_ns, drop.refusal.words)

    def known(self, names: KernelNames) -> Known | None:
        """What is known of its packets; None without any facts."""
        if self.facts is None:
            return None
        causes = {time_ns: self._cause_at(site, names) for time_ns, site in self._sites.items()}
        if self._refusal is not None:
            time_ns, words = self._refusal
            causes[time_ns] = words
        facts = self.facts
        return Known(facts.handshake, facts.segments, facts.attempts, self._cookies, causes)

    def _cause_at(self, site: Site, names: KernelNames) -> str:
        """What dropped an ACK: the verdict knows the rule, and other sites have numbers only."""
        if self._cause is not None and self._cause[0] == site:
            return self._cause[1]
        return cause_text(drop_at(*site, names))


def cause_text(drop: Drop) -> str:
    """What dropped an ACK before TCP: `netfilter, ip t c, rule handle 2; reason NETFILTER_DROP`."""
    what = drop.what or "unknown"
    rule = drop.netfilter.rule
    by = f"{what}, {rule_text(rule)}" if rule is not None else what
    hook = f", at its hook {drop.hook}" if drop.hook and rule is None else ""
    reason = f"reason {drop.reason}" if drop.reason else "no reason"
    return f"{by}{hook}; {reason}, at {drop.place}"


class Stories:
    """The stories of the handshakes in a replay.

    `wanted` chooses findings; a story with one of them is wanted.
    """

    def __init__(self, analysis: Analysis, wanted: Callable[[Finding], bool]) -> None:
        self._analysis = analysis
        self._wanted = wanted
        self._stories: dict[HandshakeId, Story] = {}
        self._over: list[Story] = []
        self._swept: dict[FourTuple, Handshake] = {}
        """The entries of the last whole sweep, and of those that began since."""
        self._sweeping: dict[FourTuple, Handshake] = {}

    def take(self, step: Step, findings: list[Finding]) -> list[Story]:
        """Take a step that the analysis has taken, and its findings; returns what is complete.

        These are stories that are wanted and whose flow has left, or all at the end.
        """
        if isinstance(step, Observed):
            for event in step.events:
                self._story_of(Row(event.four_tuple, event.handshake)).note_event(event)
        if findings:
            reports = {
                HandshakeId(report.four_tuple, report.handshake.first_syn_ns): report
                for report in self._analysis.reports
            }
            for finding in findings:
                who = HandshakeId(finding.four_tuple, finding.first_syn_ns)
                story = self._story(who, reports.get(who))
                story.note_finding(finding, wanted=self._wanted(finding))
        if isinstance(step, Swept):
            self._take_sweep(step.sweep)
        if isinstance(step, Ended):
            self._over += self._stories.values()
            self._stories.clear()
        over, self._over = self._over, []
        return [story for story in over if story.is_wanted]

    def _story(self, who: HandshakeId, report: FlowReport | None = None) -> Story:
        """The story of a handshake, with its present flow, or else a report, as its facts."""
        story = self._stories.get(who)
        flow = self._analysis.correlator.flows.named(who)
        if story is not None and flow is not None and story.facts not in (None, flow):
            # The flow was let go, and is seen again.
            self._over.append(self._stories.pop(who))
            story = None
        if story is None:
            story = self._stories[who] = Story(who)
        if report is not None and isinstance(story.facts, FlowReport):
            story.facts = report
        story.facts = story.facts or flow or report
        return story

    def _story_of(self, row: Row) -> Story:
        """The story of an entry. If its SYN was repeated, the sweep before has the first cookie."""
        story = self._story(HandshakeId(row.four_tuple, row.handshake.first_syn_ns))
        before = self._swept.get(row.four_tuple) if row.handshake.syn_count > 1 else None
        if before is not None and not is_torn(before):
            story.note_entry(before)
        return story

    def _take_sweep(self, sweep: Sweep) -> None:
        if sweep.part is SweepPart.CHOSEN:
            self._swept.update(sweep.rows)
            return
        for row in sweep.rows:
            if row.handshake.syn_count > 1:
                self._story_of(row)
        self._sweeping.update(sweep.rows)
        if sweep.part is SweepPart.LAST:
            self._swept, self._sweeping = self._sweeping, {}
            self._end(list(self._those_that_left()))

    def _those_that_left(self) -> Iterator[HandshakeId]:
        for who, story in self._stories.items():
            flow = self._analysis.correlator.flows.named(who)
            if not story.awaits_rules and (flow is None or flow is not story.facts):
                yield who

    def _end(self, those: list[HandshakeId]) -> None:
        self._over += [self._stories.pop(who) for who in those]
