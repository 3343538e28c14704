"""What each side's recording knows of its connections, by the wall clock of its host. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from tcpstuck_bpf.analysis import Analysis
from tcpstuck_bpf.client.analysis import ClientAnalysis
from tcpstuck_bpf.client.facts import ClientSocket, Owners
from tcpstuck_bpf.client.waits import Change
from tcpstuck_bpf.client.words import told
from tcpstuck_bpf.judge.verdict import Finding
from tcpstuck_bpf.model import FourTuple, HandshakeId
from tcpstuck_bpf.steps import Advanced, Step

Ends = tuple[bytes, int, bytes, int]
"""Addresses and ports: a connection without its network namespace, which differs at both ends."""


def ends_of(who: FourTuple) -> Ends:
    """The addresses and ports of a connection, the client's first."""
    return who.client_address, who.client_port, who.server_address, who.server_port


class ServerHandshake(NamedTuple):
    """A handshake that the server's side reported. Times are ns since the epoch."""

    finding: Finding
    """The last one on it."""
    first_syn_ns: int
    last_syn_ns: int
    stuck: bool
    """Whether the client waited for a server without a record of it when the recording ended."""

    @property
    def ends(self) -> Ends:
        """Addresses and ports."""
        return ends_of(self.finding.four_tuple)


class ClientConnection(NamedTuple):
    """A connection that the client's side reported, or that waits at its end."""

    socket: ClientSocket
    owners: Owners
    established_ns: int
    """Nanoseconds since the epoch."""
    waited_ns: int
    """Time without a byte, until the last verdict or the end of the recording."""
    waits: bool
    """Whether it waited when the recording ended."""
    verdict: str | None
    """The last one; None if it was too young for any."""
    certainty: str | None

    @property
    def ends(self) -> Ends:
        """Addresses and ports."""
        return ends_of(self.socket.four_tuple)


class ServerSide:
    """Takes the steps of the server's side with their findings, after `analysis` took them."""

    def __init__(self, analysis: Analysis) -> None:
        self._analysis = analysis
        self._found: dict[HandshakeId, Finding] = {}
        self._last_syn_ns: dict[HandshakeId, int] = {}

    def take(self, step: Step, findings: list[Finding]) -> None:
        """Take a step."""
        for finding in findings:
            identity = HandshakeId(finding.four_tuple, finding.first_syn_ns)
            if finding.flood_suspected:
                # There may be a hundred thousand of them, and none is shown.
                self._found.pop(identity, None)
            else:
                self._found[identity] = finding
        if not isinstance(step, Advanced):
            return
        for report in self._analysis.reports:
            entry = report.handshake
            identity = HandshakeId(report.four_tuple, entry.first_syn_ns)
            if identity in self._found:
                self._last_syn_ns[identity] = max(entry.first_syn_ns, entry.last_syn_ns)

    def handshakes(self) -> Iterator[ServerHandshake]:
        """The reported handshakes, without the healthy ones and those of a suspected SYN flood."""
        realtime = self._analysis.header.clock.realtime
        for identity, finding in self._found.items():
            if finding.verdict == "completed":
                continue
            last_ns = self._last_syn_ns.get(identity, identity.first_syn_ns)
            stuck = finding.stuck and self._analysis.is_stuck(identity)
            yield ServerHandshake(
                finding, realtime(identity.first_syn_ns), realtime(last_ns), stuck
            )


class ClientSide:
    """Takes the verdicts of the client's side, after `analysis` took the step behind them."""

    def __init__(self, analysis: ClientAnalysis) -> None:
        self._analysis = analysis
        self._last: dict[tuple[int, int], Change] = {}

    def take(self, changes: list[Change]) -> None:
        """Take the verdicts of a step."""
        self._last.update({change.socket.key: change for change in changes})

    def connections(self, end_ns: int) -> Iterator[ClientConnection]:
        """Those reported, and those too young for a verdict that wait at the end.

        `end_ns`: the end of the recording, CLOCK_MONOTONIC.
        """
        realtime = self._analysis.header.clock.realtime
        waiting = {one.socket.key: one for one in self._analysis.waits.waiting()}
        for key, change in self._last.items():
            now = waiting.pop(key, None)
            yield ClientConnection(
                change.socket,
                change.owners if now is None else now.owners,
                realtime(change.time_ns - change.waited_ns),
                change.waited_ns if now is None else now.aged(end_ns).age_ns,
                now is not None,
                change.verdict,
                told(change).certainty,
            )
        for one in waiting.values():
            aged = one.aged(end_ns)
            begun_ns = realtime(end_ns - aged.age_ns)
            yield ClientConnection(one.socket, one.owners, begun_ns, aged.age_ns, True, None, None)
