"""Who listens: this test itself does, and looks for itself."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tcpstuck_bpf.host import netns, netns_counters
from tcpstuck_bpf.host.listening_sockets import (
    ListenerWatch,
    owners_of,
    parse_listeners,
    sockets_for,
)
from tcpstuck_bpf.model import ListenerFacts, address_bytes
from tests.unit.judge.test_listener import facts


def of(address: str, port: int) -> ListenerFacts:
    """Facts of an address and port of this test's namespace."""
    return facts(
        netns=netns.own_netns(), server_address=address_bytes(address), server_port=port, syns=1
    )


@pytest.mark.parametrize(
    ("family", "bound", "asked"),
    [
        (socket.AF_INET, "127.0.0.1", "127.0.0.1"),
        (socket.AF_INET, "0.0.0.0", "127.0.0.1"),
        (socket.AF_INET6, "::1", "::1"),
        (socket.AF_INET6, "::", "::1"),
        (socket.AF_INET6, "::", "127.0.0.1"),
    ],
)
def test_a_listener_is_found_with_its_process(
    family: socket.AddressFamily, bound: str, asked: str
) -> None:
    dual = bound == "::"
    with socket.create_server((bound, 0), family=family, dualstack_ipv6=dual) as listener:
        port = listener.getsockname()[1]
        (seen,) = ListenerWatch().changed([of(asked, port)])
    name = Path("/proc/self/comm").read_text().strip()
    assert f"{name} (pid {os.getpid()})" in seen.owners
    assert len(seen.sockets) == 1
    assert seen.settings["core.somaxconn"] == int(Path("/proc/sys/net/core/somaxconn").read_text())


def test_sockets_that_share_an_address_are_counted() -> None:
    with socket.create_server(("127.0.0.1", 0), reuse_port=True) as one:
        port = one.getsockname()[1]
        with socket.create_server(("127.0.0.1", port), reuse_port=True):
            (seen,) = ListenerWatch().changed([of("127.0.0.1", port)])
    assert len(seen.sockets) == 2


def test_of_sockets_that_share_an_address_each_is_known_apart() -> None:
    with socket.create_server(("127.0.0.1", 0), reuse_port=True) as one:
        port = one.getsockname()[1]
        with socket.create_server(("127.0.0.1", port), reuse_port=True) as other:
            inodes = sorted(os.fstat(each.fileno()).st_ino for each in (one, other))
            at_each = [of("127.0.0.1", port)._replace(socket=inode) for inode in inodes]
            seen = ListenerWatch().changed(at_each)
    assert [each.facts for each in seen] == at_each
    for each in seen:
        assert list(each.sockets) == inodes
        assert each.bound == address_bytes("127.0.0.1")
        assert f"(pid {os.getpid()})" in each.owners[0]


