"""A snapshot as text, by prometheus_client: the one module that imports it, and a run may lack it.

The tracing thread calls `replace`, and other threads `text`. One attribute is all that they share,
and it is set as a whole; so neither waits for the other. A snapshot is put into words when somebody
asks, once for each format: whoever asks again and again gets the same bytes.

The library is Debian's python3-prometheus-client (0.9 in Debian 11, 0.16 in 12). What is used of it
is in all of them.
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
"""To be asked for the text format of a node_exporter's files, which cannot be OpenMetrics."""
_MOST_FORMATS = 8


class _Collector:
    """What prometheus_client asks for metric families."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterator[Any]:
        """Every family of the snapshot, those without samples too."""
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
    """The name by which the library makes one of that kind, to which it adds an ending."""
    ending = {"counter": "_total", "info": "_info", "gauge": ""}[family.kind]
    assert family.name.endswith(ending)
    return family.name[: len(family.name) - len(ending)]


class Text(NamedTuple):
    """A snapshot in one of the formats."""

    content_type: str
    body: bytes


class _Kept(NamedTuple):
    """A snapshot, and the texts that were made of it."""

    snapshot: Snapshot
    texts: dict[str, Text]


class Exposition:
    """The latest snapshot, for whoever wants it as text."""

    def __init__(self) -> None:
        self._kept: _Kept | None = None

    def replace(self, snapshot: Snapshot) -> None:
        """From now on this one is told. Raises nothing, and waits for nobody."""
        self._kept = _Kept(snapshot, {})

    def text(self, accept: str) -> Text | None:
        """The latest snapshot in the format that an Accept header asks for; None: there is none."""
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
