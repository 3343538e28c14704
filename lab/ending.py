"""Lets SIGTERM end a lab program through its clean-up."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType


@contextlib.contextmanager
def sigterm_ends_program() -> Iterator[None]:
    """Let SIGTERM raise SystemExit in the block, unless SIGTERM already has a handler.

    Does nothing outside the main thread.
    """
    owner = os.getpid()

    def end(number: int, _frame: FrameType | None) -> None:
        # pyroute2 forks short-lived helpers and ends them with SIGTERM; a forked copy of this
        # program must not run the clean-up.
        if os.getpid() != owner:
            os._exit(128 + number)
        raise SystemExit(128 + number)

    ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    )
    if not ours:
        yield
        return
    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
