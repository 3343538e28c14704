"""The live view in a real terminal: a recording's end, keys, sizes, colours and endings."""

from __future__ import annotations

import os
import select
import signal
import sys
from functools import partial
from pathlib import Path

import pytest

from lab.golden_files import kept_recording
from lab.terminals import STATUS, Terminal, terminal
from tcpstuck_bpf.cli import main
from tcpstuck_bpf.errors import EXIT_STUCK, EXIT_USAGE
from tests.tmux import needs_tmux

KEYS = "q quit"
RED = "\x1b[31m"


@pytest.fixture
def recording(tmp_path: Path) -> str:
    """The recording of a firewall that drops the ACKs of four clients."""
    path = tmp_path / "recorded"
    path.write_bytes(kept_recording("ack-dropped-by-rule"))
    return str(path)


def command(recording: str, *more: str) -> list[str]:
    """Shows the recording."""
    return [sys.executable, "-m", "tcpstuck_bpf", "--replay", recording, "--live", *more]


def pid_of_the_view(one: Terminal) -> int:
    """The tool: the shell's only child."""
    children = Path(f"/proc/{one.pid}/task/{one.pid}/children").read_text().split()
    (child,) = children
    return int(child)


@needs_tmux
def test_a_person_can_find_out_what_to_do_on_eighty_columns(recording: str, tmp_path: Path) -> None:
    with terminal(tmp_path, command(recording)) as one:
        first = one.until(KEYS)
        assert "4 clients of python (pid " in first
        assert "are stuck" in first
        assert "causes of stuck clients: 1" in first
        one.press("Enter")
        assert "nft list ruleset" in one.until("    do: ")
        one.press("Down", "Enter")
        assert "ACK filtered" in one.until("Left back")
        one.press("End")
        one.until("advice: look at the rule")
        one.press("Left")
        one.until("    do: ")
        one.press("q")
        assert one.exit_status() == EXIT_STUCK
        # The view has left the terminal to the summary, which ends with the counters.
        assert "SyncookiesSent" in one.screen()
        assert KEYS not in one.screen()


def is_whole(text: str, lines: int) -> bool:
    """Whether the view fills a screen of so many lines."""
    shown = text.splitlines()
    return (
        len(shown) == lines
        and shown[0].startswith("4 clients")
        and shown[-1].startswith("Enter open")
    )


@needs_tmux
def test_it_follows_the_size_of_the_terminal(recording: str, tmp_path: Path) -> None:
    with terminal(tmp_path, command(recording)) as one:
        narrow = one.until(KEYS).splitlines()
        assert any(line.endswith("...") for line in narrow)
        for columns, lines in ((200, 50), (40, 10), (80, 24)):
            one.resize(columns, lines)
            shown = one.until(partial(is_whole, lines=lines))
            if columns == 200:
                assert not any(line.endswith("...") for line in shown.splitlines())
        one.resize(60, 70)
        one.until(partial(is_whole, lines=70))
        one.press("q")
        assert one.exit_status() == EXIT_STUCK
        # The summary fits the last size: the terminal breaks none of its words.
        assert "4 clients of python" in one.screen()
        sentence = one.screen().partition("4 clients")[2].partition("\n\n")[0]
        assert "in network\nnamespace tcpstuck-276-13-server are stuck" in sentence


@needs_tmux
@pytest.mark.parametrize(
    ("environment", "is_coloured"),
    [
        ({"TERM": "screen"}, True),
        ({"TERM": "screen", "NO_COLOR": "1"}, False),
        ({"TERM": "vt100"}, False),
        ({"TERM": "screen", "LC_ALL": "C"}, True),
    ],
)
def test_colour_is_used_where_it_may_be(
    environment: dict[str, str], is_coloured: bool, recording: str, tmp_path: Path
) -> None:
    with terminal(tmp_path, command(recording), environment=environment) as one:
        one.until(KEYS)
        assert (RED in one.screen(colours=True)) == is_coloured
        assert "4 clients" in one.screen()


@needs_tmux
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_gives_the_terminal_back_and_prints_the_summary(
    number: signal.Signals, recording: str, tmp_path: Path
) -> None:
    with terminal(tmp_path, command(recording)) as one:
        one.until(KEYS)
        os.kill(pid_of_the_view(one), number)
        assert one.exit_status() == EXIT_STUCK
        assert "SyncookiesSent" in one.screen()
        # What is typed is echoed again.
        one.press("echoed")
        one.until("echoed")


@needs_tmux
def test_it_stops_and_goes_on_as_any_program(recording: str, tmp_path: Path) -> None:
    script = ["bash", "--norc", "-i"]
    with terminal(tmp_path, script, environment={"PS1": "prompt "}) as one:
        one.press(" ".join(command(recording)), "Enter")
        one.until(KEYS)
        one.press("C-z")
        one.until("Stopped")
        one.press("fg", "Enter")
        one.until(KEYS)
        one.press("q")
        one.until("SyncookiesSent")


@needs_tmux
def test_it_ends_with_its_terminal(recording: str, tmp_path: Path) -> None:
    with terminal(tmp_path, command(recording)) as one:
        one.until(KEYS)
        child = os.pidfd_open(pid_of_the_view(one))
        one.tmux("kill-server")
        assert select.select([child], [], [], 30)[0], "it goes on without a terminal"
        os.close(child)


@needs_tmux
def test_an_unknown_terminal_is_wrong_use(recording: str, tmp_path: Path) -> None:
    with terminal(tmp_path, command(recording), environment={"TERM": "no-such"}) as one:
        assert one.exit_status() == EXIT_USAGE
        assert "--live cannot use TERM=no-such" in one.screen()
        assert STATUS in one.screen()


@pytest.mark.parametrize(
    "more", [["--json"], ["--each"], ["-v"], ["--summary"], ["--only", "ack-missing"]]
)
def test_what_chooses_lines_is_refused(
    more: list[str], recording: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--replay", recording, "--live", *more]) == EXIT_USAGE
    assert "cannot be combined with --live" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--live"], ["--live", "--replay", "nothing"]])
def test_without_a_terminal_it_is_refused_before_the_machine_is_looked_at(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == EXIT_USAGE
    first, why, remedy = capsys.readouterr().err.splitlines()
    assert first == "tcpstuck-trace: --live needs a terminal"
    assert "standard output is not one" in why
    assert "--live" in remedy


def test_a_recording_from_standard_input_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--replay", "-", "--live"]) == EXIT_USAGE
    assert "reads its keys" in capsys.readouterr().err
