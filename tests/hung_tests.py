"""Ends pytest, and says where every thread was, if a test goes on long after its time limit.

pytest-timeout raises an exception in a test, once. What cleans up after that, such as the wait for
a thread, has no limit: pytest would hang, and nobody would learn where.
"""

from __future__ import annotations

import faulthandler
import os
from collections.abc import Iterator

import pytest

CLEAN_UP_S = 200.0
"""How long a test may clean up after it has failed or its time limit has passed."""


class HungTests:
    """A plugin of pytest. Create it in pytest_configure: then standard error is not captured."""

    def __init__(self, clean_up_s: float = CLEAN_UP_S) -> None:
        self._clean_up_s = clean_up_s
        self._stderr = os.dup(2)

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        marker = item.get_closest_marker("timeout")
        limit_s = float(marker.args[0] if marker else str(item.config.getini("timeout")))
        self._end_after(limit_s + self._clean_up_s)
        yield

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # pytest's plugin of the same module disarms it when a test fails; and pytest itself may
        # hang after the last test.
        if report.failed or report.when == "teardown":
            self._end_after(self._clean_up_s)

    def _end_after(self, limit_s: float) -> None:
        faulthandler.dump_traceback_later(limit_s, exit=True, file=self._stderr)
