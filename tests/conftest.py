"""For every test: neither a slow machine nor the size of a terminal is a failure."""

from __future__ import annotations

import contextlib
import os

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
