"""Implements `--plot`: draws a replay into a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath

from tcpstuck_bpf.analysis import Analysis
from tcpstuck_bpf.conversions.describe import Plot
from tcpstuck_bpf.errors import UsageError, words_of
from tcpstuck_bpf.files import obstacle, write_whole
from tcpstuck_bpf.judge.verdict import Finding
from tcpstuck_bpf.steps import Step
from tcpstuck_bpf.summary import Summary

MODE = 0o600
"""The picture shows clients' addresses, as the recording does."""


class PlotFile:
    """Draws the replay of an analysis into a file, which appears whole or not at all.

    `only`: the verdicts to draw; empty for all.

    Raises UsageError if the file cannot be written, and CannotTraceError if matplotlib is missing
    (`drawing`).
    """

    def __init__(self, path: str, analysis: Analysis, only: Sequence[str]) -> None:
        self._path = path
        why = obstacle(path)
        if why is not None:
            raise self._unwritable(why)
        # Imported here and not when it is used: a missing library must not cost a whole replay.
        from tcpstuck_bpf.conversions.drawing import drawn

        self._drawn = drawn
        self._plot = Plot(analysis, only)

    def _unwritable(self, why: str) -> UsageError:
        return UsageError(
            f"cannot write the plot to {self._path}",
            why,
            "name a file in a directory that you may write to",
        )

    def take(self, step: Step, findings: Sequence[Finding]) -> None:
        """Take a step and its findings, right after the analysis took it."""
        self._plot.take(step, findings)

    def draw(self, summary: Summary) -> None:
        """Draw and write the file. Raises UsageError if it cannot be written."""
        form = PurePath(self._path).suffix[1:].lower()
        data = self._drawn(self._plot.picture(summary), form)
        try:
            write_whole(self._path, data, MODE)
        except OSError as error:
            raise self._unwritable(words_of(error)) from error
