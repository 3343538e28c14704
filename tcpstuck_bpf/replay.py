"""Recordings: the steps of a run as JSON Lines, and their way back.

The first line is a header, the last one says that the run ended; what lies between is what the
correlator was given, in order, so that a replay gives the identical verdicts. A sweep is written
as its difference from the one before (`recorded_table`): a quiet table costs nothing. Numbers stay
integers; keys and addresses are hexadecimal.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Union

from tcpstuck_bpf import __version__
from tcpstuck_bpf.errors import RecordingError
from tcpstuck_bpf.files import OutputFile
from tcpstuck_bpf.json_text import json_text
from tcpstuck_bpf.model import (
    Coverage,
    CoverageGap,
    Event,
    KernelNames,
    KernelWarning,
    ListenerSeen,
    Rescue,
    Sweep,
    Tally,
    TraceFilter,
    TraceSettings,
)
from tcpstuck_bpf.recorded_parts import (
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
from tcpstuck_bpf.recorded_table import (
    RecordedTable,
    address_of,
    integer,
)
from tcpstuck_bpf.report import WallClock

FORMAT = "tcpstuck-recording"
VERSION = 1
_MOST_ENTRIES = (1 << 32) - 1
"""Of a BPF map: max_entries of union bpf_attr."""


@dataclass(frozen=True)
class Header:
    """What has to be known of a run besides its steps."""

    settings: TraceSettings
    coverage: Coverage
    clock: WallClock
    watched: str
    table_capacity: int
    own_netns: int | None = None
    """The network namespace it was run in; None where that is not recorded."""
    netns_names: Mapping[int, str] = field(default_factory=dict)
    """Names that those of that machine had, by inode number."""


class Observed(NamedTuple):
    """Events came."""

    events: tuple[Event, ...]


class Swept(NamedTuple):
    """The table was read."""

    sweep: Sweep


class Advanced(NamedTuple):
    """The flows were brought up to this time, in ns."""

    now_ns: int


class TallyTaken(NamedTuple):
    """Both sides' counters were read."""

    tally: Tally


class Named(NamedTuple):
    """It became known what numbers of the kernel mean, of facts that come next."""

    names: KernelNames


class Rescued(NamedTuple):
    """SYN-ACKs were repeated, or it became known who is not to be rescued."""

    rescue: Rescue


class Listened(NamedTuple):
    """The listeners were looked at; those that had changed."""

    listeners: tuple[ListenerSeen, ...]


class Logged(NamedTuple):
    """The kernel warned of full SYN queues."""

    warnings: tuple[KernelWarning, ...]


class Ended(NamedTuple):
    """The run ended."""

    now_ns: int
    losses: Mapping[str, int]
    notes: tuple[str, ...]


Step = Union[Observed, Swept, Advanced, TallyTaken, Rescued, Named, Listened, Logged, Ended]


class Recorder:
    """Writes a recording. A full disk ends the recording, not the run.

    The file appears with its header, in place of an older one, and grows by whole lines, each of
    them written at once. So under its name there is always either what was there before or a
    recording that can be replayed as far as it goes: a run that is killed has had no time to do
    anything more, which is why it cannot appear at the end only. It holds the addresses of clients
    and is for its owner alone (0600).

    Raises RecordingError where the file cannot be created.
    """

    def __init__(self, path: str, header: Header) -> None:
        self.failure: str | None = None
        """Why the recording is incomplete; None while it is not."""
        self._table = RecordedTable()
        try:
            self._file = OutputFile(path, 0o600)
        except OSError as error:
            raise _cannot_record(path, error) from error
        self._write_line(_header_values(header))
        try:
            if self.failure is None:
                self._file.appear()
        except OSError as error:
            self._file.close()
            raise _cannot_record(path, error) from error

    def write(self, step: Step) -> None:
        """Add a step; after a failure nothing more is written."""
        if self.failure is None:
            self._write_line(self._values(step))

    def close(self) -> None:
        """Nothing more will come. Raises OSError where only this fails."""
        try:
            self._file.close()
        except OSError as error:
            if self.failure is None:
                self.failure = str(error.strerror)
                raise

    def _write_line(self, values: Mapping[str, Any]) -> None:
        try:
            self._file.write(f"{json_text(values, (',', ':'))}\n".encode("ascii"))
        except OSError as error:
            self.failure = str(error.strerror)

    def _values(self, step: Step) -> dict[str, Any]:
        if isinstance(step, Observed):
            return {"events": [event_values(event) for event in step.events]}
        if isinstance(step, Swept):
            return self._table.values_of(step.sweep)
        if isinstance(step, Advanced):
            return {"advance": step.now_ns}
        if isinstance(step, TallyTaken):
            return {"tally": tally_values(step.tally)}
        if isinstance(step, Rescued):
            return {"rescue": rescue_values(step.rescue)}
        if isinstance(step, Named):
            return {"names": step.names._asdict()}
        if isinstance(step, Listened):
            return {"listeners": [listener_values(one) for one in step.listeners]}
        if isinstance(step, Logged):
            return {"warnings": [warning_values(one) for one in step.warnings]}
        return {"end": step.now_ns, "losses": dict(step.losses), "notes": list(step.notes)}


def _cannot_record(path: str, error: OSError) -> RecordingError:
    return RecordingError(
        f"cannot record to {path}",
        str(error.strerror),
        "name a file in a directory that you may write to",
    )


