"""ACKs that the kernel takes and shows no kprobe program: nobody is accused for sure of silence.

While a CPU is in a system call of bpf(2), the kernel runs no kprobe program in the softirqs that
interrupt it. Here one CPU goes through a table of nothing but empty buckets, and the server's
packets are steered to it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import struct
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from lab.patience import COMMAND_S, patient
from lab.scene import PORT
from lab.topology import INTERFACE
from tcpstuck_bpf.bpf_trial import RefusedError, bpf
from tests.kernel.conftest import summary_of, tracing
from tests.kernel.handmade import Client, site

pytestmark = pytest.mark.kernel

CLIENTS = 10
BUCKETS = 1 << 22
MAP_CREATE, MAP_LOOKUP_BATCH = 0, 24
MAP_TYPE_HASH = 1
NO_PREALLOC = 1
FOUND_AT_ONCE = 64
TIMEOUT_S = "10"
"""So that a slow machine has sent every ACK before the first client is judged."""


@contextlib.contextmanager
def reading_a_table(cpu: int) -> Iterator[None]:
    """A thread of that CPU reads an empty table again and again."""
    table = bpf(MAP_CREATE, struct.pack("=5I", MAP_TYPE_HASH, 4, 4, BUCKETS, NO_PREALLOC))
    room = ctypes.create_string_buffer(3 * 4 * FOUND_AT_ONCE)
    places = [ctypes.addressof(room) + 4 * FOUND_AT_ONCE * number for number in range(3)]
    reads_begun, done = threading.Event(), threading.Event()

    def read() -> None:
        os.sched_setaffinity(0, {cpu})
        while not done.is_set():
            reads_begun.set()
            attributes = struct.pack("=4Q2I2Q", 0, *places, FOUND_AT_ONCE, table, 0, 0)
            with pytest.raises(RefusedError) as refused:
                bpf(MAP_LOOKUP_BATCH, attributes)
            assert refused.value.number == errno.ENOENT

    with contextlib.ExitStack() as opened:
        opened.callback(os.close, table)
        threads = opened.enter_context(ThreadPoolExecutor(1))
        reading = threads.submit(read)
        opened.callback(done.set)
        assert reads_begun.wait(patient(COMMAND_S))
        yield
        done.set()
        reading.result(timeout=patient(COMMAND_S))


@pytest.mark.parametrize("mode", ["fentry", "kprobe"])
def test_who_seems_silent_beside_acks_that_passed_unseen_is_accused_as_possible(mode: str) -> None:
    receiving = max(os.sched_getaffinity(0))
    with (
        site(4) as where,
        tracing(("-p", str(PORT), "--all", "-t", TIMEOUT_S, "--probe-mode", mode)) as (tracer,),
    ):
        steering = f"/sys/class/net/{INTERFACE}/queues/rx-0/rps_cpus"
        in_server = ("ip", "netns", "exec", where.topology.server.name)
        steer = f"echo {1 << receiving:x} > {steering}"
        where.topology.server.command(*in_server, "sh", "-c", steer)
        clients = [Client(where) for _ in range(CLIENTS)]
        for client in clients:
            client.connect()
        with reading_a_table(receiving):
            for client in clients:
                client.send(0)
            where.watch.until(
                lambda: where.known_to_server() == {client.port for client in clients},
                "everyone to be known to the server",
            )
        received = where.topology.server.counters()["SyncookiesRecv"]
        assert received == CLIENTS
        assert tracer.await_lines(CLIENTS)
        tracer.stop()
    told = [line for line in tracer.lines if line["type"] == "verdict"]
    unseen = [line for line in told if line["verdict"] != "completed"]
    assert {line["client_port"] for line in told} == {client.port for client in clients}
    assert {(line["verdict"], line["certainty"]) for line in unseen} <= {
        ("ack-missing", "possible")
    }
    assert bool(unseen) == (mode == "kprobe")
    for line in unseen:
        assert f"the kernel counted {len(unseen)} valid ACK" in " ".join(line["evidence"])
    (row,) = (
        row for row in summary_of(tracer)["reconciliation"] if row["counter"] == "SyncookiesRecv"
    )
    assert row["agrees"] == (mode == "fentry")
    assert row["traced"] == CLIENTS - len(unseen)
