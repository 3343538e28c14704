"""Gathers the handshakes of a recording for a picture, while it is replayed. Pure.

Times are CLOCK_MONOTONIC nanoseconds.
"""

from __future__ import annotations

import heapq
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from tcpstuck_bpf.analysis import Analysis
from tcpstuck_bpf.conversions.picture import FLOOD, Mark, MarkKind
from tcpstuck_bpf.handshake.flow import Flow, FlowReport, Segment
from tcpstuck_bpf.handshake.timeline import facts_without_event
from tcpstuck_bpf.judge.verdict import Finding
from tcpstuck_bpf.model import (
    Attempt,
    Ending,
    EventKind,
    FourTuple,
    Handshake,
    HandshakeId,
    ListenerId,
    Row,
    SweepPart,
    listener_of,
)
from tcpstuck_bpf.output.writers import Selection
from tcpstuck_bpf.steps import Advanced, Observed, Rescued, Step, Swept

MOST_KEPT = 20_000
"""Largest number of handshakes in memory."""
MOST_VERDICTS = 16
"""Largest number of verdicts kept for one handshake. Only a namespace that seems gone again and
again could cause more."""

_MARK_OF: dict[int, MarkKind] = {
    EventKind.SYN_REPEATED: MarkKind.SYN,
    EventKind.SYN_DROPPED: MarkKind.SYN_DROPPED,
    EventKind.ACK_DROPPED: MarkKind.ACK_DROPPED,
    EventKind.ACK_FILTERED: MarkKind.ACK_FILTERED,
    EventKind.ACK_REJECTED: MarkKind.ACK_REJECTED,
    EventKind.RESET: MarkKind.RESET,
    EventKind.COMPLETED: MarkKind.CONNECTED,
    EventKind.TAKEN_OVER: MarkKind.SYN_TAKEN,
    EventKind.REPLACED: MarkKind.NEW_SYN,
    EventKind.NO_LISTENER: MarkKind.NO_LISTENER,
}


class Facts(NamedTuple):
    """What is known about a handshake's packets."""

    entry: Handshake
    segments: tuple[Segment, ...] = ()
    segments_omitted: int = 0
    attempts: tuple[Attempt, ...] = ()


def facts_of(one: Flow | FlowReport) -> Facts:
    """The facts of a flow, or of a report on it."""
    return Facts(one.handshake, one.segments, one.segments_omitted, one.attempts)


def marks_of(facts: Facts) -> tuple[Mark, ...]:
    """A handshake's packets in order of time, each once."""
    return tuple(sorted(set(_marks(facts)), key=lambda mark: (mark.time_ns, _ORDER[mark.kind])))


_ORDER = {kind: place for place, kind in enumerate(MarkKind)}


def _marks(facts: Facts) -> Iterator[Mark]:
    entry = facts.entry
    if entry.syn_count:
        yield Mark(entry.first_syn_ns, MarkKind.SYN)
        yield Mark(entry.first_syn_ns, MarkKind.COOKIE)
    for segment in facts.segments:
        if segment.kind in _MARK_OF:
            yield Mark(segment.time_ns, _MARK_OF[segment.kind])
        if segment.kind == EventKind.SYN_REPEATED:
            yield Mark(segment.time_ns, MarkKind.COOKIE)
    for fact in facts_without_event(entry, facts.segments):
        yield Mark(fact.time_ns, _MARK_OF[fact.kind])
        # Without an event, nothing shows which of several SYNs were dropped.
        if fact.kind == EventKind.SYN_REPEATED and not entry.syns_dropped:
            yield Mark(fact.time_ns, MarkKind.COOKIE)
    for attempt in facts.attempts:
        if attempt.sent:
            yield Mark(attempt.time_ns, MarkKind.RESCUE)


class Verdict(NamedTuple):
    """A verdict on a handshake."""

    time_ns: int
    name: str
    """FLOOD for a client that looks like part of a SYN flood."""
    stuck: bool


def verdict_of(finding: Finding) -> Verdict:
    """The verdict of a finding."""
    name = FLOOD if finding.flood_suspected else finding.verdict
    return Verdict(finding.verdict_ns, name, finding.stuck and not finding.flood_suspected)


