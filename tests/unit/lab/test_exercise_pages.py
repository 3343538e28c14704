"""Reading an exercise's page, and what counts as being what it promises."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lab.errors import LabError
from lab.exercises import play
from lab.exercises.page import INTERRUPT, LOOK, Step, read_page
from lab.exercises.play import PAGES, pages


def page(block: str, *, opening: str = "```console", before: str = "") -> str:
    return f"# A page\n\nserver# not typed\n{before}\n{opening}\n{block}```\n\ntext\n"


def only(block: str, *, opening: str = "```console", before: str = "") -> Step:
    (step,) = read_page(page(block, opening=opening, before=before))
    return step


def test_what_is_typed_where_and_what_it_shows() -> None:
    text = page("server# ls\nfile one\nfile two\nclient2# true\nclient ^C\nbye\nserver shows\nup\n")
    steps = [(step.terminal, step.typed, step.shown) for step in read_page(text)]
    assert steps == [
        ("server", "ls", ["file one", "file two"]),
        ("client2", "true", []),
        ("client", INTERRUPT, ["bye"]),
        ("server", LOOK, ["up"]),
    ]


def test_the_line_is_where_a_person_finds_it() -> None:
    text = page("server# true\nclient# false\n")
    for step in read_page(text):
        assert step.typed in text.splitlines()[step.line - 1]


def test_only_the_last_command_of_a_running_block_goes_on() -> None:
    steps = read_page(page("server# a\nserver# b\n", opening="```console running"))
    assert [step.goes_on for step in steps] == [False, True]
    assert not only("server# a\n").goes_on


@pytest.mark.parametrize(
    ("shown", "output"),
    [("^Cclient#\n", ""), ("^C3 wait\nclient#\n", "^C3 wait\n"), ("^C\nclient#\n", "")],
)
def test_after_ctrl_c_the_prompt_may_stand_beside_the_key(shown: str, output: str) -> None:
    """A command that ends without a word leaves the cursor behind the ^C."""
    assert play._split(shown, Step("client", INTERRUPT, 1)) == (output, True)


@pytest.mark.parametrize(
    ("promised", "output", "kept"),
    [
        ("", "", True),
        ("", "a\n", False),
        ("a\n", "a\n", True),
        ("a\n", "", False),
        ("a\n", "a\nb\n", False),
        ("a\n", "b\na\n", False),
        ("a.c\n", "abc\n", False),
        ("...\n", "", True),
        ("...\n", "a\nb\n", True),
        ("a\n...\nd\n", "a\nd\n", True),
        ("a\n...\nd\n", "a\nb\nc\nd\n", True),
        ("a\n...\nd\n", "a\nb\nc\n", False),
        ("a\n...\n", "b\na\n", False),
        ("a  b\n", "a b\n", False),
    ],
)
def test_the_output_is_what_the_page_promises(promised: str, output: str, kept: bool) -> None:
    assert only(f"server# x\n{promised}").is_shown_by(output) == kept


def test_of_a_command_that_goes_on_the_beginning_is_compared() -> None:
    step = only("server# x\na\n", opening="```console running")
    assert step.is_shown_by("a\nb\n")
    assert not step.is_shown_by("ab\n")
    assert not step.is_shown_by("b\na\n")


def test_lines_that_a_running_command_has_shown_are_found_anywhere() -> None:
    step = only("server shows\nb\n...\nd\n")
    assert step.is_shown_by("a\nb\nc\nd\ne\n")
    assert not step.is_shown_by("d\nb\n")
    assert not step.is_shown_by("ab\nd\n")


def test_what_varies_may_be_another_and_nothing_else_may() -> None:
    step = only("server# x\nport  4711 of 10.0.0.1\n", before="<!-- varies: \\b\\d{4,5}\\b -->\n")
    assert step.is_shown_by("port  4711 of 10.0.0.1\n")
    assert step.is_shown_by("port 12345 of 10.0.0.1\n")
    assert not step.is_shown_by("port 12345 of 10.0.0.2\n")
    assert not step.is_shown_by("port x of 10.0.0.1\n")


def test_what_varies_is_said_of_one_block() -> None:
    first, second = read_page(
        page("server# x\n1\n", before="<!-- varies: \\d -->\n") + page("server# x\n1\n")
    )
    assert first.is_shown_by("2\n")
    assert not second.is_shown_by("2\n")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (page("output\n"), "begins with output"),
        ("```console\nserver# x\n", "has no end"),
        (page("server# x\n", before="<!-- varies: ( -->\n"), "missing \\)"),
        (page("server# x\n", before="<!-- varies: (a) -->\n"), "groups"),
    ],
)
def test_a_page_that_cannot_be_read_is_refused(text: str, why: str) -> None:
    with pytest.raises(LabError, match=why):
        read_page(text)


@pytest.mark.parametrize("file", pages(), ids=lambda page: page.stem)
def test_each_page_can_be_read_and_is_in_the_list(file: Path) -> None:
    text = file.read_text()
    assert [step.typed for step in read_page(text)]
    number, _, _ = file.name.partition("-")
    title = re.match(r"# (\d+)\. (.+)\n", text)
    assert title is not None
    assert int(title[1]) == int(number)
    index = (file.parent / "README.md").read_text()
    assert f"[{title[2]}]({file.name})" in index


def test_the_list_has_no_page_that_is_not_there() -> None:
    index = (PAGES / "README.md").read_text()
    linked = re.findall(r"\]\((\d\d-[^)]+)\)", index)
    assert linked == [page.name for page in pages()]
