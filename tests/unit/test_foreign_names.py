"""Names that strangers chose come in as they are, whatever bytes they have."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tcpstuck_bpf.host import netns, ruleset_child
from tcpstuck_bpf.host.kernel_log import warning_of
from tcpstuck_bpf.host.listening_sockets import owners_of
from tcpstuck_bpf.host.ruleset_text import reachable
from tcpstuck_bpf.host.xtables_text import xtables_rules
from tcpstuck_bpf.terminal import printable
from tests.builders import at

OWN_NAME = Path(f"/proc/{os.getpid()}/comm")


@pytest.fixture
def _own_name() -> Iterator[None]:
    # What is read ends with a newline that is not the name's.
    before = OWN_NAME.read_bytes()[:-1]
    yield
    OWN_NAME.write_bytes(before)


@pytest.mark.usefixtures("_own_name")
@pytest.mark.parametrize(
    ("chosen", "shown"),
    [
        (b"\x1b[2J\xff", "\\x1b[2J\\xff"),
        (b" a\rb\n ", " a\\x0db\\x0a "),
        (b"\n\n", "\\x0a\\x0a"),
        ("caf\u00e9".encode(), "caf\u00e9"),
    ],
)
def test_the_name_of_a_process_is_its_own(chosen: bytes, shown: str) -> None:
    OWN_NAME.write_bytes(chosen)
    with socket.socket() as open_here:
        inode = os.fstat(open_here.fileno()).st_ino
        (owner,) = owners_of([inode])[inode]
    assert printable(owner) == f"{shown} (pid {os.getpid()})"


def test_a_comment_of_any_bytes_does_not_hide_the_rules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "iptables-legacy-save"
    program.write_bytes(
        b"#!/bin/sh\nprintf '*filter\\n:INPUT ACCEPT\\n"
        b'-A INPUT -p tcp -m comment --comment "\\377\\033[2J" -j DROP\\nCOMMIT\\n\'\n'
    )
    program.chmod(0o700)
    monkeypatch.setattr(ruleset_child, "find_program", lambda _name: str(program))
    text = ruleset_child._output([program.name])
    (rule,) = reachable(xtables_rules(text, "ip")).rules
    assert (rule.chain, rule.number) == ("INPUT", 1)


def test_a_namespace_of_any_name_has_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(netns, "_NAMED", tmp_path)
    (tmp_path / os.fsdecode(b"\xff\x1b")).symlink_to("/proc/self/ns/net")
    found = netns.names()
    # `host` goes before where this is the host's.
    assert printable(found[netns.own_netns()]) in ("\\xff\\x1b", "host")


def test_a_line_of_the_kernels_log_is_taken_with_any_bytes() -> None:
    record = b"4,1,5,-;TCP: request: Possible SYN flooding on port 25. Sending \xff\x1b cookies.\n"
    warning = warning_of(record, at(0), at(1))
    assert warning is not None
    assert printable(warning.text).endswith("Sending \\xff\\x1b cookies.")