class Story:
    """One handshake."""

    __slots__ = ("facts", "identity", "superseded_ns", "verdicts")

    def __init__(self, identity: HandshakeId, facts: Facts) -> None:
        self.identity = identity
        self.facts = facts
        self.verdicts: tuple[Verdict, ...] = ()
        self.superseded_ns: int | None = None
        """Time at which the client's port began a new handshake; None if it did not."""

    @property
    def listener(self) -> ListenerId:
        """The listener that sent the last SYN-ACK."""
        return listener_of(self.identity.four_tuple, self.facts.entry)

    @property
    def last(self) -> Verdict | None:
        """The verdict that holds; None if there is none yet."""
        return self.verdicts[-1] if self.verdicts else None

    @property
    def ended_ns(self) -> int | None:
        """When a stuck client gave up; None if nothing shows that it did."""
        entry = self.facts.entry
        replaced = entry.ended_ns if entry.ending == Ending.REPLACED else None
        return min((one for one in (replaced, self.superseded_ns) if one is not None), default=None)

    @property
    def is_stuck(self) -> bool:
        """Whether the client is stuck at the end."""
        return self.last is not None and self.last.stuck and self.ended_ns is None

    @property
    def ever_stuck(self) -> bool:
        """Whether the client was stuck at any time."""
        return any(verdict.stuck for verdict in self.verdicts)

    @property
    def rank(self) -> int:
        """How much the story matters, the most important stories first."""
        if self.last is None or self.last.name == FLOOD:
            return 3
        return 0 if self.is_stuck else 1 if self.ever_stuck else 2

    def note_handshake(self, first_syn_ns: int) -> None:
        """Note that the client's port had a handshake that began at this time."""
        if first_syn_ns > self.identity.first_syn_ns:
            before_ns = self.superseded_ns
            self.superseded_ns = first_syn_ns if before_ns is None else min(before_ns, first_syn_ns)

    def add(self, verdict: Verdict) -> None:
        """Add a verdict. One about the same moment corrects the last one."""
        last = self.last
        if last is not None and last[1:] == verdict[1:]:
            return
        earlier = self.verdicts[:-1] if last and last.time_ns == verdict.time_ns else self.verdicts
        self.verdicts = (*earlier, verdict)[-MOST_VERDICTS:]


def in_order(story: Story) -> tuple[int, FourTuple]:
    """The order of stories: by the first SYN."""
    return (story.identity.first_syn_ns, story.identity.four_tuple)


