"""Plays a recording back: prints what the live run printed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tcpstuck_bpf.analysis import Analysis
from tcpstuck_bpf.app.interfaces import Output
from tcpstuck_bpf.judge.verdict import Finding
from tcpstuck_bpf.recording.replay import Replay
from tcpstuck_bpf.steps import Ended, Rescued, Step
from tcpstuck_bpf.summary import Summary


def run_replay(
    replay: Replay,
    output: Output,
    analysis: Analysis | None = None,
    also: Sequence[Callable[[Step, list[Finding]], None]] = (),
) -> Summary:
    """Print the findings and the summary of a recording, up to its end or its last whole line.

    `analysis`: a new Analysis with the recording's header, if the caller uses it as well. `also`
    get each step with its findings, right after the analysis took it.

    Raises RecordingError if the recording is damaged.
    """
    analysis = Analysis(replay.header) if analysis is None else analysis
    for step in replay.steps():
        findings = analysis.take(step)
        for taker in also:
            taker(step, findings)
        if findings:
            output.findings(findings)
        if isinstance(step, Rescued):
            output.attempts(step.rescue.attempts)
        if isinstance(step, Ended):
            replay.refuse_without_counters(analysis.tallied)
            summary = analysis.summary(step)
            output.summary(summary)
            return summary
    raise AssertionError("the last step must be Ended")
