"""The manual page: what the parser and README.md say, all of it and nothing else."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.pages import manual
from lab.pages.build import DATE_VARIABLE, MANUAL, REPOSITORY, write_pages
from tcpstuck_bpf import __version__, errors
from tcpstuck_bpf.cli import EXIT_BROKEN_PIPE
from tcpstuck_bpf.judge.rules import VERDICT_NAMES
from tcpstuck_bpf.options import EPILOG, build_parser

FONT = re.compile(r"\\f[BIR]")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pages")
    write_pages(directory)
    return directory / MANUAL


def sections(page: Path) -> dict[str, list[str]]:
    """The lines of each section of the source, by its heading."""
    found: dict[str, list[str]] = {}
    for line in page.read_text("ascii").splitlines():
        if line.startswith(".SH "):
            found[line[4:]] = []
        elif found:
            found[[*found][-1]].append(line)
    return found


def plain(roff: str) -> str:
    text = FONT.sub("", roff).replace("\\&", "").replace("\\e", "\0")
    for name, one in {"-": "-", "(aq": "'", "(ga": "`", "(ha": "^", "(ti": "~"}.items():
        text = text.replace(f"\\{name}", one)
    return " ".join(text.replace("\0", "\\").split())


def entries(lines: list[str]) -> Iterator[tuple[str, str]]:
    """Tags of .TP, and what is said below each."""
    for part in "\n".join(lines).split(".TP\n")[1:]:
        tag, _, text = part.partition("\n")
        yield plain(tag), plain(re.split(r"^\.(?:SS|PP)", text, flags=re.MULTILINE)[0])


def test_every_option_is_in_the_page_with_its_help_and_no_other(page: Path) -> None:
    told = {
        tuple(re.findall(r"(?:^|, )(--?[a-z0-9-]+)", tag)): text
        for tag, text in entries(sections(page)["OPTIONS"])
    }
    actions = build_parser()._actions
    assert told == {tuple(one.option_strings): manual.help_of(one) for one in actions}


def test_every_option_is_in_the_synopsis_once(page: Path) -> None:
    synopsis = " ".join(map(plain, sections(page)["SYNOPSIS"]))
    named = re.findall(r"(?:(?<= )\[|\| )(--?[a-z0-9-]+)", synopsis)
    assert sorted(named) == sorted(one.option_strings[0] for one in build_parser()._actions)


def test_values_are_those_of_the_help(page: Path) -> None:
    shown = build_parser().format_help()
    tags = [tag for tag, _ in entries(sections(page)["OPTIONS"])]
    for action in build_parser()._actions:
        value = manual.value_of(action)
        if value:
            assert value in shown or "{" + value.replace("|", ",") + "}" in shown
            assert any(value in tag for tag in tags if action.option_strings[0] in tag)


def test_every_exit_status_and_verdict_is_told(page: Path) -> None:
    found = sections(page)
    statuses = {value for name, value in vars(errors).items() if name.startswith("EXIT_")}
    told = {int(tag) for tag, _ in entries(found["EXIT STATUS"])}
    assert told == statuses | {EXIT_BROKEN_PIPE}
    assert {tag for tag, _ in entries(found["VERDICTS"])} == {*VERDICT_NAMES}


def test_the_examples_are_those_of_the_help(page: Path) -> None:
    shown = [plain(line) for line in sections(page)["EXAMPLES"] if not line.startswith(".E")]
    help_text = EPILOG.partition("examples:\n")[2].partition("\n\n")[0]
    assert shown == [" ".join(line.split()) for line in help_text.splitlines()]


def test_no_limit_of_the_readme_is_left_out(page: Path) -> None:
    readme = (REPOSITORY / "README.md").read_text("utf-8")
    items = re.findall(r"^- \*\*(.+?)\*\*", manual.section_of(readme, "Limits"), re.MULTILINE)
    assert items
    told = plain(" ".join(sections(page)["LIMITS"]))
    assert [item for item in items if item not in told] == []


def test_no_markdown_is_left(page: Path) -> None:
    text = page.read_text("ascii")
    for mark in ("**", "](", "|---", "\\(ga\\(ga"):
        assert mark not in text


@pytest.mark.parametrize("word", ["\\", "'x", ".x", "a-b", "caf\xe9", "`~^"])
def test_what_roff_would_take_for_its_own_is_escaped(word: str, tmp_path: Path) -> None:
    if shutil.which("man") is None:
        pytest.skip("needs man")
    page = tmp_path / "x.8"
    source = "\n".join(["x", *manual.filled(manual.escaped(word))])
    page.write_text(f'.TH X 8 2020-01-01 "x"\n.SH NAME\nx \\- y\n.SH Z\n{source}\n', "ascii")
    shown = subprocess.run(
        ["man", "--warnings", "-E", "UTF-8", "-l", str(page)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=True,
        timeout=60,
    )
    assert shown.stderr == ""
    assert f"x {word}" in shown.stdout


def test_groff_and_mandoc_have_no_complaint(page: Path) -> None:
    commands = (("man", "--warnings", "-l", str(page)), ("mandoc", "-Tlint", "-Wall", str(page)))
    there = [command for command in commands if shutil.which(command[0])]
    assert there, "make setup installs both"
    for command in there:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        complaints = done.stdout if command[0] == "mandoc" else done.stderr
        assert (done.returncode, complaints) == (0, ""), command


def test_the_page_says_of_which_version_and_day_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(DATE_VARIABLE, "86400")
    write_pages(tmp_path)
    title = (tmp_path / MANUAL).read_text("ascii").splitlines()[0]
    assert title == f'.TH TCPSTUCK\\-TRACE 8 1970-01-02 "tcpstuck-trace {__version__}"'
