"""A flood of repeated SYNs: the tool stays small, and ends when it is asked to."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lab.patience import COMMAND_S, patient
from lab.scene import PORT
from lab.syns import Syn, make_syns, repeat_until, send_in_bursts
from lab.topology import SILENT_SOURCES
from lab.tracer import READY_PLACEHOLDER, Tracer
from tests.kernel.conftest import TOOL, summary_of
from tests.kernel.handmade import Site, site

pytestmark = pytest.mark.kernel

CLIENTS = 500
ENDS_WITHIN_S = 2.0
"""More than where nothing comes, by which the machine's own speed is left out."""
GROWTH_KIB = 4096
"""Of the process, by any number of SYNs of the same clients."""


def resident_kib(tracer: Tracer) -> int:
    """VmRSS (proc_pid_status(5))."""
    status = Path(f"/proc/{tracer.pid}/status").read_text("ascii")
    (line,) = (line for line in status.splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1])


class Flood:
    """Sends the same SYNs again and again, and says how many it has sent."""

    def __init__(self) -> None:
        self.sent = 0
        self._more = threading.Condition()
        self._over = threading.Event()

    @contextlib.contextmanager
    def of(self, where: Site, syns: list[Syn]) -> Iterator[None]:
        sender = threading.Thread(
            target=repeat_until,
            args=(where.topology.client, syns, self._over.is_set, self._note),
        )
        sender.start()
        try:
            yield
        finally:
            self._over.set()
            sender.join(patient(COMMAND_S))

    def _note(self, number: int) -> None:
        with self._more:
            self.sent += number
            self._more.notify_all()

    def await_sent(self, number: int) -> None:
        with self._more:
            assert self._more.wait_for(lambda: self.sent >= number, patient(COMMAND_S))


def seconds_of(stop: Callable[[], None]) -> float:
    begun = time.monotonic()
    stop()
    return time.monotonic() - begun


@pytest.mark.parametrize("mode", ["fentry", "kprobe"])
def test_a_flood_of_repeated_syns_fills_nothing_and_ends_with_the_summary(
    mode: str, record_property: Callable[[str, object], None]
) -> None:
    command = [*TOOL, "--probe-mode", mode, "--ready-file", READY_PLACEHOLDER]
    with Tracer(command) as idle:
        idle.start()
        idle_s = seconds_of(idle.stop)
    with site(4) as where, Tracer(command) as tracer:
        tracer.start()
        syns = list(make_syns(SILENT_SOURCES[4], where.server_ip, PORT, CLIENTS))
        send_in_bursts(where.topology.client, where.watch, syns)
        flood = Flood()
        with flood.of(where, syns):
            flood.await_sent(5 * CLIENTS)
            before_kib = resident_kib(tracer)
            flood.await_sent(20 * CLIENTS)
            after_kib = resident_kib(tracer)
            took_s = seconds_of(tracer.stop)
    record_property("ended_after_s", round(took_s, 2))
    record_property("idle_s", round(idle_s, 2))
    record_property("resident_kib", (before_kib, after_kib))
    assert after_kib - before_kib < GROWTH_KIB
    assert took_s < idle_s + patient(ENDS_WITHIN_S)
    summary = summary_of(tracer)
    assert summary["lost_events"] == 0
    (cookies,) = (
        row
        for row in summary["reconciliation"]
        if row["counter"] == "SyncookiesSent" and row["netns"] == where.netns
    )
    assert cookies["agrees"], cookies
    assert cookies["traced"] >= 20 * CLIENTS
