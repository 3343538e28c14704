"""Where on its host an ACK died: one client stuck by one fault, named as whoever dropped names it.

The oracle is the fault itself: its rule as nft or iptables lists it, its own packet counter, the
server's `ss`. The ACK itself is sound: test_data_lost has the same one connect.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

from lab.network.drop_sites import (
    DROP_SITES,
    Fault,
    Spot,
    has_bpf_security_module,
    security_module,
    wrong_checksums,
)
from lab.network.faults import ack_rule, dropping
from lab.network.segments import IPPROTO_TCP
from lab.network.syns import flood
from lab.network.topology import SILENT_SOURCES, source_addresses
from lab.records import FourTuple
from lab.scenarios.scene import PORT
from lab.scenarios.tracer import Tracer
from tcpstuck_bpf import model
from tcpstuck_bpf.kernel import attach_plan, open_source
from tcpstuck_bpf.kernel.running_kernel import RunningKernel
from tests.kernel.conftest import be_greeted, summary_of, told_by, tracing
from tests.kernel.handmade import Client, Site, site, told

pytestmark = pytest.mark.kernel

CASES = [(name, family) for name, place in DROP_SITES.items() for family in place.families]
DATA = b"anyone there?"
_HOP_BY_HOP, _FRAGMENT, _DESTINATION = 0, 44, 60
_PADDING = bytes((1, 4, 0, 0, 0, 0))
"""PadN: six bytes of options that say nothing (RFC 8200, 4.2)."""
IPV6_EXTENSIONS = {
    "hop-by-hop": (_HOP_BY_HOP, bytes((IPPROTO_TCP, 0)) + _PADDING),
    "destination": (_DESTINATION, bytes((IPPROTO_TCP, 0)) + _PADDING),
    "both": (
        _HOP_BY_HOP,
        bytes((_DESTINATION, 0)) + _PADDING + bytes((IPPROTO_TCP, 0)) + _PADDING,
    ),
    "only fragment": (_FRAGMENT, bytes((IPPROTO_TCP, 0, 0, 0, 1, 2, 3, 4))),
}
"""The number of the first header, and the headers."""
STORM = 4000
STORM_PORT = 4000
HEALTHY = 20
WATCHED = ("-p", str(PORT))
UNSEEN = 20
DIFFERENT_CALLERS = ("nft-prerouting", "nft-input", "rp-filter", "tc-ingress", "generic-xdp")


@contextlib.contextmanager
def losing_its_ack(
    where: Site,
    place: str,
    client: Client,
    extensions: tuple[int, bytes] = (IPPROTO_TCP, b""),
) -> Iterator[Fault]:
    """A client whose SYN was answered before the fault came, and whose ACK meets it."""
    client.connect()
    server = where.topology.server
    with DROP_SITES[place].make(Spot(server, where.listener, PORT, where.family)) as fault:
        count = fault.packets
        assert count is None or count() == 0
        client.send(0, extensions=extensions)
        if count is not None:
            where.watch.until(lambda: count() == 1, f"an ACK to die at {place}")
        assert where.known_to_server() == set()
        yield fault


def assert_named(drop: dict[str, Any], fault: Fault) -> None:
    """The drop as the one who dropped has it; a kernel before 5.17 has no reasons."""
    assert drop["reason"] in (fault.reason, fault.vague_reason, None)
    without_reason = fault.what_without_reason or fault.what
    assert drop["what"] == (fault.what if drop["reason"] else without_reason)
    assert drop["place"]
    if fault.named:
        assert {key: drop[key] for key in fault.named} == dict(fault.named)
        assert drop["rule"] in fault.rules
        assert drop["rule_candidates"] == []


def assert_refusal_named(drop: dict[str, Any], fault: Fault) -> None:
    """An ACK that the cookie's check dropped; from 6.9 on it frees the packet itself, and says why.

    Until then its caller does, which does not know.
    """
    assert drop["counter"] == "SyncookiesRecv"
    if drop["place"].startswith("cookie_v"):
        assert (drop["reason"], drop["what"]) == (fault.reason, fault.what)
    else:
        assert drop["place"].startswith("tcp_v")
        assert drop["reason"] in ("NOT_SPECIFIED", None)
        assert drop["what"] is None


@pytest.fixture(params=CASES, ids=[f"{name}-ipv{family}" for name, family in CASES])
def place(request: pytest.FixtureRequest) -> tuple[str, int]:
    name, family = request.param
    return str(name), int(family)


def test_the_place_is_named(either_tracer: Tracer, place: tuple[str, int]) -> None:
    name, family = place
    with site(family) as where:
        client = Client(where)
        with losing_its_ack(where, name, client) as fault:
            line = told(either_tracer, where.netns, client.four_tuple, fault.verdict)
        assert line["stuck"]
        if fault.verdict == "ack-filtered":
            assert_named(line["drop"], fault)
        else:
            assert_refusal_named(line["drop"], fault)


def test_a_refused_ack_that_comes_after_the_time_out_is_named(either_tracer: Tracer) -> None:
    """Its event goes out before the packet is freed, and the client was reported before."""
    with site(4) as where:
        client = Client(where)
        client.connect()
        told(either_tracer, where.netns, client.four_tuple, "ack-missing")
        spot = Spot(where.topology.server, where.listener, PORT, where.family)
        with DROP_SITES["no-route"].make(spot) as fault:
            client.send(0)
            line = told(either_tracer, where.netns, client.four_tuple, fault.verdict)
        assert where.known_to_server() == set()
        assert line["updates"] == "ack-missing"
        assert_refusal_named(line["drop"], fault)


@pytest.mark.parametrize("family", [4, 6])
def test_a_security_module_is_named(either_tracer: Tracer, family: int) -> None:
    if not has_bpf_security_module():
        pytest.skip("no BPF program may be a security module here (CONFIG_BPF_LSM, lsm=)")
    with site(family) as where:
        client = Client(where)
        client.connect()
        with security_module(Spot(where.topology.server, where.listener, PORT, family)) as fault:
            client.send(0)
            line = told(either_tracer, where.netns, client.four_tuple, fault.verdict)
        assert where.known_to_server() == set()
        assert_refusal_named(line["drop"], fault)


@pytest.mark.parametrize("place", ["nft-input", "no-route"])
@pytest.mark.parametrize("extensions", IPV6_EXTENSIONS.values(), ids=IPV6_EXTENSIONS)
def test_headers_before_tcps_hide_no_ack(
    either_tracer: Tracer, extensions: tuple[int, bytes], place: str
) -> None:
    with site(6) as where:
        client = Client(where)
        with losing_its_ack(where, place, client, extensions) as fault:
            line = told(either_tracer, where.netns, client.four_tuple, fault.verdict)
        assert line["stuck"]


@pytest.mark.parametrize("payload", [b"", bytes(500)], ids=["bare", "long"])
@pytest.mark.parametrize("family", [4, 6])
def test_a_wrong_checksum_is_named(either_tracer: Tracer, family: int, payload: bytes) -> None:
    """For a long segment tcp_v4_do_rcv finds the wrong checksum, not tcp_v4_rcv."""
    with site(family) as where:
        client = Client(where)
        client.connect()
        before = wrong_checksums(where.topology.server)
        client.send(0, payload, wrong_by=1)
        where.watch.until(
            lambda: wrong_checksums(where.topology.server) == before + 1, "the wrong checksum"
        )
        assert where.known_to_server() == set()
        line = told(either_tracer, where.netns, client.four_tuple, "ack-filtered")
        assert line["drop"]["reason"] in ("TCP_CSUM", None)
        assert line["drop"]["what"] == ("checksum" if line["drop"]["reason"] else "tcp")


@pytest.mark.parametrize("family", [4, 6])
def test_a_full_accept_queue_is_named(either_tracer: Tracer, family: int) -> None:
    """A backlog of 0 has room for one connection."""
    with site(family, backlog=0) as where:
        first, second = Client(where), Client(where)
        for client in (first, second):
            client.connect()
        overflows = where.topology.server.counters()["ListenOverflows"]
        for client in (first, second):
            client.send(0)
        where.watch.until(
            lambda: where.topology.server.counters()["ListenOverflows"] == overflows + 1,
            "the overflow",
        )
        assert where.known_to_server() == {first.port}
        line = told(either_tracer, where.netns, second.four_tuple, "accept-queue-full")
        assert line["drop"]["counter"] == "ListenOverflows"


@pytest.mark.parametrize("mode", ["fentry", "kprobe"])
def test_whose_syn_came_before_the_tracing_is_told_by_its_ack(mode: str) -> None:
    with site(4, backlog=0) as where:
        first, second, third = (Client(where) for _ in range(3))
        for client in (first, second, third):
            client.connect()
        with tracing((*WATCHED, "--probe-mode", mode)) as (tracer,):
            for client in (first, second, third):
                client.send(0)
            line = told(tracer, where.netns, second.four_tuple, "accept-queue-full")
            assert (line["syn_count"], line["certainty"]) == (0, "likely")
            assert line["drop"]["counter"] == "ListenOverflows"
            assert where.known_to_server() == {first.port}
            told(tracer, where.netns, third.four_tuple, "accept-queue-full")
            # Once there is room, what the client sends connects it.
            served, _ = where.listener.accept()
            served.close()
            third.send(0, DATA)
            assert third.read_by_server(len(DATA)) == DATA
            told(tracer, where.netns, third.four_tuple, "recovered")
        assert first.four_tuple not in {who for _, who, _ in told_by(tracer, where.netns)}


def test_an_ack_that_was_dropped_and_made_good_is_not_accused(either_tracer: Tracer) -> None:
    with site(4) as where:
        mended, stuck = Client(where), Client(where)
        with losing_its_ack(where, "nft-input", mended):
            pass
        mended.send(0, DATA)
        assert mended.read_by_server(len(DATA)) == DATA
        with losing_its_ack(where, "nft-input", stuck):
            told(either_tracer, where.netns, stuck.four_tuple, "ack-filtered")
        verdicts = [
            v for _, who, v in told_by(either_tracer, where.netns) if who == mended.four_tuple
        ]
        # Where this machine took longer than the time-out, it was stuck for a while.
        assert verdicts[-1:] in ([], ["recovered"])


def test_a_packet_where_a_dropped_one_was_is_not_taken_for_it() -> None:
    """The kernel gives the memory of a packet out again at once.

    The one before it was an ACK of a handshake that the tool has not seen, dropped by TCP.
    """
    with site(4, backlog=0) as full, site(4) as where:
        unseen = [Client(full) for _ in range(UNSEEN)]
        for client in unseen:
            client.connect()
        unseen[0].send(0)
        full.watch.until(lambda: full.known_to_server() == {unseen[0].port}, "a full queue")
        seen = [Client(where) for _ in unseen]
        with (
            tracing(WATCHED) as (tracer,),
            dropping(where.topology.server, ack_rule(PORT), where.family),
        ):
            for before, client in zip(unseen, seen):
                client.connect()
                before.send(0)
                client.send(0)
            expected = {client.four_tuple: "ack-filtered" for client in seen}
            assert tracer.await_reported(expected, where.netns)


@pytest.mark.parametrize("rooms", [1, 4])
def test_callers_without_room_are_counted(rooms: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each drop has callers of its own, of which the table keeps one for each value of a hash."""
    monkeypatch.setattr(open_source, "MAX_STACKS", rooms)
    wanted = model.TraceFilter(ports=(PORT,))
    opened = open_source.open_source(model.TraceSettings(trace_filter=wanted))
    with contextlib.closing(opened), site(4) as where:
        for name in DIFFERENT_CALLERS:
            with losing_its_ack(where, name, Client(where)):
                pass
        rows = [row for batch in opened.sweep() for row in batch.rows]
        entries = [row.handshake for row in rows if row.four_tuple.netns == where.netns]
        assert [entry.acks_filtered for entry in entries] == [1] * len(DIFFERENT_CALLERS)
        known = [entry for entry in entries if entry.filter_stack]
        assert 1 <= len(known) <= rooms
        assert len({entry.filter_stack for entry in known}) == len(known)
        for entry in known:
            assert entry.filter_place in opened.stack(entry.filter_stack)
        assert opened.losses()["stacks_unknown"] == len(entries) - len(known)


