"""Every page of docs/exercises: what it says is typed, and the terminals show what it says."""

from __future__ import annotations

from pathlib import Path

import pytest

from lab.exercises.hosts import Hosts
from lab.exercises.play import pages, play
from tests.tmux import needs_tmux

pytestmark = [pytest.mark.kernel, needs_tmux]


QUICK = "06"
"""The page that is played where there is no time for all: each takes one to three minutes."""


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(one, id=one.stem, marks=() if one.name.startswith(QUICK) else pytest.mark.slow)
        for one in pages()
    ],
)
def test_what_the_page_promises_is_what_happens(page: Path) -> None:
    with Hosts() as hosts:
        play(page, hosts)
