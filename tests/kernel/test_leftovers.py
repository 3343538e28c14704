"""However a run ends, the kernel keeps nothing of it: no program, no map, no probe, no socket."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest

from lab.network.faults import dropping, syn_rule
from lab.network.topology import INTERFACE, SERVER_ADDRESS, Namespace, Topology
from lab.network.watch import Watch
from lab.patience import COMMAND_S, START_S, Deadline, patient
from lab.processes.child import pause
from lab.records import FourTuple
from lab.scenarios.scene import PORT
from tcpstuck_bpf.rescue.candidate import MAX_TRIES
from tests.kernel.rescue import cookie_server, silenced

pytestmark = pytest.mark.kernel

TOOL = (sys.executable, "-m", "tcpstuck_bpf", "-p", "3311", "--json")
EXIT_INTERRUPTED = 130
EXIT_STUCK = 1
PROBED = "tcp_conn_request"

MEMBARRIER_CMD_GLOBAL = 1
SYSCALL_NUMBERS = {
    "x86_64": {"bpf": 321, "membarrier": 324},
    "aarch64": {"bpf": 280, "membarrier": 283},
}
NEXT_ID_COMMANDS = {"prog_id": 11, "map_id": 12, "link_id": 31}
"""BPF_PROG_GET_NEXT_ID, BPF_MAP_GET_NEXT_ID, BPF_LINK_GET_NEXT_ID of enum bpf_cmd; named as in
/proc/PID/fdinfo."""
PROBE_LISTS = (
    Path("/sys/kernel/debug/kprobes/list"),
    Path("/sys/kernel/tracing/kprobe_events"),
    Path("/sys/kernel/tracing/enabled_functions"),
)

RAW_SOCKETS = ("raw", "raw6")
"""The kernel's own lists, of IPv4 and IPv6."""
RTMGRP_LINK = 1
DATA = b"EHLO lab\r\n"

Objects = set[tuple[str, int]]
"""What the kernel holds for BPF: kind and identity number."""

_libc = ctypes.CDLL(None, use_errno=True)


def system_call(name: str, *arguments: object) -> int:
    """Raises OSError where the kernel refuses."""
    result = int(_libc.syscall(SYSCALL_NUMBERS[platform.machine()][name], *arguments))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def objects_of_kernel() -> Objects:
    found: Objects = set()
    for kind, command in NEXT_ID_COMMANDS.items():
        # start_id, next_id, open_flags of union bpf_attr.
        attributes = (ctypes.c_uint32 * 3)()
        with suppress(FileNotFoundError):
            while True:
                system_call("bpf", command, attributes, ctypes.sizeof(attributes))
                attributes[0] = attributes[1]
                found.add((kind, int(attributes[1])))
    return found


def objects_of_process(pid: int) -> Objects:
    found: Objects = set()
    for path in Path(f"/proc/{pid}/fdinfo").iterdir():
        # It reads files of /proc meanwhile; what it has closed again is not kept.
        with suppress(FileNotFoundError):
            for line in path.read_text().splitlines():
                name, _, value = line.partition(":")
                if name in NEXT_ID_COMMANDS:
                    found.add((name, int(value)))
    return found


def probed_functions() -> set[tuple[str, str]]:
    """The functions with at least one probe, from the kernel's own lists."""
    found = set()
    for path in PROBE_LISTS:
        for line in path.read_text().splitlines() if path.exists() else ():
            place = line.split()[2 if path.name == "list" else 0]
            found.add((str(path), place.partition("+")[0]))
    return found


def await_gone(leftovers: Callable[[], object]) -> None:
    """The kernel frees a program's maps some RCU grace periods after the program's end."""
    deadline = Deadline(COMMAND_S)
    while left := leftovers():
        assert not deadline.passed(), f"the kernel still holds {left}"
        system_call("membarrier", MEMBARRIER_CMD_GLOBAL, 0, 0)


