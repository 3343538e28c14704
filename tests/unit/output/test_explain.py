"""docs/verdicts.md against the table of verdicts and the kernel; `--explain` against the file.

The file is read here by other means than the tool's: what is printed has the words of the section,
all of them and in their order, whatever the width.
"""

from __future__ import annotations

import fnmatch
import re
from pathlib import Path

import pytest

from tcpstuck_bpf.cli import main
from tcpstuck_bpf.errors import EXIT_CANNOT_TRACE, EXIT_USAGE
from tcpstuck_bpf.handshake.flow import SYNS_OF_A_REPEATING_CLIENT
from tcpstuck_bpf.judge.rules import ALL_RULES, VERDICT_NAMES, Rule
from tcpstuck_bpf.kernel.probes import PROBES
from tcpstuck_bpf.output.explain import WIDEST, explanation

TEXT = (Path(__file__).parents[3] / "docs" / "verdicts.md").read_text("utf-8")
INTRODUCTION, *PARTS = re.split(r"^(?=## )", TEXT, flags=re.MULTILINE)
SECTIONS = {part.splitlines()[0][3:]: part.partition("\n")[2] for part in PARTS}
LABELS = (
    "Client stuck",
    "Certainty",
    "Seen",
    "Proves",
    "Cannot prove",
    "On the server",
    "On the client",
    "In the protocol",
    "Check",
)
TERMINAL = 80
FUNCTIONS = {probe.function for probe in PROBES}
each_rule = pytest.mark.parametrize("rule", ALL_RULES, ids=lambda rule: rule.name)


def one_line(text: str) -> str:
    return " ".join(text.split())


def words(markdown: str) -> list[str]:
    """What is left of Markdown without fences, backquotes and bold."""
    return re.sub(r"^```$|`|\*\*", "", markdown, flags=re.MULTILINE).split()


def commands(name: str) -> list[str]:
    """The lines between the fences of a section."""
    return [
        line
        for fenced in re.findall(r"^```\n(.*?)^```$", SECTIONS[name], re.MULTILINE | re.DOTALL)
        for line in fenced.splitlines()
    ]


def labelled(name: str) -> dict[str, str]:
    """What follows each bold label of a section, in one line."""
    _, *parts = re.split(r"\*\*([A-Z][a-z ]+):?\*\*", SECTIONS[name])
    return {label: one_line(text) for label, text in zip(parts[::2], parts[1::2])}


def kernel_counters() -> set[str]:
    """The names nstat has for the counters of the kernel that runs this test."""
    names = set()
    for table in ("netstat", "snmp"):
        for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[::2]:
            group, _, columns = line.partition(":")
            names |= {f"{group}{column}" for column in columns.split()}
    return names


def test_every_verdict_has_its_section_and_nothing_else_has_one() -> None:
    assert tuple(part.splitlines()[0][3:] for part in PARTS) == VERDICT_NAMES


def test_the_table_is_the_table_of_rules() -> None:
    rows = re.findall(r"^\| `(.*)` \| (.*) \| (.*) \| (.*) \|$", INTRODUCTION, re.MULTILINE)
    assert rows == [
        (rule.name, "yes" if rule.stuck else "no", rule.certainty, rule.meaning)
        for rule in ALL_RULES
    ]


@each_rule
def test_a_section_says_what_its_rule_says(rule: Rule) -> None:
    said = labelled(rule.name)
    assert tuple(said) == LABELS
    assert all(said.values())
    assert re.split(r"\W", said["Client stuck"])[0] == ("yes" if rule.stuck else "no")
    assert re.split(r"\W", said["Certainty"])[0] == rule.certainty
    assert ("possible if" in said["Certainty"]) == bool(rule.needs)
    assert said["Proves"].startswith(rule.proves)
    assert said["Cannot prove"].startswith(rule.cannot_prove)
    assert {name for name in rule.needs if name not in said["Seen"]} == set()


@each_rule
def test_whatever_a_rule_advises_to_look_at_is_in_its_section(rule: Rule) -> None:
    named = set(re.findall(r"\w+(?:[._]\w+)+|\w+\(\)|[A-Z]{2,}|\d+ to \d+ s", rule.advice))
    assert {name for name in named if name not in one_line(SECTIONS[rule.name])} == set()


@each_rule
def test_a_verdict_can_be_checked_by_other_means(rule: Rule) -> None:
    lines = commands(rule.name)
    programs = {line.split()[0] for line in lines if not line.startswith("#")}
    assert "ss" in programs
    assert programs >= {"ss", "nstat", "tcpdump"} or not rule.stuck
    assert lines[0].startswith("# ")
    assert max(map(len, lines)) <= TERMINAL - 2


