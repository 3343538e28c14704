"""Limits the unanswered SYN-ACKs per listener to the free places in its accept queue. Pure.

An answer that meets a full accept queue is dropped like the client's first ACK. A listener whose
queue overflowed therefore gets one SYN-ACK at a time, a pathfinder, until a completed handshake
shows how many places are free. A listener whose queue never overflowed has no limit.

Sockets that share a port (SO_REUSEPORT) have a queue each. A client's segments go to the same
socket as long as none joins or leaves the group. A handshake completed at one socket shows nothing
about the queue of another.

Times are CLOCK_MONOTONIC nanoseconds.
"""

from __future__ import annotations

from collections.abc import Collection

from tcpstuck_bpf.model import SECOND_NS, Event, ListenerId, listener_of

ANSWER_NS = SECOND_NS
"""Longest time that an answer may take."""
MAX_LISTENERS = 4096
"""Largest number of queues before unused ones are forgotten."""


class AcceptQueue:
    """The state of one listener's accept queue that overflowed."""

    __slots__ = ("as_of_ns", "retry_ns", "room")

    def __init__(self) -> None:
        self.room = 0
        """Places that were free at `as_of_ns`."""
        self.as_of_ns = 0
        self.retry_ns = 0
        """Earliest time of the next pathfinder while the queue is full."""

    def may_send(self, under_way: int, now_ns: int) -> bool:
        """Whether another SYN-ACK may be sent while `under_way` SYN-ACKs are unanswered."""
        if self.room == 0:
            return under_way == 0 and now_ns >= self.retry_ns
        return under_way < self.room


class AcceptQueues:
    """The accept queues that overflowed, by listener."""

    def __init__(self) -> None:
        self._queues: dict[ListenerId, AcceptQueue] = {}
        self._limit = MAX_LISTENERS

    def __len__(self) -> int:
        return len(self._queues)

    @property
    def crowded(self) -> bool:
        """Whether unused queues should be forgotten now."""
        return len(self._queues) > self._limit

    def get(self, listener: ListenerId) -> AcceptQueue | None:
        """The listener's queue; None if it never overflowed."""
        return self._queues.get(listener)

    def note_overflow(self, event: Event, is_answer: bool) -> None:
        """Note an ACK that met a full queue. `is_answer`: it answers a repeated SYN-ACK.

        Only an answer or the first overflow delays the next pathfinder. Otherwise a listener whose
        other clients keep sending ACKs would never be tried again.
        """
        listener = listener_of(event.four_tuple, event.handshake)
        queue = self._queues.get(listener)
        is_first = queue is None or queue.room > 0
        if queue is None:
            queue = self._queues[listener] = AcceptQueue()
        if event.time_ns < queue.as_of_ns:
            return
        if is_answer or is_first:
            queue.retry_ns = max(queue.retry_ns, event.time_ns + ANSWER_NS)
        queue.room = 0
        queue.as_of_ns = event.time_ns

    def note_completion(self, event: Event) -> None:
        """Note a completed handshake. Its event has the queue's length before it was added.

        The queue is full when it is longer than its limit (sk_acceptq_is_full).
        """
        queue = self._queues.get(listener_of(event.four_tuple, event.handshake))
        if queue is not None and event.time_ns >= queue.as_of_ns:
            queue.room = max(1, event.accept_queue_limit - event.accept_queue)
            queue.as_of_ns = event.time_ns

    def forget_unused(self, in_use: Collection[ListenerId]) -> None:
        """Forget the oldest unused queues, until at most half of `MAX_LISTENERS` remain.

        Queues in use are kept: a forgotten queue would count as one that never overflowed.
        """
        unused = [listener for listener in self._queues if listener not in in_use]
        for listener in unused[: max(0, len(self._queues) - MAX_LISTENERS // 2)]:
            del self._queues[listener]
        self._limit = max(MAX_LISTENERS, 2 * len(self._queues))
