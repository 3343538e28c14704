"""Faults of the network, each undone when its context ends."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from typing import TYPE_CHECKING

from lab.errors import LabError, LabTimeoutError
from lab.network.topology import INTERFACE
from lab.patience import COMMAND_S, patient

if TYPE_CHECKING:
    from lab.network.topology import Namespace

HELD_BYTES = 16 << 20


def ack_rule(port: int) -> tuple[str, ...]:
    """A rule that matches bare ACKs to the server, but no segment with data (PSH) or FIN."""
    return ("-p", "tcp", "--dport", str(port), "--tcp-flags", "ALL", "ACK")


def syn_rule(port: int) -> tuple[str, ...]:
    """The clients' SYNs."""
    return ("-p", "tcp", "--dport", str(port), "--syn")


def repeated_syn_rule(port: int) -> tuple[str, ...]:
    """The clients' SYNs but the first from each address and port; the kernel repeats them by time.

    For the chain OUTPUT of the clients' own namespace.
    """
    allowed_once = "--hashlimit-above 1/hour --hashlimit-burst 1 --hashlimit-htable-expire 3600000"
    by_client = "-m hashlimit --hashlimit-name lab-syns --hashlimit-mode srcip,srcport"
    return (*syn_rule(port), *by_client.split(), *allowed_once.split())


def no_syn_rule(port: int) -> tuple[str, ...]:
    """Whatever comes to the server but SYNs: ACKs, data, the end."""
    return ("-p", "tcp", "--dport", str(port), "!", "--syn")


def synack_rule(port: int) -> tuple[str, ...]:
    """The server's SYN-ACKs, for the client's side."""
    return ("-p", "tcp", "--sport", str(port), "--tcp-flags", "SYN,ACK", "SYN,ACK")


@contextlib.contextmanager
def dropping(
    namespace: Namespace, rule: tuple[str, ...], family: int, chain: str = "INPUT"
) -> Iterator[None]:
    """Drop what arrives in the namespace and matches an iptables rule, while the context lasts.

    With the chain OUTPUT what the namespace sends: nobody else ever sees it.
    """
    program = "iptables" if family == 4 else "ip6tables"
    namespace.command(program, "-w", "-A", chain, *rule, "-j", "DROP")
    try:
        yield
    finally:
        namespace.command(program, "-w", "-D", chain, *rule, "-j", "DROP")


@contextlib.contextmanager
def held_back(namespace: Namespace) -> Iterator[None]:
    """Hold what the namespace sends; when the context ends it goes out in one batch.

    A virtual machine batches packets like this: all SYN-ACKs arrive at once, and so do the ACKs
    they draw. The queueing discipline `plug` passes nothing on until told to (plug_dequeue).

    The process that lets go is started before anything is held: to start one takes long.
    """
    plug = f"dev {INTERFACE} root plug"
    letting_go = namespace.popen(
        ["tc", "-batch", "-"], stdin=subprocess.PIPE, stderr=subprocess.PIPE
    )
    with letting_go:
        namespace.command("tc", *f"qdisc add {plug} limit {HELD_BYTES}".split())
        try:
            yield
        finally:
            release = f"qdisc change {plug} release_indefinite\n"
            said = _finished(letting_go, release)
    if letting_go.returncode != 0:
        raise LabError(f"`{release.strip()}` failed", " ".join(said.split()), "see man tc")


def _finished(process: subprocess.Popen[bytes], text: str) -> str:
    """What it complains of, given this text as all its input."""
    limit_s = patient(COMMAND_S)
    try:
        return process.communicate(text.encode(), limit_s)[1].decode()
    except subprocess.TimeoutExpired as error:
        process.kill()
        raise LabTimeoutError(str(process.args), limit_s, "still running") from error