def started(mode: str, *options: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [*TOOL, "--probe-mode", mode, *options],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
    )


def await_attached(process: subprocess.Popen[bytes]) -> None:
    """It says so on its standard error, once everything is attached."""
    assert process.stderr is not None
    said = b""
    # Before that it may say that it compiles.
    while b"watching port 3311" not in said:
        readable, _, _ = select.select([process.stderr], [], [], patient(START_S))
        assert readable, f"the tool said nothing more than {said!r}"
        more = process.stderr.read(4096)
        assert more, f"the tool ended, having said {said!r}"
        said += more


def ended(process: subprocess.Popen[bytes]) -> tuple[int, str]:
    """Exit status and standard output."""
    output, _ = process.communicate(timeout=patient(START_S))
    return process.returncode, output.decode()


def end_by(process: subprocess.Popen[bytes], number: signal.Signals) -> tuple[int, str]:
    """Exit status and standard output; all that the process had of the kernel is gone."""
    owned = objects_of_process(process.pid)
    assert {"prog_id", "map_id"} <= {kind for kind, _ in owned}
    assert owned <= objects_of_kernel()
    process.send_signal(number)
    # Where it is paused, the other signal has waited for this one, and comes first.
    process.send_signal(signal.SIGCONT)
    status_and_output = ended(process)
    await_gone(lambda: owned & objects_of_kernel())
    return status_and_output


def types_of_lines(output: str) -> list[str]:
    return [json.loads(line)["type"] for line in output.splitlines()]


@pytest.mark.parametrize("mode", ["fentry", "kprobe"])
def test_however_it_ends_nothing_is_left(mode: str) -> None:
    """Four runs at the same time, each of which ends in its own way."""
    objects_before, probed_before = objects_of_kernel(), probed_functions()
    runs = (("--dry-run",), ("-d", "1"), (), ("--rescue",))
    processes = [started(mode, *options) for options in runs]
    dry, timed, interrupted, killed = processes
    try:
        await_attached(interrupted)
        await_attached(killed)
        assert PROBED in {function for _, function in probed_functions()}
        assert end_by(killed, signal.SIGKILL) == (-signal.SIGKILL, "")
        status, output = end_by(interrupted, signal.SIGINT)
        assert (status, types_of_lines(output)) == (EXIT_INTERRUPTED, ["summary"])
        status, output = ended(timed)
        assert (status, types_of_lines(output)) == (0, ["summary"])
        status, output = ended(dry)
        assert status == 0
        assert f" by {mode}" in output
    finally:
        for process in processes:
            process.kill()
            process.wait(patient(COMMAND_S))
    await_gone(lambda: objects_of_kernel() - objects_before)
    await_gone(lambda: probed_functions() - probed_before)


