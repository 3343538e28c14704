"""Wrong use of the command line: three lines that say what, why, and what to write instead."""

from __future__ import annotations

import pytest

from tcpstuck_bpf.cli import main
from tcpstuck_bpf.errors import EXIT_USAGE


def complaint(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[str, str, str]:
    """What, why and remedy of wrong use: all that is said."""
    assert main(words) == EXIT_USAGE
    out, err = capsys.readouterr()
    assert out == ""
    what, why, remedy = err.splitlines()
    assert what.startswith("tcpstuck-trace: ")
    assert why.startswith("  why: ")
    assert remedy.startswith("  remedy: ")
    return what[len("tcpstuck-trace: ") :], why[len("  why: ") :], remedy[len("  remedy: ") :]


@pytest.mark.parametrize(
    ("words", "what", "remedy"),
    [
        (["--prot", "3311"], "no option --prot", "did you mean --port?"),
        (["--xyz"], "no option --xyz", "--help"),
        (["3306"], "3306 belongs to no option", "write -p 3306"),
        (["surplus"], "surplus belongs to no option", "--help"),
        (["-p", "70000"], "-p/--port: 70000", "-p 3306"),
        (["-p"], "-p/--port: its value is missing", "write -p PORT"),
        (["-t", "-1"], "-t/--timeout: its value is missing, or begins with -", "-t"),
        (["-4", "-6"], "-6 cannot be combined with -4", "leave out one of the two"),
        (["--why", "--no-why"], "--no-why cannot be combined with --why", "leave out"),
        (["--probe-mode", "fentri"], "--probe-mode: no mode 'fentri'", "did you mean fentry?"),
        (["--json=1"], "--json takes no value", "write --json"),
        (["--only", "accept-queue"], "--only: no verdict", "did you mean accept-queue-full?"),
        (["--only", "qqq"], "--only: no verdict 'qqq'", "--explain"),
        (["--explain", "ack-mising"], "--explain: no verdict", "did you mean ack-missing?"),
        (["--rescue=al"], "--rescue: 'al' is", "did you mean all?"),
        (["--rescue=known,all"], "--rescue: 'known,all' is", "--rescue=known"),
        (["--rescue", "--rescue-rate", "0"], "--rescue-rate: 0 ", "--rescue-rate 100"),
        (["--max-handshakes", "few"], "--max-handshakes: 'few'", "--max-handshakes 131072"),
        (["--rescue", "--rescue-exclude", "10.0.0.0/33"], "--rescue-exclude: ", "10.0.0.0/8"),
        (["--record", ""], "--record: the name of a file is missing", "variable"),
        (["--netns="], "--netns: the name of a network namespace is missing", "variable"),
    ],
)
def test_wrong_use_has_three_lines_and_says_what_to_write(
    words: list[str], what: str, remedy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = complaint(capsys, *words)
    assert what in said[0]
    assert remedy in said[2]


@pytest.mark.parametrize(
    "words", [["--prot\x1b[2J\n"], ["x\x1b[2J"], ["-p", "\x1b[2J\n3"], ["--only", "\x1b\n"]]
)
def test_what_was_typed_cannot_command_the_terminal(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert "".join(complaint(capsys, *words)).isprintable()
