"""The figures of each listener for `--metrics`: added up by labels, in a bounded number of places.

Pure. A listener is known by its label values, and not by its socket: the sockets that share a port
and the ones of a restarted server are one row of figures. What only rises is added up from the
differences of readings, so that it goes on rising when a socket goes and another one comes.

MOST_LISTENERS have places of their own. One that has been idle for IDLE_NS gives its place up to a
new one; half of the places are kept for listeners that sent a cookie or dropped something. All
others share one row (OTHER), which takes in what was counted of a listener that gave its place up:
the sum over all rows never falls. So whoever opens listening sockets without end makes neither this
process nor Prometheus's database grow without end.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from tcpstuck_bpf.judge.stuck_now import StuckGroup
from tcpstuck_bpf.judge.verdict import Finding
from tcpstuck_bpf.model import (
    SECOND_NS,
    FourTuple,
    HandshakeId,
    ListenerFacts,
    ListenerId,
    ListenerSeen,
    address_bytes,
    address_text,
    listener_id,
)
from tcpstuck_bpf.output import metric_families as families
from tcpstuck_bpf.output.metric_families import OTHER, Family, Sample
from tcpstuck_bpf.terminal import printable

MOST_LISTENERS = 128
IDLE_NS = 3600 * SECOND_NS
MOST_CHARACTERS = 80
"""Of a label's value. A process name has 15 (TASK_COMM_LEN), the name of a namespace up to 255."""
_MOST_OWNERS = 4
_LOOK_INTERVAL_NS = 60 * SECOND_NS
_MOST_READINGS_KEPT = 16_384
"""Twice as many listeners as a run remembers (`backlog_history.MAX_LISTENERS`)."""

FLOOD_CAUSE = "syn-flood"
"""The cause of an `ack-missing` that looks like a SYN flood's."""

Labels = tuple[str, str, str, str]
"""The values of families.LISTENER."""
What = tuple[str, str]
"""Verdict and cause."""

_OTHERS: Labels = (OTHER, "", "", "")
_COUNTED: tuple[tuple[Family, str], ...] = (
    (families.LISTENER_SYNS, "syns"),
    (families.LISTENER_COOKIES, "cookies_sent"),
    (families.SYNS_REFUSED, "syns_refused"),
    (families.ACKS_REFUSED, "acks_refused"),
)


def clean(text: str) -> str:
    """A foreign name as the value of a label: as it may be printed, and not without end."""
    return printable(text)[:MOST_CHARACTERS]


def cause_of(finding: Finding) -> str:
    """What dropped the ACK, in the word that JSON has for it; empty where nothing did."""
    if finding.flood_suspected:
        return FLOOD_CAUSE
    return "" if finding.drop is None else finding.drop.what


def owner_names(owners: Iterable[str]) -> str:
    """The names of the processes in `name (pid N)`, each once.

    Without their numbers: a server that is started again is to have the same label.
    """
    names = sorted({owner.rpartition(" (pid ")[0] or owner for owner in owners})
    more = ["..."] if len(names) > _MOST_OWNERS else []
    return clean(",".join([*names[:_MOST_OWNERS], *more]))


class _Where(NamedTuple):
    """The listener of a verdict, and where its client wrote to."""

    listener: ListenerId
    address: bytes
    port: int


def _where(netns: int, socket: int, address: bytes, port: int) -> _Where:
    return _Where(listener_id(netns, socket, address, port), address, port)


class _Suspect(NamedTuple):
    """A silent client that looks like a SYN flood's."""

    first_syn_ns: int
    where: _Where


class _Row:
    """The figures of one set of label values."""

    def __init__(self) -> None:
        self.active_ns = 0
        self.verdicts: Counter[What] = Counter()
        self.counted: Counter[str] = Counter()
        self.stuck: Counter[What] = Counter()
        """As of now; a zero stays, for a graph that ends is no graph that falls."""
        self.flood = 0

    def absorb(self, other: _Row) -> None:
        """Take in what only rises."""
        self.verdicts.update(other.verdicts)
        self.counted.update(other.counted)

    def begin(self) -> None:
        """Forget what was so a moment ago."""
        self.stuck = Counter(dict.fromkeys(self.stuck, 0))
        self.flood = 0


