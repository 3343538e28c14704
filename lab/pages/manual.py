"""The page tcpstuck-trace(8), from the parser and README.md, which are the only texts there are.

Own code, because what Debian has for this loses what the parser knows. argparse-manpage 1.2 (Debian
12) drops the groups of options and the examples, and takes no further sections; help2man reads the
printed help, and takes a usage of several lines for a list of options. Neither reads Markdown.
"""

from __future__ import annotations

import argparse
import configparser
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

NAME = "tcpstuck-trace"
SECTION = 8
WIDEST = 78
"""Columns of the source; longer lines are bad style (mandoc)."""
OPTIONS = "OPTIONS"
SEE_ALSO = ("bpf(2)", "nft(8)", "nstat(8)", "ss(8)", "tcpdump(8)", "tcp(7)")

_UNNAMED = ("options", "optional arguments")
"""What argparse calls the options that are in no group of ours; before Python 3.10 the latter."""
_ESCAPES = {
    "\\": "\\e",
    "-": "\\-",
    "'": "\\(aq",
    "`": "\\(ga",
    "^": "\\(ha",
    "~": "\\(ti",
}
_INLINE = re.compile(
    r"`(?P<code>[^`]+)`|\*\*(?P<strong>.+?)\*\*|\*(?P<stress>[^*]+)\*|\[(?P<link>[^]]+)\]\((?P<target>[^)]+)\)"
)
_TITLE = re.compile(r"\*\*[^*]+\.\*\*")
_METAVAR_WORD = re.compile(r"[A-Z]+|[^A-Z]+")


def escaped(text: str) -> str:
    """Text as roff takes it, whatever it holds."""
    ascii_only = "".join(one if one.isascii() else f"\\[u{ord(one):04X}]" for one in text)
    return re.sub(r"\\(?!\[u[0-9A-F]{4,6}\])|[-'`^~]", lambda m: _ESCAPES[m[0]], ascii_only)


def _bold(text: str) -> str:
    # A break between words would leave the next line in the same font, which is right.
    return f"\\fB{escaped(text)}\\fR"


def inline(markdown: str) -> str:
    """A paragraph's Markdown as roff, in one line."""
    found, at = [], 0
    markdown = " ".join(markdown.replace("\\|", "|").split())
    for match in _INLINE.finditer(markdown):
        found.append(escaped(markdown[at : match.start()]))
        if match["link"] is not None:
            found.append(inline(match["link"]))
        elif match["strong"] is not None:
            found.append(f"\\fB{inline(match['strong'])}\\fR")
        elif match["stress"] is not None:
            found.append(f"\\fI{inline(match['stress'])}\\fR")
        else:
            found.append(_bold(match["code"]))
        at = match.end()
    return "".join([*found, escaped(markdown[at:])])


def filled(roff: str) -> Iterator[str]:
    """Text lines of the source, none of them taken for a request."""
    lines = textwrap.wrap(roff, WIDEST, break_long_words=False, break_on_hyphens=False)
    yield from (f"\\&{line}" if line[0] in ".'" else line for line in lines)


def section_of(markdown: str, heading: str) -> str:
    """What is below a heading of the second level. Raises ValueError where there is none."""
    _, found, rest = markdown.partition(f"\n## {heading}\n")
    if not found:
        raise ValueError(f"README.md has no section {heading}")
    return rest.partition("\n## ")[0]


def table_rows(markdown: str) -> list[list[str]]:
    """The rows of the table in a text, as cells, the headings first and without the rule."""
    return [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in markdown.splitlines()
        if line.startswith("|") and not re.fullmatch(r"\|[-| :]*-[-| :]*\|", line)
    ]


def _entry(tag: str, text: str) -> Iterator[str]:
    yield ".TP"
    yield tag
    yield from filled(text)


def _table(markdown: str) -> Iterator[str]:
    """A list instead of a table: the first cell above the others, which keep their headings."""
    (_, *headings), *rows = table_rows(markdown)
    told = [f"{one[:1].upper()}{one[1:].rstrip('?')}: " if one else "" for one in headings]
    for first, *others in rows:
        cells = ". ".join(f"{heading}{cell}" for heading, cell in zip(told, others))
        yield from _entry(inline(first), inline(cells))


def _paragraphs(markdown: str) -> Iterator[str]:
    """Paragraphs, and the items of lists; no code and no table."""
    for number, block in enumerate(re.split(r"\n\s*\n", markdown.strip())):
        items = re.split(r"^- ", block, flags=re.MULTILINE)
        if items[0].strip():
            if number:
                yield ".PP"
            yield from filled(inline(items[0]))
        for item in items[1:]:
            title = _TITLE.match(item)
            if title is None:
                yield ".IP \\(bu 2"
                yield from filled(inline(item))
            else:
                yield from _entry(inline(title[0]), inline(item[title.end() :]))


