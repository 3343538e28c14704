"""Generates tcpstuck-trace(8) from its only two sources, the parser and README.md.

Debian's tools are not used, because they lose information that the parser has. argparse-manpage 1.2
(Debian 12) drops option groups and examples, and accepts no further sections. help2man reads the
printed help, and mistakes a usage of several lines for a list of options. Neither reads Markdown.
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
"""Maximum columns in the roff source; mandoc warns about longer lines."""
OPTIONS = "OPTIONS"
SEE_ALSO = ("bpf(2)", "nft(8)", "nstat(8)", "ss(8)", "tcpdump(8)", "tcp(7)")

_UNNAMED = ("options", "optional arguments")
"""argparse's title for options outside our groups; the second one before Python 3.10."""
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
    """Text with all characters escaped for roff."""
    ascii_only = "".join(one if one.isascii() else f"\\[u{ord(one):04X}]" for one in text)
    return re.sub(r"\\(?!\[u[0-9A-F]{4,6}\])|[-'`^~]", lambda m: _ESCAPES[m[0]], ascii_only)


def _bold(text: str) -> str:
    # If the text wraps, the next line keeps the font, as it should.
    return f"\\fB{escaped(text)}\\fR"


def inline(markdown: str) -> str:
    """A Markdown paragraph as one line of roff."""
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
    """Wrapped text lines; lines that roff would read as requests are protected."""
    lines = textwrap.wrap(roff, WIDEST, break_long_words=False, break_on_hyphens=False)
    yield from (f"\\&{line}" if line[0] in ".'" else line for line in lines)


def section_of(markdown: str, heading: str) -> str:
    """The text below a second-level heading. Raises ValueError if the heading is missing."""
    _, found, rest = markdown.partition(f"\n## {heading}\n")
    if not found:
        raise ValueError(f"README.md has no section {heading}")
    return rest.partition("\n## ")[0]


def table_rows(markdown: str) -> list[list[str]]:
    """The cells of a Markdown table, row by row: headings first, without the separator row."""
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
    """A table as a list: the first cell is the tag, the other cells follow with their headings."""
    (_, *headings), *rows = table_rows(markdown)
    told = [f"{one[:1].upper()}{one[1:].rstrip('?')}: " if one else "" for one in headings]
    for first, *others in rows:
        cells = ". ".join(f"{heading}{cell}" for heading, cell in zip(told, others))
        yield from _entry(inline(first), inline(cells))


def _paragraphs(markdown: str) -> Iterator[str]:
    """Paragraphs and list items; code and tables are not supported."""
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
    """A metavar with placeholders in italics and literal words in bold."""
    return "".join(
        f"\\fI{escaped(word)}\\fR"
        if word.isupper()
        else re.sub(r"[a-z][a-z-]*", lambda m: _bold(m[0]), word)
        for word in _METAVAR_WORD.findall(text)
    )


def value_of(action: argparse.Action) -> str:
    """An option's value as shown in the help, such as PORT[,PORT]; empty if it takes none."""
    if action.nargs == 0:
        return ""
    if action.metavar is not None:
        metavar = action.metavar
        return metavar if isinstance(metavar, str) else " ".join(metavar)
    return "|".join(map(str, action.choices)) if action.choices else action.dest.upper()


def _written(option: str, action: argparse.Action) -> str:
    value = value_of(action)
    if not value:
        return _bold(option)
    shown = _metavar(value)
    if action.nargs == argparse.OPTIONAL:
        # An optional value needs the =; a separate word could be another argument.
        return f"{_bold(option)}[{_bold('=')}{shown}]"
    return f"{_bold(option)} {shown}"


def help_of(action: argparse.Action) -> str:
    """An option's help, in one line."""
    return " ".join((action.help or "").replace("%%", "%").split())


def groups_of(parser: argparse.ArgumentParser) -> Iterator[tuple[str, list[argparse.Action]]]:
    """The parser's groups that have options, each with its options."""
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
    """The package's description, with a lower-case first letter."""
    config = configparser.ConfigParser()
    config.read(repository / "setup.cfg", "utf-8")
    text = config["metadata"]["description"]
    return text[0].lower() + text[1:]


def manual(
    parser: argparse.ArgumentParser, repository: Path, version: str, date: str
) -> Iterator[str]:
    """The lines of the page. Raises OSError, and ValueError if README.md lacks a section."""
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
