"""For every test: a slow machine is not a failure."""

from __future__ import annotations

import contextlib

# The kernel tests also run where Hypothesis is not installed.
with contextlib.suppress(ImportError):
    from hypothesis import settings

    # pytest-timeout ends what hangs; a deadline of 200 ms for each example, Hypothesis's default,
    # fails on a machine that is busy.
    settings.register_profile("patient", deadline=None)
    settings.load_profile("patient")
