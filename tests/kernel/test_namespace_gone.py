"""A stuck client of a network namespace that is removed, as when a container ends."""

from __future__ import annotations

import contextlib
import socket

import pytest

from lab.network.topology import SERVER_ADDRESS
from lab.patience import COMMAND_S, patient
from lab.records import FourTuple
from lab.scenarios.scene import PORT
from tests.kernel.conftest import summary_of, tracing
from tests.kernel.handmade import told
from tests.kernel.rescue import cookie_server
from tests.kernel.test_firewall_rules import BARE_ACK, CHAIN

pytestmark = pytest.mark.kernel


def test_who_was_stuck_in_a_namespace_that_is_gone_is_counted_apart() -> None:
    server = (SERVER_ADDRESS[4], PORT)
    with tracing(("-p", str(PORT), "-t", "1")) as (tracer,):
        with contextlib.ExitStack() as kept, cookie_server() as (topology, _):
            topology.server.command(
                "nft", CHAIN.format(hook="input") + f"add rule inet guard acks {BARE_ACK} drop"
            )
            client = kept.enter_context(
                topology.client.run(socket.create_connection, server, patient(COMMAND_S))
            )
            who = FourTuple._make((*client.getsockname()[:2], *server))
            netns = topology.server.inode
            before = told(tracer, netns, who, "ack-filtered")
            # He keeps his socket: while packets still find the namespace, a FIN would draw an RST.
            kept.pop_all()
        after = told(tracer, netns, who, "namespace-gone")
        tracer.stop()
        client.close()
    assert (before["stuck"], after["stuck"]) == (True, False)
    assert after["updates"] == "ack-filtered"
    summary = summary_of(tracer)
    assert (summary["stuck"], summary["ever_stuck"], summary["namespace_gone"]) == (0, 1, 1)
