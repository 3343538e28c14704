"""The tool as the fork server starts it is the tool as a shell starts it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from lab.network.topology import SERVER_ADDRESS, Namespace, Topology
from lab.patience import COMMAND_S, patient
from lab.processes.child import Running, pause
from lab.processes.clients import Clients
from lab.processes.preloaded import TOOL, start_tool
from lab.processes.servers import Greeter
from lab.scenarios.tracer import start_command
from tcpstuck_bpf.kernel.attach_plan import WITHOUT_VARIABLE

LIMIT_S = patient(COMMAND_S)
Start = Callable[[list[str], int], Running]


def answer(start: Start, words: Sequence[str]) -> tuple[bytes, int]:
    """What a start of these words prints, and its exit status."""
    ours, theirs = os.pipe()
    process = start([*TOOL, *words], theirs)
    os.close(theirs)
    with os.fdopen(ours, "rb") as output:
        said = output.read()
    return said, process.wait(LIMIT_S)


@pytest.mark.parametrize(
    "words", [["--version"], ["--explain", "ack-missing"], ["--replay", "/nowhere"], ["--nonsense"]]
)
def test_output_and_exit_status_are_the_same(
    words: list[str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of what the C library's environment has and ours has not, a command would hear as well.
    monkeypatch.setenv("COLUMNS", "70")
    as_command = answer(start_command, words)
    complaint = capfd.readouterr().err
    assert answer(start_tool, words) == as_command
    assert capfd.readouterr().err == complaint


def test_the_environment_is_that_of_the_moment(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    answer(start_tool, ["--version"])
    monkeypatch.setenv(WITHOUT_VARIABLE, "no such probe")
    assert answer(start_tool, ["-p", "3311"])[1] != 0
    assert "no such probe" in capfd.readouterr().err


def test_one_that_is_paused_goes_on_and_one_that_is_killed_has_ended() -> None:
    ours, theirs = os.pipe()
    recording, waiting_for = os.pipe()
    process = start_tool([*TOOL, "--replay", f"/proc/{os.getpid()}/fd/{recording}"], theirs)
    os.close(theirs)
    pause(process)
    assert process.poll() is None
    process.send_signal(signal.SIGCONT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.01)
    process.kill()
    assert process.wait(LIMIT_S) == -signal.SIGKILL
    pause(process)
    for file in (ours, recording, waiting_for):
        os.close(file)


def test_a_lab_process_is_forked_into_its_namespace_and_ends_with_its_channel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if os.geteuid() != 0:
        pytest.skip("making a network namespace takes root")
    monkeypatch.setattr(Namespace, "forks", True)
    with Topology() as topology:
        with Greeter(topology.server, SERVER_ADDRESS[4], 3311, backlog=9) as greeter:
            place = Path(f"/proc/{greeter.pid}/ns/net")
            assert place.stat().st_ino == topology.server.inode
            with Clients(topology.client) as clients:
                clients.connect(2, SERVER_ADDRESS[4], 3311)
                clients.await_counts(connected=2)
                greeter.resume()
                clients.await_counts(greeted=2)
            assert clients.exit_status == 0
        assert greeter.exit_status == 0
        assert not place.exists()


def test_another_command_is_refused() -> None:
    with pytest.raises(ValueError, match="is not the tool"):
        start_tool([sys.executable, "-c", "pass"], 1)
