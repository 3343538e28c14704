"""How many SYN-ACKs may be under way to a listener's clients: as many as its accept queue takes.

A client's answer that meets a full accept queue is dropped like its first ACK. So a listener whose
queue overflowed gets one SYN-ACK at a time, a pathfinder, until a completed handshake shows how
much room there is. A listener whose queue never overflowed has no limit. Pure.

Sockets that share a port (SO_REUSEPORT) have a queue each, and a client's segments go to one of
them as long as none joins or leaves. A handshake that completes at one says nothing about the room
at another.

Times are CLOCK_MONOTONIC nanoseconds.
"""

from __future__ import annotations

from collections.abc import Collection

from tcpstuck_bpf.model import SECOND_NS, Event, ListenerId, listener_of

ANSWER_NS = SECOND_NS
"""How long an answer may take."""
MAX_LISTENERS = 4096
"""Number of queues after which those without clients are forgotten."""


class AcceptQueue:
    """What is known of one listener's accept queue that overflowed."""

    __slots__ = ("as_of_ns", "retry_ns", "room")

    def __init__(self) -> None:
        self.room = 0
        """Places that were free at `as_of_ns`."""
        self.as_of_ns = 0
        self.retry_ns = 0
        """When a full queue may be tried again."""

    def may_send(self, under_way: int, now_ns: int) -> bool:
        """Whether one more SYN-ACK may be under way besides these."""
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
        """Whether it is time to forget queues that are not in use."""
        return len(self._queues) > self._limit

    def get(self, listener: ListenerId) -> AcceptQueue | None:
        """The queue; None where it never overflowed."""
        return self._queues.get(listener)

    def note_overflow(self, event: Event, is_answer: bool) -> None:
        """Take in an ACK that met a full queue; `is_answer`: a repeated SYN-ACK drew it.

        Only an answer or the first overflow puts off the next pathfinder. Otherwise a listener
        whose other clients keep sending ACKs would never be tried again.
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
        """Take in a completed handshake: its event has the queue's length before it came in.

        The queue is full when it is longer than its limit (sk_acceptq_is_full).
        """
        queue = self._queues.get(listener_of(event.four_tuple, event.handshake))
        if queue is not None and event.time_ns >= queue.as_of_ns:
            queue.room = max(1, event.accept_queue_limit - event.accept_queue)
            queue.as_of_ns = event.time_ns

    def forget_unused(self, in_use: Collection[ListenerId]) -> None:
        """Forget the oldest queues that are not in use, down to half of `MAX_LISTENERS`.

        A queue in use must stay: one that is forgotten counts as one that never overflowed.
        """
        unused = [listener for listener in self._queues if listener not in in_use]
        for listener in unused[: max(0, len(self._queues) - MAX_LISTENERS // 2)]:
            del self._queues[listener]
        self._limit = max(MAX_LISTENERS, 2 * len(self._queues))
