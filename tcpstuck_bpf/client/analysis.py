"""Turns the steps of a run on the client's side into verdicts and a summary, live and in a replay.

Pure: it does no I/O and knows no clock.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from tcpstuck_bpf.client.facts import Poll
from tcpstuck_bpf.client.steps import (
    Attempted,
    ClientHeader,
    ClientStep,
    Owned,
    Polled,
    WatchEnded,
)
from tcpstuck_bpf.client.summary import ClientSummary, Status
from tcpstuck_bpf.client.waits import Change, Waits, inodes_of


class ClientAnalysis:
    """Takes steps, and returns verdicts and finally a summary."""

    def __init__(self, header: ClientHeader) -> None:
        self.header = header
        self.waits = Waits(header.timeout_ns)
        self.polls = 0
        self.printed_ns = header.clock.monotonic_ns
        """The time of the latest verdicts: that of the poll, or of what came of an action."""
        self._held: list[Change] = []
        """Verdicts that wait for the owners of their sockets."""
        self._losses: Counter[str] = Counter()
        self._unread: Mapping[int, str] = {}

    @property
    def unowned(self) -> frozenset[int]:
        """Sockets whose owners the next step must bring, by inode number."""
        return frozenset(inodes_of(self._held))

    def take(self, step: ClientStep) -> list[Change]:
        """Take a step. Returns the verdicts that it leads to, those of a poll with their owners.

        Verdicts that wait for owners come with the next step, whatever it is.
        """
        if isinstance(step, Owned):
            self.waits.note_owners(step.owners)
            owned = [
                one._replace(owners=step.owners.get(one.socket.inode, one.owners))
                for one in self._held
            ]
            self._held = []
            return owned
        changes, self._held = self._held, []
        if isinstance(step, Polled):
            self.printed_ns = step.poll.time_ns
            changes += self._polled(step.poll, step.beyond)
            if any(inodes_of(changes)):
                changes, self._held = [], changes
        elif isinstance(step, Attempted):
            self.printed_ns = step.now_ns
            judged = (self.waits.attempted(one, step.now_ns) for one in step.attempts)
            changes += (one for one in judged if one is not None)
        return changes

    def _polled(self, poll: Poll, beyond: int) -> list[Change]:
        changes = self.waits.take(poll)
        self.polls += 1
        self._unread = poll.failures
        losses = {
            "untracked": self.waits.untracked,
            "unreadable": poll.unreadable,
            "subflows": poll.subflows,
            "namespaces_beyond": beyond,
        }
        for name, number in losses.items():
            self._losses[name] = max(self._losses[name], number)
        return changes

    def status(self, now_ns: int) -> Status:
        """The current figures for the status line."""
        return Status(
            self.header.watched,
            self.waits.stuck,
            self.waits.young,
            self.waits.established,
            now_ns - self.header.clock.monotonic_ns,
        )

    def summary(self, ended: WatchEnded) -> ClientSummary:
        """The summary of all steps taken, which must include a poll."""
        waits, selection = self.waits, self.header.selection
        return ClientSummary(
            watched=self.header.watched,
            duration_ns=ended.now_ns - self.header.clock.monotonic_ns,
            verdicts={name: number for name, number in waits.verdicts.items() if number},
            stuck=waits.stuck,
            ever_stuck=waits.ever_stuck,
            closed=waits.closed,
            young=waits.young,
            established=None if selection else waits.established,
            seen_any=waits.seen_waiting if selection else waits.seen_any,
            groups=tuple(waits.groups(ended.now_ns)),
            polls=self.polls,
            longest_poll_ns=ended.longest_poll_ns,
            pause_ns=ended.pause_ns,
            losses=dict(self._losses),
            unread=self._unread,
            notes=ended.notes,
            slow=waits.slow,
            closed_slow=waits.closed_slow,
            mending=ended.mending,
            cut_off_ns=ended.now_ns if ended.cut_off else None,
            selection=selection,
        )
