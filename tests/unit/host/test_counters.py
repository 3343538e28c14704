"""The kernel's TCP counters of network namespaces: each through a way that leads into it."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
from collections.abc import Iterator

import pytest

from lab.errors import LabError
from lab.network.topology import Namespace
from lab.patience import COMMAND_S, patient
from tcpstuck_bpf.host import netns
from tcpstuck_bpf.host.netns_cookie import own_cookie
from tcpstuck_bpf.host.netns_counters import CounterReader
from tcpstuck_bpf.model import living_of

SENT = "SyncookiesSent"


@contextlib.contextmanager
def namespace_with(connections: int) -> Iterator[Namespace]:
    """A namespace in which so many connections were made by cookies."""
    made = Namespace(f"tcpstuck-{os.getpid()}-with-{connections}")
    with contextlib.closing(made):
        made.command("ip", "link", "set", "lo", "up")
        made.pin({"net/ipv4/tcp_syncookies": "2"})
        with made.run(socket.create_server, ("127.0.0.1", 0)) as listener:
            for _ in range(connections):
                made.run(
                    socket.create_connection, listener.getsockname(), patient(COMMAND_S)
                ).close()
        assert made.counters()[SENT] == connections
        yield made


@pytest.fixture
def pair() -> Iterator[tuple[Namespace, Namespace]]:
    """Two namespaces, with one and with two connections."""
    if os.geteuid() != 0:
        pytest.skip("making a network namespace takes root")
    with contextlib.ExitStack() as opened:
        try:
            yield opened.enter_context(namespace_with(1)), opened.enter_context(namespace_with(2))
        except LabError as error:
            pytest.skip(f"network namespaces cannot be made here: {error}")


@contextlib.contextmanager
def started(*words: str) -> Iterator[subprocess.Popen[str]]:
    """A command that has said `living`."""
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as made:
        assert made.stdout is not None
        assert made.stdout.readline() == "living\n"
        yield made
        made.kill()


@contextlib.contextmanager
def process_in(
    namespace: Namespace, then: Namespace | None = None
) -> Iterator[subprocess.Popen[str]]:
    """A process that lives there; told a line, it ends, or moves to another one and says so."""
    move = f"exec ip netns exec {then.name} sh -c 'echo moved; read line'" if then else "exit"
    script = f"echo living; read line; {move}"
    with started("ip", "netns", "exec", namespace.name, "sh", "-c", script) as made:
        yield made


def forbid_search(monkeypatch: pytest.MonkeyPatch) -> None:
    def search() -> dict[int, list[int]]:
        raise AssertionError("every process was looked at")

    monkeypatch.setattr(netns, "pids_by_namespace", search)


def test_each_namespace_has_its_own_counters(pair: tuple[Namespace, Namespace]) -> None:
    found = CounterReader().read()
    assert [found[one.inode][SENT] for one in pair] == [1, 2]
    assert netns.own_netns() in found


def test_namespaces_with_a_name_are_read_by_it(
    pair: tuple[Namespace, Namespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_search(monkeypatch)
    found = CounterReader().read([one.inode for one in pair])
    assert {inode: counters[SENT] for inode, counters in found.items()} == {
        pair[0].inode: 1,
        pair[1].inode: 2,
    }


def test_one_without_a_name_is_read_through_a_process_known_to_live_there(
    pair: tuple[Namespace, Namespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = CounterReader()
    with process_in(pair[1]):
        pair[1].close()
        everything = reader.read()
        forbid_search(monkeypatch)
        found = reader.read([pair[1].inode, netns.own_netns()])
    assert found[pair[1].inode][SENT] == everything[pair[1].inode][SENT] == 2
    assert set(found) == {pair[1].inode, netns.own_netns()}


def test_where_the_process_has_ended_another_one_is_looked_for(
    pair: tuple[Namespace, Namespace],
) -> None:
    reader = CounterReader()
    with process_in(pair[1]) as first:
        pair[1].close()
        reader.read()
        script = "echo living; read line"
        with started("nsenter", f"--net=/proc/{first.pid}/ns/net", "sh", "-c", script):
            first.communicate("end\n", timeout=patient(COMMAND_S))
            assert reader.read([pair[1].inode])[pair[1].inode][SENT] == 2


def test_a_process_that_has_moved_is_no_way_into_where_it_was(
    pair: tuple[Namespace, Namespace],
) -> None:
    reader = CounterReader()
    with process_in(pair[1], then=pair[0]) as moving:
        pair[1].close()
        assert reader.read()[pair[1].inode][SENT] == 2
        assert moving.stdin is not None
        assert moving.stdout is not None
        moving.stdin.write("move\n")
        moving.stdin.flush()
        assert moving.stdout.readline() == "moved\n"
        assert reader.read([pair[1].inode]) == {}


def test_what_was_read_belongs_to_the_namespace_whose_cookie_is_with_it(
    pair: tuple[Namespace, Namespace],
) -> None:
    """An inode number may be another namespace's by the next reading."""
    cookies = [one.run(own_cookie) for one in pair]
    if not all(cookies):
        pytest.skip("this kernel has no SO_NETNS_COOKIE")
    assert cookies[0] != cookies[1] != own_cookie()
    by_name = living_of(CounterReader().read([one.inode for one in pair]))
    assert [by_name[one.inode] for one in pair] == cookies
    with process_in(pair[1]):
        pair[1].close()
        everything = living_of(CounterReader().read())
    assert everything[pair[1].inode] == cookies[1]
    assert everything[netns.own_netns()] == own_cookie()


def test_a_namespace_that_may_not_be_entered_is_read_without_its_cookie(
    pair: tuple[Namespace, Namespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> dict[str, int]:
        raise PermissionError

    monkeypatch.setattr(netns, "inside", refused)
    with process_in(pair[1]):
        found = CounterReader().read()
    assert found[pair[1].inode][SENT] == 2
    assert pair[1].inode not in living_of(found)
