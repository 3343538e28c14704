"""Why a run may have nothing to see, asked of this machine's own sockets and of made-up ones."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable, Mapping
from typing import Optional

import pytest

from tcpstuck_bpf.host import expectations, netns
from tcpstuck_bpf.host.expectations import MAX_NAMESPACES, doubts
from tcpstuck_bpf.model import TraceFilter

OWN, OTHER = 1, 2
Namespace = tuple[frozenset[int], Optional[int]]


def test_a_port_is_heard_while_its_socket_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        wanted = TraceFilter(ports=(port,), netns=netns.own_netns())
        assert not any("nobody listens" in one for one in doubts(wanted))
    assert doubts(wanted) == (f"nobody listens on port {port}",)


def place(monkeypatch: pytest.MonkeyPatch, namespaces: Mapping[int, Namespace | None]) -> None:
    """Network namespaces with their listening ports and their sysctl; None cannot be entered."""
    here: list[int] = []

    def run_in(inode: int, function: Callable[[], object]) -> object:
        if namespaces[inode] is None:
            raise OSError(errno.EPERM, "not permitted")
        here[:] = [inode]
        return function()

    def own() -> expectations._Seen:
        now = namespaces[here[0]]
        assert now is not None
        return expectations._Seen(*now)

    monkeypatch.setattr(netns, "inodes", lambda: list(namespaces))
    monkeypatch.setattr(netns, "run_in", run_in)
    monkeypatch.setattr(netns, "names", lambda: {OWN: "host"})
    monkeypatch.setattr(expectations, "_own", own)


HEARD: Namespace = (frozenset({3311, 22}), 1)
DEAF: Namespace = (frozenset(), 1)
OFF: Namespace = (frozenset({3311}), 0)


@pytest.mark.parametrize(
    ("namespaces", "wanted", "found"),
    [
        ({OWN: HEARD}, TraceFilter(ports=(3311,)), ()),
        ({OWN: DEAF, OTHER: HEARD}, TraceFilter(ports=(3311,)), ()),
        ({OWN: DEAF, OTHER: HEARD}, TraceFilter(ports=(3311,), netns=OWN), ("nobody", "3311")),
        ({OWN: HEARD}, TraceFilter(ports=(25, 3311, 465)), ("nobody", "ports 25, 465")),
        ({OWN: DEAF}, TraceFilter(), ("nobody", "any TCP port")),
        ({OWN: OFF}, TraceFilter(ports=(3311,)), ("tcp_syncookies=0", "in host")),
        ({OWN: HEARD, OTHER: OFF}, TraceFilter(), ("tcp_syncookies=0", "in 2:")),
        ({OWN: OFF}, TraceFilter(ports=(25,)), ("nobody", "25")),
        ({OWN: DEAF, OTHER: None}, TraceFilter(ports=(25,)), ("nobody", "could be looked at")),
        ({OWN: None}, TraceFilter(ports=(25,)), ()),
        ({OWN: (frozenset({25}), None)}, TraceFilter(ports=(25,)), ()),
    ],
)
def test_what_is_in_doubt(
    monkeypatch: pytest.MonkeyPatch,
    namespaces: Mapping[int, Namespace | None],
    wanted: TraceFilter,
    found: tuple[str, ...],
) -> None:
    place(monkeypatch, namespaces)
    sentences = doubts(wanted)
    assert len(sentences) == bool(found)
    assert all(words in sentences[0] for words in found)


def test_of_thousands_of_namespaces_few_are_looked_at_and_it_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    place(monkeypatch, dict.fromkeys(range(1, 3 * MAX_NAMESPACES), DEAF))
    entered: list[int] = []
    run_in = netns.run_in
    monkeypatch.setattr(
        netns, "run_in", lambda inode, function: (entered.append(inode), run_in(inode, function))[1]
    )
    (sentence,) = doubts(TraceFilter(ports=(3311,)))
    assert len(entered) == MAX_NAMESPACES
    assert "not every network namespace could be looked at" in sentence
