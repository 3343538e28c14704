"""ACKs that the kernel takes and shows no kprobe program: nobody is accused for sure of silence.

While a CPU is in a system call of bpf(2), the kernel runs no kprobe program in the softirqs that
interrupt it. Here one CPU goes through a table of nothing but empty buckets, and the server's
packets are steered to it, from another one. Each ACK is on its own: those that come while no read
is under way, or that ksoftirqd takes between two, are seen.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import struct
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from lab.network.topology import INTERFACE
from lab.patience import COMMAND_S, patient
from lab.scenarios.scene import PORT
from tcpstuck_bpf.host.bpf_syscall import RefusedError, bpf
from tests.kernel.conftest import summary_of, tracing
from tests.kernel.handmade import Client, Site, site

pytestmark = pytest.mark.kernel

CLIENTS = 20
BUCKETS = 1 << 22
MAP_CREATE, MAP_LOOKUP_BATCH = 0, 24
MAP_TYPE_HASH = 1
NO_PREALLOC = 1
FOUND_AT_ONCE = 64


@contextlib.contextmanager
def reading_a_table(cpu: int) -> Iterator[None]:
    """A thread of that CPU reads an empty table again and again; the caller keeps off that CPU.

    A packet sent from that CPU to itself needs no interrupt: it is received outside the read.
    """
    allowed = os.sched_getaffinity(0)
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
        opened.callback(os.sched_setaffinity, 0, allowed)
        os.sched_setaffinity(0, allowed - {cpu})
        yield
        done.set()
        reading.result(timeout=patient(COMMAND_S))


def knows(where: Site, connections: int) -> bool:
    """Whether the server knows so many; without the time a start of `ss` takes."""
    return where.topology.server.count_known(PORT) == connections


@pytest.mark.parametrize("mode", ["fentry", "kprobe"])
def test_who_seems_silent_beside_acks_that_passed_unseen_is_accused_as_possible(mode: str) -> None:
    receiving = max(os.sched_getaffinity(0))
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("it takes two CPUs: one that reads, and one that sends")
    with (
        site(4) as where,
        tracing(("-p", str(PORT), "--all", "--probe-mode", mode)) as (tracer,),
    ):
        steering = f"/sys/class/net/{INTERFACE}/queues/rx-0/rps_cpus"
        in_server = ("ip", "netns", "exec", where.topology.server.name)
        steer = f"echo {1 << receiving:x} > {steering}"
        where.topology.server.command(*in_server, "sh", "-c", steer)
        # However long the clients take, nobody is judged before each has sent its ACK.
        tracer.pause()
        clients = [Client(where) for _ in range(CLIENTS)]
        for client in clients:
            client.connect()
        with reading_a_table(receiving):
            for known, client in enumerate(clients, 1):
                client.send(0)
                where.watch.until(partial(knows, where, known), f"{known} known to the server")
        received = where.topology.server.counters()["SyncookiesRecv"]
        assert received == CLIENTS
        tracer.resume()
        assert tracer.await_lines(CLIENTS)
        tracer.stop()
    told = [line for line in tracer.lines if line["type"] == "verdict"]
    unseen = [line for line in told if line["verdict"] != "completed"]
    assert {line["client_port"] for line in told} == {client.port for client in clients}
    assert {(line["verdict"], line["certainty"]) for line in unseen} <= {
        ("ack-missing", "possible")
    }
    assert bool(unseen) == (mode == "kprobe")
    counted = [
        int(number)
        for line in unseen
        for number in re.findall(
            r"the kernel counted (\d+) valid cookie ACK", " ".join(line["evidence"])
        )
    ]
    assert len(counted) == len(unseen)
    assert max(counted, default=0) == len(unseen)
    (row,) = (
        row for row in summary_of(tracer)["reconciliation"] if row["counter"] == "SyncookiesRecv"
    )
    assert row["agrees"] == (mode == "fentry")
    assert row["traced"] == CLIENTS - len(unseen)
