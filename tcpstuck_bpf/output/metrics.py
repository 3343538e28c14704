"""An output that keeps figures for Prometheus: what a run tells in, a snapshot of all families out.

Pure. It runs where the tracing does, and is asked for nothing there: each snapshot replaces the one
before, as a whole, and whoever serves it (`exporter`) reads it when it likes. Of the time that
passes it takes one part in COST_SHARE at most.
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
"""Between two snapshots, at least."""
COST_SHARE = 20
MOST_REASONS = 32
"""Values that a label such as `reason` or `loss` takes; what is more is counted as OTHER."""

_Values = dict[Family, list[Sample]]


class Metrics:
    """An Output that publishes snapshots, about once a second and at the end.

    `so_far`: what the summary would say at a time, which is now. `is_suspected`: whether a client
    looks like a SYN flood's still. `publish` takes a snapshot and raises nothing. `clock_ns` is
    CLOCK_MONOTONIC, `realtime_ns` the wall clock; None for a replay, whose time is the recording's.
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
        """Of the time that the run has traced."""

    def findings(self, findings: list[Finding]) -> None:
        """Verdicts as they come, whatever of them is shown."""
        self._listeners.take(findings)

    def attempts(self, attempts: Sequence[Attempt]) -> None:
        """Nothing: their totals come with the snapshot."""

    def status(self, status: Status) -> None:
        """A moment at which a snapshot may be taken."""
        if status.running_ns < self._next_ns:
            return
        begun_ns = self._clock_ns()
        self._publish(self._snapshot(self._so_far(status.now_ns), running=True))
        cost_ns = self._clock_ns() - begun_ns
        self._next_ns = status.running_ns + max(INTERVAL_NS, COST_SHARE * cost_ns)

    def summary(self, summary: Summary) -> None:
        """The end."""
        self._publish(self._snapshot(summary, running=False))

    def close(self) -> None:
        """Nothing is left to be done."""

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
        """A counter that falls would be taken for one that began anew.

        Those of listeners rise by themselves; they may go away and come again from zero.
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
    """What was not seen."""
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
    """Nothing where nobody was to be rescued."""
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
    """One sample for each reason; those beyond MOST_REASONS, in their order, in one together."""
    together: dict[str, int] = {}
    for reason, number in numbers.items():
        label = clean(reason)
        if label not in together and len(together) >= MOST_REASONS:
            label = OTHER
        together[label] = together.get(label, 0) + number
    return [Sample((reason,), number) for reason, number in together.items()]
