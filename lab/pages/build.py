"""Writes the pages for packages: the manual page and the completions."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from lab.pages import completions
from lab.pages.manual import NAME, SECTION, manual
from tcpstuck_bpf import __version__
from tcpstuck_bpf.options import build_parser

if TYPE_CHECKING:
    from lab.guests.packages import Subparsers

REPOSITORY = Path(__file__).resolve().parents[2]
DIRECTORY = Path("build") / "pages"
"""Relative to the source root; setup.cfg uses the same path."""
MANUAL = f"{NAME}.{SECTION}"
BASH = NAME
"""bash-completion loads a file with the name of the command."""
ZSH = f"_{NAME}"
DATE_VARIABLE = "SOURCE_DATE_EPOCH"
"""Sets the date, so that a rebuild gives identical bytes (reproducible-builds.org)."""


def manual_lines() -> Iterator[str]:
    """The lines of the manual page, with the date of the build."""
    when = time.gmtime(int(os.environ.get(DATE_VARIABLE, time.time())))
    return manual(build_parser(), REPOSITORY, __version__, time.strftime("%Y-%m-%d", when))


def write_pages(directory: Path) -> list[Path]:
    """Write all pages; returns their paths. Raises OSError."""
    parser = build_parser()
    texts = {
        MANUAL: "".join(f"{line}\n" for line in manual_lines()),
        BASH: completions.bash(parser),
        ZSH: completions.zsh(parser),
    }
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (directory / name).write_text(text, encoding="ascii")
    return [directory / name for name in texts]


def _pages_command(arguments: argparse.Namespace) -> int:
    for path in write_pages(arguments.directory):
        print(path)
    return 0


def add_parser(subparsers: Subparsers) -> None:
    """Add the `pages` command."""
    parser = subparsers.add_parser("pages", help="write the manual page and the completions")
    parser.add_argument("directory", metavar="DIR", nargs="?", type=Path, default=DIRECTORY)
    parser.set_defaults(run=_pages_command)
