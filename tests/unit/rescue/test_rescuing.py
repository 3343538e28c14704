"""From a plan to a packet: what is asked of the kernel's tables, sent, and told."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from tcpstuck_bpf.handshake.flow import State
from tcpstuck_bpf.model import Ending, FourTuple, Handshake, Rescue
from tcpstuck_bpf.rescue.candidate import NOT_KNOWN
from tcpstuck_bpf.rescue.planner import Rescuer
from tcpstuck_bpf.rescue.policy import RescuePolicy
from tcpstuck_bpf.rescue.rescuer import KNOWN_FOR_NS, Rescuing
from tests.builders import (
    ack_dropped,
    ack_filtered,
    at,
    correlator,
    ended,
    four_tuple,
    handshake,
    identity,
    reports,
    sweep,
)

ENTRY = handshake()
WHO = four_tuple()


def own_segment(sequence: int = ENTRY.cookie_isn) -> bytes:
    """The client's SYN-ACK without options, as the kernel's table keeps it."""
    numbers = (sequence, ENTRY.client_isn + 1, 5 << 4, 0x12, 65_160, 0, 0)
    header = struct.pack("!HHIIBBHHH", WHO.server_port, WHO.client_port, *numbers)
    return header + bytes(40)


class Kernel:
    """The tables that a rescue asks, and the wire."""

    def __init__(self) -> None:
        self.now_ns = at(3)
        self.entries = {WHO: ENTRY}
        self.synacks = {WHO: own_segment()}
        self.completed_ns: dict[FourTuple, int] = {WHO: at(-60)}
        self.sent: list[tuple[FourTuple, bytes]] = []
        self.refusal: OSError | None = None
        self.old_closed = 0

    def handshake(self, four_tuple: FourTuple) -> Handshake | None:
        return self.entries.get(four_tuple)

    def synack(self, four_tuple: FourTuple) -> bytes | None:
        return self.synacks.get(four_tuple)

    def last_completion_ns(self, four_tuple: FourTuple) -> int | None:
        return self.completed_ns.get(four_tuple)

    def send(self, four_tuple: FourTuple, packet: bytes) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.sent.append((four_tuple, packet))
        self.now_ns += 1_000

    def close_old(self) -> None:
        self.old_closed += 1

    def close(self) -> None:
        """Nothing is open."""


def rescue_of(kernel: Kernel, *, dry_run: bool = False, **policy: Any) -> Rescue | None:
    """What is done for one silent client."""
    rescuing = Rescuing(
        Rescuer(RescuePolicy(**policy)), kernel, kernel, lambda: kernel.now_ns, dry_run=dry_run
    )
    (report,) = reports([sweep(at(3), ENTRY)], at(3), correlator())
    assert report.state is State.SILENT
    rescuing.take_in((), [report])
    return rescuing.act()


def outcomes(rescue: Rescue | None) -> list[str]:
    assert rescue is not None
    assert [attempt.handshake for attempt in rescue.attempts] == [identity(ENTRY)]
    return [attempt.outcome for attempt in rescue.attempts]


def test_the_time_of_an_attempt_is_before_any_answer() -> None:
    kernel = Kernel()
    begun_ns = kernel.now_ns
    rescue = rescue_of(kernel)
    assert rescue is not None
    assert rescue.attempts[0].time_ns == begun_ns < kernel.now_ns


def test_a_known_client_gets_its_synack() -> None:
    kernel = Kernel()
    assert outcomes(rescue_of(kernel)) == ["sent"]
    ((who, packet),) = kernel.sent
    assert who == WHO
    assert own_segment()[:16] in packet
    assert kernel.old_closed


@pytest.mark.parametrize("age_ns", [None, KNOWN_FOR_NS])
def test_who_is_not_known_or_no_more_is_left_alone(age_ns: int | None) -> None:
    kernel = Kernel()
    kernel.completed_ns = {} if age_ns is None else {WHO: kernel.now_ns - age_ns}
    assert rescue_of(kernel) == Rescue((), (), {NOT_KNOWN: 1})
    assert kernel.sent == []


def test_a_dry_run_says_so_and_sends_nothing() -> None:
    kernel = Kernel()
    assert outcomes(rescue_of(kernel, dry_run=True)) == ["would send"]
    assert kernel.sent == []


@pytest.mark.parametrize(
    "entries",
    [
        pytest.param({}, id="gone"),
        pytest.param({WHO: ack_dropped(ENTRY, at(2.9))}, id="an ACK whose event was lost"),
        pytest.param({WHO: ack_filtered(ENTRY, at(2.9))}, id="data that a rule dropped"),
        pytest.param({WHO: ended(ENTRY, Ending.RESET, at(2.9))}, id="ended"),
        pytest.param({WHO: handshake(at(2.9))}, id="another handshake"),
    ],
)
def test_nothing_is_sent_where_more_has_happened_than_was_told(
    entries: dict[FourTuple, Handshake],
) -> None:
    kernel = Kernel()
    kernel.entries = entries
    (outcome,) = outcomes(rescue_of(kernel))
    assert outcome.startswith("failed: ")
    assert kernel.sent == []


@pytest.mark.parametrize(
    "kept", [{}, {WHO: own_segment(sequence=7)}, {WHO: b""}], ids=["none", "another's", "empty"]
)
def test_nothing_but_its_own_synack_is_sent(kept: dict[FourTuple, bytes]) -> None:
    kernel = Kernel()
    kernel.synacks = kept
    (outcome,) = outcomes(rescue_of(kernel))
    assert outcome.startswith("failed: ")
    assert kernel.sent == []


def test_what_the_kernel_refuses_is_told_in_its_words() -> None:
    kernel = Kernel()
    kernel.refusal = PermissionError(1, "Operation not permitted")
    assert outcomes(rescue_of(kernel)) == ["failed: Operation not permitted"]


def test_where_nothing_is_to_be_done_nothing_is_told() -> None:
    kernel = Kernel()
    rescuing = Rescuing(
        Rescuer(RescuePolicy()), kernel, kernel, lambda: kernel.now_ns, dry_run=False
    )
    assert rescuing.act() is None
    assert rescuing.due_ns is None
