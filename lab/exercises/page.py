"""Reads a page of docs/exercises: what to type in which terminal, and what it shows then.

Pure. A page has blocks of this kind:

    ```console
    server# ss -ltn
    State  Recv-Q Send-Q
    ...
    client# hang server
    ```

A line that begins with a terminal's name and `# ` is typed there; `server ^C` is Ctrl-C. The
lines after it are what the terminal shows then, and nothing else; `...` stands for any lines. In a
block of "```console running" the last command goes on; every other command ends before the next.
After `server shows` come lines that a command which goes on has shown by now, among others.

Before a block, `<!-- varies: PATTERN -->` names what is not the same in each run: a regular
expression, whose matches in the page may be replaced by other matches. Spaces may be more or fewer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from lab.errors import LabError

INTERRUPT = "^C"
LOOK = "shows"
"""Nothing is typed; the lines are waited for."""
ANY_LINES = "..."
_FENCE = re.compile(r"```console( running)?$")
_TYPED = re.compile(
    r"(?P<terminal>(?:server|client)\d?)(?:# ?(?P<command>.*)| (?P<key>\^C|shows))$"
)
_VARIES = re.compile(r"<!-- varies: (.+) -->$")


@dataclass
class Step:
    """A command, INTERRUPT or LOOK, and what the terminal shows then."""

    terminal: str
    typed: str
    line: int
    """Line number in the page."""
    varies: str | None = None
    shown: list[str] = field(default_factory=list)
    goes_on: bool = False
    """The command is still running when the next step begins."""

    def is_shown_by(self, output: str) -> bool:
        """Whether this is what the page promises; of a command that goes on, its beginning."""
        find = self._pattern.search if self.typed == LOOK else self._pattern.match
        return find(output) is not None

    @property
    def _pattern(self) -> re.Pattern[str]:
        parts = [
            r"(?:[^\n]*\n)*" if line == ANY_LINES else f"{self._of(line)}[ ]*\n"
            for line in self.shown
        ]
        begin, end = ("^", "") if self.typed == LOOK else ("", "" if self.goes_on else r"\Z")
        return re.compile(begin + "".join(parts) + end, re.MULTILINE)

    def _of(self, line: str) -> str:
        words = re.split(f"({self.varies})", line) if self.varies else [line]
        pieces = (
            f"(?:{self.varies})" if number % 2 else self._literally(text)
            for number, text in enumerate(words)
        )
        return "".join(pieces)

    def _literally(self, text: str) -> str:
        between = " +" if self.varies else re.escape(" ")
        return between.join(map(re.escape, re.split(" +" if self.varies else " ", text)))


def read_page(text: str) -> list[Step]:
    """The steps of a page. Raises LabError for a block that cannot be read."""
    return list(_steps(text))


def _steps(text: str) -> Iterator[Step]:
    varies: str | None = None
    steps: list[Step] | None = None
    goes_on = False
    for number, line in enumerate(text.splitlines(), 1):
        if steps is None:
            if (named := _VARIES.match(line)) is not None:
                varies = _pattern(named[1], number)
            elif (fence := _FENCE.match(line)) is not None:
                steps, goes_on = [], fence[1] is not None
        elif line == "```":
            if steps:
                steps[-1].goes_on |= goes_on
            yield from steps
            varies, steps = None, None
        elif (typed := _TYPED.match(line)) is not None:
            command = typed["key"] or typed["command"]
            looks = command == LOOK and typed["key"] is not None
            steps.append(Step(typed["terminal"], command, number, varies, goes_on=looks))
        elif steps:
            steps[-1].shown.append(line.rstrip())
        else:
            raise _unreadable(number, "the block begins with output, not with a command")
    if steps is not None:
        raise _unreadable(len(text.splitlines()), "the last block has no end")


def _pattern(text: str, number: int) -> str:
    try:
        groups = re.compile(text).groups
    except re.error as error:
        raise _unreadable(number, str(error)) from error
    if groups:
        raise _unreadable(number, "groups in a pattern must be (?: )")
    return text


def _unreadable(line: int, why: str) -> LabError:
    return LabError(f"line {line} of the page cannot be read", why, "see lab/exercises/page.py")
