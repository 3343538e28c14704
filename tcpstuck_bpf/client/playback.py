"""Plays a recording of the client's side back: prints what the live run printed, or a part of it.

The sockets that the filters exclude are dropped, and a time-out judges the others again. A poll
counts healthy connections without telling them apart, so of a part their number is not known.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace

from tcpstuck_bpf.client.analysis import ClientAnalysis
from tcpstuck_bpf.client.output import ClientOutput
from tcpstuck_bpf.client.printing import output_for, refuse_other_verdicts
from tcpstuck_bpf.client.recording import ClientReplay
from tcpstuck_bpf.client.steps import Attempted, ClientStep, Polled, WatchEnded
from tcpstuck_bpf.client.summary import ClientSummary, exit_status
from tcpstuck_bpf.judge.evidence import duration_text
from tcpstuck_bpf.recording.lines import RecordedLines
from tcpstuck_bpf.recording_part import Part, Wanted

MODE = "a recording of the client's side"


class NarrowedClientReplay(ClientReplay):
    """A recording of which only a part is judged, or all of it with another time-out.

    Raises RecordingError if it is not a recording of the client's side, and UsageError if it does
    not contain the wanted part.
    """

    def __init__(self, lines: RecordedLines, wanted: Wanted) -> None:
        super().__init__(lines)
        recorded = self.header
        self._notes: list[str] = []
        self._part = Part(wanted, recorded.wanted, recorded.watched, recorded.netns_names)
        words = self._part.words
        if words:
            self.header = replace(self.header, selection=words)
            self._notes.append(
                f"verdicts cover {words} only. What was not seen, and what --rescue did in all, "
                f"cover the whole recording ({recorded.watched}). How many connections there were "
                "cannot be split by filter and is omitted"
            )
        timeout_ns, before_ns = wanted.timeout_ns, recorded.timeout_ns
        if timeout_ns is not None and timeout_ns != before_ns:
            self.header = replace(self.header, timeout_ns=timeout_ns)
            owners = (
                ". The owner of a connection is known once the run itself reported it"
                if timeout_ns < before_ns
                else ""
            )
            self._notes.append(
                f"judged with a time-out of {duration_text(timeout_ns)}, recorded with "
                f"{duration_text(before_ns)}{owners}"
            )

    def steps(self) -> Iterator[ClientStep]:
        """The steps in order, without what the filters exclude."""
        for step in super().steps():
            yield self._narrowed(step)

    def _narrowed(self, step: ClientStep) -> ClientStep:
        if isinstance(step, WatchEnded):
            return step._replace(notes=(*step.notes, *self._notes))
        if not self._part.words:
            return step
        selects, netns = self._part.selects, self._part.netns
        if isinstance(step, Polled):
            poll = step.poll
            sockets = tuple(one for one in poll.sockets if selects(one.four_tuple))
            unread = {
                inode: why
                for inode, why in poll.failures.items()
                if netns is None or inode in netns
            }
            return step._replace(poll=poll._replace(sockets=sockets, failures=unread))
        if isinstance(step, Attempted):
            attempts = (one for one in step.attempts if selects(one.plan.socket.four_tuple))
            return step._replace(attempts=tuple(attempts))
        return step


def run_client_replay(
    replay: ClientReplay, output: ClientOutput, analysis: ClientAnalysis | None = None
) -> ClientSummary:
    """Print the verdicts and the summary of a recording, up to its end or its last whole line.

    Raises RecordingError if the recording is damaged.
    """
    analysis = ClientAnalysis(replay.header) if analysis is None else analysis
    for step in replay.steps():
        changes = analysis.take(step)
        if isinstance(step, Attempted):
            output.attempts(step.attempts)
        output.changes(changes, analysis.printed_ns)
        if isinstance(step, WatchEnded):
            replay.refuse_without_polls(analysis.polls)
            summary = analysis.summary(step)
            output.summary(summary, step.now_ns)
            return summary
    raise AssertionError("the last step must be WatchEnded")


def replay_clients(options: argparse.Namespace, lines: RecordedLines, wanted: Wanted) -> int:
    """Judge a recording of the client's side by the options. Returns the exit status.

    Raises UsageError if the options do not fit it, and RecordingError if it is damaged.
    """
    refuse_other_verdicts(options.only, MODE)
    replay = NarrowedClientReplay(lines, wanted)
    return exit_status(run_client_replay(replay, output_for(options, replay.header)))