@pytest.mark.parametrize("typed", [True, False], ids=["typed", "untyped"])
def test_a_drop_is_seen_by_whichever_program_is_loaded(
    typed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without BTF of the kernel's own the cheaper program cannot be loaded."""
    if not typed:
        monkeypatch.setattr(RunningKernel, "tracepoint_type", lambda *_: None)
    wanted = model.TraceFilter(ports=(PORT,))
    opened = open_source.open_source(
        model.TraceSettings(trace_filter=wanted), attach_plan.AttachRequest(why=True)
    )
    with contextlib.closing(opened):
        programs = opened.loaded_programs()
        assert ("packet_freed_typed" in programs) == typed
        assert ("packet_freed" in programs) != typed
        for family in (4, 6):
            places = [name for name in DIFFERENT_CALLERS if family in DROP_SITES[name].families]
            with site(family) as where:
                clients = [Client(where) for _ in places]
                for name, client in zip(places, clients):
                    with losing_its_ack(where, name, client):
                        pass
                rows = [row for batch in opened.sweep() for row in batch.rows]
            # Each client has a port of its own; the namespace's inode number may be used again.
            filtered = {row.four_tuple.client_port: row.handshake.acks_filtered for row in rows}
            assert [filtered[client.port] for client in clients] == [1] * len(places)


@pytest.mark.parametrize("mode", ["fentry", "kprobe"])
def test_a_storm_of_drops_elsewhere_hides_and_accuses_nobody(mode: str) -> None:
    with site(4) as where:
        topology = where.topology
        options = (*WATCHED, "--netns", topology.server.name, "--probe-mode", mode)
        with tracing(options) as (tracer,):
            topology.server.command(
                "nft",
                "add table inet storm; "
                "add chain inet storm drops { type filter hook input priority 0; }; "
                f"add rule inet storm drops tcp dport {STORM_PORT} counter drop",
            )
            source = source_addresses(SILENT_SOURCES[4], 1)[0]
            flow = FourTuple(source, 1024, where.server_ip, STORM_PORT)
            for _ in range(HEALTHY):
                flood(topology.client, flow, STORM // HEALTHY)
                be_greeted(topology, where.listener, where.server_ip)
            listed = topology.server.command("nft", "list", "chain", "inet", "storm", "drops")
            assert f"counter packets {STORM} " in listed
            tracer.stop()
        assert told_by(tracer) == []
        summary = summary_of(tracer)
        assert summary["verdicts"] == {"completed": HEALTHY}
        assert (summary["lost_events"], summary["stuck"]) == (0, 0)
