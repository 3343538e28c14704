"""docs/metrics.md, its alert rules and the dashboard against what is exported."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tcpstuck_bpf.output.metric_families import FAMILIES, Family
from tests.exposed_documents import ALERTS, DASHBOARD, DOCUMENT, alert_names, queries

BY_NAME = {family.name: family for family in FAMILIES}
AS_PROMETHEUS_ADDS = {"instance", "job"}


def test_the_document_lists_exactly_what_is_exported() -> None:
    rows = re.findall(
        r"^\| `(tcpstuck_\w+)` \| (\w+) \| ([^|]*)\| ([^|]+) \|$", DOCUMENT.read_text(), re.M
    )
    documented = [(name, kind, tuple(re.findall(r"\w+", labels))) for name, kind, labels, _ in rows]
    assert documented == [(one.name, one.kind, one.labels) for one in FAMILIES]


def named_in(text: str) -> set[str]:
    return set(re.findall(r"\btcpstuck_\w+", text))


def labels_in(expression: str) -> set[str]:
    """Those that an expression groups by or selects by."""
    grouped = re.findall(r"\b(?:by|on|without|ignoring) \(([^)]*)\)", expression)
    selected = re.findall(r"(\w+)(?:=|!=|=~|!~)\"", expression)
    return {*selected, *(one for group in grouped for one in re.findall(r"\w+", group))}


def known_labels(families: set[str]) -> set[str]:
    return AS_PROMETHEUS_ADDS.union(*(BY_NAME[name].labels for name in families))


def test_every_name_in_the_documents_is_exported() -> None:
    for path in (DOCUMENT, DASHBOARD, DOCUMENT.parents[1] / "README.md"):
        assert named_in(path.read_text()) <= set(BY_NAME), path


def test_the_dashboard_asks_for_labels_that_are_there() -> None:
    asked = list(queries())
    assert len(asked) > 20
    for expression, legend in asked:
        names = named_in(expression)
        assert names
        shown = set(re.findall(r"{{(\w+)}}", legend))
        assert labels_in(expression) | shown <= known_labels(names), expression
        if " by (" in expression:
            assert shown <= labels_in(expression), expression


def test_the_dashboard_shows_every_family_but_plain_run_state() -> None:
    shown = {name for expression, _ in queries() for name in named_in(expression)}
    assert shown == set(BY_NAME)


def test_panels_have_places_of_their_own() -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    taken = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(taken) == len(set(taken))
    assert max(x for x, _ in taken) == 23
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert all(panel["description"].endswith(".") for panel in panels)


def test_there_are_five_alerts_and_their_labels_are_there() -> None:
    assert len(alert_names()) == 5
    expressions = re.findall(r"^ +expr: (.*)$", ALERTS, re.M)
    blocks = ALERTS.split("- alert: ")[1:]
    for expression, block in zip(expressions, blocks):
        known = known_labels(named_in(expression))
        used = set(re.findall(r"\$labels\.(\w+)", block)) | labels_in(expression)
        assert used <= known, block


@pytest.mark.parametrize("family", FAMILIES, ids=lambda one: one.name)
def test_a_counter_is_asked_for_by_its_rate_alone(family: Family) -> None:
    if family.kind != "counter":
        return
    for text in (ALERTS, *(expression for expression, _ in queries())):
        for found in re.finditer(rf"{family.name}\b", text):
            assert re.search(r"(rate|increase)\($", text[: found.start()]), text


def test_the_pages_lead_there() -> None:
    docs = DOCUMENT.parent
    assert "(metrics.md)" in (docs / "README.md").read_text()
    assert "(grafana/tcpstuck.json)" in (docs / "README.md").read_text()
    assert "(docs/metrics.md)" in (docs.parent / "README.md").read_text()
    assert Path(docs / "grafana" / "tcpstuck.json") == DASHBOARD
