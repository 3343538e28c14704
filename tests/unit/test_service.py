"""The systemd unit: what is no failure does not end it, and it may do what the tool does."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from tcpstuck_bpf import errors
from tcpstuck_bpf.kernel.features import RELEVANT_CAPABILITIES
from tcpstuck_bpf.kernel.kept_files import ROOT_S_CACHE
from tcpstuck_bpf.options import build_parser

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGING = REPOSITORY / "packaging"
UNIT = PACKAGING / "tcpstuck-trace.service"
MOST_EXPOSED = 45
"""Tenths, by systemd-analyze(1): 96 without any of its settings, 41 by systemd 252."""
NOT_HELD = {"CAP_SYS_RESOURCE"}
"""It lifts RLIMIT_MEMLOCK, which the unit lifts instead."""


def settings() -> dict[str, list[str]]:
    """Values by name, of every section."""
    found: dict[str, list[str]] = {}
    for line in UNIT.read_text("ascii").splitlines():
        name, sign, value = line.partition("=")
        if sign and not line.startswith("#"):
            found.setdefault(name, []).append(value)
    return found


def words(name: str) -> set[str]:
    return set(" ".join(settings()[name]).split())


def test_it_outlives_what_is_no_failure() -> None:
    """Whoever was stuck makes the status 1, and so does a bug of ours."""
    assert settings()["Restart"] == ["always"]
    no_failure = {errors.EXIT_STUCK, errors.EXIT_NOT_KNOWN, errors.EXIT_INTERRUPTED}
    assert words("SuccessExitStatus") == set(map(str, no_failure))
    given_up = {errors.EXIT_USAGE, errors.EXIT_CANNOT_TRACE}
    assert words("RestartPreventExitStatus") == set(map(str, given_up))


def test_options_come_from_the_file_that_is_shipped() -> None:
    (start,) = settings()["ExecStart"]
    assert start == "/usr/bin/tcpstuck-trace $OPTIONS"
    assert settings()["EnvironmentFile"] == ["-/etc/default/tcpstuck-trace"]
    text = (PACKAGING / "tcpstuck-trace.default").read_text("ascii")
    given = re.findall(r'^#? *OPTIONS="(.*)"$', text, re.MULTILINE)
    assert len(given) == 2
    for options in given:
        build_parser().parse_args(shlex.split(options))


def test_it_holds_every_capability_that_the_tool_asks_for() -> None:
    held = words("CapabilityBoundingSet")
    assert held >= set(RELEVANT_CAPABILITIES) - NOT_HELD
    assert settings()["LimitMEMLOCK"] == ["infinity"]
    assert not held & NOT_HELD


def test_it_may_write_where_the_tool_keeps_its_programs() -> None:
    assert Path("/var/cache", *settings()["CacheDirectory"]) == ROOT_S_CACHE
    assert settings()["CacheDirectoryMode"] == ["0700"]


@pytest.mark.parametrize(
    "hidden", ["ProtectKernelTunables", "PrivateDevices", "ProtectKernelLogs", "PrivateNetwork"]
)
def test_it_does_not_ask_for_what_would_hide_what_the_tool_reads(hidden: str) -> None:
    """/proc/kallsyms, /dev/kmsg, and the network."""
    assert hidden not in settings()


def analyze(*command: str) -> str:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("needs systemd-analyze")
    done = subprocess.run(
        ["systemd-analyze", "--no-pager", *command],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_systemd_has_no_complaint(tmp_path: Path) -> None:
    # Neither the command nor the manual page need be installed here.
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text("ascii").replace("/usr/bin/tcpstuck-trace", "/bin/true"))
    assert analyze("verify", "--man=no", str(unit)) == ""


def test_it_is_exposed_no_more_than_it_must_be() -> None:
    version = int(analyze("--version").split()[1])
    if version < 250:
        pytest.skip("systemd-analyze before 250 looks at loaded units only")
    analyze("security", "--offline=true", f"--threshold={MOST_EXPOSED}", str(UNIT))


def test_the_documentation_shows_no_second_copy() -> None:
    for page in (REPOSITORY / "docs").glob("*.md"):
        assert "[Service]" not in page.read_text("utf-8"), page
