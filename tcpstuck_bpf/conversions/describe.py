"""Describes a plot of a recording: what is drawn, where, and what is left out. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from tcpstuck_bpf.analysis import Analysis
from tcpstuck_bpf.conversions.handshakes import Handshakes, Story, marks_of, sample
from tcpstuck_bpf.conversions.picture import (
    MOST_LABELLED,
    MOST_LANES,
    MOST_PANELS,
    Count,
    Lane,
    Mark,
    Panel,
    Passed,
    Picture,
    Reading,
    Span,
)
from tcpstuck_bpf.conversions.queues import QueueLengths, Queues
from tcpstuck_bpf.judge.evidence import duration_text
from tcpstuck_bpf.judge.rules import RULES
from tcpstuck_bpf.judge.verdict import Finding
from tcpstuck_bpf.model import SECOND_NS, ListenerId, ListenerSeen, address_text
from tcpstuck_bpf.output.page import Page, counted, endpoint, grouped
from tcpstuck_bpf.output.summary_text import SummaryText
from tcpstuck_bpf.output.writers import Selection
from tcpstuck_bpf.steps import Step, utc_text
from tcpstuck_bpf.summary import Summary
from tcpstuck_bpf.terminal import printable

_WIDTH_OF_A_TITLE = 10_000
"""The drawing wraps lines; here they stay whole."""
_QUIET_NS = SECOND_NS // 2
"""At least this much of the time after the last packet or verdict is shown."""


class Plot:
    """Takes the steps of a recording with their findings; then `picture` may be called once."""

    def __init__(self, analysis: Analysis, only: Sequence[str]) -> None:
        self._analysis = analysis
        self._only = tuple(only)
        self._handshakes = Handshakes(analysis, Selection(only, nothing=False))
        self._queues = Queues()

    def take(self, step: Step, findings: Sequence[Finding]) -> None:
        """Take a step and its findings, right after the analysis took it."""
        self._handshakes.take(step, findings)
        self._queues.take(step)

    def picture(self, summary: Summary) -> Picture:
        """The picture of all steps taken."""
        stories = self._handshakes.stories()
        ended_ns = self._analysis.begun_ns + summary.duration_ns
        drawn = sample(stories, MOST_LANES)
        origin_ns = drawn[0].identity.first_syn_ns if drawn else self._analysis.begun_ns
        lanes = [_lane(story, origin_ns, ended_ns) for story in drawn]
        end_ns = _end_of_axis(lanes, ended_ns - origin_ns)
        listeners = _by_suffering(stories, summary)
        panels = [
            self._panel(one, summary, origin_ns, end_ns) for one in [*listeners][:MOST_PANELS]
        ]
        title, *more = self._answer(summary)
        counts = _counts(stories, drawn, self._handshakes.let_go)
        return Picture(
            title=title,
            subtitle=("; ".join((*more, self._time_of_day(origin_ns))),),
            lanes=tuple(_cut(lane, end_ns) for lane in lanes),
            counts=counts,
            panels=tuple(panels),
            end_ns=end_ns,
            caption=(
                *self._selected(),
                *_left_out(counts, len(drawn)),
                *_without_trace(counts, summary),
                *_at_the_edge(lanes, end_ns, ended_ns - origin_ns),
                *_about_symbols(lanes),
                *_more_listeners(len(listeners) - len(panels)),
                *self._cut_off(summary),
            ),
        )

    def _page(self) -> Page:
        header = self._analysis.header
        return Page(
            clock=header.clock,
            width=_WIDTH_OF_A_TITLE,
            colour=False,
            own_netns=header.own_netns,
            netns_names=header.netns_names,
        )

    def _answer(self, summary: Summary) -> Iterator[str]:
        """The summary's answer. Its time of day would depend on the reader's time zone."""
        yield from SummaryText(self._page()).answer(summary._replace(cut_off_ns=None))

    def _time_of_day(self, origin_ns: int) -> str:
        when = utc_text(self._analysis.header.clock.realtime(origin_ns))
        return f"0 s is {when[:10]} {when[11:23]} UTC"

    def _panel(self, one: ListenerId, summary: Summary, origin_ns: int, end_ns: int) -> Panel:
        seen = next((seen for seen in summary.seen if seen.facts.listener == one), None)
        lengths = self._queues.of(one)
        return Panel(
            title=self._panel_title(one, seen),
            accept_queue=_readings(lengths.accept_queue.readings(), origin_ns, end_ns),
            syn_queue=_readings(lengths.syn_queue.readings(), origin_ns, end_ns),
            limit=_limits(lengths, seen, origin_ns, end_ns),
        )

    def _panel_title(self, one: ListenerId, seen: ListenerSeen | None) -> str:
        if seen is None:
            where = f"socket {one.socket}"
            if one.server_address:
                where = endpoint(address_text(one.server_address), one.server_port)
            return f"listener {where}{self._in_netns(one.netns)}"
        facts = seen.facts
        where = endpoint(address_text(seen.bound or facts.server_address), facts.server_port)
        owners = f" of {', '.join(map(printable, seen.owners))}" if seen.owners else ""
        return (
            f"listener {where}{owners}: accept queue at most {grouped(facts.peak_accept_queue)}, "
            f"SYN queue at most {grouped(facts.peak_syn_queue)}, limit {grouped(facts.limit)}"
            f"{self._in_netns(one.netns)}"
        )

    def _in_netns(self, netns: int) -> str:
        page = self._page()
        return "" if netns == page.own_netns else f", in {page.netns(netns)}"

    def _selected(self) -> Iterator[str]:
        chosen = [*filter(None, [self._analysis.header.selection, ", ".join(self._only)])]
        if chosen:
            yield f"Only {printable('; '.join(chosen))}."

    def _cut_off(self, summary: Summary) -> Iterator[str]:
        if summary.cut_off_ns is not None:
            until = utc_text(self._analysis.header.clock.realtime(summary.cut_off_ns))
            yield f"The recording ends early, at {until[11:23]} UTC; what came later is unknown."


def _lane(story: Story, origin_ns: int, ended_ns: int) -> Lane:
    who = story.identity.four_tuple
    marks = (Mark(one.time_ns - origin_ns, one.kind) for one in marks_of(story.facts))
    return Lane(
        label=endpoint(who.client_ip, who.client_port),
        spans=tuple(_spans(story, origin_ns, ended_ns)),
        # A damaged recording may have times before the first SYN.
        marks=tuple(mark for mark in marks if mark.time_ns >= 0),
        verdicts=tuple(Passed(max(0, one.time_ns - origin_ns), one.name) for one in story.verdicts),
        goes_on=story.is_stuck,
    )


def _spans(story: Story, origin_ns: int, ended_ns: int) -> Iterator[Span]:
    """The parts of a handshake's line, which never go back in time."""
    reached_ns = story.identity.first_syn_ns - origin_ns
    stuck_in = ""
    for verdict in story.verdicts:
        until_ns = max(reached_ns, verdict.time_ns - origin_ns)
        if until_ns > reached_ns:
            yield Span(reached_ns, until_ns, stuck_in)
        reached_ns, stuck_in = until_ns, verdict.name if verdict.stuck else ""
    marks = marks_of(story.facts)
    last_ns = marks[-1].time_ns if marks else story.identity.first_syn_ns
    if stuck_in or story.last is None:
        last_ns = ended_ns if story.ended_ns is None else story.ended_ns
    if last_ns - origin_ns > reached_ns:
        yield Span(reached_ns, last_ns - origin_ns, stuck_in)


