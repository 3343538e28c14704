"""What a verdict means and what to do about it, for the terminal: a section of docs/verdicts.md.

That file is the only text there is. It ships with the package, and what is printed is its section
with the Markdown taken off. Needs no root, no BCC and no kernel.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from tcpstuck_bpf.errors import TcpstuckError
from tcpstuck_bpf.judge.verdict import RULES, VERDICT_NAMES

FILE_NAME = "verdicts.md"
WIDEST = 100
"""Columns; longer lines are hard to read, however wide the terminal is."""
NARROWEST = 40

_FENCE = "```"
_ITEM = "- "
_INDENT = "  "
_HEADING = re.compile(r"^## (\S+)\n", re.MULTILINE)
_LABEL = re.compile(r"\*\*([A-Z][a-z ]+):?\*\*")
_DOING = ("On the server", "On the client", "In the protocol")
"""The labels of what is to be done."""
_PORT = re.compile(r"\bPORT\b")
_STRONG = re.compile(r"\*\*(.+?)\*\*", re.DOTALL)


def verdicts_text() -> str:
    """All of docs/verdicts.md, from inside the installed package or beside it in a source tree.

    Raises TcpstuckError where it is in neither place.
    """
    package = Path(__file__).resolve().parents[1]
    for candidate in (package / "docs" / FILE_NAME, package.parent / "docs" / FILE_NAME):
        if candidate.is_file():
            return candidate.read_text("utf-8")
    raise TcpstuckError(
        f"the text on verdicts ({FILE_NAME}) is missing",
        f"neither {package / 'docs'} nor {package.parent / 'docs'} has it",
        "install tcpstuck-trace again",
    )


def sections(text: str) -> Mapping[str, str]:
    """The Markdown of each verdict's section by the verdict's name, without the heading."""
    _, *parts = _HEADING.split(text)
    return dict(zip(parts[::2], parts[1::2]))


def _plain(markdown: str) -> str:
    return _STRONG.sub(r"\1", markdown).replace("`", "")


def _wrapped(text: str, width: int, following: str = "") -> list[str]:
    """Whole words only: a name that is broken cannot be copied."""
    return textwrap.wrap(
        text,
        width,
        subsequent_indent=following,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _blocks(markdown: str) -> Iterator[list[str]]:
    """Runs of lines between blank ones; a fenced block stays whole, with its fences."""
    block: list[str] = []
    fenced = False
    for line in markdown.splitlines():
        fenced ^= line.startswith(_FENCE)
        if line or fenced:
            block.append(line)
        elif block:
            yield block
            block = []
    if block:
        yield block


def _items(block: list[str]) -> Iterator[str]:
    """The items of a list, each in one line."""
    item: list[str] = []
    for line in block:
        if line.startswith(_ITEM) and item:
            yield " ".join(item)
            item = []
        item.append(line.strip())
    yield " ".join(item)


def _block_lines(block: list[str], width: int) -> Iterator[str]:
    if block[0].startswith(_FENCE):
        # Never wrapped: these are commands to be copied.
        yield from (f"{_INDENT}{line}" for line in block[1:-1])
    elif block[0].startswith(_ITEM):
        for item in _items(block):
            yield from _wrapped(_plain(item), width, " " * len(_ITEM))
    else:
        yield from _wrapped(_plain(" ".join(block)), width)


def _readable(width: int) -> int:
    return max(NARROWEST, min(width, WIDEST))


def _doing_first(blocks: Iterable[list[str]]) -> Iterator[list[str]]:
    """The blocks by which something is done, then the others; both in their order.

    A block without a label belongs to the one before it.
    """
    doing: list[list[str]] = []
    others: list[list[str]] = []
    chosen = others
    for block in blocks:
        label = _LABEL.match(block[0])
        if label is not None:
            chosen = doing if label.group(1) in _DOING else others
        chosen.append(block)
    yield from doing
    yield from others


def explanation(verdict: str, width: int, port: int | None = None) -> Iterator[str]:
    """The verdict's section as plain text, in lines for a terminal of `width` columns.

    What to do comes first. A port that is known stands in the commands in place of PORT.

    Raises KeyError where there is no such section, TcpstuckError where the file is missing.
    """
    section = sections(verdicts_text())[verdict]
    if port is not None:
        section = _PORT.sub(str(port), section)
    yield verdict
    for block in _doing_first(_blocks(section)):
        yield ""
        yield from _block_lines(block, _readable(width))


def verdict_list(width: int) -> Iterator[str]:
    """Every verdict's name and what it means, one line each where `width` allows."""
    column = 1 + max(map(len, VERDICT_NAMES)) + len(_INDENT)
    meanings = {f"{'!' if rule.stuck else ' '}{rule.name}": rule.meaning for rule in RULES}
    for name, meaning in meanings.items():
        yield from _wrapped(f"{name:{column}}{meaning}", _readable(width), " " * column)
    yield ""
    yield from _wrapped(
        "! the client is stuck. `tcpstuck-trace --explain VERDICT` says what was seen, what it "
        "proves, and what to do.",
        _readable(width),
    )