def test_an_owner_is_of_the_socket_and_of_no_other_that_shares_its_address() -> None:
    """The other one is a child's alone."""
    with socket.create_server(("127.0.0.1", 0), reuse_port=True) as own:
        port = own.getsockname()[1]
        script = (
            "import os, socket, sys; s = socket.create_server(('127.0.0.1', int(sys.argv[1])), "
            "reuse_port=True); print(os.fstat(s.fileno()).st_ino, flush=True); sys.stdin.read()"
        )
        words = [sys.executable, "-c", script, str(port)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with subprocess.Popen(words, text=True, **pipes) as child:  # type: ignore[call-overload]
            inodes = (os.fstat(own.fileno()).st_ino, int(child.stdout.readline()))
            seen = ListenerWatch().changed(
                of("127.0.0.1", port)._replace(socket=inode) for inode in inodes
            )
            child.stdin.close()
    pids = [[owner.rpartition("(pid ")[2][:-1] for owner in each.owners] for each in seen]
    assert pids == [[str(os.getpid())], [str(child.pid)]]


@pytest.mark.parametrize("listens_at", ["0.0.0.0", "127.0.0.1"])
def test_the_socket_is_known_whatever_address_its_packets_are_for(listens_at: str) -> None:
    """A proxy's socket gets packets for other addresses by TPROXY."""
    with socket.create_server((listens_at, 0)) as proxy:
        inode = os.fstat(proxy.fileno()).st_ino
        port = proxy.getsockname()[1]
        (seen,) = ListenerWatch().changed([of("192.0.2.80", port)._replace(socket=inode)])
    assert seen.sockets == (inode,)
    assert seen.bound == address_bytes(listens_at)
    assert seen.owners


def test_of_a_socket_that_has_gone_no_other_is_taken_for_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as successor:
        port = successor.getsockname()[1]
        gone = of("127.0.0.1", port)._replace(socket=(1 << 32) - 1)
        (seen,) = ListenerWatch().changed([gone])
    assert (seen.owners, seen.sockets, seen.bound) == ((), (), None)


def test_the_very_address_goes_before_any() -> None:
    with (
        socket.create_server(("127.0.0.1", 0), reuse_port=True) as own,
        socket.create_server(("0.0.0.0", own.getsockname()[1]), reuse_port=True),
    ):
        text = Path("/proc/thread-self/net/tcp").read_text()
        listening = list(parse_listeners(text.splitlines()))
        (found,) = sockets_for(of("127.0.0.1", own.getsockname()[1]), listening)
        assert found.inode == os.fstat(own.fileno()).st_ino
        assert owners_of([found.inode])


@pytest.mark.parametrize("asked", ["127.0.0.1", "::1"])
def test_each_family_has_a_socket_of_its_own_for_any_address(asked: str) -> None:
    """nginx and sshd listen like this: at 0.0.0.0, and at :: for IPv6 only."""
    with (
        socket.create_server(("0.0.0.0", 0)) as for_ipv4,
        socket.create_server(("::", for_ipv4.getsockname()[1]), family=socket.AF_INET6) as for_ipv6,
    ):
        port = for_ipv4.getsockname()[1]
        listening = [
            one
            for name in ("tcp", "tcp6")
            for one in parse_listeners(Path("/proc/thread-self/net", name).read_text().splitlines())
        ]
        (found,) = sockets_for(of(asked, port), listening)
        meant = for_ipv6 if ":" in asked else for_ipv4
        assert found.inode == os.fstat(meant.fileno()).st_ino


def test_only_what_changed_is_told_again() -> None:
    watch = ListenerWatch()
    one, other = of("127.0.0.1", 1), of("127.0.0.1", 2)
    assert [seen.facts for seen in watch.changed([one, other])] == [one, other]
    later = other._replace(syns=2)
    assert [seen.facts for seen in watch.changed([one, later])] == [later]
    assert watch.changed([one, later]) == ()


def test_an_owner_is_known_after_it_has_gone() -> None:
    watch = ListenerWatch()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one = of("127.0.0.1", listener.getsockname()[1])
        (before,) = watch.changed([one])
    (after,) = watch.changed([one._replace(syns=2)])
    assert after.owners == before.owners != ()


def test_a_namespace_that_has_gone_is_no_error() -> None:
    (seen,) = ListenerWatch().changed([facts(netns=1)])
    assert (seen.owners, seen.sockets, dict(seen.settings)) == ((), (), {})


@pytest.mark.parametrize(
    ("before", "queued", "after"), [(1, 1, 2), (2, 50, 1), (0, 50, 1), (0, 1, 2)]
)
def test_syncookies_is_read_again_where_a_cookie_contradicts_it(
    before: int, queued: int, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody changed it while the tool ran. Its other settings are as of the call of listen()."""
    name = "ipv4.tcp_syncookies"
    reads: list[int] = []

    def own() -> dict[str, int]:
        reads.append(1)
        return {name: after, "core.somaxconn": 9}

    settings = {name: before, "core.somaxconn": 4096}
    monkeypatch.setattr(
        netns_counters, "read_queue_settings", lambda: {netns.own_netns(): settings}
    )
    monkeypatch.setattr(netns_counters, "own_queue_settings", own)
    watch = ListenerWatch()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        first = of("127.0.0.1", listener.getsockname()[1])._replace(limit=50, cookies_sent=0)
        assert watch.changed([first])[0].settings == settings
        cookie = first._replace(syns=2, cookies_sent=1, lowest_cookie_syn_queue=queued)
        assert watch.changed([cookie])[0].settings == {name: after, "core.somaxconn": 4096}
        # Nothing contradicts it now.
        watch.changed([cookie._replace(cookies_sent=2)])
        # Without a further cookie there is nothing to explain.
        watch.changed([cookie._replace(cookies_sent=2, lowest_cookie_syn_queue=51 - queued)])
        assert len(reads) == 1
