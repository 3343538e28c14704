"""What a recording, or a run by a script, exports as metrics; and how a test reads it."""

from __future__ import annotations

import importlib
import os
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from lab.golden_files import kept_recording
from tcpstuck_bpf.analysis import Analysis
from tcpstuck_bpf.app.playback import run_replay
from tcpstuck_bpf.output.metric_families import Family, Snapshot
from tcpstuck_bpf.output.metrics import Metrics
from tcpstuck_bpf.recording.replay import Replay

FORCE = "TCPSTUCK_FORCE_KERNEL_TESTS"
Exported = Mapping[str, Mapping[tuple[str, ...], float]]
"""Values by the name of their family and by their labels' values."""


def needs_prometheus_client() -> None:
    """Skip where the library is missing; fail where `make test` should have it."""
    _needs("prometheus_client")


def needs_matplotlib() -> None:
    """The same for the plot's library."""
    _needs("matplotlib")


def _needs(library: str) -> None:
    try:
        importlib.import_module(library)
    except ImportError as error:
        if os.environ.get(FORCE):
            pytest.fail(f"{error}; the extra `dev` of setup.cfg brings it: run make setup")
        pytest.skip(f"{error}: run make setup")


def snapshot_of(path: Path) -> Snapshot:
    """The end state of a recording."""
    replay = Replay(str(path))
    analysis = Analysis(replay.header)
    published: list[Snapshot] = []

    def no_moment_between(_now_ns: int) -> Any:
        raise AssertionError

    metrics = Metrics(
        replay.header,
        no_moment_between,
        analysis.correlator.flows.is_suspected,
        published.append,
        lambda: 0,
        None,
    )
    run_replay(replay, metrics, analysis)
    (snapshot,) = published
    return snapshot


def golden_snapshot(name: str, directory: Path) -> Snapshot:
    """The same of a recording in tests/golden; `directory` is for scratch."""
    path = directory / name
    path.write_bytes(kept_recording(name))
    return snapshot_of(path)


def exported(snapshot: Snapshot) -> Exported:
    """The values of a snapshot."""
    return {
        family.name: {sample.labels: sample.value for sample in samples}
        for family, samples in snapshot
    }


def summed(values: Mapping[tuple[str, ...], float], family: Family, *by: str) -> dict[Any, float]:
    """Values added up by some of the family's labels, without zeros."""
    places = [family.labels.index(name) for name in by]
    found: dict[tuple[str, ...], float] = defaultdict(float)
    for labels, value in values.items():
        found[tuple(labels[place] for place in places)] += value
    return {labels: value for labels, value in found.items() if value}
