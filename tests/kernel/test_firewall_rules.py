"""Which rule dropped an ACK, and where: what netfilter itself lists is what the tool says.

A client meets the rule from its SYN on; the rule lets all pass but bare ACKs.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lab.network.faults import ack_rule
from lab.network.topology import SERVER_ADDRESS, Namespace, Topology
from lab.patience import COMMAND_S, patient
from lab.records import FourTuple
from lab.scenarios.scene import PORT
from lab.scenarios.tracer import READY_PLACEHOLDER, Tracer
from tests.kernel.conftest import TOOL, summary_of
from tests.kernel.handmade import told
from tests.kernel.rescue import cookie_server

pytestmark = pytest.mark.kernel

BARE_ACK = f"tcp dport {PORT} tcp flags & (fin | syn | rst | psh | ack) == ack"
CHAIN = (
    "add table inet guard; add chain inet guard acks {{ type filter hook {hook} priority 0; }}; "
)
DECOYS = (
    "add table inet decoys; "
    "add chain inet decoys others { type filter hook input priority 5; }; "
    "add rule inet decoys others tcp dport 9 drop; "
    "add rule inet decoys others ip saddr 203.0.113.0/24 drop; "
    "add rule inet decoys others meta l4proto udp drop; "
    "add chain inet decoys late { type filter hook postrouting priority 5; }; "
    "add rule inet decoys late meta mark 7 drop"
)


def drop_told(tracer: Tracer, topology: Topology, family: int = 4) -> dict[str, Any]:
    """What the tool says of the drop of one client's ACK."""
    server = (SERVER_ADDRESS[family], PORT)
    limit_s = patient(COMMAND_S)
    with topology.client.run(socket.create_connection, server, limit_s) as client:
        who = FourTuple._make((*client.getsockname()[:2], *server))
        line = told(tracer, topology.server.inode, who, "ack-filtered")
    assert (line["stuck"], line["certainty"]) == (True, "certain")
    drop = dict(line["drop"])
    assert drop["what"] == "netfilter"
    assert drop["reason"] in ("NETFILTER_DROP", None)
    assert "+0x" in drop["place"]
    return drop


def handle(server: Namespace, *chain: str) -> int:
    """Handle of the last rule of a chain, as nft lists it."""
    listed = json.loads(server.command("nft", "-j", "list", "chain", *chain))["nftables"]
    return int([entry["rule"]["handle"] for entry in listed if "rule" in entry][-1])


@contextlib.contextmanager
def among_decoys() -> Iterator[Topology]:
    with cookie_server() as (topology, _):
        topology.server.command("nft", DECOYS)
        yield topology


@pytest.mark.parametrize(("hook", "family"), [("input", 4), ("input", 6), ("prerouting", 4)])
def test_a_rule_in_a_named_chain(shared_tracer: Tracer, hook: str, family: int) -> None:
    with among_decoys() as topology:
        topology.server.command(
            "nft",
            CHAIN.format(hook=hook)
            + "add chain inet guard inner; "
            + f"add rule inet guard acks tcp dport {PORT} jump inner; "
            + f"add rule inet guard inner {BARE_ACK} drop",
        )
        number = handle(topology.server, "inet", "guard", "inner")
        drop = drop_told(shared_tracer, topology, family)
    assert (drop["hook"], drop["family"], drop["table"]) == (hook, "inet", "guard")
    assert (drop["chain"], drop["rule"], drop["rule_candidates"]) == (
        "inner",
        {"handle": number},
        [],
    )


def test_rules_that_changed_since_the_drop_before(either_tracer: Tracer) -> None:
    """If reading rules takes long they are read later, and the verdict is printed again."""
    with cookie_server() as (topology, _):
        for table in ("one", "other"):
            topology.server.command(
                "nft",
                f"add table inet {table}; "
                f"add chain inet {table} acks {{ type filter hook input priority 0; }}; "
                f"add rule inet {table} acks {BARE_ACK} drop",
            )
            drop = drop_told(either_tracer, topology)
            topology.server.command("nft", "delete", "table", "inet", table)
            assert (drop["table"], drop["rule_candidates"]) == (table, [])


