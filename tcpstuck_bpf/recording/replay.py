"""Writes the steps of a run as JSON Lines (`Recorder`), and reads them back (`Replay`).

This is the server's side; `recording.lines` has what both sides share. The first line is a header.
The lines between it and the last one are the correlator's input in order, so a replay gives
identical verdicts. A sweep is written as its difference from the previous one (`recording.table`),
so a quiet table costs almost nothing. Numbers stay integers; keys and addresses are hexadecimal.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from tcpstuck_bpf.errors import RecordingError
from tcpstuck_bpf.model import (
    Coverage,
    CoverageGap,
    TraceFilter,
    TraceSettings,
)
from tcpstuck_bpf.recording.codecs import step_of, time_of, values_of
from tcpstuck_bpf.recording.lines import Decoding, LineWriter, RecordedLines, cut_off_note
from tcpstuck_bpf.recording.table import (
    RecordedTable,
    address_of,
    integer,
)
from tcpstuck_bpf.steps import (
    Ended,
    Header,
    Step,
    WallClock,
    utc_text,
)

_MOST_ENTRIES = (1 << 32) - 1
"""Largest possible number of entries of a BPF map: max_entries of union bpf_attr."""


class Recorder(LineWriter):
    """Writes a recording. Raises RecordingError where the file cannot be created."""

    def __init__(self, path: str, header: Header) -> None:
        self._table = RecordedTable()
        super().__init__(path, _header_values(header))

    def write(self, step: Step) -> None:
        """Add a step, unless a write has failed before."""
        if self.failure is None:
            self.write_line(values_of(step, self._table))


def _header_values(header: Header) -> dict[str, Any]:
    settings = asdict(header.settings)
    address = header.settings.trace_filter.listener_address
    settings["trace_filter"]["listener_address"] = None if address is None else address.hex()
    coverage = asdict(header.coverage)
    coverage["probes"] = sorted(header.coverage.probes)
    return {
        "settings": settings,
        "coverage": coverage,
        "clock": asdict(header.clock),
        "watched": header.watched,
        "table_capacity": header.table_capacity,
        "own_netns": header.own_netns,
        "netns_names": dict(header.netns_names),
    }


class Replay:
    """Reads a recording line by line. `lines`: its path, or the recording opened already.

    A recording may lack its end: the run was killed, its disk was full, or it is still running. The
    replay then ends after the last whole line, with an Ended whose `cut_off` is true.

    Raises RecordingError where the file is not a recording of the server's side.
    """

    def __init__(self, lines: str | RecordedLines) -> None:
        self._lines = RecordedLines(lines) if isinstance(lines, str) else lines
        self._table = RecordedTable()
        self.header = self._lines.header(_header)

    def steps(self) -> Iterator[Step]:
        """The steps in order, with an Ended last. Raises RecordingError at the first damaged line.

        This can be called only once.
        """
        yield from self._lines.steps(
            Decoding(
                lambda values: step_of(values, self._table),
                time_of,
                lambda step: isinstance(step, Ended),
                self._broken_off,
            )
        )

    def refuse_without_counters(self, tallied: bool) -> None:
        """Raises RecordingError if the recording had no tally, without which nothing is summed."""
        if not tallied:
            raise RecordingError(
                f"the recording of {self.header.watched} is damaged",
                "it lacks the counters that are read at the start of a run",
                "record again",
            )

    def _broken_off(self, reached_ns: int) -> Ended:
        note = cut_off_note(utc_text(self.header.clock.realtime(reached_ns)))
        return Ended(reached_ns, {}, (note,), cut_off=True)


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
        raise ValueError(f"no table can have {capacity} entries")
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
