"""The doctor on a kernel that runs, beside what it says of the same kernel's file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lab.guests.packages import running_kernel_image
from tests.kernel.conftest import Traced

pytestmark = pytest.mark.kernel

ABOUT_THE_KERNEL = {"kernel", "function", "member", "counters", "drop_reasons"}


@pytest.fixture
def own_image() -> Path:
    """The file that this kernel was booted from."""
    image = running_kernel_image()
    if image is None:
        pytest.skip(f"the image of the running kernel {os.uname().release} is not here")
    return image


def consulted(*options: str) -> tuple[int, list[dict[str, Any]]]:
    done = subprocess.run(
        [sys.executable, "-m", "tcpstuck_bpf", "--doctor", "--json", *options],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


def facts(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is true of the kernel wherever it is read; where that was, and symbols, left out."""
    return [
        {key: value for key, value in line.items() if key not in ("source", "symbol")}
        for line in lines
        if line["type"] in ABOUT_THE_KERNEL
    ]


def test_the_running_kernel_and_its_file_tell_the_same(own_image: Path) -> None:
    status, running = consulted()
    assert status == 0
    status, from_file = consulted("--vmlinux", str(own_image))
    assert status == 0
    assert {fact["type"] for fact in facts(running)} == ABOUT_THE_KERNEL
    assert facts(running) == facts(from_file)


def test_a_file_stands_in_for_btf(traced: Callable[..., Traced], own_image: Path) -> None:
    btf = Path("/sys/kernel/btf")
    subprocess.run(["mount", "-t", "tmpfs", "none", str(btf)], check=True, timeout=60)
    try:
        assert not (btf / "vmlinux").exists()
        assert consulted()[0] == 3
        run = traced("overflow", "--vmlinux", str(own_image), clients=70)
    finally:
        subprocess.run(["umount", str(btf)], check=True, timeout=60)
    assert run.comparison.agrees, run.comparison
    run.assert_reconciled()