def _metavar(text: str) -> str:
    """What stands for a value in italics, what is written as it is in bold."""
    return "".join(
        f"\\fI{escaped(word)}\\fR"
        if word.isupper()
        else re.sub(r"[a-z][a-z-]*", lambda m: _bold(m[0]), word)
        for word in _METAVAR_WORD.findall(text)
    )


def value_of(action: argparse.Action) -> str:
    """The value of an option as the help has it: PORT[,PORT]; empty for none."""
    if action.nargs == 0:
        return ""
    if isinstance(action.metavar, str):
        return action.metavar
    return "|".join(map(str, action.choices)) if action.choices else action.dest.upper()


def _written(option: str, action: argparse.Action) -> str:
    value = value_of(action)
    if not value:
        return _bold(option)
    shown = _metavar(value)
    if action.nargs == argparse.OPTIONAL:
        # With = alone: a word of its own could be meant as something else.
        return f"{_bold(option)}[{_bold('=')}{shown}]"
    return f"{_bold(option)} {shown}"


def help_of(action: argparse.Action) -> str:
    """The help of an option, in one line."""
    return " ".join((action.help or "").replace("%%", "%").split())


def groups_of(parser: argparse.ArgumentParser) -> Iterator[tuple[str, list[argparse.Action]]]:
    """The groups of the parser that have options, with these."""
    for group in parser._action_groups:
        if group._group_actions:
            yield group.title or "", group._group_actions


def _synopsis(parser: argparse.ArgumentParser) -> Iterator[str]:
    beside = {
        id(action): group._group_actions
        for group in parser._mutually_exclusive_groups
        for action in group._group_actions
    }
    yield f".SY {escaped(NAME)}"
    for action in parser._actions:
        together = beside.get(id(action), [action])
        if action is together[0]:
            ways = " | ".join(_written(one.option_strings[0], one) for one in together)
            yield f"[{ways}]"
    yield ".YS"


def _options(parser: argparse.ArgumentParser) -> Iterator[str]:
    for title, actions in groups_of(parser):
        if title not in _UNNAMED:
            yield f".SS {escaped(title[:1].upper() + title[1:])}"
        for action in actions:
            tag = ", ".join(_written(option, action) for option in action.option_strings)
            yield from _entry(tag, escaped(help_of(action)))


def _examples(parser: argparse.ArgumentParser) -> Iterator[str]:
    text = (parser.epilog or "").partition("examples:\n")[2].partition("\n\n")[0]
    yield ".EX"
    yield from (escaped(line.strip()) for line in text.splitlines())
    yield ".EE"


def _summary(repository: Path) -> str:
    """What the package's description says, as part of a sentence."""
    config = configparser.ConfigParser()
    config.read(repository / "setup.cfg", "utf-8")
    text = config["metadata"]["description"]
    return text[0].lower() + text[1:]


def manual(
    parser: argparse.ArgumentParser, repository: Path, version: str, date: str
) -> Iterator[str]:
    """The lines of the page. Raises ValueError where README.md lacks a section, and OSError."""
    readme = (repository / "README.md").read_text("utf-8")
    yield f'.TH {escaped(NAME).upper()} {SECTION} {date} "{NAME} {version}"'
    yield ".SH NAME"
    yield from filled(f"{escaped(NAME)} \\- {escaped(_summary(repository))}")
    yield ".SH SYNOPSIS"
    yield from _synopsis(parser)
    yield ".SH DESCRIPTION"
    yield from _paragraphs(readme.partition("\n")[2].partition("```")[0])
    yield f".SH {OPTIONS}"
    yield from _options(parser)
    for heading in ("Exit status", "Verdicts"):
        yield f".SH {heading.upper()}"
        yield from _table(section_of(readme, heading))
    yield ".SH FILES"
    yield from _table(section_of(readme, "Files"))
    yield ".SH EXAMPLES"
    yield from _examples(parser)
    yield ".SH LIMITS"
    yield from _paragraphs(section_of(readme, "Limits"))
    yield ".SH SEE ALSO"
    yield from _see_also()


def _see_also() -> Iterator[str]:
    for position, page in enumerate(SEE_ALSO):
        name, _, section = page.rstrip(")").partition("(")
        comma = "," if position + 1 < len(SEE_ALSO) else ""
        yield f".BR {escaped(name)} ({section}){comma}"
