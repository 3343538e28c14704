"""Clients that connect and wait for the server to speak first, like MySQL clients.

One process in the client's namespace owns all sockets (`client_process`). This module has the
scenario's side and the request types that both sides use.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from lab.errors import LabTimeoutError
from lab.patience import LOAD_S, SETTLE_S, patient
from lab.processes.child import Child, End
from lab.records import ClientRecord

ALL = "all"
WAITING = "waiting"
"""Only the sockets that are connected and have not been greeted."""


class Connect(NamedTuple):
    """Open connections; `sources` are used in turn, or the kernel chooses if there are none."""

    how_many: int
    in_flight: int
    """Maximum number of sockets that are still connecting or, with `then_close`, not yet closed."""
    server_ip: str
    server_port: int
    sources: tuple[str, ...] = ()
    then_close: bool = False
    """Close as soon as the greeting arrives."""
    first_words: bytes = b""
    """Write this as soon as the client is connected: the client speaks first."""


class WaitFor(NamedTuple):
    """Answer True as soon as every count is reached, or False when the limit passes."""

    counts: Mapping[str, int]
    """`opened`, `connected`, `settled` (connected or failed), `greeted`, `failed` or `ended`
    (closed or failed). Each counts all sockets since the start."""
    limit_s: float


class Send(NamedTuple):
    """Write a payload to some sockets."""

    payload: bytes
    which: str = ALL


class Close(NamedTuple):
    """Close some sockets: with a FIN, or with an RST (SO_LINGER 0)."""

    which: str = ALL
    reset: bool = False


class Report(NamedTuple):
    """Answer with every socket's record, in the order of opening."""


class Clients(Child):
    """The client process; a context manager."""

    def __init__(self, end: End) -> None:
        super().__init__(end, "lab.processes.client_process")

    def __enter__(self) -> Clients:
        return self

    def connect(
        self,
        count: int,
        server_ip: str,
        server_port: int,
        *,
        in_flight: int | None = None,
        sources: Sequence[str] = (),
        then_close: bool = False,
        first_words: bytes = b"",
    ) -> None:
        """Begin to open `count` connections; returns before they are open."""
        at_once = in_flight or count
        self.ask(
            Connect(count, at_once, server_ip, server_port, tuple(sources), then_close, first_words)
        )

    def reach(self, limit_s: float, **counts: int) -> bool:
        """Wait for counts such as `settled=200`; returns False if `limit_s` seconds pass first."""
        return bool(self.ask(WaitFor(counts, limit_s), limit_s + LOAD_S))

    def await_counts(self, limit_s: float = SETTLE_S, **counts: int) -> None:
        """As `reach`, with a `patient` limit. Raises LabTimeoutError if the limit passes first."""
        limit_s = patient(limit_s)
        if not self.reach(limit_s, **counts):
            raise LabTimeoutError(f"clients to reach {counts}", limit_s, self.summary())

    def send(self, payload: bytes, which: str = ALL) -> None:
        """Write a payload to all sockets or the waiting ones."""
        self.ask(Send(payload, which))

    def close_sockets(self, which: str = ALL, *, reset: bool = False) -> None:
        """Close all sockets or the waiting ones, with a FIN or an RST."""
        self.ask(Close(which, reset))

    def records(self) -> tuple[ClientRecord, ...]:
        """Every socket's record so far."""
        return tuple(self.ask(Report()))

    def summary(self) -> str:
        """One line with the number of clients in each state."""
        records = self.records()
        connected = sum(record.connected_ns is not None for record in records)
        greeted = sum(record.greeted_ns is not None for record in records)
        failed = sum(record.error is not None for record in records)
        return f"{len(records)} opened, {connected} connected, {greeted} greeted, {failed} failed"
