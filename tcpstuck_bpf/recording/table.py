"""The awaiting-ACK table in a recording: only the differences of each batch of rows are written.

Every key gets a number when it is first written. A batch has the rows that changed since they were
last written, and the numbers of the unchanged rows, as runs. At the end of a whole sweep, keys that
were not in it lose their numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from tcpstuck_bpf import wire
from tcpstuck_bpf.model import FourTuple, Handshake, Row, Sweep, SweepPart

_HANDSHAKE_NUMBERS = len(Handshake._fields)
_ADDRESS_BYTES = 16


def integer(value: object) -> int:
    """Check for an unsigned 64-bit integer. Raises ValueError for anything else."""
    if type(value) is not int or not 0 <= value < 1 << 64:
        raise ValueError(f"{value!r} is not an unsigned 64-bit integer")
    return value


def integers(values: object, count: int) -> list[int]:
    """Check for a list of `count` such integers. Raises ValueError for anything else."""
    if not isinstance(values, list) or len(values) != count:
        raise ValueError(f"not a list of {count} integers")
    return [integer(value) for value in values]


def four_tuple_of(key: str) -> FourTuple:
    """Decode a struct handshake_key in hexadecimal. Raises ValueError for anything else."""
    data = bytes.fromhex(key)
    if len(data) != wire.KEY.size:
        raise ValueError("not a struct handshake_key")
    return wire.decode_key(data)


def address_of(text: str) -> bytes:
    """Decode an address in hexadecimal. Raises ValueError for anything else."""
    address = bytes.fromhex(text)
    if len(address) != _ADDRESS_BYTES:
        raise ValueError("not an address")
    return address


def handshake_of(values: object) -> Handshake:
    """Decode a struct handshake from a list. Raises ValueError for anything else.

    A recording of an earlier version may lack the last numbers: the socket, and the device before.
    """
    lacking = _HANDSHAKE_NUMBERS - len(values) if isinstance(values, list) else 0
    return Handshake(*integers(values, _HANDSHAKE_NUMBERS - (lacking if lacking in (1, 2) else 0)))


def runs_of(numbers: Iterable[int]) -> Iterator[list[int]]:
    """First and last number of each run of consecutive numbers; `numbers` is in ascending order."""
    first = last = None
    for number in numbers:
        if first is None or last is None or number != last + 1:
            if first is not None and last is not None:
                yield [first, last]
            first = number
        last = number
    if first is not None and last is not None:
        yield [first, last]


def numbers_of(runs: Iterable[list[int]], end: int) -> Iterator[int]:
    """The numbers in runs as `runs_of` writes them: ascending, and all below `end`.

    Raises ValueError for anything else, because a few bytes of overlapping runs could fill the
    memory.
    """
    least = 0
    for first, last in runs:
        if not least <= integer(first) <= integer(last) < end:
            raise ValueError(f"{first} to {last} is not a run of numbers from {least} on")
        yield from range(first, last + 1)
        least = last + 1


class RecordedTable:
    """The table according to the recording so far; the writer and the reader have the same one."""

    def __init__(self) -> None:
        self._numbers: dict[FourTuple, int] = {}
        self._rows: dict[int, Row] = {}
        self._next = 0
        self._swept: set[int] = set()

    def _put(self, row: Row) -> int:
        number = self._numbers.get(row.four_tuple)
        if number is None:
            number = self._numbers[row.four_tuple] = self._next
            self._next += 1
        self._rows[number] = row
        return number

    def _end(self, part: SweepPart, numbers: Iterable[int]) -> list[int]:
        """Note a batch's numbers. If it ends a sweep, free numbers that were not in the sweep."""
        if part is SweepPart.CHOSEN:
            return []
        self._swept.update(numbers)
        if part is SweepPart.MORE:
            return []
        gone = sorted(self._rows.keys() - self._swept)
        for number in gone:
            del self._numbers[self._rows.pop(number).four_tuple]
        self._swept.clear()
        return gone

    def values_of(self, sweep: Sweep) -> dict[str, Any]:
        """Encode a batch of rows."""
        changed, kept, held = [], [], []
        for row in sweep.rows:
            number = self._numbers.get(row.four_tuple)
            if number is not None and self._rows[number] == row:
                kept.append(number)
            else:
                changed.append([wire.encode_key(row.four_tuple).hex(), list(row.handshake)])
                held.append(self._put(row))
        self._end(sweep.part, [*kept, *held])
        return {
            "sweep": sweep.time_ns,
            "part": sweep.part.name.lower(),
            "rows": changed,
            "kept": list(runs_of(sorted(kept))),
        }

    def sweep_of(self, values: dict[str, Any]) -> Sweep:
        """Decode a batch of rows; unchanged rows come first.

        Raises KeyError, TypeError or ValueError where the values are damaged.
        """
        part = SweepPart[str(values["part"]).upper()]
        kept = list(numbers_of(values["kept"], self._next))
        rows = [self._rows[number] for number in kept]
        changed = [Row(four_tuple_of(key), handshake_of(entry)) for key, entry in values["rows"]]
        self._end(part, [*kept, *(self._put(row) for row in changed)])
        return Sweep(integer(values["sweep"]), (*rows, *changed), part)
