"""An output for Prometheus: collects the run's figures and publishes snapshots of all families.

Pure. It runs in the tracing thread, and no other thread calls it. Each snapshot replaces the
previous one as a whole, and the servers in `exporter` read the latest one at any time. Snapshots
take at most one part in COST_SHARE of the run's time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from tcpstuck_bpf import __version__
from tcpstuck_bpf.judge.reconcile import Reconciled
from tcpstuck_bpf.judge.verdict import Finding
from tcpstuck_bpf.model import ATTEMPT_NOT_SENT, SECOND_NS, Attempt, HandshakeId
from tcpstuck_bpf.output import metric_families as families
from tcpstuck_bpf.output.metric_families import (
    FAMILIES,
    OTHER,
    Family,
    Sample,
    Samples,
    Snapshot,
)
from tcpstuck_bpf.output.metric_listeners import ListenerBook, clean
from tcpstuck_bpf.steps import Header
from tcpstuck_bpf.summary import RescueTotals, Status, Summary

INTERVAL_NS = SECOND_NS
"""Least time between two snapshots."""
COST_SHARE = 20
MOST_REASONS = 32
"""Most values of a label such as `reason` or `loss`. Further values are counted under OTHER."""

_Values = dict[Family, list[Sample]]


class Metrics:
    """An Output that publishes a snapshot about once a second and at the end.

    `so_far` returns the current summary; its argument is the present time. `is_suspected`: whether
    a client still looks like part of a SYN flood. `publish` takes a snapshot and raises nothing.
    `clock_ns` is CLOCK_MONOTONIC. `realtime_ns` is the wall clock; None for a replay, which uses
    the recorded times.
    """

    def __init__(
        self,
        header: Header,
        so_far: Callable[[int], Summary],
        is_suspected: Callable[[HandshakeId], bool],
        publish: Callable[[Snapshot], None],
        clock_ns: Callable[[], int],
        realtime_ns: Callable[[], int] | None,
    ) -> None:
        self._header = header
        self._so_far = so_far
        self._publish = publish
        self._clock_ns = clock_ns
        self._realtime_ns = realtime_ns
        self._listeners = ListenerBook(header.netns_names, is_suspected, header.table_capacity)
        self._risen: dict[tuple[Family, tuple[str, ...]], float] = {}
        self._next_ns = 0
        """Traced time (`Status.running_ns`) at which the next snapshot is due."""

    def findings(self, findings: list[Finding]) -> None:
        """Count all verdicts, including those that --only and --all hide."""
        self._listeners.take(findings)

    def attempts(self, attempts: Sequence[Attempt]) -> None:
        """Do nothing: the summary of each snapshot contains the totals."""

    def status(self, status: Status) -> None:
        """Publish a snapshot if one is due."""
        if status.running_ns < self._next_ns:
            return
        begun_ns = self._clock_ns()
        self._publish(self._snapshot(self._so_far(status.now_ns), running=True))
        cost_ns = self._clock_ns() - begun_ns
        self._next_ns = status.running_ns + max(INTERVAL_NS, COST_SHARE * cost_ns)

    def summary(self, summary: Summary) -> None:
        """Publish the last snapshot."""
        self._publish(self._snapshot(summary, running=False))

    def close(self) -> None:
        """Do nothing: there is nothing to close."""

    def _snapshot(self, summary: Summary, *, running: bool) -> Snapshot:
        values: _Values = self._listeners.samples(
            summary.seen, summary.duration_ns, summary.stuck, summary.flood_suspected
        )
        values.update(self._of_run(summary, running))
        values.update(_of_clients(summary))
        values.update(_of_sight(summary))
        values.update(_of_rescue(summary.rescue))
        return tuple(
            Samples(family, tuple(self._rising(family, values.get(family, ()))))
            for family in FAMILIES
        )

    def _rising(self, family: Family, samples: Iterable[Sample]) -> Iterable[Sample]:
        """Keep counters from falling: Prometheus takes a fall for a restart of the counter.

        Listener counters never fall in themselves; a row that returns may start at zero.
        """
        if family.kind != "counter" or set(families.LISTENER) <= set(family.labels):
            return samples
        return [self._risen_sample(family, *sample) for sample in samples]

    def _risen_sample(self, family: Family, labels: tuple[str, ...], value: float) -> Sample:
        highest = max(value, self._risen.get((family, labels), 0))
        self._risen[family, labels] = highest
        return Sample(labels, highest)

    def _of_run(self, summary: Summary, running: bool) -> _Values:
        started_ns = self._header.clock.realtime_ns
        now_ns = (
            started_ns + summary.duration_ns if self._realtime_ns is None else self._realtime_ns()
        )
        return {
            families.BUILD: [Sample((__version__,), 1)],
            families.RUN: [Sample((clean(summary.watched), clean(summary.mode)), 1)],
            families.RUNNING: [Sample((), int(running))],
            families.STARTED: [Sample((), _seconds(started_ns))],
            families.UPDATED: [Sample((), _seconds(now_ns))],
            families.TRACED: [Sample((), _seconds(summary.duration_ns))],
        }


def _seconds(nanoseconds: int) -> float:
    return round(nanoseconds / SECOND_NS, 3)


def _of_clients(summary: Summary) -> _Values:
    by_verdict = summary.verdicts
    connected = by_verdict.get("completed", 0) + summary.recovered + summary.data_lost
    connected += by_verdict.get("rescued", 0)
    return {
        families.STUCK: [Sample((), summary.still_stuck)],
        families.FLOOD: [Sample((), summary.flood_suspected)],
        families.PENDING: [Sample((), summary.pending)],
        families.COOKIES: [Sample((), summary.cookies_sent)],
        families.COMPLETED: [Sample((), connected)],
    }


def _of_sight(summary: Summary) -> _Values:
    """Samples of everything that was not seen: losses, gaps, disagreeing counters."""
    losses = {
        "lost_events": summary.lost_events,
        "unseen_syn": summary.unseen_syn,
        **summary.losses,
    }
    gaps = {(clean(gap.probe), clean(gap.why)): 1 for gap in summary.gaps[:MOST_REASONS]}
    return {
        families.UNTRACKED: [Sample((), summary.untracked)],
        families.UNWATCHED: [Sample((), summary.unwatched)],
        families.LOSSES: _by_reason(losses),
        families.GAPS: [Sample((), len(summary.gaps))],
        families.GAP: [Sample(labels, 1) for labels in gaps],
        **_of_reconciliation(summary.reconciliation),
    }


def _of_reconciliation(rows: Sequence[Reconciled]) -> _Values:
    disagreeing = {row.counter: 0 for row in rows}
    difference = dict(disagreeing)
    for row in rows:
        if row.agrees is False and row.kernel is not None:
            traced = row.traced + row.outside
            low, high = row.kernel
            disagreeing[row.counter] += 1
            difference[row.counter] += traced - (low if traced < low else high)
    return {
        families.DISAGREEING: [Sample((name,), n) for name, n in disagreeing.items()],
        families.DIFFERENCE: [Sample((name,), n) for name, n in difference.items()],
    }


def _of_rescue(totals: RescueTotals | None) -> _Values:
    """Samples of --rescue; none without it."""
    if totals is None:
        return {}
    failed = {why.partition(": ")[2] or why: number for why, number in totals.failed.items()}
    outcomes = (
        ("sent", totals.sent),
        (ATTEMPT_NOT_SENT.replace(" ", "_"), totals.not_sent),
        ("failed", sum(failed.values())),
    )
    return {
        families.RESCUE_SENT: [Sample((outcome,), number) for outcome, number in outcomes],
        families.RESCUE_FAILED: _by_reason(failed),
        families.RESCUED: [Sample((), totals.rescued)],
        families.LEFT_ALONE: _by_reason(totals.left_alone),
    }


def _by_reason(numbers: Mapping[str, int]) -> list[Sample]:
    """One sample per reason. Reasons after the first MOST_REASONS share the sample OTHER."""
    together: dict[str, int] = {}
    for reason, number in numbers.items():
        label = clean(reason)
        if label not in together and len(together) >= MOST_REASONS:
            label = OTHER
        together[label] = together.get(label, 0) + number
    return [Sample((reason,), number) for reason, number in together.items()]
