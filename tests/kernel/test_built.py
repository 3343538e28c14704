"""Programs that were built from the kernel's file, where there is no compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from lab.guests.packages import running_kernel_image
from lab.patience import START_S, patient
from tests.kernel.conftest import Traced

pytestmark = pytest.mark.kernel


def build(directory: Path, *options: str) -> list[str]:
    """The files that `--build` names."""
    done = subprocess.run(
        [sys.executable, "-m", "tcpstuck_bpf", "--build", str(directory), *options],
        capture_output=True,
        text=True,
        timeout=patient(START_S),
        check=True,
    )
    return [line.partition(": ")[0] for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    image = running_kernel_image()
    if image is None:
        pytest.skip(f"the image of the running kernel {os.uname().release} is not here")
    directory = tmp_path_factory.mktemp("built")
    assert len(build(directory, "--vmlinux", str(image))) == len(list(directory.iterdir())) == 2
    return directory


@pytest.fixture
def without_bcc() -> Iterator[None]:
    """BCC's Python module is out of the way, for every process."""
    spec = find_spec("bcc")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    (place,) = map(Path, spec.submodule_search_locations)
    hidden = place.with_name("bcc-hidden")
    shutil.move(place, hidden)
    try:
        yield
    finally:
        shutil.move(hidden, place)


@pytest.mark.usefixtures("without_bcc")
@pytest.mark.parametrize("mode", ["fentry", "kprobe"])
def test_a_host_without_a_compiler_traces(
    traced: Callable[..., Traced], built: Path, mode: str
) -> None:
    run = traced("overflow", "--programs", str(built), "--probe-mode", mode, clients=70)
    assert run.comparison.agrees, run.comparison
    run.assert_reconciled()


@pytest.mark.usefixtures("without_bcc")
def test_a_host_without_a_compiler_refuses_what_was_not_built(built: Path) -> None:
    """The rescue's programs are others, and nobody has built them."""
    command = [sys.executable, "-m", "tcpstuck_bpf", "--dry-run", "--programs", str(built)]
    done = subprocess.run(
        [*command, "--rescue"],
        capture_output=True,
        text=True,
        timeout=patient(START_S),
        check=False,
    )
    assert (done.returncode, done.stdout) == (3, "")
    assert f"no programs in {built} fit this kernel" in done.stderr
    assert os.uname().release in done.stderr


def test_the_running_kernel_and_its_file_build_the_same(built: Path, tmp_path: Path) -> None:
    written = build(tmp_path / "here")
    for path in map(Path, written):
        assert path.read_bytes() == (built / path.name).read_bytes()
