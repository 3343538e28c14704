"""What every kernel test needs: root, a kernel that allows tracing, and the tool beside a scenario.

The oracle is the clients' own record and the kernel's counters, read by the lab, never the tool.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from lab.records import Comparison, Outcome, compare
from lab.scenarios import play
from lab.scene import READY, Stage
from lab.tracer import READY_PLACEHOLDER, Tracer
from lab.trial import tracing_refusal

FORCE = "TCPSTUCK_FORCE_KERNEL_TESTS"
TOOL = (sys.executable, "-m", "tcpstuck_bpf", "-p", "3311", "--json")
COUNTERS = ("SyncookiesSent", "SyncookiesRecv", "SyncookiesFailed", "ListenOverflows")


@pytest.fixture(scope="session", autouse=True)
def _kernel_allows_tracing() -> None:
    refusal = tracing_refusal()
    if refusal is not None and os.environ.get(FORCE):
        pytest.fail(f"{FORCE} is set, and this kernel does not let us trace: {refusal}")
    if refusal is not None:
        pytest.skip(f"this kernel does not let us trace: {refusal}")


@dataclass(frozen=True)
class Traced:
    """A scenario, what the tool said of it, and the two compared."""

    outcome: Outcome
    comparison: Comparison
    verdicts: list[dict[str, Any]]
    summary: dict[str, Any]
    exit_status: int | None

    def reconciled(self) -> dict[str, tuple[int, Any, bool]]:
        """Traced and kernel figure of each counter, by the tool, for the server's namespace."""
        return {
            row["counter"]: (row["traced"] + row["outside_filter"], row["kernel"], row["agrees"])
            for row in self.summary["reconciliation"]
            if row["netns"] == self.outcome.netns
        }

    def assert_reconciled(self) -> None:
        """The tool's figures equal the movement that the lab itself read of each counter."""
        found = self.reconciled()
        moved = {name: self.outcome.moved(name) for name in COUNTERS}
        expected = {name: (count, count, True) for name, count in moved.items() if count}
        assert found == expected


@pytest.fixture(scope="module", params=["fentry", "kprobe"])
def shared_tracer(request: pytest.FixtureRequest) -> Iterator[Tracer]:
    """One run of the tool per mode, beside many scenarios: starting it is what takes long.

    Each scenario has its own network namespaces, by which its verdicts are told apart.
    """
    with Tracer(
        [*TOOL, "--probe-mode", request.param, "--ready-file", READY_PLACEHOLDER]
    ) as tracer:
        tracer.start()
        yield tracer
        tracer.stop()


@pytest.fixture
def compared(shared_tracer: Tracer) -> Callable[..., tuple[Outcome, Comparison]]:
    """Play a scenario beside the shared tracer; the outcome, and what the tool said compared."""

    def run(name: str, clients: int, family: str = "4") -> tuple[Outcome, Comparison]:
        first = len(shared_tracer.lines)

        def hook(stage: Stage) -> None:
            if stage.name != READY:
                shared_tracer.await_reported(stage.expected, stage.netns, first)

        outcome = play(name, clients=clients, family=family, after=hook)
        return outcome, compare(outcome, shared_tracer.lines[first:])

    return run


@pytest.fixture
def traced() -> Callable[..., Traced]:
    """Play a scenario beside the tool, with these options besides -p and --json."""

    def run(name: str, *options: str, clients: int | None = None, family: str = "4") -> Traced:
        with Tracer([*TOOL, *options, "--ready-file", READY_PLACEHOLDER]) as tracer:
            outcome = play(name, clients=clients, family=family, after=tracer.after)
        lines = [dict(line) for line in tracer.lines]
        verdicts = [line for line in lines if line["type"] == "verdict"]
        (summary,) = (line for line in lines if line["type"] == "summary")
        return Traced(outcome, compare(outcome, lines), verdicts, summary, tracer.exit_status)

    return run