class Handshakes:
    """Takes the steps of a recording with their findings, right after the analysis took each.

    `selection` says which findings are shown. A handshake is kept with all its verdicts if one of
    them is shown.
    """

    def __init__(self, analysis: Analysis, selection: Selection) -> None:
        self._analysis = analysis
        self._selection = selection
        self._kept: dict[HandshakeId, Story] = {}
        self._latest: dict[FourTuple, Story] = {}
        """The latest handshake of each kept 4-tuple."""
        self._let_go: Counter[str] = Counter()
        """Handshakes that are no longer kept, by their last verdict."""
        self._batches: list[tuple[Row, ...]] = []
        """The rows of the sweep that is being read."""
        self._rows: list[tuple[Row, ...]] = []
        """The rows of the last whole sweep."""
        self._swept_ns = 0

    def take(self, step: Step, findings: Iterable[Finding]) -> None:
        """Take a step and its findings."""
        if isinstance(step, Observed):
            self._observed(HandshakeId(e.four_tuple, e.handshake.first_syn_ns) for e in step.events)
        elif isinstance(step, Swept):
            self._swept(step)
        elif isinstance(step, Rescued):
            self._observed(attempt.handshake for attempt in step.rescue.attempts)
        reports = self._analysis.reports if isinstance(step, Advanced) else []
        facts = {_identity(report): facts_of(report) for report in reports}
        for finding in findings:
            self._take_finding(finding, facts)
        if len(self._kept) > MOST_KEPT:
            self._make_room()

    def _observed(self, identities: Iterable[HandshakeId]) -> None:
        for identity in identities:
            latest = self._latest.get(identity.four_tuple)
            if latest is not None:
                latest.note_handshake(identity.first_syn_ns)
            story = self._kept.get(identity)
            if story is not None:
                self._refresh(story)

    def _swept(self, step: Swept) -> None:
        sweep = step.sweep
        if self._latest:
            for who, entry in sweep.rows:
                latest = self._latest.get(who)
                if latest is not None:
                    latest.note_handshake(entry.first_syn_ns)
        if sweep.part is SweepPart.CHOSEN:
            return
        self._batches.append(sweep.rows)
        if sweep.part is SweepPart.LAST:
            self._rows, self._batches = self._batches, []
            self._swept_ns = sweep.time_ns

    def _refresh(self, story: Story) -> None:
        """Take the facts that the correlator has by now."""
        flow = self._analysis.correlator.flows.get(story.identity.four_tuple)
        if flow is None:
            return
        if flow.handshake.first_syn_ns == story.identity.first_syn_ns:
            story.facts = facts_of(flow)
        else:
            story.note_handshake(flow.handshake.first_syn_ns)

    def _take_finding(self, finding: Finding, facts: dict[HandshakeId, Facts]) -> None:
        identity = HandshakeId(finding.four_tuple, finding.first_syn_ns)
        story = self._kept.get(identity)
        known = facts.get(identity)
        if story is None:
            if known is None or not self._selection.of([finding]):
                return
            self._take_back(finding)
            story = self._kept[identity] = Story(identity, known)
            self._refresh(story)
            latest = self._latest.setdefault(identity.four_tuple, story)
            latest.note_handshake(identity.first_syn_ns)
            story.note_handshake(latest.identity.first_syn_ns)
            if latest.identity.first_syn_ns < identity.first_syn_ns:
                self._latest[identity.four_tuple] = story
        elif known is not None:
            story.facts = known
        story.add(verdict_of(finding))

    def _take_back(self, finding: Finding) -> None:
        """A handshake that was let go is kept again, if this finding replaces one about it."""
        if finding.updates is None:
            return
        for name in (finding.updates, FLOOD):
            if self._let_go[name] > 0:
                self._let_go[name] -= 1
                return

    def _make_room(self) -> None:
        """Let a quarter of the handshakes go, the least important ones."""
        ordered = sorted(self._kept.values(), key=_by_importance)
        for story in ordered[MOST_KEPT * 3 // 4 :]:
            del self._kept[story.identity]
            self._let_go[story.last.name if story.last else ""] += 1
            if self._latest.get(story.identity.four_tuple) is story:
                del self._latest[story.identity.four_tuple]

    def stories(self) -> list[Story]:
        """The handshakes with a verdict, and those too young for one, by their first SYN."""
        for story in self._kept.values():
            self._refresh(story)
        return sorted((*self._kept.values(), *self._young()), key=in_order)

    def _young(self) -> Iterator[Story]:
        """Handshakes in the last sweep that were too young for a verdict."""
        timeout_ns = self._analysis.header.settings.timeout_ns
        if self._selection.chooses:
            return
        for batch in self._rows:
            for who, entry in batch:
                identity = HandshakeId(who, entry.first_syn_ns)
                flow = self._analysis.correlator.flows.named(identity)
                facts = Facts(entry) if flow is None else facts_of(flow)
                judged = flow is not None and flow.state is not None
                old = flow is None and entry.first_syn_ns <= self._swept_ns - timeout_ns
                if not (judged or old or identity in self._kept or facts.entry.ending):
                    yield Story(identity, facts)

    @property
    def let_go(self) -> Counter[str]:
        """The number of handshakes that are no longer kept, by their last verdict."""
        return +self._let_go


def _identity(report: FlowReport) -> HandshakeId:
    return HandshakeId(report.four_tuple, report.handshake.first_syn_ns)


def _by_importance(story: Story) -> tuple[int, int, int, FourTuple]:
    """The order in which stories are wanted. Of equals, chance decides, and not their age.

    The chance is a checksum, so it is the same each time.
    """
    who, first_syn_ns = story.identity
    chance = zlib.crc32(b"%b%d %d" % (who.client_address, who.client_port, first_syn_ns))
    return (story.rank, chance, *in_order(story))


def sample(stories: Iterable[Story], most: int) -> list[Story]:
    """The most important stories, by their first SYN; of equals that do not all fit, a sample."""
    return sorted(heapq.nsmallest(most, stories, key=_by_importance), key=in_order)
