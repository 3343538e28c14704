"""What a run needs of others: the kernel, its log, the names of its numbers, and an output."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

from tcpstuck_bpf.judge.verdict import Finding
from tcpstuck_bpf.model import (
    NOT_KNOWN,
    Attempt,
    Coverage,
    Event,
    HandshakeId,
    KernelNames,
    KernelWarning,
    ListenerFacts,
    NetnsCounts,
    Row,
    Sweep,
)
from tcpstuck_bpf.summary import Status, Summary


class Source(Protocol):
    """Where observations come from; `source.KernelSource` is the running kernel."""

    @property
    def coverage(self) -> Coverage:
        """Which probes attached."""

    @property
    def timings(self) -> Mapping[str, float]:
        """Seconds that each part of the start took."""

    @property
    def table_capacity(self) -> int:
        """How many handshakes the table holds."""

    @property
    def most_waiting(self) -> int:
        """How many events may wait to be read at any moment."""

    def poll(self, timeout_ns: int) -> list[Event]:
        """A bounded number of events that came, waiting at most that long for the first.

        A signal ends the waiting.
        """

    def sweep(self) -> Iterator[Sweep]:
        """The whole table in batches; their time is from before the first entry was read."""

    def chosen(self) -> Sweep:
        """The entries that the rescue may be for, however many others there are."""

    def forget(self, handshakes: Iterable[HandshakeId]) -> None:
        """Remove entries from the table, where they are still of that handshake."""

    def counts(self, living: Mapping[int, int] = NOT_KNOWN) -> NetnsCounts:
        """What the programs counted since they were attached, by network namespace.

        `living` has the cookies of those that are there now, by inode number, where they are known:
        what was counted in another one of that number is counted as gone.
        """

    def netns_in_full_tables(self) -> Collection[int]:
        """The network namespaces that have entries in tables that are more than half full."""

    def free(self, gone: Collection[int], living: Mapping[int, int]) -> None:
        """Make room in those tables: these network namespaces are gone.

        So are those whose number is another one's by now: `living` as for `counts`.
        """

    def listeners(self) -> tuple[ListenerFacts, ...]:
        """How the queues of each listener fared."""

    def losses(self) -> Mapping[str, int]:
        """Losses that belong to no namespace, by name."""

    def close(self) -> None:
        """Detach."""


class Output(Protocol):
    """Where findings go; `output` has the table and JSON Lines."""

    def findings(self, findings: list[Finding]) -> None:
        """Show findings as they come."""

    def attempts(self, attempts: Sequence[Attempt]) -> None:
        """Show what was done for stuck clients."""

    def status(self, status: Status) -> None:
        """Nothing new: say that it is watching."""

    def summary(self, summary: Summary) -> None:
        """The end."""

    def close(self) -> None:
        """Nothing more will come, with or without a summary. Raises OSError."""


class Log(Protocol):
    """The kernel's warnings of full SYN queues; `kernel_log.KernelLog` is the real one."""

    @property
    def overruns(self) -> int:
        """Times that lines were overwritten before they were read."""

    def warnings(self, now_ns: int) -> tuple[KernelWarning, ...]:
        """Those that came since it was asked last."""


class Names(Protocol):
    """What says what the kernel's numbers mean; `places.Namer` asks the running kernel."""

    def __call__(self, rows: Iterable[Row]) -> KernelNames | None:
        """Names of numbers in entries, and firewall rules, that it has not told yet.

        None: nothing new.
        """

    def hurry(self) -> None:
        """The run ends: what is still to be read is read without a pause."""