@contextmanager
def running(mode: str, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """The tool, attached; it is killed at the end, should it live."""
    process = started(mode, *options)
    try:
        await_attached(process)
        yield process
    finally:
        process.kill()
        process.wait(patient(COMMAND_S))


def raw_sockets(namespace: Namespace) -> list[str]:
    """The lines of the kernel's lists, without their headings."""
    paths = [Path("/proc/thread-self/net", name) for name in RAW_SOCKETS]
    return [line for path in paths for line in namespace.run(path.read_text).splitlines()[1:]]


def pause_when_trying(
    process: subprocess.Popen[bytes], server: Namespace, watch: Watch, who: FourTuple
) -> None:
    """Stop the tool when it has repeated a SYN-ACK and the socket that it did so by is still open.

    It has that for two seconds; a machine may be too slow for one try, and there are three.
    """

    def tried(times: int) -> bool:
        # The kernel sends a cookie's SYN-ACK once for each SYN; the others are ours.
        return watch.records[who].synacks >= watch.records[who].syns + times

    for times in range(1, MAX_TRIES + 1):
        watch.until(partial(tried, times), "a SYN-ACK of the tool")
        pause(process)
        if raw_sockets(server):
            return
        process.send_signal(signal.SIGCONT)
    raise AssertionError("the tool was never seen with its raw socket open")


def await_repeated_syn(topology: Topology, watch: Watch, family: int) -> None:
    """Until a SYN that nobody answers has been repeated twice: after one second and two more."""
    kind = socket.AF_INET if family == 4 else socket.AF_INET6
    server = (SERVER_ADDRESS[family], PORT)
    with (
        dropping(topology.server, syn_rule(PORT), family),
        topology.client.run(socket.socket, kind) as asking,
    ):
        asking.setblocking(False)
        asking.connect_ex(server)
        who = FourTuple._make((*asking.getsockname()[:2], *server))
        watch.until(
            lambda: who in watch.records and watch.records[who].syns > 2,
            "a SYN to be repeated twice",
        )


def remove_until_gone(topology: Topology) -> None:
    """Remove the server's namespace. Once the kernel gives it up, the wire goes, at both ends.

    Whatever socket still belongs to it keeps it.
    """
    netlink = (socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
    deadline = Deadline(COMMAND_S)
    with topology.client.run(socket.socket, *netlink) as links:
        links.bind((0, RTMGRP_LINK))
        topology.server.give_up_number()
        topology.server.close()
        while INTERFACE in [name for _, name in topology.client.run(socket.if_nameindex)]:
            changed, _, _ = select.select([links], [], [], deadline.left())
            assert changed, "something keeps the server's namespace"
            links.recv(1 << 16)


@pytest.mark.parametrize(
    ("number", "mode", "family"),
    [
        (signal.SIGKILL, "fentry", 4),
        (signal.SIGTERM, "kprobe", 6),
        pytest.param(signal.SIGKILL, "kprobe", 6, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, "fentry", 4, marks=pytest.mark.slow),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_a_rescue_that_is_cut_off_leaves_nothing(
    number: signal.Signals, mode: str, family: int, tmp_path: Path
) -> None:
    """A try is under way in another namespace, and the client's answer will not come."""
    objects_before, probed_before = objects_of_kernel(), probed_functions()
    ready = tmp_path / "ready"
    options = ("--rescue=all", "-t", "1", "--ready-file", str(ready))
    with cookie_server() as (topology, listener), running(mode, *options) as process:
        # What is sent passes the sender's end of the wire before the sending call returns.
        with Watch(topology.server, PORT) as watch, silenced(topology, family) as client:
            pause_when_trying(process, topology.server, watch, client.four_tuple)
            assert int(ready.read_text("ascii")) == process.pid
            watch.take_in()
            wire = watch.records[client.four_tuple]
            sent = wire.synacks
            status, output = end_by(process, number)
            assert raw_sockets(topology.server) == []
            await_repeated_syn(topology, watch, family)
            watch.take_in()
            assert (wire.synacks, wire.server_resets, wire.client_resets) == (sent, 0, 0)
            rows = topology.client.sockets("established", f"dport = :{PORT}")
            assert [row.local_port for row in rows] == [client.four_tuple.client_port]
            assert topology.server.sockets("established", f"sport = :{PORT}") == []
        # As any stuck client, it connects by what it sends.
        client.socket.sendall(DATA)
        served, _ = listener.accept()
        with served:
            served.settimeout(patient(COMMAND_S))
            assert served.recv(len(DATA), socket.MSG_WAITALL) == DATA
            client.socket.close()
            assert served.recv(1) == b""
        listener.close()
        remove_until_gone(topology)
    if number == signal.SIGKILL:
        assert status == -signal.SIGKILL
    else:
        assert (status, types_of_lines(output)[-1]) == (EXIT_STUCK, "summary")
        assert not ready.exists()
    await_gone(lambda: objects_of_kernel() - objects_before)
    await_gone(lambda: probed_functions() - probed_before)
