"""The per-listener figures of `--metrics`, summed by label values, in a bounded number of rows.

Pure. A row is identified by its label values, not by a socket: sockets that share a port, and those
of a restarted server, share a row. Counters add up the differences between readings, so they keep
rising when one socket is replaced by another.

At most MOST_LISTENERS rows exist. A new listener replaces one that has been idle for IDLE_NS. Half
of the rows are reserved for listeners that sent a cookie or dropped something. All other listeners
share one row (OTHER), to which the counters of a replaced listener are added: the sum over all rows
never falls. A program that keeps opening listening sockets therefore cannot grow this process or
Prometheus's database without bound.
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
"""Longest label value. A process name has up to 15 characters (TASK_COMM_LEN), a namespace 255."""
_MOST_OWNERS = 4
_LOOK_INTERVAL_NS = 60 * SECOND_NS
_MOST_READINGS_KEPT = 16_384
"""Twice the number of listeners that a run remembers (`backlog_history.MAX_LISTENERS`)."""

FLOOD_CAUSE = "syn-flood"
"""The cause for an `ack-missing` client that looks like part of a SYN flood."""

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
    """A foreign name as a label value: printable and of bounded length."""
    return printable(text)[:MOST_CHARACTERS]


def cause_of(finding: Finding) -> str:
    """What dropped the ACK, as the word that JSON uses; empty if nothing dropped it."""
    if finding.flood_suspected:
        return FLOOD_CAUSE
    return "" if finding.drop is None else finding.drop.what


def owner_names(owners: Iterable[str]) -> str:
    """The process names from `name (pid N)`, without repetition.

    The pids are left out, so that a restarted server keeps its label.
    """
    names = sorted({owner.rpartition(" (pid ")[0] or owner for owner in owners})
    more = ["..."] if len(names) > _MOST_OWNERS else []
    return clean(",".join([*names[:_MOST_OWNERS], *more]))


class _Where(NamedTuple):
    """The listener of a verdict, and the address and port that the client connected to."""

    listener: ListenerId
    address: bytes
    port: int


def _where(netns: int, socket: int, address: bytes, port: int) -> _Where:
    return _Where(listener_id(netns, socket, address, port), address, port)


class _Suspect(NamedTuple):
    """A silent client that looks like part of a SYN flood."""

    first_syn_ns: int
    where: _Where


class _Row:
    """The figures of one set of label values."""

    def __init__(self) -> None:
        self.active_ns = 0
        self.verdicts: Counter[What] = Counter()
        self.counted: Counter[str] = Counter()
        self.stuck: Counter[What] = Counter()
        """Clients stuck now. Zeros are kept: a series that vanishes does not show the fall."""
        self.flood = 0

    def absorb(self, other: _Row) -> None:
        """Add the counters of another row."""
        self.verdicts.update(other.verdicts)
        self.counted.update(other.counted)

    def begin(self) -> None:
        """Set the gauges to zero before they are counted again."""
        self.stuck = Counter(dict.fromkeys(self.stuck, 0))
        self.flood = 0


class ListenerBook:
    """Takes verdicts as they come; `samples` may be called at any time.

    `names`: names of network namespaces by inode number. `is_suspected`: whether a client still
    looks like part of a SYN flood. No finding reports that a suspect gave up. `most_suspects`:
    largest number of suspects remembered.

    Suspects are checked one by one only if there are more of them than the run counts, or once per
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
        """Number of suspects by listener and destination."""
        self._next_look_ns = 0
        self._fresh: dict[_Where, Counter[What]] = {}
        """Verdicts since the latest samples. They wait until the listener is known."""
        self._wheres: dict[_Where, _Where] = {}
        """Shared copies of values that many clients have in common."""
        self._rows: OrderedDict[Labels, _Row] = OrderedDict()
        """Rows by label values; the least recently active one comes first."""
        self._others = _Row()
        self._read: dict[ListenerId, ListenerFacts] = {}
        self._labels: dict[ListenerId, tuple[ListenerSeen, Labels]] = {}

    def take(self, findings: Iterable[Finding]) -> None:
        """Count verdicts, including those that the output hides."""
        for finding in findings:
            self._take(finding)

    def _take(self, finding: Finding) -> None:
        who = finding.four_tuple
        was_suspect = self._acquit(who)
        if finding.verdict == "completed":  # healthy; not every run reports those
            return
        where = _where(who.netns, finding.listener_socket, *who.server)
        # An update that keeps the verdict and only adds details was counted before.
        if finding.updates != finding.verdict or finding.flood_suspected != was_suspect:
            what = (finding.verdict, cause_of(finding))
            self._fresh.setdefault(where, Counter())[what] += 1
        if finding.flood_suspected and len(self._suspects) < self._most_suspects:
            where = self._wheres.setdefault(where, where)
            self._suspects[who] = _Suspect(finding.first_syn_ns, where)
            self._floods[where] += 1

    def _acquit(self, who: FourTuple) -> bool:
        """Remove a client from the suspects; whether it was one."""
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
        """The samples of every family with listener labels, and of FOLDED.

        `seen`: the latest reading of each listener; the one unchanged for longest comes first.
        `stuck`: groups of clients stuck now. `flood`: number of flood suspects in the run.
        """
        self._look(now_ns, flood)
        self._name(seen)
        labelled = [(one, self._labels[one.facts.listener][1]) for one in seen]
        for one, labels in labelled:
            self._take_reading(one.facts, labels, now_ns)
        for where, verdicts in self._fresh.items():
            self._row(self._labels_of(where), now_ns, suffered=True).verdicts.update(verdicts)
        self._fresh.clear()
        folded = {labels for _, labels in labelled if labels not in self._rows}
        folded |= self._count_now(stuck, now_ns)
        found: dict[Family, list[Sample]] = {families.FOLDED: [Sample((), len(folded))]}
        for labels, row in self._rows_to_export():
            for family, sample in _samples_of(labels, row):
                found.setdefault(family, []).append(sample)
        found.update(self._queues(labelled))
        return found

    def _name(self, seen: Sequence[ListenerSeen]) -> None:
        """Set the labels of each listener; those of unchanged listeners are reused."""
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
        """The row of an active listener; the row for all others if no row is free."""
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
        """Remove the least recently active row if it is idle; whether it was removed."""
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
            earlier = dict.fromkeys(names, 0)  # another socket, or counters that restarted
        row = self._row(labels, now_ns, suffered=facts.suffered)
        row.counted.update({name: getattr(facts, name) - earlier[name] for name in names})

    def _look(self, now_ns: int, flood: int) -> None:
        """Remove suspects that are no longer suspected but sent no finding about it."""
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
        """Count the clients that are stuck or suspected now; returns the labels without a row."""
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

    def _rows_to_export(self) -> Iterator[tuple[Labels, _Row]]:
        yield from sorted(self._rows.items())
        others = self._others
        if others.verdicts or others.counted or others.stuck or others.flood:
            yield _OTHERS, others

    def _queues(
        self, labelled: Iterable[tuple[ListenerSeen, Labels]]
    ) -> Iterator[tuple[Family, list[Sample]]]:
        """Queue peaks and backlog limit of the sockets that exist as of the latest reading."""
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
    """The sockets that still share the port, as of the latest reading; all of them if unknown."""
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