@contextlib.contextmanager
def rules_read_when_told(directory: Path) -> Iterator[tuple[Tracer, Callable[[], object]]]:
    """The tool with an `nft` that waits to be let go, and what lets it go.

    The tool does not go by PATH, so the waiting one is mounted over the real one, where only the
    tool sees it.
    """
    real = shutil.which("nft")
    assert real is not None
    gate, is_open, waiting = directory / "gate", directory / "open", directory / "waiting"
    shutil.copy(real, directory / "nft")
    os.mkfifo(gate)
    waiting.write_text(
        f'#!/bin/sh\n[ -e {is_open} ] || read _ <{gate}\nexec {directory}/nft "$@"\n'
    )
    waiting.chmod(0o755)
    opened = os.open(gate, os.O_RDWR)

    def let_go() -> None:
        is_open.touch()
        os.write(opened, b"\n")

    alone = ["unshare", "--mount", "--propagation", "slave", "sh", "-c"]
    mounted = f'mount --bind "$0" {Path(real).resolve()} && exec "$@"'
    tool = [*TOOL, "-t", "1", "--ready-file", READY_PLACEHOLDER]
    try:
        with Tracer([*alone, mounted, str(waiting), *tool]) as tracer:
            tracer.start()
            yield tracer, let_go
    finally:
        os.close(opened)


def test_a_verdict_before_the_rules_are_read_is_told_again_with_them(tmp_path: Path) -> None:
    server = (SERVER_ADDRESS[4], PORT)
    with (
        rules_read_when_told(tmp_path) as (tracer, let_go),
        cookie_server() as (topology, _),
    ):
        topology.server.command(
            "nft", CHAIN.format(hook="input") + f"add rule inet guard acks {BARE_ACK} drop"
        )
        named = {"handle": handle(topology.server, "inet", "guard", "acks")}
        limit_s = patient(COMMAND_S)
        with topology.client.run(socket.create_connection, server, limit_s) as client:
            who = FourTuple._make((*client.getsockname()[:2], *server))
            assert tracer.await_lines(1)
            let_go()
            second = told(tracer, topology.server.inode, who, "ack-filtered")
            # Once it closes it is connected: its FIN passes the rule.
            tracer.stop()
    first = tracer.lines[0]
    assert (first["verdict"], first["certainty"]) == ("ack-filtered", "likely")
    assert (first["to_be_updated"], first["drop"]["rule"]) == (True, None)
    assert (second["updates"], second["certainty"]) == ("ack-filtered", "certain")
    assert (second["drop"]["table"], second["drop"]["rule"]) == ("guard", named)
    assert second["drop"]["rules_read_ms"] is not None
    summary = summary_of(tracer)
    assert summary["verdicts"]["ack-filtered"] == summary["stuck"] == 1
    assert summary["losses"]["causes_not_updated"] == 0


@pytest.mark.parametrize("backend", ["legacy", "nft"])
def test_a_rule_of_iptables(shared_tracer: Tracer, backend: str) -> None:
    with among_decoys() as topology:
        for rule in (("-p", "udp", "-j", "ACCEPT"), (*ack_rule(PORT), "-j", "DROP")):
            topology.server.command(f"iptables-{backend}", "-w", "-A", "INPUT", *rule)
        named = {"number": 2}
        if backend == "nft":
            named = {"handle": handle(topology.server, "ip", "filter", "INPUT")}
        drop = drop_told(shared_tracer, topology)
    assert (drop["hook"], drop["family"], drop["table"]) == ("input", "ip", "filter")
    assert (drop["chain"], drop["rule"], drop["rule_candidates"]) == ("INPUT", named, [])


def test_a_queue_that_no_program_reads_is_told_with_its_rule(shared_tracer: Tracer) -> None:
    server = (SERVER_ADDRESS[4], PORT)
    limit_s = patient(COMMAND_S)
    with among_decoys() as topology:
        queue = ("-j", "NFQUEUE", "--queue-num", "77")
        topology.server.command("iptables-legacy", "-w", "-A", "INPUT", *ack_rule(PORT), *queue)
        with topology.client.run(socket.create_connection, server, limit_s) as client:
            who = FourTuple._make((*client.getsockname()[:2], *server))
            line = told(shared_tracer, topology.server.inode, who, "ack-filtered")
    assert (line["stuck"], line["certainty"]) == (True, "certain")
    drop = line["drop"]
    assert (drop["what"], drop["hook"]) == ("nfqueue", "input")
    assert (drop["table"], drop["chain"], drop["rule"]) == ("filter", "INPUT", {"number": 1})


def test_two_rules_that_can_have_done_it_are_both_named(shared_tracer: Tracer) -> None:
    with among_decoys() as topology:
        topology.server.command(
            "nft",
            CHAIN.format(hook="input")
            + f"add rule inet guard acks tcp dport {PORT} meta mark 7 drop; "
            + f"add rule inet guard acks {BARE_ACK} drop",
        )
        number = handle(topology.server, "inet", "guard", "acks")
        drop = drop_told(shared_tracer, topology)
    assert (drop["table"], drop["chain"], drop["rule"]) == ("guard", "acks", None)
    place = {"family": "inet", "table": "guard", "chain": "acks"}
    assert {**place, "rule": {"handle": number}} in drop["rule_candidates"]
    assert len(drop["rule_candidates"]) == 2
