"""The handshake of our own by which a start sees that its programs run."""

from __future__ import annotations

import os
import re
import socket
import threading
from pathlib import Path

import pytest

from tcpstuck_bpf.errors import CannotTraceError
from tcpstuck_bpf.host import netns
from tcpstuck_bpf.host.netns_counters import parse_netstat
from tcpstuck_bpf.kernel import trial
from tcpstuck_bpf.model import NetnsCount

NOTHING = dict.fromkeys(NetnsCount, 0)
SYN_SEEN = {**NOTHING, NetnsCount.COOKIES_SENT_OUTSIDE: 1}
BOTH_SEEN = {**SYN_SEEN, NetnsCount.COOKIES_RECEIVED_OUTSIDE: 1}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a network namespace")
def test_the_handshake_is_one_under_a_cookie_and_nowhere_else() -> None:
    def counters() -> dict[str, int]:
        return parse_netstat(Path("/proc/thread-self/net/netstat").read_text("ascii"))

    def handshake() -> tuple[int, dict[str, int]]:
        return trial._handshake(), counters()

    before, threads = counters(), threading.active_count()
    inode, counted = netns.in_new_namespace(handshake)
    assert inode != netns.own_netns()
    assert (counted["SyncookiesSent"], counted["SyncookiesRecv"]) == (1, 1)
    assert counters()["SyncookiesSent"] == before["SyncookiesSent"]
    assert threading.active_count() == threads


def test_a_handshake_that_was_seen_is_good() -> None:
    trial.require_seen(BOTH_SEEN, has_counters=True)
    trial.require_seen(SYN_SEEN, has_counters=False)


@pytest.mark.parametrize(
    ("counted", "unseen"),
    [
        ({}, "the SYN and the ACK"),
        (NOTHING, "the SYN and the ACK"),
        (SYN_SEEN, "the ACK"),
        (NOTHING, "the SYN"),
    ],
)
@pytest.mark.parametrize(
    ("switches", "why", "remedy"),
    [
        ("01", "kernel.ftrace_enabled is 0", "sysctl kernel.ftrace_enabled=1"),
        ("10", "kprobes/enabled is 0", "echo 1 > /sys/kernel/debug/kprobes/enabled"),
        ("11", "are not off", "kernel log"),
        ("", "are not off", "kernel log"),
    ],
)
def test_what_passed_unseen_is_no_start_and_the_switch_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    counted: dict[NetnsCount, int],
    unseen: str,
    switches: str,
    why: str,
    remedy: str,
) -> None:
    moved = []
    for number, (_, name, kind) in enumerate(trial._SWITCHES):
        path = tmp_path / str(number)
        if switches:
            path.write_text(f"{switches[number]}\n")
        moved.append((path, name, kind))
    monkeypatch.setattr(trial, "_SWITCHES", tuple(moved))
    with pytest.raises(CannotTraceError) as refused:
        trial.require_seen(counted, has_counters="ACK" in unseen)
    assert f"{unseen} of a handshake" in refused.value.why
    assert why in refused.value.why
    assert remedy in refused.value.remedy


def test_both_ends_are_as_the_programs_know_them() -> None:
    """Other instances recognize the handshake by its addresses, and ignore it."""
    header = (Path(__file__).parents[3] / "bpf" / "tcpstuck.h").read_text("ascii")
    (address,) = re.findall(r"#define TRIAL_ADDRESS (0x\w+)U", header)
    (netns,) = re.findall(r"#define NOBODYS_NETNS (0x\w+)U", header)
    assert int(address, 16).to_bytes(4, "little") == socket.inet_aton(trial.ADDRESS)
    assert int(netns, 16) == trial.NOBODYS_NETNS
