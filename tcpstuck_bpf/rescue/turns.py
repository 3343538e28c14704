"""How many SYN-ACKs may be under way to a listener's clients: as many as its accept queue takes.

A client's answer that meets a full accept queue is dropped like its first ACK. So a listener that
overflowed gets one client at a time as a pathfinder, until a completed handshake shows how much
room there is. A listener that never overflowed has no limit. Pure.

Of the sockets of one port (SO_REUSEPORT) each has a queue of its own, and what a client sends goes
to one of them, as long as none joins or leaves. What completes at one says nothing of the room at
another.

Times are CLOCK_MONOTONIC nanoseconds.
"""

from __future__ import annotations

from collections import OrderedDict

from tcpstuck_bpf.model import SECOND_NS, Event, FourTuple, ListenerId, listener_of
from tcpstuck_bpf.rescue.pacing import KeyedHeap

ANSWER_NS = SECOND_NS
"""How long an answer may take."""
MAX_LISTENERS = 4096


class _Listener:
    """One listener: what is known of its accept queue, and its clients."""

    def __init__(self) -> None:
        self.room: int | None = None
        """How many may be under way; None: it never overflowed. 0: it is full."""
        self.as_of_ns = 0
        self.retry_ns = 0
        """Until then a full one is not tried again."""
        self.under_way: set[FourTuple] = set()
        self.ready: KeyedHeap[FourTuple] = KeyedHeap()

    def may_send(self, now_ns: int) -> bool:
        """Whether one more may be under way."""
        if self.room is None:
            return True
        if self.room == 0:
            return not self.under_way and now_ns >= self.retry_ns
        return len(self.under_way) < self.room


class Listeners:
    """All listeners, and whose turn it is: they take turns."""

    def __init__(self) -> None:
        self._listeners: OrderedDict[ListenerId, _Listener] = OrderedDict()
        self._at: dict[FourTuple, ListenerId] = {}
        """Where each client is, from its first turn until it is withdrawn."""
        self.open: OrderedDict[ListenerId, None] = OrderedDict()
        """Those that may have a client whose turn it is."""
        self.waking: KeyedHeap[ListenerId] = KeyedHeap()
        """When full ones are to be tried again."""

    def _listener(self, key: ListenerId) -> _Listener:
        listener = self._listeners.get(key)
        if listener is None:
            listener = self._listeners[key] = _Listener()
            # Two looks for each that comes: one that finds clients forgets nobody.
            for _ in range(2):
                if len(self._listeners) > MAX_LISTENERS:
                    self._forget_one()
        return listener

    def _forget_one(self) -> None:
        """Forget the oldest listener, unless it has clients: then it is the next one's turn."""
        key, listener = next(iter(self._listeners.items()))
        if listener.ready or listener.under_way:
            self._listeners.move_to_end(key)
            return
        del self._listeners[key]
        self.open.pop(key, None)
        self.waking.discard(key)

    def note_overflow(self, event: Event, is_answer: bool) -> None:
        """An ACK met a full accept queue; `is_answer`: one that a repeated SYN-ACK drew.

        Only the answer, or the first overflow, puts off the next pathfinder: else a listener
        whose other clients keep knocking would never be tried again.
        """
        listener = self._listener(listener_of(event.four_tuple, event.handshake))
        if event.time_ns < listener.as_of_ns:
            return
        if is_answer or listener.room != 0:
            listener.retry_ns = max(listener.retry_ns, event.time_ns + ANSWER_NS)
        listener.room = 0
        listener.as_of_ns = event.time_ns

    def note_completion(self, event: Event) -> None:
        """A handshake completed: its event tells the queue's length before it came in.

        The queue is full when it is longer than its limit (sk_acceptq_is_full).
        """
        key = listener_of(event.four_tuple, event.handshake)
        listener = self._listeners.get(key)
        if listener is None or listener.room is None or event.time_ns < listener.as_of_ns:
            return
        listener.room = max(1, event.accept_queue_limit - event.accept_queue)
        listener.as_of_ns = event.time_ns
        self._reopen(key, listener)

    def _reopen(self, key: ListenerId, listener: _Listener) -> None:
        if listener.ready:
            self.open[key] = None

    def add_ready(self, who: FourTuple, key: ListenerId, *order: int) -> None:
        """A client of that listener waits for its turn; the lowest `order` comes first."""
        if self._at.get(who, key) != key:
            self.withdraw(who)
        self._at[who] = key
        listener = self._listener(key)
        listener.ready.put(who, *order)
        self._reopen(key, listener)

    def withdraw(self, who: FourTuple) -> None:
        """A client waits no more, and nothing is under way to it."""
        self.end_wait(who)
        key = self._at.pop(who, None)
        listener = None if key is None else self._listeners.get(key)
        if listener is not None:
            listener.ready.discard(who)

    def begin_wait(self, who: FourTuple) -> None:
        """A SYN-ACK is under way to that client, whose turn it was."""
        self._listener(self._at[who]).under_way.add(who)

    def end_wait(self, who: FourTuple) -> None:
        """It is under way no more."""
        key = self._at.get(who)
        listener = None if key is None else self._listeners.get(key)
        if key is not None and listener is not None and who in listener.under_way:
            listener.under_way.discard(who)
            self._reopen(key, listener)

    def wake(self, now_ns: int) -> None:
        """Look again at the listeners that are to be tried again now."""
        for key in self.waking.pop_due(now_ns):
            self._reopen(key, self._listeners[key])

    def pop_ready(self, now_ns: int) -> FourTuple | None:
        """Take out the client whose turn it is; None where there is none."""
        while self.open:
            key = next(iter(self.open))
            listener = self._listeners[key]
            if listener.ready and listener.may_send(now_ns):
                self.open.move_to_end(key)
                return listener.ready.pop()
            # What ends a wait or tells of room reopens it; only time has to be asked for.
            del self.open[key]
            if listener.ready and not listener.under_way:
                self.waking.put(key, listener.retry_ns)
        return None
