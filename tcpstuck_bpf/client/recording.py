"""Writes the steps of a run on the client's side (`ClientRecorder`), and reads them back.

`recording.lines` has what the recordings of both sides share. A poll is written as its difference
from the one before (`client.recorded_sockets`), so sockets that merely wait cost almost nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

from tcpstuck_bpf.client.codecs import header_of, header_values, step_of, time_of, values_of
from tcpstuck_bpf.client.recorded_sockets import RecordedSockets
from tcpstuck_bpf.client.steps import ClientHeader, ClientStep, WatchEnded
from tcpstuck_bpf.errors import RecordingError
from tcpstuck_bpf.recording.lines import Decoding, LineWriter, RecordedLines, cut_off_note
from tcpstuck_bpf.steps import utc_text


class ClientRecorder(LineWriter):
    """Writes a recording. Raises RecordingError where the file cannot be created."""

    def __init__(self, path: str, header: ClientHeader) -> None:
        self._sockets = RecordedSockets()
        super().__init__(path, header_values(header))

    def write(self, step: ClientStep) -> None:
        """Add a step, unless a write has failed before."""
        if self.failure is None:
            self.write_line(values_of(step, self._sockets))


class ClientReplay:
    """Reads a recording that is opened already.

    A recording may lack its end: the run was killed, its disk was full, or it is still running. The
    replay then ends after the last whole line, with a WatchEnded whose `cut_off` is true.

    Raises RecordingError where it is not a recording of the client's side.
    """

    def __init__(self, lines: RecordedLines) -> None:
        self._lines = lines
        self._sockets = RecordedSockets()
        self.header = lines.header(header_of)

    def steps(self) -> Iterator[ClientStep]:
        """The steps in order, with a WatchEnded last.

        Raises RecordingError at the first damaged line. This can be called only once.
        """
        decoding = Decoding[ClientStep](
            lambda values: step_of(values, self._sockets),
            time_of,
            lambda step: isinstance(step, WatchEnded),
            self._broken_off,
        )
        yield from self._lines.steps(decoding)

    def refuse_without_polls(self, polls: int) -> None:
        """Raises RecordingError if the recording had no poll: a run begins with one."""
        if not polls:
            raise RecordingError(
                f"the recording of {self.header.watched} is damaged",
                "it lacks the first reading of the sockets",
                "record again",
            )

    def _broken_off(self, reached_ns: int) -> WatchEnded:
        note = cut_off_note(utc_text(self.header.clock.realtime(reached_ns)))
        return WatchEnded(reached_ns, (note,), None, None, cut_off=True)
