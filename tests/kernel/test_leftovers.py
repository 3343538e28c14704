"""However a run ends, the kernel keeps nothing of it: no program, no map, no probe."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from lab.patience import COMMAND_S, START_S, Deadline, patient

pytestmark = pytest.mark.kernel

TOOL = (sys.executable, "-m", "tcpstuck_bpf", "-p", "3311", "--json")
EXIT_INTERRUPTED = 130
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
    """By the kernel's own lists: which functions have a probe, however many."""
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
    readable, _, _ = select.select([process.stderr], [], [], patient(START_S))
    assert readable, "the tool said nothing"
    assert b"watching port 3311" in process.stderr.read(4096)


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
