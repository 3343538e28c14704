"""Judges a recording again with narrower filters or another time-out.

Steps that the filters exclude are dropped, so the findings equal those of a run with these filters.
Plain counters (cookies sent, handshakes completed, the kernel's counters) cannot be split by port
or address. The summary has a note about that.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from tcpstuck_bpf.analysis import Analysis
from tcpstuck_bpf.errors import UsageError
from tcpstuck_bpf.handshake.correlate import DEFAULT_ROW_LIFE_NS
from tcpstuck_bpf.judge.evidence import duration_text
from tcpstuck_bpf.model import SECOND_NS, FourTuple, ListenerSeen, Row
from tcpstuck_bpf.recording.lines import STANDARD_INPUT, RecordedLines
from tcpstuck_bpf.recording.replay import Replay
from tcpstuck_bpf.recording_part import Part, Wanted
from tcpstuck_bpf.steps import Ended, Header, Listened, Observed, Rescued, Step, Swept

LONGEST_TIMEOUT_NS = DEFAULT_ROW_LIFE_NS - 60 * SECOND_NS
"""Largest time-out. A silent client's entry is removed 15 minutes after its last SYN."""


class NarrowedReplay(Replay):
    """A recording of which only a part is judged, or all of it with another time-out.

    `path`: the file's name, which is read again for a longer time-out; `lines`: it is opened
    already. Raises RecordingError if the file is not a recording, and UsageError if it does not
    contain the wanted part.
    """

    def __init__(self, path: str, wanted: Wanted, lines: RecordedLines | None = None) -> None:
        super().__init__(path if lines is None else lines)
        recorded = self.header
        self._part = Part(
            wanted, recorded.settings.trace_filter, recorded.watched, recorded.netns_names
        )
        self._sockets: set[int] = set()
        """Listening sockets of the selected handshakes."""
        self._notes: list[str] = []
        words = self._part.words
        if words:
            self.header = replace(self.header, selection=words)
            self._notes.append(
                f"findings and listeners cover {words} only. Cookies sent, losses, clients that "
                "--rescue left alone and the comparison with the kernel's counters cover the "
                f"whole recording ({recorded.watched}). Completed handshakes cannot be split by "
                "filter and are omitted"
            )
        timeout_ns, before_ns = wanted.timeout_ns, recorded.settings.timeout_ns
        if timeout_ns is not None and timeout_ns != before_ns:
            _refuse_timeout(path, timeout_ns, recorded)
            settings = replace(recorded.settings, timeout_ns=timeout_ns)
            self.header = replace(self.header, settings=settings)
            self._notes.append(
                f"judged with a time-out of {duration_text(timeout_ns)}, recorded with "
                f"{duration_text(before_ns)}. A verdict takes effect at the next sweep in the "
                "recording, and only counters read by then can weaken it"
            )

    def steps(self) -> Iterator[Step]:
        """The steps in order, without what the filters exclude."""
        for step in super().steps():
            yield self._narrowed(step)

    def _narrowed(self, step: Step) -> Step:
        if isinstance(step, Ended):
            return step._replace(notes=(*step.notes, *self._notes))
        if not self._part.words:
            return step
        if isinstance(step, Swept):
            rows = tuple(row for row in step.sweep.rows if self._selects_handshake(row))
            return Swept(step.sweep._replace(rows=rows))
        if isinstance(step, Observed):
            events = (
                event
                for event in step.events
                if self._selects_handshake(Row(event.four_tuple, event.handshake))
            )
            return Observed(tuple(events))
        if isinstance(step, Rescued):
            rescue = step.rescue
            attempts = (a for a in rescue.attempts if self._part.selects(a.handshake.four_tuple))
            unanswered = (h for h in rescue.unanswered if self._part.selects(h.four_tuple))
            return Rescued(rescue._replace(attempts=tuple(attempts), unanswered=tuple(unanswered)))
        if isinstance(step, Listened):
            return Listened(tuple(one for one in step.listeners if self._selects_listener(one)))
        return step

    def _selects_handshake(self, row: Row) -> bool:
        chosen = self._part.selects(row.four_tuple)
        if chosen and row.handshake.socket:
            self._sockets.add(row.handshake.socket)
        return chosen

    def _selects_listener(self, seen: ListenerSeen) -> bool:
        """Whether a listener is selected: by a selected handshake, or by its address and port.

        The listener of a selected handshake may have another port than the packets, as behind a
        proxy.
        """
        facts = seen.facts
        if facts.socket and facts.socket in self._sockets:
            return True
        # A FourTuple's family is that of the packets, hence that of the server's address.
        return self._part.selects(
            FourTuple(facts.server_address, facts.server_address, 0, facts.server_port, facts.netns)
        )


def _refuse_timeout(path: str, timeout_ns: int, recorded: Header) -> None:
    before_ns = recorded.settings.timeout_ns
    shortest_ns = before_ns * 3 // 4
    if timeout_ns < shortest_ns and not recorded.settings.tell_healthy:
        raise UsageError(
            f"-t {duration_text(timeout_ns)} is too short for this recording",
            f"it omits clients that connected within {shortest_ns / SECOND_NS:g} s of the SYN (3/4 "
            "of its time-out): they would look stuck",
            f"write -t {shortest_ns / SECOND_NS:g} or more, or record with a shorter -t or --all",
        )
    if timeout_ns > LONGEST_TIMEOUT_NS:
        raise UsageError(
            f"-t {duration_text(timeout_ns)} is too long for a recording",
            f"a run forgets clients after {duration_text(DEFAULT_ROW_LIFE_NS)} of silence",
            f"write -t {duration_text(LONGEST_TIMEOUT_NS).split()[0]}m or less",
        )
    if timeout_ns > before_ns:
        _refuse_what_was_let_go(path, timeout_ns)


def _refuse_what_was_let_go(path: str, timeout_ns: int) -> None:
    """Refuse a longer time-out if a full table dropped clients before they reach it."""
    if path == STANDARD_INPUT:
        raise UsageError(
            f"-t {duration_text(timeout_ns)} is longer than the recorded time-out",
            "that needs to read the recording twice, which standard input does not allow",
            "name the file",
        )
    replay = Replay(path)
    analysis = Analysis(replay.header)
    lost = before = 0
    for step in replay.steps():
        analysis.take(step)
        now_ns = getattr(step, "now_ns", None)
        if analysis.leaving and now_ns is not None:
            young = sum(now_ns - one.first_syn_ns < timeout_ns for one in analysis.leaving)
            # Ended handshakes leave the table too; that loses no verdict.
            given_up = _given_up(analysis)
            lost += min(young, given_up - before)
            before = given_up
    if lost:
        raise UsageError(
            f"-t {duration_text(timeout_ns)} is too long for this recording",
            f"its table was full, and {lost} clients were removed before that time",
            f"write -t {replay.header.settings.timeout_ns / SECOND_NS:g}, or record with a larger "
            "--max-handshakes",
        )


def _given_up(analysis: Analysis) -> int:
    stats = analysis.correlator.stats()
    return stats.let_go + stats.evicted
