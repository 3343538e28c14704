"""Threads beside the one that traces: they end with the process, and take no signal from it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable


def start_beside(name: str, job: Callable[[], None]) -> threading.Thread:
    """Run it in a thread of its own, to which no signal is delivered.

    A signal ends the waiting for events (`app.interfaces.Source.poll`) only in the thread that
    waits.
    """
    thread = threading.Thread(target=job, name=name, daemon=True)
    # Inherited from the moment it begins: pthread_create(3).
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        thread.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return thread
