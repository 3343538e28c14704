"""`--explain`: prints a verdict's section of docs/verdicts.md on the terminal.

That file is the only source of the text. It ships with the package, and its section is printed
without the Markdown. Needs no root, no BCC and no kernel.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from tcpstuck_bpf.errors import TcpstuckError
from tcpstuck_bpf.judge.rules import ALL_RULES, VERDICT_NAMES

FILE_NAME = "verdicts.md"
WIDEST = 100
"""Largest width in columns; longer lines are hard to read."""
NARROWEST = 40

_FENCE = "```"
_ITEM = "- "
_INDENT = "  "
_HEADING = re.compile(r"^## (\S+)\n", re.MULTILINE)
_LABEL = re.compile(r"\*\*([A-Z][a-z ]+):?\*\*")
_DOING = ("On the server", "On the client", "In the protocol")
"""Labels of the blocks that say what to do."""
_PORT = re.compile(r"\bPORT\b")
_STRONG = re.compile(r"\*\*(.+?)\*\*", re.DOTALL)


def verdicts_text() -> str:
    """The text of docs/verdicts.md, from the installed package or from the source tree.

    Raises TcpstuckError if the file is in neither place.
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
    """Each verdict's section in Markdown without the heading, by the verdict's name."""
    _, *parts = _HEADING.split(text)
    return dict(zip(parts[::2], parts[1::2]))


def _plain(markdown: str) -> str:
    return _STRONG.sub(r"\1", markdown).replace("`", "")


def _wrapped(text: str, width: int, following: str = "") -> list[str]:
    """Wrap text at whole words, because a broken name could not be copied."""
    return textwrap.wrap(
        text,
        width,
        subsequent_indent=following,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _blocks(markdown: str) -> Iterator[list[str]]:
    """Blocks of lines between blank lines; a fenced block stays whole and keeps its fences."""
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
    """The items of a list, each joined to one line."""
    item: list[str] = []
    for line in block:
        if line.startswith(_ITEM) and item:
            yield " ".join(item)
            item = []
        item.append(line.strip())
    yield " ".join(item)


def _block_lines(block: list[str], width: int) -> Iterator[str]:
    if block[0].startswith(_FENCE):
        # Commands are never wrapped, so that they can be copied.
        yield from (f"{_INDENT}{line}" for line in block[1:-1])
    elif block[0].startswith(_ITEM):
        for item in _items(block):
            yield from _wrapped(_plain(item), width, " " * len(_ITEM))
    else:
        yield from _wrapped(_plain(" ".join(block)), width)


def _readable(width: int) -> int:
    return max(NARROWEST, min(width, WIDEST))


def _doing_first(blocks: Iterable[list[str]]) -> Iterator[list[str]]:
    """The blocks that say what to do, then the others; each part keeps its order.

    A block without a label belongs to the block before it.
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
    """A verdict's section as plain text, in lines for a terminal of `width` columns.

    What to do comes first. A known port replaces PORT in the commands.

    Raises KeyError if there is no such section, TcpstuckError if the file is missing.
    """
    section = sections(verdicts_text())[verdict]
    if port is not None:
        section = _PORT.sub(str(port), section)
    yield verdict
    for block in _doing_first(_blocks(section)):
        yield ""
        yield from _block_lines(block, _readable(width))


def verdict_list(width: int) -> Iterator[str]:
    """Every verdict's name and meaning, one line each if `width` allows."""
    column = 1 + max(map(len, VERDICT_NAMES)) + len(_INDENT)
    meanings = {f"{'!' if rule.stuck else ' '}{rule.name}": rule.meaning for rule in ALL_RULES}
    for name, meaning in meanings.items():
        yield from _wrapped(f"{name:{column}}{meaning}", _readable(width), " " * column)
    yield ""
    yield from _wrapped(
        "! the client is stuck. `tcpstuck-trace --explain VERDICT` says what was seen, what it "
        "proves, and what to do.",
        _readable(width),
    )