class ListenerBook:
    """Takes in verdicts as they come; `samples` may be asked for at any time.

    `names`: of network namespaces, by inode number. `is_suspected`: whether a client looks like a
    SYN flood's still, which is not told where it gave up. `most_suspects`: how many are remembered.

    Each of them is looked at only where there are more of them than the run knows of, and once in
    _LOOK_INTERVAL_NS: there may be a hundred thousand.
    """

    def __init__(
        self,
        names: Mapping[int, str],
        is_suspected: Callable[[HandshakeId], bool],
        most_suspects: int,
    ) -> None:
        self._names = names
        self._is_suspected = is_suspected
        self._most_suspects = most_suspects
        self._suspects: dict[FourTuple, _Suspect] = {}
        self._floods: Counter[_Where] = Counter()
        """The same, counted."""
        self._next_look_ns = 0
        self._fresh: dict[_Where, Counter[What]] = {}
        """Verdicts that came since the latest samples: by then it is known whose listener it is."""
        self._wheres: dict[_Where, _Where] = {}
        """One copy of what many clients have in common."""
        self._rows: OrderedDict[Labels, _Row] = OrderedDict()
        """The one that was active longest ago first."""
        self._others = _Row()
        self._read: dict[ListenerId, ListenerFacts] = {}
        self._labels: dict[ListenerId, tuple[ListenerSeen, Labels]] = {}

    def take(self, findings: Iterable[Finding]) -> None:
        """Verdicts, whatever of them is shown."""
        for finding in findings:
            self._take(finding)

    def _take(self, finding: Finding) -> None:
        who = finding.four_tuple
        was_suspect = self._acquit(who)
        if finding.verdict == "completed":  # a healthy one, which only some runs tell of
            return
        where = _where(who.netns, finding.listener_socket, *who.server)
        # Where only the rest of what is told is new, it was counted before.
        if finding.updates != finding.verdict or finding.flood_suspected != was_suspect:
            what = (finding.verdict, cause_of(finding))
            self._fresh.setdefault(where, Counter())[what] += 1
        if finding.flood_suspected and len(self._suspects) < self._most_suspects:
            where = self._wheres.setdefault(where, where)
            self._suspects[who] = _Suspect(finding.first_syn_ns, where)
            self._floods[where] += 1

    def _acquit(self, who: FourTuple) -> bool:
        """Whether it was a suspect, which it is no more."""
        suspect = self._suspects.pop(who, None)
        if suspect is not None:
            self._floods[suspect.where] -= 1
        return suspect is not None

    def samples(
        self,
        seen: Sequence[ListenerSeen],
        now_ns: int,
        stuck: Iterable[tuple[StuckGroup, int]],
        flood: int,
    ) -> dict[Family, list[Sample]]:
        """The samples of every family that has a listener's labels, and of FOLDED.

        `seen`: the latest reading of each listener, the one that changed longest ago first.
        `stuck`: who is stuck now. `flood`: how many suspects of a SYN flood the run knows of.
        """
        self._look(now_ns, flood)
        self._name(seen)
        labelled = [(one, self._labels[one.facts.listener][1]) for one in seen]
        for one, labels in labelled:
            self._take_reading(one.facts, labels, now_ns)
        for where, told in self._fresh.items():
            self._row(self._labels_of(where), now_ns, suffered=True).verdicts.update(told)
        self._fresh.clear()
        folded = {labels for _, labels in labelled if labels not in self._rows}
        folded |= self._count_now(stuck, now_ns)
        found: dict[Family, list[Sample]] = {families.FOLDED: [Sample((), len(folded))]}
        for labels, row in self._rows_to_tell():
            for family, sample in _samples_of(labels, row):
                found.setdefault(family, []).append(sample)
        found.update(self._queues(labelled))
        return found

    def _name(self, seen: Sequence[ListenerSeen]) -> None:
        """The labels of each listener; those that have not changed are not put together again."""
        known = self._labels
        self._labels = {}
        for one in seen:
            facts = one.facts
            before = known.get(facts.listener)
            if before is None or before[0] is not one:
                labels = (
                    self._netns(facts.netns),
                    address_text(one.bound or facts.server_address),
                    str(facts.server_port),
                    owner_names(one.owners),
                )
                before = (one, labels)
            self._labels[facts.listener] = before

    def _netns(self, netns: int) -> str:
        return clean(self._names.get(netns, str(netns)))

    def _labels_of(self, where: _Where) -> Labels:
        known = self._labels.get(where.listener)
        if known is not None:
            return known[1]
        return (self._netns(where.listener.netns), address_text(where.address), str(where.port), "")

    def _row(self, labels: Labels, now_ns: int, *, suffered: bool) -> _Row:
        """The row of a listener that is active; the one of all others where there is no place."""
        row = self._rows.get(labels)
        if row is None:
            most = MOST_LISTENERS if suffered else MOST_LISTENERS // 2
            if len(self._rows) >= most and not self._give_up_idle(now_ns):
                return self._others
            row = self._rows[labels] = _Row()
        row.active_ns = now_ns
        self._rows.move_to_end(labels)
        return row

    def _give_up_idle(self, now_ns: int) -> bool:
        """Whether the listener that was active longest ago gave its place up."""
        labels, row = next(iter(self._rows.items()))
        if now_ns - row.active_ns < IDLE_NS:
            return False
        self._others.absorb(row)
        del self._rows[labels]
        return True

    def _take_reading(self, facts: ListenerFacts, labels: Labels, now_ns: int) -> None:
        before = self._read.get(facts.listener)
        if before is facts or before == facts:
            return
        if len(self._read) >= _MOST_READINGS_KEPT:
            self._read.pop(next(iter(self._read)))
        self._read[facts.listener] = facts
        names = [name for _, name in _COUNTED]
        earlier = {name: 0 if before is None else getattr(before, name) for name in names}
        if any(getattr(facts, name) < earlier[name] for name in names):
            earlier = dict.fromkeys(names, 0)  # the figures of another socket, or begun anew
        row = self._row(labels, now_ns, suffered=facts.suffered)
        row.counted.update({name: getattr(facts, name) - earlier[name] for name in names})

    def _look(self, now_ns: int, flood: int) -> None:
        """Forget who is no suspect any more and has not told so."""
        if len(self._suspects) <= flood and now_ns < self._next_look_ns:
            return
        self._next_look_ns = now_ns + _LOOK_INTERVAL_NS
        gone = [
            who
            for who, one in self._suspects.items()
            if not self._is_suspected(HandshakeId(who, one.first_syn_ns))
        ]
        for who in gone:
            self._acquit(who)
        self._floods = +self._floods
        self._wheres = {where: where for where in self._floods}

    def _count_now(self, stuck: Iterable[tuple[StuckGroup, int]], now_ns: int) -> set[Labels]:
        """Count who is stuck, or a suspect, now; gives the labels that have no row."""
        for row in (*self._rows.values(), self._others):
            row.begin()
        folded: set[Labels] = set()
        for group, number in stuck:
            address = address_bytes(group.server_ip)
            where = _where(group.netns, group.socket, address, group.server_port)
            row = self._row_now(where, now_ns, folded)
            row.stuck[group.verdict, group.what] += number
        for where, number in self._floods.items():
            if number:
                self._row_now(where, now_ns, folded).flood += number
        return folded

    def _row_now(self, where: _Where, now_ns: int, folded: set[Labels]) -> _Row:
        labels = self._labels_of(where)
        row = self._row(labels, now_ns, suffered=True)
        if row is self._others:
            folded.add(labels)
        return row

    def _rows_to_tell(self) -> Iterator[tuple[Labels, _Row]]:
        yield from sorted(self._rows.items())
        others = self._others
        if others.verdicts or others.counted or others.stuck or others.flood:
            yield _OTHERS, others

    def _queues(
        self, labelled: Iterable[tuple[ListenerSeen, Labels]]
    ) -> Iterator[tuple[Family, list[Sample]]]:
        """Peaks and limit, of the sockets that are there by what the latest reading says."""
        together: dict[Labels, list[ListenerSeen]] = {}
        for one, labels in labelled:
            if labels in self._rows:
                together.setdefault(labels, []).append(one)
        living = {labels: list(_living(sockets)) for labels, sockets in sorted(together.items())}
        for family, name in (
            (families.ACCEPT_QUEUE, "peak_accept_queue"),
            (families.SYN_QUEUE, "peak_syn_queue"),
        ):
            yield (
                family,
                [
                    Sample(labels, max(getattr(one.facts, name) for one in sockets))
                    for labels, sockets in living.items()
                ],
            )
        limits = [Sample(labels, sockets[-1].facts.limit) for labels, sockets in living.items()]
        yield families.BACKLOG, limits


def _living(sockets: Sequence[ListenerSeen]) -> Iterator[ListenerSeen]:
    """Those that share the port with the one that changed last, where that is known."""
    latest = sockets[-1]
    for one in sockets:
        if one is latest or not latest.sockets or one.facts.socket in (0, *latest.sockets):
            yield one


def _samples_of(labels: Labels, row: _Row) -> Iterator[tuple[Family, Sample]]:
    for what, number in sorted(row.verdicts.items()):
        yield families.VERDICTS, Sample((*labels, *what), number)
    for what, number in sorted(row.stuck.items()):
        yield families.LISTENER_STUCK, Sample((*labels, *what), number)
    yield families.LISTENER_FLOOD, Sample(labels, row.flood)
    for family, name in _COUNTED:
        yield family, Sample(labels, row.counted[name])
