"""The alert rules of docs/metrics.md, and the dashboard's queries, for whoever tries them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

DOCUMENT = Path(__file__).parents[1] / "docs" / "metrics.md"
DASHBOARD = DOCUMENT.parent / "grafana" / "tcpstuck.json"


def _alerts() -> str:
    (block,) = re.findall(
        r"^```yaml\n(groups:\n.*?)^```$", DOCUMENT.read_text("utf-8"), re.M | re.S
    )
    return str(block)


ALERTS = _alerts()
"""YAML."""


def alert_names() -> list[str]:
    """In their order."""
    return re.findall(r"- alert: (\w+)", ALERTS)


def queries() -> Iterator[tuple[str, str]]:
    """The dashboard's expressions, each with its legend."""
    for panel in json.loads(DASHBOARD.read_text("utf-8"))["panels"]:
        for target in panel["targets"]:
            yield target["expr"], target["legendFormat"]