def _header_values(header: Header) -> dict[str, Any]:
    settings = asdict(header.settings)
    address = header.settings.trace_filter.listener_address
    settings["trace_filter"]["listener_address"] = None if address is None else address.hex()
    coverage = asdict(header.coverage)
    coverage["probes"] = sorted(header.coverage.probes)
    return {
        "format": FORMAT,
        "version": VERSION,
        "tool": __version__,
        "settings": settings,
        "coverage": coverage,
        "clock": asdict(header.clock),
        "watched": header.watched,
        "table_capacity": header.table_capacity,
        "own_netns": header.own_netns,
        "netns_names": dict(header.netns_names),
    }


class Replay:
    """Reads a recording. Raises RecordingError where the file is none, or is damaged."""

    def __init__(self, path: str) -> None:
        self._path = path
        try:
            with Path(path).open("rb") as file:
                # What is no recording may be larger than the memory, or have no end.
                first = file.read(1)
                content = first + (file.read() if first == b"{" else b"")
        except OSError as error:
            raise RecordingError(
                f"cannot read the recording {path}",
                str(error.strerror),
                "name a file that --record has written",
            ) from error
        # Only \n ends a line: str.splitlines would also split at other characters.
        self._lines = content.split(b"\n")
        self._table = RecordedTable()
        values = self._decoded(0) if self._looks_like_one() else None
        if values is None or values.get("format") != FORMAT:
            raise RecordingError(
                f"{path} is not a recording of tcpstuck-trace",
                f'it does not begin with {{"format":"{FORMAT}"',
                "name a file that --record has written",
            )
        version = values.get("version")
        if not isinstance(version, int) or version > VERSION:
            raise RecordingError(
                f"{path} was written by a newer tcpstuck-trace",
                f"its format is {version!r}, this version reads up to {VERSION}",
                "replay it with that version, or a newer one",
            )
        try:
            self.header = _header(values)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise self._damaged(0) from error
        if self._lines.pop() != b"" or "end" not in self._decoded(len(self._lines) - 1):
            raise RecordingError(
                f"the recording {path} is incomplete",
                f"after line {len(self._lines)} the line that ends a run is missing: the recorder "
                "was killed, or its disk was full",
                "record again",
            )

    def _looks_like_one(self) -> bool:
        return self._lines[0].startswith(b"{") and len(self._lines[0]) < 1 << 20

    def _damaged(self, index: int) -> RecordingError:
        return RecordingError(
            f"the recording {self._path} is damaged",
            f"line {index + 1} is not what a recording has there",
            "record again",
        )

    def _decoded(self, index: int) -> dict[str, Any]:
        try:
            values = json.loads(self._lines[index].decode("ascii"))
        except (ValueError, RecursionError) as error:
            if index == 0:
                return {}
            raise self._damaged(index) from error
        if not isinstance(values, dict):
            raise self._damaged(index)
        return values

    def steps(self) -> Iterator[Step]:
        """The steps in order. Raises RecordingError at the first damaged line."""
        for index in range(1, len(self._lines)):
            values = self._decoded(index)
            try:
                step = self._step(values)
            except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
                raise self._damaged(index) from error
            if isinstance(step, Ended) != (index == len(self._lines) - 1):
                raise self._damaged(index)
            yield step

    def _step(self, values: dict[str, Any]) -> Step:
        if "events" in values:
            return Observed(tuple(event_of(event) for event in values["events"]))
        if "sweep" in values:
            return Swept(self._table.sweep_of(values))
        if "advance" in values:
            return Advanced(integer(values["advance"]))
        if "tally" in values:
            return TallyTaken(tally_of(values["tally"]))
        if "rescue" in values:
            return Rescued(rescue_of(values["rescue"]))
        if "names" in values:
            return Named(names_of(values["names"]))
        if "listeners" in values:
            return Listened(tuple(map(listener_of, values["listeners"])))
        if "warnings" in values:
            return Logged(tuple(map(warning_of, values["warnings"])))
        losses = {str(name): integer(number) for name, number in values["losses"].items()}
        return Ended(integer(values["end"]), losses, tuple(map(str, values["notes"])))


def _header(values: dict[str, Any]) -> Header:
    settings = dict(values["settings"])
    wanted = dict(settings.pop("trace_filter"))
    address = wanted.pop("listener_address")
    trace_filter = TraceFilter(
        ports=tuple(map(integer, wanted.pop("ports"))),
        listener_address=None if address is None else address_of(address),
        **wanted,
    )
    capacity = integer(values["table_capacity"])
    if capacity > _MOST_ENTRIES:
        raise ValueError(f"no table has {capacity} entries")
    coverage = values["coverage"]
    clock = values["clock"]
    own_netns = values.get("own_netns")
    return Header(
        settings=TraceSettings(
            trace_filter=trace_filter,
            timeout_ns=integer(settings.pop("timeout_ns")),
            max_handshakes=integer(settings.pop("max_handshakes")),
            **settings,
        ),
        coverage=Coverage(
            mode=str(coverage["mode"]),
            probes=frozenset(map(str, coverage["probes"])),
            gaps=tuple(
                CoverageGap(str(gap["probe"]), str(gap["why"]), str(gap["lost"]))
                for gap in coverage["gaps"]
            ),
        ),
        clock=WallClock(integer(clock["monotonic_ns"]), integer(clock["realtime_ns"])),
        watched=str(values["watched"]),
        table_capacity=capacity,
        own_netns=None if own_netns is None else integer(own_netns),
        netns_names={
            int(number): str(name) for number, name in values.get("netns_names", {}).items()
        },
    )
