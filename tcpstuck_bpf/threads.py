"""Additional threads besides the tracing one. They end with the process and get no signals."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable


def start_beside(name: str, job: Callable[[], None]) -> threading.Thread:
    """Run a job in a new thread that receives no signals.

    A signal interrupts the wait for events (`app.interfaces.Source.poll`) only in the waiting
    thread.
    """
    thread = threading.Thread(target=job, name=name, daemon=True)
    # A new thread inherits the signal mask: pthread_create(3).
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        thread.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return thread
