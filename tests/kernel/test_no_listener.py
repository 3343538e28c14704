"""A server that is gone when a client's segment comes: an error for the client, and no hang.

The oracle is the RST on the client's wire.
"""

from __future__ import annotations

import pytest

from lab.scenarios.tracer import Tracer
from tcpstuck_bpf.typeinfo.btf import read_running_kernel
from tests.kernel.conftest import told_by
from tests.kernel.handmade import Client, Site, site, told

pytestmark = pytest.mark.kernel

DATA = b"hello?"


def has_drop_reasons() -> bool:
    """Whether the kernel says why it drops a packet: from 5.17 on."""
    return bool(read_running_kernel().enumerators("SKB_DROP_REASON_"))


def assert_gets_an_error(tracer: Tracer, where: Site, client: Client, updates: str | None) -> None:
    """A client that got an RST, as it is told last."""
    client.await_reset()
    if has_drop_reasons():
        line = told(tracer, where.netns, client.four_tuple, "no-listener")
        assert (line["stuck"], line["certainty"], line["updates"]) == (False, "certain", updates)
    elif updates is None:
        # Nothing tells it from a packet that TCP drops without an answer.
        line = told(tracer, where.netns, client.four_tuple, "ack-filtered")
        assert (line["drop"]["reason"], line["certainty"]) == (None, "likely")


@pytest.mark.parametrize("family", [4, 6])
def test_a_listener_that_closes_before_the_ack_leaves_nobody_stuck(
    either_tracer: Tracer, family: int
) -> None:
    with site(family) as where:
        bare, talking = Client(where), Client(where)
        for client in (bare, talking):
            client.connect()
        where.listener.close()
        bare.send(0)
        talking.send(0, DATA)
        for client in (bare, talking):
            assert_gets_an_error(either_tracer, where, client, None)
        assert len(told_by(either_tracer, where.netns)) == len((bare, talking))


@pytest.mark.parametrize("family", [4, 6])
def test_who_was_turned_away_and_finds_no_listener_later_is_not_stuck_any_more(
    either_tracer: Tracer, family: int
) -> None:
    with site(family, backlog=0) as where:
        first, second = Client(where), Client(where)
        for client in (first, second):
            client.connect()
        for client in (first, second):
            client.send(0)
        told(either_tracer, where.netns, second.four_tuple, "accept-queue-full")
        where.listener.close()
        second.send(0, DATA)
        assert_gets_an_error(either_tracer, where, second, "accept-queue-full")
