"""For every test of the lab: the processes that it starts are not measured."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module", autouse=True)
def _processes_are_not_measured() -> Iterator[None]:
    """A measured run has all processes measured that inherit this variable.

    Coverage is of the tool. The lab's tests run pytest itself some forty times, and a measured one
    takes much longer to import the lab.
    """
    with pytest.MonkeyPatch.context() as environment:
        environment.delenv("COVERAGE_PROCESS_CONFIG", raising=False)
        yield
