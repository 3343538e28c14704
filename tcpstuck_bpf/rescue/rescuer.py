"""Acts on the rescuer's plans: asks the kernel's tables, sends, and says what was done.

The policy is `rescue`, the packet is `synack`, the socket is `resend`; here they meet the source.
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
"""How long a completed handshake makes a client's address known to a listener."""


class RescueSource(Protocol):
    """What the kernel's tables tell about a client."""

    def handshake(self, four_tuple: FourTuple) -> Handshake | None:
        """The entry of the awaiting-ACK table as it is now."""

    def synack(self, four_tuple: FourTuple) -> bytes | None:
        """The TCP segment of the last SYN-ACK with a cookie."""

    def last_completion_ns(self, four_tuple: FourTuple) -> int | None:
        """When a client of that address last completed a handshake with that listener."""


def _progress(entry: Handshake) -> tuple[int, ...]:
    segments = (entry.syn_count, entry.acks_dropped, entry.acks_filtered)
    return (entry.first_syn_ns, *segments, entry.ending)


class Sender(Protocol):
    """The way out; `resend.Resender` is the real one."""

    def send(self, four_tuple: FourTuple, packet: bytes) -> None:
        """Send a packet to a 4-tuple's client, in its namespace. Raises OSError."""

    def close_old(self) -> None:
        """Let go of what has been open for some seconds."""

    def close(self) -> None:
        """Nothing more is to be sent."""


class Rescuing:
    """One run's rescue."""

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
        """When `act` has something to do at the latest, if anything."""
        return self._rescuer.due_ns

    def take_in(self, events: Iterable[Event], reports: Iterable[FlowReport]) -> None:
        """What is new; the events of a moment before its reports."""
        for event in events:
            self._rescuer.observe(event)
        for report in reports:
            self._rescuer.report(report)

    def act(self) -> Rescue | None:
        """Repeat the SYN-ACKs whose time has come; None where there is nothing to tell."""
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
        """Nothing more is to be sent."""
        self._sender.close()

    def _is_known(self, four_tuple: FourTuple) -> bool:
        completed_ns = self._source.last_completion_ns(four_tuple)
        return completed_ns is not None and self._clock_ns() - completed_ns < KNOWN_FOR_NS

    def _attempt(self, plan: Plan) -> Attempt:
        # Before the packet leaves: on a veth pair the answer is here when sendto() returns.
        begun_ns = self._clock_ns()
        outcome = self._repeat(plan.handshake_id, plan.handshake)
        return Attempt(plan.handshake_id, begun_ns, plan.number, outcome)

    def _repeat(self, handshake_id: HandshakeId, handshake: Handshake) -> str:
        four_tuple = handshake_id.four_tuple
        # An event that was lost, or is still on its way, may be of data that the client sent.
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
