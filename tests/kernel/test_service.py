"""The systemd unit's capabilities: with these alone the tool attaches all that root attaches."""

from __future__ import annotations

import ctypes
import resource
import subprocess
from collections.abc import Callable

import pytest

from lab.patience import START_S, patient
from tests.kernel.conftest import TOOL
from tests.unit.test_service import words

pytestmark = pytest.mark.kernel

NUMBERS = {
    "CAP_DAC_READ_SEARCH": 2,
    "CAP_NET_ADMIN": 12,
    "CAP_NET_RAW": 13,
    "CAP_SYS_PTRACE": 19,
    "CAP_SYS_ADMIN": 21,
    "CAP_SYSLOG": 34,
    "CAP_PERFMON": 38,
    "CAP_BPF": 39,
}
"""linux/capability.h."""
PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 24, 38


def as_the_unit() -> None:
    """In the child: what systemd does before it starts the command."""
    prctl = ctypes.CDLL(None).prctl
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY,) * 2)
    prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    held = {NUMBERS[name] for name in words("CapabilityBoundingSet")}
    for number in set(range(64)) - held:
        prctl(PR_CAPBSET_DROP, number, 0, 0, 0)


def attached(mode: str, before: Callable[[], None] | None) -> tuple[str, str]:
    """What a dry run prints, of programs for a rescue as well."""
    ended = subprocess.run(
        [*TOOL, "--dry-run", "--rescue", "--no-cache", "--probe-mode", mode],
        capture_output=True,
        text=True,
        timeout=patient(START_S),
        check=False,
        preexec_fn=before,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout, ended.stderr


@pytest.mark.parametrize("mode", ["fentry", "kprobe"])
def test_with_the_unit_s_capabilities_all_is_attached_that_root_attaches(mode: str) -> None:
    assert attached(mode, as_the_unit) == attached(mode, None)
