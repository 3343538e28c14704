"""Parts of recordings that earlier versions wrote shorter."""

from __future__ import annotations

import json

import pytest

from tcpstuck_bpf.model import EventKind, Handshake, ListenerSeen
from tcpstuck_bpf.recording.table import handshake_of
from tcpstuck_bpf.recording.values import event_of, event_values, listener_of, listener_values
from tests.builders import at, event, handshake
from tests.unit.judge.test_listener import facts

ENTRY = handshake(filter_device=7, socket=9016)
BEFORE = {0: ENTRY, 1: ENTRY._replace(socket=0), 2: ENTRY._replace(socket=0, filter_device=0)}
"""Entries of earlier versions, by the number of their missing last numbers."""


@pytest.mark.parametrize(("missing", "entry"), BEFORE.items())
def test_a_handshake_of_an_earlier_version_lacks_its_last_numbers(
    missing: int, entry: Handshake
) -> None:
    values = json.loads(json.dumps(ENTRY))[: len(ENTRY) - missing]
    assert handshake_of(values) == entry
    told = json.loads(json.dumps(event_values(event(EventKind.ACK_DROPPED, ENTRY, at(1)))))
    told[1] = values
    assert event_of(told).handshake == entry


@pytest.mark.parametrize("count", [0, len(ENTRY) - 3, len(ENTRY) + 1])
def test_a_handshake_of_no_version_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match="not a list of"):
        handshake_of([1] * count)


SEEN = ListenerSeen(
    facts(socket=9016), ("greeter (pid 7)",), (9016, 9500), {"core.somaxconn": 4096}, bytes(16)
)


def test_a_listener_comes_back_as_it_was() -> None:
    for seen in (SEEN, SEEN._replace(bound=None, owners=())):
        assert listener_of(json.loads(json.dumps(listener_values(seen)))) == seen


def test_a_listener_of_an_earlier_version_is_that_of_an_address_and_port() -> None:
    numbers, *known, _ = json.loads(json.dumps(listener_values(SEEN)))
    expected = SEEN._replace(facts=facts(), bound=None)
    assert listener_of([numbers[:-1], *known]) == expected


@pytest.mark.parametrize("missing", [0, 2])
def test_a_listener_of_no_version_is_refused(missing: int) -> None:
    numbers, *known, _ = json.loads(json.dumps(listener_values(SEEN)))
    with pytest.raises(ValueError, match="not a list of"):
        listener_of([numbers[: len(numbers) - missing], *known])
