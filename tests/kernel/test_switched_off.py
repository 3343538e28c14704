"""What is attached and not run: a start that says so, and no run that calls nothing stuck."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.patience import START_S, patient
from tcpstuck_bpf.errors import EXIT_CANNOT_TRACE
from tests.kernel.conftest import TOOL

pytestmark = pytest.mark.kernel

FTRACE = Path("/proc/sys/kernel/ftrace_enabled")
KPROBES = Path("/sys/kernel/debug/kprobes/enabled")


@contextlib.contextmanager
def off(switch: Path) -> Iterator[None]:
    switch.write_text("0", encoding="ascii")
    try:
        yield
    finally:
        switch.write_text("1", encoding="ascii")


@pytest.mark.parametrize(
    ("mode", "switch"),
    [("fentry", FTRACE), ("kprobe", FTRACE), ("kprobe", KPROBES)],
    ids=["fentry-ftrace", "kprobe-ftrace", "kprobe-kprobes"],
)
def test_programs_that_the_kernel_does_not_run_are_told_at_the_start(
    mode: str, switch: Path
) -> None:
    if not switch.exists():
        pytest.skip(f"{switch} is not there: tracing cannot be switched off so")
    command = [*TOOL, "-d", "1", "--probe-mode", mode]
    with off(switch):
        ended = subprocess.run(
            command, capture_output=True, text=True, timeout=patient(START_S), check=False
        )
    assert (ended.returncode, ended.stdout) == (EXIT_CANNOT_TRACE, "")
    assert "Traceback" not in ended.stderr
    on_again = subprocess.run(
        command, capture_output=True, text=True, timeout=patient(START_S), check=False
    )
    assert on_again.returncode == 0, on_again.stderr
