"""What a network namespace is called: `host` only where it is known to be the host's."""

from __future__ import annotations

from pathlib import Path

import pytest

from tcpstuck_bpf.host import netns

INITIAL_PID = 0xEFFFFFFC
INITIAL_NET = 0xEFFFFFF9
A_CONTAINERS_PID = 0xF0000123
ON_AN_OLDER_KERNEL = 0xF0000000 + 85
OTHER = 0xF0000777


@pytest.mark.parametrize(
    ("init", "own", "names"),
    [
        # On the host, of a kernel whose initial network namespace has a fixed number, or none.
        ((INITIAL_PID, INITIAL_NET), INITIAL_NET, {INITIAL_NET: "host"}),
        ((INITIAL_PID, ON_AN_OLDER_KERNEL), ON_AN_OLDER_KERNEL, {ON_AN_OLDER_KERNEL: "host"}),
        (
            (INITIAL_PID, ON_AN_OLDER_KERNEL),
            OTHER,
            {ON_AN_OLDER_KERNEL: "host", OTHER: "own"},
        ),
        # In a container with PIDs of its own: process 1 is the container's.
        ((A_CONTAINERS_PID, OTHER), OTHER, {OTHER: "own"}),
        ((A_CONTAINERS_PID, OTHER), OTHER + 1, {OTHER: "pid 1's", OTHER + 1: "own"}),
        # And one that is in the host's network.
        ((A_CONTAINERS_PID, INITIAL_NET), INITIAL_NET, {INITIAL_NET: "host"}),
        ((A_CONTAINERS_PID, ON_AN_OLDER_KERNEL), ON_AN_OLDER_KERNEL, {ON_AN_OLDER_KERNEL: "own"}),
        # Without the right to look at process 1.
        (None, OTHER, {OTHER: "own"}),
        (None, INITIAL_NET, {INITIAL_NET: "host"}),
    ],
)
def test_what_is_the_hosts(
    init: tuple[int, int] | None,
    own: int,
    names: dict[int, str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(netns, "_NAMED", tmp_path)
    monkeypatch.setattr(netns, "own_netns", lambda: own)
    monkeypatch.setattr(netns, "_of_process_1", lambda: init)
    assert netns.names() == names


def test_a_name_of_ip_netns_goes_before_those_that_say_less(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(netns, "with_names", lambda: {OTHER: Path("/run/netns/web")})
    monkeypatch.setattr(netns, "own_netns", lambda: OTHER)
    monkeypatch.setattr(netns, "_of_process_1", lambda: (A_CONTAINERS_PID, OTHER))
    assert netns.names() == {OTHER: "web"}


def test_process_1_of_this_machine_is_looked_at_or_not_allowed() -> None:
    found = netns._of_process_1()
    assert found is None or all(number > 0 for number in found)
