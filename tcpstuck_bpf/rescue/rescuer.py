"""Carries out the planner's plans: looks clients up in the kernel's tables, sends, and reports.

`planner` decides, `synack` makes the packet, and `raw_socket` sends it; this module connects them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

from tcpstuck_bpf.handshake.flow import FlowReport
from tcpstuck_bpf.model import (
    ATTEMPT_NOT_SENT,
    ATTEMPT_SENT,
    SECOND_NS,
    Attempt,
    Event,
    FourTuple,
    Handshake,
    HandshakeId,
    Rescue,
)
from tcpstuck_bpf.rescue.planner import Plan, Rescuer
from tcpstuck_bpf.synack import is_synack_of, synack_packet

KNOWN_FOR_NS = 3600 * SECOND_NS
"""How long a completed handshake keeps a client's address known to a listener."""


class RescueSource(Protocol):
    """The entries of the kernel's tables about a client."""

    def handshake(self, four_tuple: FourTuple) -> Handshake | None:
        """The current entry of the awaiting-ACK table; None if there is none."""

    def synack(self, four_tuple: FourTuple) -> bytes | None:
        """The TCP segment of the last SYN-ACK with a cookie; None if it was not kept."""

    def last_completion_ns(self, four_tuple: FourTuple) -> int | None:
        """Time of the address's last completed handshake with that listener; None if none."""


def _progress(entry: Handshake) -> tuple[int, ...]:
    segments = (entry.syn_count, entry.acks_dropped, entry.acks_filtered)
    return (entry.first_syn_ns, *segments, entry.ending)


class Sender(Protocol):
    """Sends packets; the real one is `raw_socket.Resender`."""

    def send(self, four_tuple: FourTuple, packet: bytes) -> None:
        """Send a packet to a 4-tuple's client, in its namespace. Raises OSError."""

    def close_old(self) -> None:
        """Close what has been open for some seconds."""

    def close(self) -> None:
        """Close everything; nothing more will be sent."""


class Rescuing:
    """The rescue of one run."""

    def __init__(
        self,
        rescuer: Rescuer,
        source: RescueSource,
        sender: Sender,
        clock_ns: Callable[[], int],
        *,
        dry_run: bool,
    ) -> None:
        self._rescuer = rescuer
        self._source = source
        self._sender = sender
        self._clock_ns = clock_ns
        self._dry_run = dry_run
        self._left_alone: dict[str, int] = {}

    @property
    def due_ns(self) -> int | None:
        """Latest time for the next call of `act`; None if there is nothing to do."""
        return self._rescuer.due_ns

    def take_in(self, events: Iterable[Event], reports: Iterable[FlowReport]) -> None:
        """Take new events and reports; events come before the reports of the same moment."""
        for event in events:
            self._rescuer.observe(event)
        for report in reports:
            self._rescuer.report(report)

    def act(self) -> Rescue | None:
        """Repeat the SYN-ACKs that are due; None if nothing was sent and no count changed."""
        now_ns = self._clock_ns()
        plans = self._rescuer.plan(now_ns, self._is_known)
        attempts = tuple(map(self._attempt, plans))
        self._sender.close_old()
        self._rescuer.attempted(attempts)
        unanswered = tuple(self._rescuer.unanswered())
        left_alone = dict(self._rescuer.left_alone)
        if not attempts and not unanswered and left_alone == self._left_alone:
            return None
        self._left_alone = left_alone
        return Rescue(attempts, unanswered, left_alone)

    def close(self) -> None:
        """Close the sender; nothing more will be sent."""
        self._sender.close()

    def _is_known(self, four_tuple: FourTuple) -> bool:
        completed_ns = self._source.last_completion_ns(four_tuple)
        return completed_ns is not None and self._clock_ns() - completed_ns < KNOWN_FOR_NS

    def _attempt(self, plan: Plan) -> Attempt:
        # Taken before sending: on a veth pair the answer has arrived when sendto() returns.
        begun_ns = self._clock_ns()
        outcome = self._repeat(plan.handshake_id, plan.handshake)
        return Attempt(plan.handshake_id, begun_ns, plan.number, outcome)

    def _repeat(self, handshake_id: HandshakeId, handshake: Handshake) -> str:
        four_tuple = handshake_id.four_tuple
        # The client may have sent data: its event may be lost or still unread.
        now = self._source.handshake(four_tuple)
        if now is None or _progress(now) != _progress(handshake):
            return "failed: its handshake has changed since"
        segment = self._source.synack(four_tuple)
        if segment is None:
            return "failed: the SYN-ACK was not kept"
        if not is_synack_of(segment, handshake, four_tuple):
            return "failed: the SYN-ACK that was kept belongs to another handshake"
        if self._dry_run:
            return ATTEMPT_NOT_SENT
        try:
            self._sender.send(four_tuple, synack_packet(four_tuple, segment))
        except OSError as error:
            return f"failed: {error.strerror or error}"
        return ATTEMPT_SENT
