"""How rarely a spoofed address is taken for a real one, because it recurs by chance."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from tcpstuck_bpf.handshake.flood import _Listener

SYNS = 20_000


def taken_for_real(addresses: int, seed: int) -> bool:
    """Whether any address of a flood is, at any of its SYNs."""
    chosen = random.Random(seed)
    listener, seen = _Listener(), Counter[int]()
    for _ in range(SYNS):
        address = chosen.randrange(addresses)
        listener.addresses += address not in seen
        listener.handshakes += 1
        seen[address] += 1
        if seen[address] > 2 and listener.is_beyond_chance(seen[address]):
            return True
    return False


@pytest.mark.parametrize("addresses", [2**13, 2**16, 2**20, 2**32])
def test_no_spoofed_address_is_taken_for_a_real_one(addresses: int) -> None:
    assert [seed for seed in range(150) if taken_for_real(addresses, seed)] == []


@pytest.mark.parametrize("syns", [300, 1000, 5000, 20_000])
def test_where_no_address_recurs_few_handshakes_show_a_real_client(syns: int) -> None:
    """More are needed only where the flood's own addresses recur."""
    listener = _Listener()
    listener.addresses = listener.handshakes = syns
    for handshakes in range(1, 10):
        listener.handshakes += 1
        if listener.is_beyond_chance(handshakes):
            assert handshakes in (3, 4)
            return
    pytest.fail("a client with ten silent handshakes is not taken for real")


def test_a_real_client_shows_itself_in_a_flood_whose_addresses_recur_all_the_time() -> None:
    """64 spoofed addresses; the mean is known well by then, and twice of it is beyond chance."""
    listener = _Listener()
    listener.addresses, listener.handshakes = 65, 64 * 100
    reached = next(number for number in range(1, 300) if listener.is_beyond_chance(number))
    assert 100 < reached < 200
