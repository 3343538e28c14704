"""Writes the metrics to a file for node_exporter's textfile collector, replacing it atomically.

A separate thread writes the file, so a slow or full disk does not delay tracing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from tcpstuck_bpf.errors import UsageError, words_of
from tcpstuck_bpf.exporter.exposition import PLAIN, Exposition, Text
from tcpstuck_bpf.files import OutputFile, write_whole
from tcpstuck_bpf.threads import start_beside

INTERVAL_S = 5.0
LAST_WRITE_S = 5.0
"""Longest time that the end of a run waits for the last write."""
MODE = 0o644
"""node_exporter runs as another user. The file contains no client addresses."""


class MetricsFile:
    """Writes the latest snapshot every INTERVAL_S, and at the end.

    `note` reports once that the file cannot be written; `note` must not raise.

    Raises UsageError if the file cannot be created.
    """

    def __init__(
        self,
        path: str,
        exposition: Exposition,
        note: Callable[[str], None],
        interval_s: float = INTERVAL_S,
    ) -> None:
        self._path = path
        self._exposition = exposition
        self._note = note
        self._interval_s = interval_s
        self._end = threading.Event()
        self._thread: threading.Thread | None = None
        self._written: Text | None = None
        self._failure: OSError | None = None
        try:
            # A check only: an existing file stays unchanged until the first snapshot.
            OutputFile(path, MODE).close()
        except OSError as error:
            raise UsageError(
                f"cannot write metrics to {path}",
                str(error.strerror),
                "name a file in a directory that you may write to",
            ) from error

    def start(self) -> None:
        """Start the writing thread."""
        self._thread = start_beside("metrics-file", self._run)

    def close(self) -> None:
        """Write the latest snapshot a last time.

        Raises OSError if that fails, and TimeoutError if it takes longer than LAST_WRITE_S.
        """
        self._end.set()
        if self._thread is None:
            return
        self._thread.join(LAST_WRITE_S)
        if self._thread.is_alive():
            raise TimeoutError(f"not written within {LAST_WRITE_S:.0f} s")
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        while not self._end.wait(self._interval_s):
            self._write()
        self._write()

    def _write(self) -> None:
        text = self._exposition.text(PLAIN)
        if text is None or text is self._written:
            return
        try:
            write_whole(self._path, text.body, MODE)
        except OSError as error:
            if self._failure is None:
                self._note(f"metrics are not written to {self._path}: {words_of(error)}")
            self._failure = error
        else:
            self._failure, self._written = None, text
