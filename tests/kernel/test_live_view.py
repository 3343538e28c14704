"""The live view of a run on a real kernel, in a real terminal, while clients are stuck."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import pytest

from lab.patience import START_S
from lab.scenarios.catalogue import play
from lab.scenarios.scene import DONE, READY, Stage
from lab.scenarios.tracer import REPORT_S
from lab.terminals import Terminal, terminal
from tcpstuck_bpf.errors import EXIT_STUCK
from tests.tmux import needs_tmux

pytestmark = [pytest.mark.kernel, needs_tmux]

CLIENTS = 70
LIVE = [sys.executable, "-m", "tcpstuck_bpf", "-p", "3311", "--live"]


def test_a_person_sees_the_clients_that_are_stuck_and_what_to_do(tmp_path: Path) -> None:
    """The clients say themselves how many wait; the server says its queue and its limit."""
    with contextlib.ExitStack() as stack:
        terminals: list[Terminal] = []

        def after(stage: Stage) -> None:
            if stage.name == READY:
                terminals.append(stack.enter_context(terminal(tmp_path, LIVE)))
                terminals[0].until("q quit", START_S)
            if stage.name == DONE:
                _look_around(terminals[0], len(stage.expected))

        outcome = play("overflow", clients=CLIENTS, after=after)
        assert len(outcome.stuck) == len(outcome.expected)
        (one,) = terminals
        assert one.exit_status(REPORT_S) == EXIT_STUCK


def _look_around(one: Terminal, stuck: int) -> None:
    """Use the view as a person would, and quit."""
    one.until(f"{stuck} clients", REPORT_S)
    shown = one.until("accept-queue-full", REPORT_S)
    (cause,) = (line for line in shown.splitlines() if line.split()[1:2] == ["accept-queue-full"])
    assert cause.split()[0] == str(stuck)
    heading, listener = _below(shown, "listener ")
    values = dict(zip(heading.split(), listener.split()))
    # The queue held one more than its limit (sk_acceptq_is_full), and is accepted from by now.
    assert int(values["peak"]) == int(values["limit"]) + 1
    assert int(values["now"]) <= int(values["limit"])
    assert int(values["stuck"]) == stuck
    one.press("Enter")
    assert "backlog" in one.until("    do: ")
    one.press("Down", "Enter")
    assert "ACK dropped" in one.until("Left back")
    one.press("q")


def _below(shown: str, beginning: str) -> tuple[str, str]:
    """The column headings and the line after them. Of the columns `peak`, the second one counts."""
    lines = shown.splitlines()
    at = next(n for n, line in enumerate(lines) if line.startswith(beginning))
    return lines[at], lines[at + 1]
