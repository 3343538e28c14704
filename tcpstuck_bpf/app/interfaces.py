"""Interfaces of the parts of a run: the source of observations, kernel log, names and output."""

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
    KernelWarning,
    ListenerFacts,
    NetnsCounts,
    Row,
    Sweep,
)
from tcpstuck_bpf.rulesets import KernelNames
from tcpstuck_bpf.summary import Status, Summary


class Source(Protocol):
    """A source of observations; `kernel.source.KernelSource` is the running kernel."""

    @property
    def coverage(self) -> Coverage:
        """The probes that attached."""

    @property
    def timings(self) -> Mapping[str, float]:
        """Duration of each part of the start, in seconds."""

    @property
    def table_capacity(self) -> int:
        """Number of handshakes that the table holds."""

    @property
    def most_waiting(self) -> int:
        """Largest number of events that can wait unread."""

    def poll(self, timeout_ns: int) -> list[Event]:
        """Read a bounded number of events; wait at most `timeout_ns` for the first.

        A signal ends the wait.
        """

    def sweep(self) -> Iterator[Sweep]:
        """Read the whole table in batches. Their time is taken before the first entry is read."""

    def chosen(self) -> Sweep:
        """Read only the entries that a rescue may concern, however large the table is."""

    def forget(self, handshakes: Iterable[HandshakeId]) -> None:
        """Remove the entries of these handshakes; an entry with a newer handshake stays."""

    def settle(self) -> None:
        """Wait until each packet that is being processed now is in the programs' counts."""

    def counts(self, living: Mapping[int, int] = NOT_KNOWN) -> NetnsCounts:
        """Read what the programs counted since they were attached, by network namespace.

        `living` has the known cookies of the present namespaces by inode number. Counts of an
        earlier namespace with the same number are added to those of removed namespaces.
        """

    def netns_in_full_tables(self) -> Collection[int]:
        """The network namespaces with entries in tables that are more than half full."""

    def free(self, gone: Collection[int], living: Mapping[int, int]) -> None:
        """Remove the entries of these network namespaces from the tables that fill.

        Entries of earlier namespaces with a number in `living` (as for `counts`) are removed too.
        """

    def listeners(self) -> tuple[ListenerFacts, ...]:
        """Read the queue figures of each listener."""

    def losses(self) -> Mapping[str, int]:
        """The losses that belong to no namespace, by name."""

    def close(self) -> None:
        """Detach the programs."""


class Output(Protocol):
    """A form of output; `output.writers` has the table and JSON Lines. Methods raise OSError."""

    def findings(self, findings: list[Finding]) -> None:
        """Print findings."""

    def attempts(self, attempts: Sequence[Attempt]) -> None:
        """Print the outcome of attempts to rescue stuck clients."""

    def status(self, status: Status) -> None:
        """Show that the run goes on without news."""

    def summary(self, summary: Summary) -> None:
        """Print the summary."""

    def close(self) -> None:
        """Finish the output, with or without a summary."""


class Log(Protocol):
    """The kernel's warnings of full SYN queues; `host.kernel_log.KernelLog` reads the real ones."""

    @property
    def overruns(self) -> int:
        """Number of times that lines were overwritten before they were read."""

    def warnings(self) -> tuple[KernelWarning, ...]:
        """Read the warnings since the last call."""


class Names(Protocol):
    """Names for the kernel's numbers; `kernel.drop_names.Namer` asks the running kernel."""

    def __call__(self, rows: Iterable[Row]) -> KernelNames | None:
        """Look up names and firewall rules for these rows. Returns only what is new.

        None: nothing is new.
        """

    def hurry(self) -> None:
        """Read the remaining firewall rules without a pause, because the run ends."""
