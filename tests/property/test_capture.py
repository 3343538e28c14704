"""Whatever happens to handshakes: a capture that scapy reads, and no packet that never was."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tcpstuck_bpf.analysis import Analysis
from tcpstuck_bpf.conversions.capture import Capture
from tcpstuck_bpf.judge.verdict import Finding
from tcpstuck_bpf.model import Event, EventKind, Row, Sweep
from tcpstuck_bpf.steps import Advanced, Ended, Observed, Step, Swept
from tests.builders import ACK, RST, SYN, ack_dropped, at, event, handshake, header
from tests.captured import Read, read
from tests.property.test_correlate import TIMES, nonsense_events, nonsense_sweeps, segment_steps
from tests.property.world import World

FLAGS = {SYN: "S", ACK: "A", RST: "R"}
START = header()
LONG = event(
    EventKind.ACK_DROPPED, ack_dropped(handshake(), at(0.1)), at(0.1), payload_length=2**16 - 1
)
scripts = st.lists(
    st.one_of(segment_steps, st.sampled_from(("drain", "sweep"))), min_size=1, max_size=30
)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("capture") / "run.pcapng"


def played(world: World, script: Sequence[tuple[int, str, int] | str]) -> Iterator[Step]:
    """The steps that a run of this script would record."""
    for what in (*script, (0, "nothing", 10_000 * 10**9), "drain", "sweep"):
        if what == "drain":
            yield Observed(tuple(world.table.ring))
            world.table.ring.clear()
        elif what == "sweep":
            yield Swept(world.table.sweep(world.now_ns))
        elif isinstance(what, tuple) and what[1] == "nothing":
            world.now_ns += what[2]
        elif isinstance(what, tuple):
            world.play(*what)
        yield Advanced(world.now_ns)
    yield Ended(world.now_ns, {}, ())


def converted(steps: Iterator[Step], target: Path) -> tuple[list[Read], list[Finding]]:
    analysis = Analysis(START)
    capture = Capture(str(target), analysis, ())
    told: list[Finding] = []
    for step in steps:
        findings = analysis.take(step)
        told += findings
        capture.take(step, findings)
    capture.close()
    return read(target), told


def flag_of(segment: str) -> str:
    if segment.startswith("syn"):
        return FLAGS[SYN]
    return FLAGS[RST] if segment == "reset" else FLAGS[ACK]


@given(scripts, st.lists(st.booleans(), max_size=30))
def test_every_packet_was_played_and_belongs_to_a_finding(
    target: Path, script: list[tuple[int, str, int] | str], lost: list[bool]
) -> None:
    world = World(lost)
    packets, told = converted(played(world, script), target)
    times = [packet.time_ns for packet in packets]
    assert times == sorted(times)
    found = {
        (one.four_tuple.client_ip, one.four_tuple.client_port)
        for one in told
        if one.verdict != "completed"
    }
    true = {
        (START.clock.realtime(time_ns), who.client_ip): (segment, isn)
        for who, segments in world.history._segments.items()
        for time_ns, segment, isn in segments
    }
    for packet in packets:
        client = packet.source if packet.inbound else packet.destination
        assert client in found
        segment, isn = true[packet.time_ns, client[0]]
        if packet.flags == "SA":
            assert (segment, packet.acknowledgement) == ("syn", isn + 1)
        else:
            assert packet.flags == flag_of(segment)
            assert packet.sequence == isn + (packet.flags != "S")
    # Each handshake with a verdict says it once; one without a known packet has none to say it.
    verdicts = [c for packet in packets for c in packet.comments if c.startswith("verdict ")]
    assert len(verdicts) == len({(one.four_tuple, one.first_syn_ns) for one in told})


@given(scripts)
def test_no_packet_is_there_twice(target: Path, script: list[tuple[int, str, int] | str]) -> None:
    packets, _ = converted(played(World(), script), target)
    plain = [packet._replace(comments=(), options=()) for packet in packets]
    assert len(set(plain)) == len(plain)


@example([LONG, Sweep(at(9), (Row(LONG.four_tuple, LONG.handshake),))])
@given(st.lists(st.one_of(nonsense_events, nonsense_sweeps, TIMES), max_size=30))
def test_nonsense_is_converted_too(target: Path, nonsense: list[Event | Sweep | int]) -> None:
    def steps() -> Iterator[Step]:
        for one in nonsense:
            if isinstance(one, int):
                yield Advanced(one)
            else:
                yield Swept(one) if isinstance(one, Sweep) else Observed((one,))
        yield Advanced(2**64 - 1)
        yield Ended(2**64 - 1, {}, ())

    packets, told = converted(steps(), target)
    clients = {(one.four_tuple.client_ip, one.four_tuple.client_port) for one in told}
    assert {p.source if p.inbound else p.destination for p in packets} <= clients
