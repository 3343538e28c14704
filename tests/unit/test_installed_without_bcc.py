"""An environment that pip or pipx made: the command there works, or names what makes it work."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tcpstuck_bpf.errors import EXIT_CANNOT_TRACE
from tcpstuck_bpf.kernel import compilation

REPOSITORY = Path(__file__).resolve().parents[2]
NEEDED = ("tabulate", "elftools")
"""What pip brings from the index."""
AS_ROOT = """
import sys
from tcpstuck_bpf.kernel import features
features.require_privileges = lambda: None
from tcpstuck_bpf.__main__ import main
sys.exit(main())
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment of the distribution's Python that is all by itself."""
    directory = tmp_path_factory.mktemp("alone") / "environment"
    base = Path(sys.base_prefix, "bin", "python3")
    subprocess.run([base, "-m", "venv", "--without-pip", directory], check=True, timeout=60)
    (packages,) = directory.glob("lib/python3*/site-packages")
    for name in NEEDED:
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.origin is not None
        place = Path(spec.origin)
        if place.name == "__init__.py":
            (packages / name).symlink_to(place.parent)
        else:
            (packages / place.name).symlink_to(place)
    (packages / "tcpstuck.pth").write_text(f"{REPOSITORY}\n")
    return directory / "bin" / "python"


def asked_to_trace(python: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [python, "-c", AS_ROOT, "--dry-run"],
        capture_output=True,
        text=True,
        check=False,
        cwd=python.parent,
        timeout=60,
    )


def test_what_needs_no_bcc_works(python: Path) -> None:
    subprocess.run([python, "-m", "tcpstuck_bpf", "--explain"], check=True, capture_output=True)


def test_the_remedy_is_a_command_after_which_bcc_is_found(python: Path) -> None:
    refused = asked_to_trace(python)
    assert refused.returncode == EXIT_CANNOT_TRACE
    assert len(refused.stderr.splitlines()) == 3
    assert "apt install python3-bpfcc" in refused.stderr
    if sys.base_prefix != "/usr":
        pytest.skip("this is not the distribution's Python")
    commands = re.findall(r"sed -i '[^']*' \S+?(?=;)", refused.stderr)
    assert len(commands) == 1
    subprocess.run(["sh", "-c", commands[0]], check=True)
    again = asked_to_trace(python)
    if importlib.util.find_spec("bcc") is None:
        pytest.skip("no BCC here to be found")
    assert "BCC" not in again.stderr


def test_an_environment_of_another_python_is_told_of_the_distribution_s(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "base_prefix", "/home/anna/python")
    for prefix in ("/home/anna/tool", "/home/anna/python"):
        monkeypatch.setattr(sys, "prefix", prefix)
        assert "/usr/bin/python3 -m venv --system-site-packages" in compilation._bcc_remedy()
    for one in ("prefix", "base_prefix"):
        monkeypatch.setattr(sys, one, "/usr")
    assert "venv" not in compilation._bcc_remedy()
