"""The metric families of `--metrics`, with type, labels and help text, as plain data.

docs/metrics.md has the same list. Names follow https://prometheus.io/docs/practices/naming/: base
units, `_total` for counters, and `_info` for a constant 1 whose labels carry the information. A
family without samples is exported with its name and help text.

No label identifies a client. `metric_listeners` and `metrics` bound the label values that can be
many (listeners, reasons), and count the rest under OTHER.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

OTHER = "(other)"
"""Label value for everything without a row of its own."""

Kind = Literal["counter", "gauge", "info"]


class Family(NamedTuple):
    """One metric family."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()


class Sample(NamedTuple):
    """One value of a family, identified by its label values."""

    labels: tuple[str, ...]
    value: float


class Samples(NamedTuple):
    """A family and its values at one moment."""

    family: Family
    samples: tuple[Sample, ...]


Snapshot = tuple[Samples, ...]
"""Everything exported at one moment; immutable."""

LISTENER = ("netns", "address", "port", "owner")
_CAUSE = ("verdict", "cause")

BUILD = Family("tcpstuck_build_info", "info", "Version of the tool.", ("version",))
RUN = Family(
    "tcpstuck_run_info", "info", "What is watched, as text, and the mode.", ("watched", "mode")
)
RUNNING = Family("tcpstuck_running", "gauge", "1 while the run traces, 0 once it has ended.")
STARTED = Family(
    "tcpstuck_start_time_seconds", "gauge", "When tracing began, in seconds since the epoch."
)
UPDATED = Family(
    "tcpstuck_last_update_timestamp_seconds",
    "gauge",
    "When these figures were taken, in seconds since the epoch.",
)
TRACED = Family("tcpstuck_traced_seconds", "gauge", "How long the run has traced.")

STUCK = Family("tcpstuck_stuck_clients", "gauge", "Clients that are stuck now.")
FLOOD = Family(
    "tcpstuck_flood_suspected_clients",
    "gauge",
    "Silent clients that look like part of a SYN flood; they do not count as stuck.",
)
PENDING = Family(
    "tcpstuck_pending_handshakes", "gauge", "Handshakes that are too young for a verdict."
)
COOKIES = Family("tcpstuck_cookies_sent_total", "counter", "SYN-ACKs sent with a SYN cookie.")
COMPLETED = Family(
    "tcpstuck_handshakes_completed_total", "counter", "Handshakes under a cookie that connected."
)
VERDICTS = Family(
    "tcpstuck_verdicts_total",
    "counter",
    "Verdicts on connections of a listener, by verdict and by what dropped the ACK.",
    (*LISTENER, *_CAUSE),
)

LISTENER_STUCK = Family(
    "tcpstuck_listener_stuck_clients",
    "gauge",
    "Clients of a listener that are stuck now, by verdict and by what dropped the ACK.",
    (*LISTENER, *_CAUSE),
)
LISTENER_FLOOD = Family(
    "tcpstuck_listener_flood_suspected_clients",
    "gauge",
    "Silent clients of a listener that look like part of a SYN flood.",
    LISTENER,
)
LISTENER_SYNS = Family(
    "tcpstuck_listener_syns_total", "counter", "SYNs, repetitions included.", LISTENER
)
LISTENER_COOKIES = Family(
    "tcpstuck_listener_cookies_sent_total",
    "counter",
    "SYN-ACKs that a listener sent with a SYN cookie.",
    LISTENER,
)
SYNS_REFUSED = Family(
    "tcpstuck_listener_syns_refused_total",
    "counter",
    "SYNs dropped for a full accept queue, repetitions included.",
    LISTENER,
)
ACKS_REFUSED = Family(
    "tcpstuck_listener_acks_refused_total",
    "counter",
    "ACKs dropped for a full accept queue, repetitions included.",
    LISTENER,
)
ACCEPT_QUEUE = Family(
    "tcpstuck_listener_accept_queue_peak",
    "gauge",
    "Longest accept queue seen since tracing began, in connections.",
    LISTENER,
)
SYN_QUEUE = Family(
    "tcpstuck_listener_syn_queue_peak",
    "gauge",
    "Longest SYN queue seen since tracing began, in handshakes.",
    LISTENER,
)
BACKLOG = Family(
    "tcpstuck_listener_backlog_limit",
    "gauge",
    "The backlog in force, which bounds both queues (sk_max_ack_backlog).",
    LISTENER,
)
FOLDED = Family(
    "tcpstuck_listeners_folded",
    "gauge",
    f"Listeners without a row of their own now; they are counted as {OTHER}.",
)

UNTRACKED = Family(
    "tcpstuck_untracked_handshakes_total",
    "counter",
    "Handshakes under a cookie that had no entry in the kernel's table.",
)
UNWATCHED = Family(
    "tcpstuck_unwatched_handshakes",
    "gauge",
    "Handshakes whose outcome is unknown: untracked, or counted by the kernel alone.",
)
LOSSES = Family("tcpstuck_losses_total", "counter", "What the run did not see, by name.", ("loss",))
GAPS = Family("tcpstuck_coverage_gaps", "gauge", "Probes that are not attached.")
GAP = Family(
    "tcpstuck_coverage_gap_info",
    "info",
    "A probe that is not attached, and why.",
    ("probe", "why"),
)
DISAGREEING = Family(
    "tcpstuck_reconciliation_disagreements",
    "gauge",
    "Network namespaces whose kernel counter differs from what was traced.",
    ("counter",),
)
DIFFERENCE = Family(
    "tcpstuck_reconciliation_difference",
    "gauge",
    "Traced minus counted by the kernel, summed over all namespaces.",
    ("counter",),
)

RESCUE_SENT = Family(
    "tcpstuck_rescue_synacks_total",
    "counter",
    "SYN-ACKs repeated to stuck clients: sent, failed, or would_send in a dry run.",
    ("outcome",),
)
RESCUE_FAILED = Family(
    "tcpstuck_rescue_failures_total",
    "counter",
    "SYN-ACKs that could not be repeated, by reason.",
    ("reason",),
)
RESCUED = Family(
    "tcpstuck_rescue_rescued_total", "counter", "Clients that a repeated SYN-ACK connected."
)
LEFT_ALONE = Family(
    "tcpstuck_rescue_left_alone_clients",
    "gauge",
    "Stuck clients that get no SYN-ACK, by the reason that holds now.",
    ("reason",),
)

FAMILIES: tuple[Family, ...] = (
    *(BUILD, RUN, RUNNING, STARTED, UPDATED, TRACED),
    *(STUCK, FLOOD, PENDING, COOKIES, COMPLETED, VERDICTS),
    *(LISTENER_STUCK, LISTENER_FLOOD, LISTENER_SYNS, LISTENER_COOKIES),
    *(SYNS_REFUSED, ACKS_REFUSED, ACCEPT_QUEUE, SYN_QUEUE, BACKLOG, FOLDED),
    *(UNTRACKED, UNWATCHED, LOSSES, GAPS, GAP, DISAGREEING, DIFFERENCE),
    *(RESCUE_SENT, RESCUE_FAILED, RESCUED, LEFT_ALONE),
)
"""Every family, in export order."""
