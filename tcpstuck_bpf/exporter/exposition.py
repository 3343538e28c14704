"""Formats a snapshot with prometheus_client. No other module imports that library; it is optional.

The tracing thread calls `replace`, and other threads call `text`. They share one attribute, which
is replaced atomically, so neither waits for the other. A snapshot is formatted on demand, once per
format: repeated scrapes get the same bytes.

The library is Debian's python3-prometheus-client (0.9 in Debian 11, 0.16 in 12). This module uses
only functions that all these versions have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from tcpstuck_bpf.errors import CannotTraceError
from tcpstuck_bpf.output.metric_families import Family, Samples, Snapshot

try:
    from prometheus_client import CollectorRegistry, core, exposition
except ImportError as error:
    raise CannotTraceError(
        "metrics need the Python module prometheus_client",
        f"it cannot be imported: {error}",
        "apt install python3-prometheus-client, or leave out --metrics and --metrics-file",
    ) from error

PLAIN = "text/plain"
"""Accept header for the text format of node_exporter's files, which cannot be OpenMetrics."""
_MOST_FORMATS = 8


class _Collector:
    """The collector that prometheus_client calls for metric families."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterator[Any]:
        """Every family of the snapshot, including those without samples."""
        return map(_family, self._snapshot)


_MAKERS: dict[str, Callable[..., Any]] = {
    "counter": core.CounterMetricFamily,
    "gauge": core.GaugeMetricFamily,
    "info": core.InfoMetricFamily,
}


def _family(samples: Samples) -> Any:
    family = samples.family
    made = _MAKERS[family.kind](_name(family), family.help, labels=family.labels)
    for labels, value in samples.samples:
        made.add_metric(labels, {} if family.kind == "info" else value)
    return made


def _name(family: Family) -> str:
    """The name to give to prometheus_client, which appends the ending of the family's kind."""
    ending = {"counter": "_total", "info": "_info", "gauge": ""}[family.kind]
    assert family.name.endswith(ending)
    return family.name[: len(family.name) - len(ending)]


class Text(NamedTuple):
    """A snapshot in one exposition format."""

    content_type: str
    body: bytes


class _Kept(NamedTuple):
    """A snapshot and its formatted texts by content type."""

    snapshot: Snapshot
    texts: dict[str, Text]


class Exposition:
    """The latest snapshot, as text on demand."""

    def __init__(self) -> None:
        self._kept: _Kept | None = None

    def replace(self, snapshot: Snapshot) -> None:
        """Publish a new snapshot. Raises nothing and does not block."""
        self._kept = _Kept(snapshot, {})

    def text(self, accept: str) -> Text | None:
        """The latest snapshot in the format of an Accept header; None if there is no snapshot."""
        kept = self._kept
        if kept is None:
            return None
        encode, content_type = exposition.choose_encoder(accept)
        text = kept.texts.get(content_type)
        if text is None:
            registry = CollectorRegistry()
            collector: Any = _Collector(kept.snapshot)
            registry.register(collector)
            text = Text(content_type, encode(registry))
            if len(kept.texts) < _MOST_FORMATS:
                kept.texts[content_type] = text
        return text
