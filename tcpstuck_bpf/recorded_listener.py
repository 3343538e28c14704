"""A listener in a recording, and its way back."""

from __future__ import annotations

from typing import Any

from tcpstuck_bpf.model import ListenerFacts, ListenerSeen
from tcpstuck_bpf.recorded_table import integer, integers


def listener_values(seen: ListenerSeen) -> list[Any]:
    """What stands in a recording."""
    netns, address, *numbers = seen.facts
    return [[netns, address.hex(), *numbers], seen.owners, seen.sockets, dict(seen.settings)]


def listener_of(values: list[Any]) -> ListenerSeen:
    """The way back. Raises TypeError or ValueError where it is damaged."""
    (netns, address, *rest), owners, sockets, settings = values
    numbers = integers(rest, len(ListenerFacts._fields) - 2)
    return ListenerSeen(
        ListenerFacts(integer(netns), bytes.fromhex(address), *numbers),
        tuple(map(str, owners)),
        integer(sockets),
        {str(name): integer(number) for name, number in settings.items()},
    )
