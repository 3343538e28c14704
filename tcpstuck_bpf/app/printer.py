"""A queue of findings and attempts to be printed, in order of arrival."""

from __future__ import annotations

import contextlib
import itertools
from collections import deque
from collections.abc import Iterable, Iterator

from tcpstuck_bpf.app.interfaces import Output
from tcpstuck_bpf.judge.verdict import Finding
from tcpstuck_bpf.model import Attempt
from tcpstuck_bpf.summary import Status, Summary

PRINTED_AT_ONCE = 16
"""Number of lines that `print_some` prints."""
MAX_WAITING = 4096
"""Largest number of lines that `print_some` leaves in the queue."""


class Printer:
    """Passes findings and attempts to the output, and notes whether the output has failed."""

    def __init__(self, output: Output) -> None:
        self.failed = False
        """Whether the output raised an exception."""
        self._output = output
        self._waiting: deque[Finding | Attempt] = deque()

    @property
    def has_waiting(self) -> bool:
        """Whether findings or attempts wait to be printed."""
        return bool(self._waiting)

    def add(self, lines: Iterable[Finding | Attempt]) -> None:
        """Append findings or attempts to the queue."""
        self._waiting += lines

    def print_all(self) -> None:
        """Print the whole queue."""
        self._print_first(len(self._waiting))

    def print_some(self) -> None:
        """Print a few lines, or more if too many wait.

        Formatting a verdict takes longer than sending a packet, and a rescue must not wait for it.
        """
        self._print_first(max(PRINTED_AT_ONCE, len(self._waiting) - MAX_WAITING))

    def status(self, status: Status) -> None:
        """Print the status at once, ahead of the queue."""
        with self._noting_failure():
            self._output.status(status)

    def summary(self, summary: Summary) -> None:
        """Print the summary."""
        with self._noting_failure():
            self._output.summary(summary)

    def _print_first(self, most: int) -> None:
        some = [self._waiting.popleft() for _ in range(min(most, len(self._waiting)))]
        for kind, alike in itertools.groupby(some, type):
            with self._noting_failure():
                if kind is Attempt:
                    self._output.attempts([one for one in alike if isinstance(one, Attempt)])
                else:
                    self._output.findings([one for one in alike if isinstance(one, Finding)])

    @contextlib.contextmanager
    def _noting_failure(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.failed = True
            raise