def test_the_kernel_has_the_counters_and_the_probes_the_functions_that_are_named() -> None:
    counters = set(re.findall(r"\b(?:TcpExt|Tcp)[A-Z]\w+\*?", TEXT))
    known = kernel_counters()
    assert counters
    assert {name for name in counters if not fnmatch.filter(known, name)} == set()
    functions = set(re.findall(r"`((?:cookie|tcp)_\w+)`", TEXT))
    assert functions
    assert functions <= FUNCTIONS


def test_the_number_of_syns_is_the_correlators() -> None:
    assert f"at least {SYNS_OF_A_REPEATING_CLIENT} SYNs" in SECTIONS["synack-missing"]


def test_the_text_is_fit_for_any_terminal() -> None:
    assert TEXT.isascii()
    assert max(map(len, TEXT.splitlines())) <= 100


def what_to_do_first(name: str) -> str:
    """The section with what is to be done in front; each part as it is there."""
    before, doing, after = re.split(r"(?=\*\*On the server|\*\*Check)", SECTIONS[name])
    assert doing.startswith("**On the server")
    assert after.startswith("**Check")
    return f"{doing}\n{before}\n{after}"


@pytest.mark.parametrize("name", VERDICT_NAMES)
@pytest.mark.parametrize("width", [1, 60, TERMINAL, 132, 1000])
def test_an_explanation_is_the_section_with_what_to_do_first(name: str, width: int) -> None:
    lines = list(explanation(name, width))
    assert " ".join(lines).split() == [name, *words(what_to_do_first(name))]
    assert lines[2].startswith("On the server:")
    verbatim = commands(name)
    assert [line[2:] for line in lines if line[2:] in verbatim] == verbatim
    text = [line for line in lines if line[2:] not in verbatim]
    assert max(map(len, text)) <= max(40, min(width, WIDEST))
    assert all(line == line.rstrip() for line in lines)


@pytest.mark.parametrize("name", VERDICT_NAMES)
@pytest.mark.parametrize("width", [60, TERMINAL])
def test_no_line_ends_before_it_has_to(name: str, width: int) -> None:
    lines = list(explanation(name, width))
    verbatim = commands(name)
    for line, following in zip(lines, lines[1:]):
        goes_on = line and following and not following.startswith("- ")
        if goes_on and following[2:] not in verbatim:
            assert len(f"{line} {following.split()[0]}") > width


@pytest.mark.parametrize("name", VERDICT_NAMES)
def test_the_command_prints_the_explanation(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(TERMINAL))
    assert main(["--explain", name]) == 0
    assert capsys.readouterr().out.splitlines() == list(explanation(name, TERMINAL))


def test_known_ports_are_filled_in(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(TERMINAL))
    assert main(["--explain", "accept-queue-full", "-p", "3306"]) == 0
    shown = capsys.readouterr().out
    assert "ss -ltn 'sport = :3306'" in shown
    assert re.search(r"\bPORT\b", shown) is None
    assert "SO_REUSEPORT" in shown or "SO_REUSEPORT" not in SECTIONS["accept-queue-full"]
    assert shown == "".join(
        f"{re.sub(chr(92) + 'bPORT' + chr(92) + 'b', '3306', line)}\n"
        for line in explanation("accept-queue-full", TERMINAL)
    )


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["accept-queue-full", "-p", "3306,3311"], "one port"),
        (["-p", "3306"], "a verdict"),
        (["accept-queue-full", "-4"], "-4"),
    ],
)
def test_what_cannot_be_filled_in_is_refused(
    words: list[str], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--explain", *words]) == EXIT_USAGE
    assert why in capsys.readouterr().err


def test_without_a_verdict_there_is_a_line_for_each(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(TERMINAL))
    assert main(["--explain"]) == 0
    listed = capsys.readouterr().out.split("\n\n")[0].splitlines()
    assert tuple(line[1:].split()[0] for line in listed) == VERDICT_NAMES
    assert {line[1:].split()[0] for line in listed if line[0] == "!"} == {
        rule.name for rule in ALL_RULES if rule.stuck
    }
    assert max(map(len, listed)) <= TERMINAL
    for rule, line in zip(ALL_RULES, listed):
        assert line.endswith(rule.meaning)


def test_a_missing_text_is_said_with_its_remedy(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tcpstuck_bpf.output.explain.FILE_NAME", "no-such-file")
    assert main(["--explain", "ack-missing"]) == EXIT_CANNOT_TRACE
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 3
    assert "install tcpstuck-trace again" in err
