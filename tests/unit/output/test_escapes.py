"""Escape sequences go where they are understood, and colour to what matters."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from tcpstuck_bpf.output.render import TableRenderer
from tcpstuck_bpf.output.writers import Selection, TableOutput
from tcpstuck_bpf.summary import Status
from tcpstuck_bpf.terminal import BOLD, CLEAR_LINE, RED
from tests.replay.test_replay import recorded
from tests.unit.output.test_render import CLOCK, LONG_IPV4, finding

ESCAPE = "\x1b"


class Terminal(io.StringIO):
    """A stream that says that it is one."""

    def isatty(self) -> bool:
        return True


def renderer(colour: bool = False) -> TableRenderer:
    return TableRenderer(
        clock=CLOCK,
        width=80,
        colour=colour,
        verbose=False,
        own_netns=1,
        netns_names={},
        each=True,
    )


@pytest.mark.parametrize(
    ("stream", "kind", "rewritten"),
    [
        (Terminal, "xterm-256color", True),
        (Terminal, "linux", True),
        (Terminal, "dumb", False),
        (Terminal, "", False),
        (Terminal, None, False),
        (io.StringIO, "xterm-256color", False),
    ],
)
def test_a_status_line_is_rewritten_where_that_is_understood(
    stream: type[io.StringIO], kind: str | None, rewritten: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind is None:
        monkeypatch.delenv("TERM", raising=False)
    else:
        monkeypatch.setenv("TERM", kind)
    text = stream()
    output = TableOutput(text, renderer(), Selection([], False))
    output.status(Status("port 3311", 1, 1, 0, 0, 1_000_000_000, 1))
    output.findings([finding(LONG_IPV4)])
    output.close()
    assert (CLEAR_LINE in text.getvalue()) == rewritten
    assert (ESCAPE in text.getvalue()) == rewritten
    assert ("nothing stuck" in text.getvalue()) == rewritten


def test_only_who_is_stuck_is_painted() -> None:
    stuck = finding(LONG_IPV4)
    heading, first, *_, second, _ = renderer(colour=True).findings(
        [stuck, stuck._replace(stuck=False)]
    )
    assert heading.startswith(BOLD)
    assert RED in first
    assert ESCAPE not in second


def on_a_terminal(path: Path, **environment: str) -> str:
    """What a replay prints there."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "tcpstuck_bpf", "--replay", str(path)],
        stdout=theirs,
        stderr=theirs,
        env={**{k: v for k, v in os.environ.items() if k != "NO_COLOR"}, **environment},
    )
    os.close(theirs)
    printed = b""
    while True:
        try:
            some = os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
        if not some:
            break
        printed += some
    os.close(ours)
    assert process.wait(60) == 1
    return printed.decode()


@pytest.mark.parametrize(
    ("environment", "coloured"),
    [
        ({"TERM": "xterm"}, True),
        ({"TERM": "dumb"}, False),
        ({"TERM": "xterm", "NO_COLOR": "1"}, False),
    ],
    ids=str,
)
def test_colour_is_for_terminals_that_have_it_and_people_who_want_it(
    environment: dict[str, str], coloured: bool, tmp_path: Path
) -> None:
    printed = on_a_terminal(recorded(tmp_path / "run"), **environment)
    assert "!accept-queue-full" in printed
    assert (ESCAPE in printed) == coloured
