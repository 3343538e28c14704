"""What two recordings say together. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from tcpstuck_bpf.joining.match import Difference, Joined, difference_of, nearest_apart_ns


class Span(NamedTuple):
    """From when until when a recording reaches, in ns since the epoch."""

    begin_ns: int
    end_ns: int


class Result(NamedTuple):
    """The joined connections, and how the recordings fit together."""

    joined: Sequence[Joined]
    """The longest wait first, then those that do not wait."""
    server: Span
    client: Span
    flood_suspected: int
    """Silent handshakes that look like a SYN flood's, which are left out."""
    notes: tuple[str, ...]
    """Those of both recordings, each with its side."""

    @property
    def both(self) -> int:
        """Connections that both sides reported."""
        return sum(one.difference_ns is not None for one in self.joined)

    @property
    def server_only(self) -> int:
        """Handshakes that the server's side alone reported."""
        return sum(one.client is None for one in self.joined)

    @property
    def client_only(self) -> int:
        """Connections that the client's side alone reported."""
        return sum(one.server is None for one in self.joined)

    @property
    def waiting(self) -> list[Joined]:
        """Connections that waited at the client when its recording ended."""
        return [one for one in self.joined if one.client is not None and one.client.waits]

    @property
    def difference(self) -> Difference | None:
        """The difference of the two sides' times; None if nothing is joined."""
        return difference_of(self.joined)

    @property
    def apart_ns(self) -> int | None:
        """How far apart those are that have the same addresses and ports and are not joined."""
        return nearest_apart_ns(self.joined)

    @property
    def overlap_ns(self) -> int:
        """How long both recordings were made; below 0: the time between them."""
        end_ns = min(self.server.end_ns, self.client.end_ns)
        return end_ns - max(self.server.begin_ns, self.client.begin_ns)


def ordered(joined: Sequence[Joined]) -> list[Joined]:
    """The longest wait first, then those that do not wait, by the time of their SYN."""

    def key(one: Joined) -> tuple[bool, int]:
        waits = one.client is not None and one.client.waits
        if one.client is not None and waits:
            return (False, -one.client.waited_ns)
        if one.server is not None:
            return (True, one.server.first_syn_ns)
        return (True, 0 if one.client is None else one.client.established_ns)

    return sorted(joined, key=key)
