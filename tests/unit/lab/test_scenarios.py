"""The lab's pure parts: the oracle, segments, readings, the command line."""

from __future__ import annotations

import argparse
import ast
import ipaddress
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6

from lab import patience
from lab.errors import LabError
from lab.network import drop_sites, readings
from lab.network.segments import ACK, RST, SYN, SynTemplate, parse_segment
from lab.network.syns import FIRST_PORT, LAST_PORT, make_syns
from lab.network.topology import LOCAL_SOURCES, SERVER_ADDRESS, SILENT_SOURCES
from lab.records import (
    VERDICTS_OF_STUCK,
    FourTuple,
    Outcome,
    compare,
    endpoint,
    reported_verdicts,
)
from lab.scenarios import play
from lab.scenarios.catalogue import SCENARIOS
from lab.scenarios.catalogue import play as play_scenario
from tcpstuck_bpf.judge import drop_cause
from tcpstuck_bpf.judge.drop_cause import Cause
from tcpstuck_bpf.judge.rules import RULES

NETNS = 4_026_531_999
LOOPBACK = "127.0.0.1"
KEY = FourTuple("10.9.0.2", 40_000, "10.9.0.1", 3311)

ports = st.integers(1, 65_535)
sequence_numbers = st.integers(0, 2**32 - 1)
four_tuples = st.builds(FourTuple, st.just("10.9.0.2"), ports, st.just("10.9.0.1"), st.just(3311))
verdicts = st.sampled_from(["ack-missing", "accept-queue-full", "client-reset", "recovered"])
truths = st.dictionaries(four_tuples, verdicts, max_size=20)


def line_of(key: FourTuple, verdict: str, netns: int = NETNS) -> dict[str, Any]:
    return {"type": "verdict", "netns": netns, "verdict": verdict, **key._asdict()}


def outcome_of(expected: dict[FourTuple, str]) -> Outcome:
    return Outcome("test", "4", NETNS, expected=expected)


def test_what_is_stuck_for_the_oracle_is_stuck_for_the_tool() -> None:
    assert {rule.name for rule in RULES if rule.stuck} == VERDICTS_OF_STUCK


