"""The signals that end a run."""

from __future__ import annotations

import signal
import sys
from types import FrameType
from typing import Protocol

from tcpstuck_bpf.console import discard


class Run(Protocol):
    """What a run lends to its signal handlers; `app.live.Live` and `client.watch.Watch` do."""

    stop: bool
    abandoned: bool

    @property
    def reading(self) -> bool:
        """Whether an exception that a handler raises now would be lost."""


class Interrupts:
    """The signal handlers of a run.

    SIGINT, SIGTERM or SIGHUP ends the run with its summary. A second signal ends it at once.

    No handler raises while events are read; see `Run.reading`.
    """

    def __init__(self) -> None:
        self.live: Run | None = None
        self.interrupted = False
        self._ignored = False
        signal.signal(signal.SIGINT, self._handle)
        signal.signal(signal.SIGTERM, self._handle)
        # isatty() is false once the terminal is lost, so it is asked now.
        self._on_terminal = [one for one in (sys.stdout, sys.stderr) if one.isatty()]
        # Under nohup the run continues.
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            signal.signal(signal.SIGHUP, self._handle)

    def ignore(self) -> None:
        """Ignore further signals: the run is over, and releasing everything must not be cut off."""
        self._ignored = True

    def end(self) -> None:
        """End the run with its summary, as SIGTERM does. May be called from any thread."""
        if self.live is not None:
            self.live.stop = True

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            # Output to the lost terminal must not fail, so that the recording still gets its end.
            for stream in self._on_terminal:
                discard(stream)
        if self._ignored:
            return
        if self.live is None:
            raise KeyboardInterrupt
        if self.live.stop and not self.live.reading:
            raise KeyboardInterrupt
        self.live.abandoned = self.live.stop
        self.live.stop = True
        self.interrupted = number == signal.SIGINT
