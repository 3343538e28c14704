"""Keeps symbols from overlapping: those of one line, and those of lines close together. Pure.

Lengths are in points.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

Point = tuple[float, float]

MOST_MOVED = 24.0
"""Greatest distance by which a symbol is moved."""


def side_by_side(places: Sequence[float], widths: Sequence[float]) -> list[float]:
    """The places of symbols on one line, in order; those that would overlap move to the right.

    A symbol without width shares its place with the next one.
    """
    found: list[float] = []
    reached = float("-inf")
    for place, width in zip(places, widths):
        moved = max(place, reached)
        if moved - place > MOST_MOVED:
            moved = place
        found.append(moved)
        reached = max(reached, moved + width)
    return found


class _Taken:
    """The points of chosen symbols, at least `gap` apart in one direction."""

    def __init__(self, gap: float) -> None:
        self._gap = gap
        self._cells: dict[tuple[int, int], list[Point]] = {}

    def _cell(self, point: Point) -> tuple[int, int]:
        return (int(point[0] // self._gap), int(point[1] // self._gap))

    def is_free(self, point: Point) -> bool:
        """Whether no chosen symbol is too near."""
        return not any(
            abs(point[0] - x) < self._gap and abs(point[1] - y) < self._gap
            for x, y in self._near(point)
        )

    def _near(self, point: Point) -> Iterator[Point]:
        column, row = self._cell(point)
        for x in (column - 1, column, column + 1):
            for y in (row - 1, row, row + 1):
                yield from self._cells.get((x, y), ())

    def add(self, point: Point) -> None:
        """Choose a symbol."""
        self._cells.setdefault(self._cell(point), []).append(point)


def chosen(groups: Sequence[Sequence[Point]], gap: float) -> list[list[bool]]:
    """Whether each symbol is drawn whole. Every group has one at least, whatever it overlaps.

    Groups share the room: rare symbols come first, and no group takes all of it.
    """
    everywhere = _Taken(gap)
    found: list[list[bool]] = [[] for _ in groups]
    for number in sorted(range(len(groups)), key=lambda one: (len(groups[one]), one)):
        own = _Taken(gap * len(groups))
        for point in groups[number]:
            whole = own.is_free(point) and everywhere.is_free(point)
            found[number].append(whole)
            if whole:
                own.add(point)
                everywhere.add(point)
        if found[number] and not any(found[number]):
            found[number][0] = True
            everywhere.add(groups[number][0])
    return found