def test_a_place_that_drops_is_called_by_a_word_of_the_tool() -> None:
    """The words of the kernel tests' faults, without a kernel."""
    calls = [
        node
        for node in ast.walk(ast.parse(Path(drop_sites.__file__).read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Fault"
    ]
    named = {node.args[0].value for node in calls if isinstance(node.args[0], ast.Constant)}
    assert len(named) > 5
    assert named <= {cause.what for cause in vars(drop_cause).values() if isinstance(cause, Cause)}


class TestCompare:
    @given(truths)
    def test_the_truth_agrees(self, truth: dict[FourTuple, str]) -> None:
        comparison = compare(outcome_of(truth), [line_of(*item) for item in truth.items()])
        assert comparison.agrees
        assert comparison.stuck_reported == comparison.stuck_expected
        assert comparison.stuck_expected == sum(v in VERDICTS_OF_STUCK for v in truth.values())

    @given(truths, truths)
    def test_every_difference_is_named_once(
        self, truth: dict[FourTuple, str], said: dict[FourTuple, str]
    ) -> None:
        comparison = compare(outcome_of(truth), [line_of(*item) for item in said.items()])
        assert set(comparison.missing) == truth.keys() - said.keys()
        assert set(comparison.extra) == said.keys() - truth.keys()
        assert set(comparison.different) == {
            key for key in truth.keys() & said.keys() if truth[key] != said[key]
        }
        assert comparison.agrees == (truth == said)

    @given(four_tuples)
    def test_a_healthy_connection_may_be_told_or_not(self, key: FourTuple) -> None:
        assert compare(outcome_of({}), [line_of(key, "completed")]).agrees
        assert compare(outcome_of({}), []).agrees

    @given(four_tuples)
    def test_a_stuck_client_called_completed_differs(self, key: FourTuple) -> None:
        comparison = compare(outcome_of({key: "ack-missing"}), [line_of(key, "completed")])
        assert comparison.different == {key: ("ack-missing", "completed")}

    @given(four_tuples, verdicts, verdicts)
    def test_the_last_word_counts_and_other_namespaces_do_not(
        self, key: FourTuple, first: str, last: str
    ) -> None:
        lines = [
            line_of(key, first),
            line_of(key, last),
            line_of(key, "ack-failed", netns=NETNS + 1),
            {"type": "summary"},
        ]
        assert reported_verdicts(lines, NETNS) == {key: last}


def scapy_packet(source: str, destination: str, segment: TCP | UDP) -> bytes:
    header = IPv6 if ":" in source else IP
    return bytes(header(src=source, dst=destination) / segment)


class TestSegments:
    @given(st.sampled_from([4, 6]), ports, sequence_numbers, st.integers(1, 2**21 - 1))
    def test_checksums_are_those_scapy_computes(
        self, family: int, port: int, isn: int, host: int
    ) -> None:
        address = ipaddress.ip_network(SILENT_SOURCES[family])[host % 2000]
        made = SynTemplate(SERVER_ADDRESS[family], 3311).packet(address.packed, port, isn)
        decoded = (IP if family == 4 else IPv6)(made)
        checksum = decoded[TCP].chksum
        del decoded[TCP].chksum
        again = (IP if family == 4 else IPv6)(bytes(decoded))
        assert checksum == again[TCP].chksum
        assert (decoded.src, decoded.dst) == (str(address), SERVER_ADDRESS[family])
        assert (decoded[TCP].sport, decoded[TCP].seq, decoded[TCP].flags) == (port, isn, "S")
        assert len(made) == len(bytes(again))

    @given(
        st.sampled_from([4, 6]), ports, ports, sequence_numbers, st.sampled_from([SYN, RST, ACK])
    )
    def test_reading_what_scapy_made(
        self, family: int, source: int, destination: int, sequence: int, flags: int
    ) -> None:
        here, there = SERVER_ADDRESS[family], str(ipaddress.ip_network(LOCAL_SOURCES[family])[7])
        segment = TCP(sport=source, dport=destination, seq=sequence, flags=flags)
        read = parse_segment(scapy_packet(here, there, segment))
        assert read == (here, source, there, destination, sequence, flags)

    def test_other_protocols_are_none_of_ours(self) -> None:
        assert parse_segment(scapy_packet("10.9.0.1", "10.9.0.2", UDP(dport=3311))) is None

    @given(st.binary(max_size=100))
    def test_any_bytes_can_be_read(self, packet: bytes) -> None:
        parse_segment(packet)

    @pytest.mark.parametrize("family", [4, 6])
    def test_syns_differ_in_tuple_and_isn(self, family: int) -> None:
        count = 10_000
        network = ipaddress.ip_network(SILENT_SOURCES[family])
        made = list(make_syns(SILENT_SOURCES[family], SERVER_ADDRESS[family], 3311, count))
        assert len({syn.four_tuple for syn in made}) == count
        assert len({syn.isn for syn in made}) == count
        for syn in made[:: count // 100]:
            read = parse_segment(syn.packet)
            assert read is not None
            assert (*read[:4], read.sequence) == (*syn.four_tuple, syn.isn)
            assert ipaddress.ip_address(syn.four_tuple.client_ip) in network

    def test_too_many_syns_are_refused(self) -> None:
        prefix = "10.9.1.0/30"
        hosts = len(list(ipaddress.ip_network(prefix).hosts()))
        most = hosts * (LAST_PORT - FIRST_PORT + 1)
        with pytest.raises(ValueError, match="addresses and ports"):
            next(make_syns(prefix, "10.9.0.1", 3311, most + 1))
        assert next(make_syns(prefix, "10.9.0.1", 3311, most))


class TestReadings:
    def test_ss_in_every_notation(self) -> None:
        text = (
            "0      0            10.9.0.2:40000      10.9.0.1:3311 \n"
            "0      25   [::ffff:10.9.0.1]:3311 [::ffff:10.9.0.2]:40001\n"
            "51     50           [fd09::1]:3311             [::]:*\n"
            "3      128                  *:3311                *:*\n"
            "1      2      [fe80::1]%veth0:1        [fe80::2]:2\n"
        )
        assert readings.parse_ss(text) == [
            (0, 0, "10.9.0.2", 40_000, "10.9.0.1", 3311),
            (0, 25, "10.9.0.1", 3311, "10.9.0.2", 40_001),
            (51, 50, "fd09::1", 3311, "::", 0),
            (3, 128, "*", 3311, "*", 0),
            (1, 2, "fe80::1", 1, "fe80::2", 2),
        ]

    def test_ss_itself_is_understood(self) -> None:
        with socket.create_server((LOOPBACK, 0)) as listener:
            port = listener.getsockname()[1]
            words = ["ss", "-tnH", "state", "listening", f"sport = :{port}"]
            text = subprocess.run(words, check=True, capture_output=True, text=True).stdout
        (row,) = readings.parse_ss(text)
        assert (row.local_ip, row.local_port, row.receive_queue) == (LOOPBACK, port, 0)

    def test_who_is_known_at_a_port_of_this_kernel(self) -> None:
        """A connection has two ends here, and only one of them is at that port."""
        table = Path("/proc/net/tcp")
        with socket.create_server((LOOPBACK, 0)) as listener:
            port = listener.getsockname()[1]
            assert readings.count_known(table.read_text(), port) == 0
            with (
                socket.create_connection((LOOPBACK, port)),
                socket.create_connection((LOOPBACK, port)),
            ):
                assert readings.count_known(table.read_text(), port) == 2

    def test_a_handshake_is_known_and_an_end_is_not(self) -> None:
        head = "  sl  local_address rem_address   st tx_queue rx_queue\n"
        rows = (
            "   0: 0100090A:0CEF 0200090A:9C40 03 00000000:00000000\n"
            "   1: 0100090A:0CEF 0200090A:9C41 06 00000000:00000000\n"
            "   2: 0100090A:0CF0 0200090A:9C42 01 00000000:00000000\n"
        )
        assert readings.count_known(head + rows, 3311) == 1

    def test_counters_of_this_kernel(self) -> None:
        text = Path("/proc/net/netstat").read_text(encoding="ascii")
        counters = readings.parse_netstat(text)
        assert {"SyncookiesSent", "SyncookiesRecv", "ListenOverflows"} <= counters.keys()
        assert "InOctets" in readings.parse_netstat(text, "IpExt")

    def test_missing_counters_are_an_error(self) -> None:
        with pytest.raises(ValueError, match="no TcpExt"):
            readings.parse_netstat("IpExt: A\nIpExt: 1\n")


class TestPatience:
    @pytest.mark.parametrize(("factor", "expected"), [("3", 30.0), ("x", 10.0), ("-1", 10.0)])
    def test_only_a_sensible_factor_counts(
        self, monkeypatch: pytest.MonkeyPatch, factor: str, expected: float
    ) -> None:
        monkeypatch.setenv(patience.PATIENCE_VARIABLE, factor)
        assert patience.patient(10.0) == expected

    def test_a_deadline_passes(self) -> None:
        assert patience.Deadline(0.0).passed()
        assert not patience.Deadline(60.0).passed()


class TestCommandLine:
    @pytest.fixture
    def parser(self) -> argparse.ArgumentParser:
        parser = argparse.ArgumentParser()
        play.add_parser(parser.add_subparsers())
        return parser

    def test_all_after_tracer_is_the_tracers(self, parser: argparse.ArgumentParser) -> None:
        words = ["play", "overflow", "--family", "6", "--tracer", "trace", "--json", "-p", "1"]
        arguments = parser.parse_args(words)
        assert arguments.tracer == ["trace", "--json", "-p", "1"]
        assert (arguments.scenario, arguments.family, arguments.json) == ("overflow", "6", None)

    @pytest.mark.parametrize(
        "words",
        [
            ["--port", "0"],
            ["--port", "65536"],
            ["--port", "x"],
            ["--clients", "0"],
            ["--clients=-1"],
        ],
    )
    def test_wrong_numbers_are_wrong_use(
        self, parser: argparse.ArgumentParser, words: list[str]
    ) -> None:
        with pytest.raises(SystemExit) as caught:
            parser.parse_args(["play", "overflow", *words])
        assert caught.value.code == 2

    @pytest.mark.parametrize("name", SCENARIOS)
    def test_every_scenario_says_what_happens(self, name: str) -> None:
        assert SCENARIOS[name].summary
        assert SCENARIOS[name].play.__name__.replace("_", "-") == name

    def test_what_cannot_be_played_is_refused(self) -> None:
        with pytest.raises(LabError, match="no scenario"):
            play_scenario("no-such")
        with pytest.raises(LabError, match="family mapped"):
            play_scenario("mariadb-stall", family="mapped")

    def test_differences_are_named_in_words(self) -> None:
        text = play.comparison_text(compare(outcome_of({KEY: "ack-missing"}), []), {})
        assert f"missing: {endpoint(KEY.client_ip, KEY.client_port)} ack-missing" in text
        assert "DIFFER" in text
