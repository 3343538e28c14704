"""Network faults; each is removed when its context ends."""

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
    """Match bare ACKs to the server, but no segment with data (PSH) or FIN."""
    return ("-p", "tcp", "--dport", str(port), "--tcp-flags", "ALL", "ACK")


def syn_rule(port: int) -> tuple[str, ...]:
    """Match the clients' SYNs."""
    return ("-p", "tcp", "--dport", str(port), "--syn")


def repeated_syn_rule(port: int) -> tuple[str, ...]:
    """Match the clients' SYN retransmissions: every SYN but the first of each address and port.

    The rule is for the chain OUTPUT in the clients' namespace.
    """
    allowed_once = "--hashlimit-above 1/hour --hashlimit-burst 1 --hashlimit-htable-expire 3600000"
    by_client = "-m hashlimit --hashlimit-name lab-syns --hashlimit-mode srcip,srcport"
    return (*syn_rule(port), *by_client.split(), *allowed_once.split())


def no_syn_rule(port: int) -> tuple[str, ...]:
    """Match every segment to the server except SYNs: ACK, data, FIN, RST."""
    return ("-p", "tcp", "--dport", str(port), "!", "--syn")


def synack_rule(port: int) -> tuple[str, ...]:
    """Match the server's SYN-ACKs, at the client."""
    return ("-p", "tcp", "--sport", str(port), "--tcp-flags", "SYN,ACK", "SYN,ACK")


@contextlib.contextmanager
def dropping(
    namespace: Namespace, rule: tuple[str, ...], family: int, chain: str = "INPUT"
) -> Iterator[None]:
    """Drop packets that match an iptables rule in a namespace while the context lasts.

    The chain INPUT drops received packets. The chain OUTPUT drops sent packets before they reach
    the wire.
    """
    program = "iptables" if family == 4 else "ip6tables"
    namespace.command(program, "-w", "-A", chain, *rule, "-j", "DROP")
    try:
        yield
    finally:
        namespace.command(program, "-w", "-D", chain, *rule, "-j", "DROP")


@contextlib.contextmanager
def held_back(namespace: Namespace) -> Iterator[None]:
    """Hold the packets that a namespace sends; when the context ends, they leave in one batch.

    Virtual machines batch packets in this way: all SYN-ACKs arrive at once, and so do the ACKs that
    answer the SYN-ACKs. The queueing discipline `plug` passes no packet on until its release
    (plug_dequeue).

    The process that releases the queue starts before any packet is held, because starting a process
    takes long.
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
    """Send `text` as the process's whole input; returns its standard error."""
    limit_s = patient(COMMAND_S)
    try:
        return process.communicate(text.encode(), limit_s)[1].decode()
    except subprocess.TimeoutExpired as error:
        process.kill()
        raise LabTimeoutError(str(process.args), limit_s, "still running") from error
