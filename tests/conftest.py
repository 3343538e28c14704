"""For every test: the caller's terminal, a slow machine and earlier tests make no difference."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator

import pytest

# A caller may export them.
for size in ("COLUMNS", "LINES"):
    os.environ.pop(size, None)

# The kernel tests also run where Hypothesis is not installed.
with contextlib.suppress(ImportError):
    from hypothesis import settings

    # pytest-timeout ends what hangs; a deadline of 200 ms for each example, Hypothesis's default,
    # fails on a machine that is busy.
    settings.register_profile("patient", deadline=None)
    settings.load_profile("patient")


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    """No test leaves the tool's signal handlers, which raise, to the next one.

    A process that ignores SIGHUP, as under nohup, passes that on to the programs that it starts.
    """
    before = {one: signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
