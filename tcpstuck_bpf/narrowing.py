"""Judges a recording again with narrower filters or another time-out.

Steps that the filters exclude are dropped, so the findings equal those of a run with these filters.
Plain counters (cookies sent, handshakes completed, the kernel's counters) cannot be split by port
or address. The summary has a note about that.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

from tcpstuck_bpf.analysis import Analysis
from tcpstuck_bpf.errors import UsageError
from tcpstuck_bpf.handshake.correlate import DEFAULT_ROW_LIFE_NS
from tcpstuck_bpf.judge.evidence import duration_text
from tcpstuck_bpf.model import SECOND_NS, FourTuple, ListenerSeen, Row, TraceFilter, address_text
from tcpstuck_bpf.recording.lines import STANDARD_INPUT
from tcpstuck_bpf.recording.replay import Replay
from tcpstuck_bpf.steps import Ended, Header, Listened, Observed, Rescued, Step, Swept
from tcpstuck_bpf.usage import nearest

LONGEST_TIMEOUT_NS = DEFAULT_ROW_LIFE_NS - 60 * SECOND_NS
"""Largest time-out. A silent client's entry is removed 15 minutes after its last SYN."""


@dataclass(frozen=True)
class Wanted:
    """The wanted part of a recording. An empty or None field does not restrict it."""

    ports: Collection[int] = ()
    ports_text: str = ""
    family: int | None = None
    address: bytes | None = None
    netns: str | None = None
    """A name in the recording, or an inode number."""
    timeout_ns: int | None = None

    @property
    def selects(self) -> bool:
        """Whether these filters exclude anything."""
        return bool(self.ports or self.family or self.address or self.netns)


class NarrowedReplay(Replay):
    """A recording of which only a part is judged, or all of it with another time-out.

    Raises RecordingError if the file is not a recording, and UsageError if it does not contain the
    wanted part.
    """

    def __init__(self, path: str, wanted: Wanted) -> None:
        super().__init__(path)
        recorded = self.header
        wanted = self._wanted = _less_than(recorded.settings.trace_filter, wanted)
        self._netns = _netns_of(wanted.netns, recorded)
        self._sockets: set[int] = set()
        """Listening sockets of the selected handshakes."""
        self._notes: list[str] = []
        _refuse_what_was_not_watched(wanted, self._netns, recorded)
        if wanted.selects:
            words = _in_words(wanted)
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
        if not self._wanted.selects:
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
            attempts = (a for a in rescue.attempts if self._selects(a.handshake.four_tuple))
            unanswered = (h for h in rescue.unanswered if self._selects(h.four_tuple))
            return Rescued(rescue._replace(attempts=tuple(attempts), unanswered=tuple(unanswered)))
        if isinstance(step, Listened):
            return Listened(tuple(one for one in step.listeners if self._selects_listener(one)))
        return step

    def _selects_handshake(self, row: Row) -> bool:
        chosen = self._selects(row.four_tuple)
        if chosen and row.handshake.socket:
            self._sockets.add(row.handshake.socket)
        return chosen

    def _selects(self, who: FourTuple) -> bool:
        wanted = self._wanted
        return (
            (not wanted.ports or who.server_port in wanted.ports)
            and wanted.family in (None, who.family)
            and wanted.address in (None, who.server_address)
            and (self._netns is None or who.netns in self._netns)
        )

    def _selects_listener(self, seen: ListenerSeen) -> bool:
        """Whether a listener is selected: by a selected handshake, or by its address and port.

        The listener of a selected handshake may have another port than the packets, as behind a
        proxy.
        """
        facts = seen.facts
        if facts.socket and facts.socket in self._sockets:
            return True
        # A FourTuple's family is that of the packets, hence that of the server's address.
        return self._selects(
            FourTuple(facts.server_address, facts.server_address, 0, facts.server_port, facts.netns)
        )


def _less_than(watched: TraceFilter, wanted: Wanted) -> Wanted:
    """The same filters without those that the recording was already made with."""
    return replace(
        wanted,
        ports=() if {*wanted.ports} == {*watched.ports} else wanted.ports,
        family=None if wanted.family == watched.family else wanted.family,
        address=None if wanted.address == watched.listener_address else wanted.address,
    )


def _in_words(wanted: Wanted) -> str:
    words = []
    if wanted.ports:
        words.append(f"port{'s' * (len(wanted.ports) > 1)} {wanted.ports_text}")
    if wanted.address is not None:
        words.append(f"address {address_text(wanted.address)}")
    if wanted.family is not None:
        words.append(f"IPv{wanted.family}")
    if wanted.netns is not None:
        words.append(f"network namespace {wanted.netns}")
    return ", ".join(words)


def _netns_of(text: str | None, recorded: Header) -> Collection[int] | None:
    """The inode numbers that match a name or number; None if no namespace was given."""
    if text is None:
        return None
    names = recorded.netns_names
    # A container's name matches without the engine and identifier that may follow it.
    found = {inode for inode, name in names.items() if text in (name, name.partition(" (")[0])}
    if not found and text.isdecimal():
        found = {int(text)}
    if not found:
        known = ", ".join(sorted(names.values())) or "none by name"
        raise UsageError(
            f"the recording has no network namespace {text}",
            f"it has: {known}",
            nearest(text, names.values(), "give one of these names, or an inode number"),
        )
    return found


def _refuse_what_was_not_watched(
    wanted: Wanted, netns: Collection[int] | None, recorded: Header
) -> None:
    watched = recorded.settings.trace_filter
    beyond = {
        "-p": bool(watched.ports) and not {*wanted.ports} <= {*watched.ports},
        "-4 or -6": None not in (watched.family, wanted.family) and watched.family != wanted.family,
        "--listener": None not in (watched.listener_address, wanted.address)
        and watched.listener_address != wanted.address,
        "--netns": watched.netns is not None and netns is not None and watched.netns not in netns,
    }
    for option, asks_for_more in beyond.items():
        if asks_for_more:
            raise UsageError(
                f"{option} selects more than the recording contains",
                f"it watched {recorded.watched} and nothing else",
                "leave it out, or record again",
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
