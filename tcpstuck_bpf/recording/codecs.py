"""Converts each kind of step to a line of a recording, and back. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from tcpstuck_bpf.recording.lines import Values
from tcpstuck_bpf.recording.table import RecordedTable, integer
from tcpstuck_bpf.recording.values import (
    event_of,
    event_values,
    listener_of,
    listener_values,
    names_of,
    rescue_of,
    rescue_values,
    tally_of,
    tally_values,
    warning_of,
    warning_values,
)
from tcpstuck_bpf.steps import (
    Advanced,
    Ended,
    Listened,
    Logged,
    Named,
    Observed,
    Rescued,
    Step,
    Swept,
    TallyTaken,
    Vanished,
)


class Codec(NamedTuple):
    """The codec of one kind of step.

    The functions also take the recording's current table, because a sweep is written as its
    difference from the previous one.
    """

    kind: type
    key: str
    """Key that only lines of this kind have."""
    encode: Callable[[Any, RecordedTable], Values]
    decode: Callable[[Values, RecordedTable], Step]
    """Decoder of a line. For a damaged line it raises KeyError, TypeError, ValueError,
    AttributeError or OverflowError."""
    time_ns: Callable[[Any], int | None] = lambda _step: None
    """Latest time that a step shows; None if it shows none."""


def _events(step: Observed, _table: RecordedTable) -> Values:
    return {"events": [event_values(event) for event in step.events]}


def _observed(values: Values, _table: RecordedTable) -> Observed:
    return Observed(tuple(map(event_of, values["events"])))


def _last_event_ns(step: Observed) -> int | None:
    return max((event.time_ns for event in step.events), default=None)


def _vanished_values(step: Vanished, _table: RecordedTable) -> Values:
    known = {} if step.until_ns is None else {"until_ns": step.until_ns}
    return {"vanished": step.now_ns, "netns": list(step.netns), **known}


def _vanished(values: Values, _table: RecordedTable) -> Vanished:
    until_ns = None if "until_ns" not in values else integer(values["until_ns"])
    return Vanished(integer(values["vanished"]), tuple(map(integer, values["netns"])), until_ns)


def _end_values(step: Ended, _table: RecordedTable) -> Values:
    return {"end": step.now_ns, "losses": dict(step.losses), "notes": list(step.notes)}


def _ended(values: Values, _table: RecordedTable) -> Ended:
    losses = {str(name): integer(number) for name, number in values["losses"].items()}
    return Ended(integer(values["end"]), losses, tuple(map(str, values["notes"])))


def _now_ns(step: Advanced | Vanished | Ended) -> int:
    return step.now_ns


CODECS: tuple[Codec, ...] = (
    Codec(Observed, "events", _events, _observed, _last_event_ns),
    Codec(
        Swept,
        "sweep",
        lambda step, table: table.values_of(step.sweep),
        lambda values, table: Swept(table.sweep_of(values)),
        lambda step: int(step.sweep.time_ns),
    ),
    Codec(
        Advanced,
        "advance",
        lambda step, _table: {"advance": step.now_ns},
        lambda values, _table: Advanced(integer(values["advance"])),
        _now_ns,
    ),
    Codec(
        TallyTaken,
        "tally",
        lambda step, _table: {"tally": tally_values(step.tally)},
        lambda values, _table: TallyTaken(tally_of(values["tally"])),
        lambda step: int(step.tally.time_ns),
    ),
    Codec(
        Rescued,
        "rescue",
        lambda step, _table: {"rescue": rescue_values(step.rescue)},
        lambda values, _table: Rescued(rescue_of(values["rescue"])),
    ),
    Codec(
        Named,
        "names",
        lambda step, _table: {"names": step.names._asdict()},
        lambda values, _table: Named(names_of(values["names"])),
    ),
    Codec(
        Listened,
        "listeners",
        lambda step, _table: {"listeners": [listener_values(one) for one in step.listeners]},
        lambda values, _table: Listened(tuple(map(listener_of, values["listeners"]))),
    ),
    Codec(
        Logged,
        "warnings",
        lambda step, _table: {"warnings": [warning_values(one) for one in step.warnings]},
        lambda values, _table: Logged(tuple(map(warning_of, values["warnings"]))),
    ),
    Codec(Vanished, "vanished", _vanished_values, _vanished, _now_ns),
    Codec(Ended, "end", _end_values, _ended, _now_ns),
)
_BY_KIND: Mapping[type, Codec] = {codec.kind: codec for codec in CODECS}


def values_of(step: Step, table: RecordedTable) -> Values:
    """Encode a step as a line."""
    return _BY_KIND[type(step)].encode(step, table)


def step_of(values: Values, table: RecordedTable) -> Step:
    """Decode a line. Raises KeyError for a line of unknown kind, and what `Codec.decode` raises."""
    for codec in CODECS:
        if codec.key in values:
            return codec.decode(values, table)
    raise KeyError("a line of unknown kind")


def time_of(step: Step) -> int | None:
    """Latest time that a step shows; None if it shows none."""
    return _BY_KIND[type(step)].time_ns(step)