def _end_of_axis(lanes: Sequence[Lane], ended_ns: int) -> int:
    """Where to end the time axis: soon after the last news, at the latest with the recording."""
    if not lanes:
        return max(1, ended_ns)
    last_ns = max(time_ns for lane in lanes for time_ns in _times(lane))
    return max(1, last_ns, min(ended_ns, last_ns + max(_QUIET_NS, last_ns // 8)))


def _times(lane: Lane) -> Iterator[int]:
    """The times at which something happened to a handshake, and 0."""
    yield 0
    yield from (mark.time_ns for mark in lane.marks)
    yield from (passed.time_ns for passed in lane.verdicts)
    yield from (span.begin_ns for span in lane.spans)
    if lane.spans and lane.verdicts and not lane.goes_on:
        yield lane.spans[-1].end_ns


def _cut(lane: Lane, end_ns: int) -> Lane:
    """The lane within the time axis."""
    spans = tuple(span._replace(end_ns=min(span.end_ns, end_ns)) for span in lane.spans)
    return lane._replace(spans=spans)


def _counts(
    stories: Sequence[Story], drawn: Sequence[Story], let_go: Counter[str]
) -> tuple[Count, ...]:
    """The number of handshakes by verdict. Of those let go, only the last verdict is known."""
    stuck = {rule.name for rule in RULES if rule.stuck}
    ever = let_go + Counter(name for story in stories for name in _names(story))
    last = let_go + Counter(story.last.name if story.last else "" for story in stories)
    shown = Counter(name for story in drawn for name in _names(story))
    return tuple(
        Count(name, ever[name], last[name], shown[name], name in stuck)
        for name in sorted(ever, key=lambda name: (-ever[name], name))
    )


def _names(story: Story) -> set[str]:
    return {verdict.name for verdict in story.verdicts} or {""}


def _by_suffering(stories: Sequence[Story], summary: Summary) -> list[ListenerId]:
    """The listeners: most stuck clients first, then most handshakes, then most cookies."""
    stuck = Counter(story.listener for story in stories if story.ever_stuck)
    served = Counter(story.listener for story in stories)
    cookies = {
        one.facts.listener: one.facts.cookies_sent for one in summary.seen if one.facts.suffered
    }
    return sorted(
        served.keys() | cookies.keys(),
        key=lambda one: (-stuck[one], -served[one], -cookies.get(one, 0), one),
    )


def _readings(
    readings: Sequence[tuple[int, int]], origin_ns: int, end_ns: int
) -> tuple[Reading, ...]:
    """The readings within the time axis."""
    since = (Reading(time_ns - origin_ns, number) for time_ns, number in readings)
    return tuple(one for one in since if 0 <= one.time_ns <= end_ns)


def _limits(
    lengths: QueueLengths, seen: ListenerSeen | None, origin_ns: int, end_ns: int
) -> tuple[Reading, ...]:
    """The limit at first, and each change of it."""
    known = _readings(lengths.limit.readings(), origin_ns, end_ns)
    if not known and seen is not None:
        known = (Reading(0, seen.facts.limit),)
    return tuple(
        one for before, one in zip((None, *known), known) if not before or before[1] != one[1]
    )


def _left_out(counts: Sequence[Count], drawn: int) -> Iterator[str]:
    number = sum(count.last for count in counts)
    if number > drawn:
        yield (
            f"{grouped(number - drawn)} of {grouped(number)} handshakes are not drawn: there is "
            f"room for {grouped(MOST_LANES)}: stuck clients first, and of equals a sample."
        )


def _without_trace(counts: Sequence[Count], summary: Summary) -> Iterator[str]:
    """The handshakes that a recording does not contain."""
    told = sum(count.last for count in counts if count.verdict == "completed")
    healthy = summary.verdicts.get("completed", 0) - told
    if healthy > 0:
        yield (
            f"{counted(healthy, 'healthy handshake')} left no trace in the recording and "
            f"{'is' if healthy == 1 else 'are'} not drawn."
        )
    if summary.lost_events:
        yield f"{counted(summary.lost_events, 'event')} got lost, so some marks may be missing."


def _at_the_edge(lanes: Sequence[Lane], end_ns: int, ended_ns: int) -> Iterator[str]:
    if any(lane.goes_on for lane in lanes):
        yield (
            "Clients whose lines run to the end were still stuck when the recording ended, at "
            f"{duration_text(max(ended_ns, end_ns))}."
        )


def _about_symbols(lanes: Sequence[Lane]) -> Iterator[str]:
    if lanes:
        yield "Symbols on one line that would overlap stand side by side."
    if len(lanes) > MOST_LABELLED:
        yield "Where lines are close, only some symbols are whole; the others are dots."


def _more_listeners(number: int) -> Iterator[str]:
    if number > 0:
        yield f"{counted(number, 'more listener')} {'has' if number == 1 else 'have'} no panel."
