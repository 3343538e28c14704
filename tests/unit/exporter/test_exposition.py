"""The metrics as text, read back by prometheus_client's own parsers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lab.golden import RECORDINGS
from tcpstuck_bpf.errors import EXIT_CANNOT_TRACE
from tcpstuck_bpf.output.metric_families import FAMILIES, Sample, Samples, Snapshot
from tests.exported import exported, golden_snapshot, needs_prometheus_client
from tests.replay.test_replay import recorded

REPOSITORY = Path(__file__).parents[3]
OPENMETRICS = "application/openmetrics-text; version=1.0.0,text/plain;q=0.5"
LABELS = {family.name: family.labels for family in FAMILIES}
NOT_THERE = """
import sys
sys.modules["prometheus_client"] = None
from tcpstuck_bpf.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(autouse=True)
def _library() -> None:
    needs_prometheus_client()


def text_of(snapshot: Snapshot, accept: str = "text/plain") -> str:
    from tcpstuck_bpf.exporter.exposition import Exposition

    exposition = Exposition()
    assert exposition.text(accept) is None
    exposition.replace(snapshot)
    text = exposition.text(accept)
    assert text is not None
    assert exposition.text(accept) is text
    openmetrics = text.content_type.startswith("application/openmetrics-text")
    assert openmetrics == ("openmetrics" in accept)
    return text.body.decode("utf-8")


def test_prometheus_client_reads_what_was_written(tmp_path: Path) -> None:
    from prometheus_client.openmetrics import parser as openmetrics
    from prometheus_client.parser import text_string_to_metric_families

    for name in RECORDINGS:
        snapshot = golden_snapshot(name, tmp_path)
        for accept, parse in (
            ("text/plain", text_string_to_metric_families),
            (OPENMETRICS, openmetrics.text_string_to_metric_families),
        ):
            found: dict[str, dict[tuple[str, ...], float]] = {}
            for family in parse(text_of(snapshot, accept)):
                assert family.documentation.endswith(".")
                for sample in family.samples:
                    assert set(sample.labels) == set(LABELS[sample.name])
                    labels = tuple(sample.labels[label] for label in LABELS[sample.name])
                    found.setdefault(sample.name, {})[labels] = sample.value
            expected = {name: values for name, values in exported(snapshot).items() if values}
            assert found == expected


def test_types_are_told(tmp_path: Path) -> None:
    text = text_of(golden_snapshot("healthy", tmp_path))
    for family in FAMILIES:
        kind = "gauge" if family.kind == "info" else family.kind
        assert f"# TYPE {family.name} {kind}\n" in text
        assert f"# HELP {family.name} {family.help}\n" in text


def test_a_hostile_label_is_one_label() -> None:
    from prometheus_client.parser import text_string_to_metric_families

    hostile = 'a"} 1\ntcpstuck_stuck_clients 99\n\\'
    family = next(one for one in FAMILIES if one.labels == ("version",))
    text = text_of((Samples(family, (Sample((hostile,), 1),)),))
    (read,) = text_string_to_metric_families(text)
    assert [sample.labels for sample in read.samples] == [{"version": hostile}]


def test_without_the_library_the_package_is_named_before_anything_is_done(tmp_path: Path) -> None:
    path, target = recorded(tmp_path / "run"), tmp_path / "m.prom"
    for words in (
        ["--metrics", ":0", "-p", "25"],
        ["--replay", str(path), "--metrics-file", str(target)],
    ):
        ended = subprocess.run(
            [sys.executable, "-c", NOT_THERE, *words],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert ended.returncode == EXIT_CANNOT_TRACE
        assert ended.stdout == ""
        assert len(ended.stderr.splitlines()) == 3
        assert "apt install python3-prometheus-client" in ended.stderr.splitlines()[2]
    assert not target.exists()
