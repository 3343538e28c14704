"""For every test of the client's side: signals do what they do by default."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module", autouse=True)
def signals() -> Iterator[None]:
    """The default handlers, whatever tests before these ran the tool in this process.

    A process that ignores SIGHUP, as under nohup, passes that on to the programs that it starts.
    pyroute2 ends its forked helpers with SIGTERM. A handler that raises there would run our
    clean-up in the copy, and remove the namespaces of this process.
    """
    taken = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = {one: signal.getsignal(one) for one in taken}
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for one, handler in before.items():
        signal.signal(one, handler)
