"""Where the parts of a picture are, and how its texts are wrapped. Pure. Lengths are in inches."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from tcpstuck_bpf.conversions.picture import MOST_LABELLED, Count, Lane, MarkKind, Picture
from tcpstuck_bpf.output.page import grouped

WIDTH = 12.0
RIGHT = 3.0
"""Room for the legends, right of the axes."""
MARGIN = 0.2
PANEL, PANEL_TITLE = 1.05, 0.38
LEGEND_ROW = 0.185
LEGEND_TITLE = 0.26
"""Room for a legend's title, above its rows."""
BETWEEN_LEGENDS = 0.15
TITLE_ROW, SUBTITLE_ROW, CAPTION_ROW = 0.22, 0.19, 0.17
LABEL_POINTS = 7.5
"""Size of the clients' labels, in points."""

_LEFT, _MOST_LEFT = 0.75, 3.8
_LANE, _DENSE_LANE = 0.19, 0.013
"""Height of a handshake, with a label and without."""
_HIGHEST_LANES = 9.0
_TIME_AXIS = 0.5
_INCHES_PER_LETTER = LABEL_POINTS * 0.64 / 72
_TITLE_COLUMNS, _SUBTITLE_COLUMNS, _CAPTION_COLUMNS = 124, 170, 205
_PANEL_COLUMNS = 130
_MOST_LINES = 6


class Layout(NamedTuple):
    """The places of the parts."""

    title: tuple[str, ...]
    subtitle: tuple[str, ...]
    caption: tuple[str, ...]
    left: float
    """Where the axes begin, from the left."""
    lanes_top: float
    """From the top, like the next ones."""
    lanes: float
    """Height of the axes with the handshakes."""
    panels_tops: tuple[float, ...]
    height: float
    """Height of the whole picture."""


def is_labelled(picture: Picture) -> bool:
    """Whether each handshake has a label."""
    return len(picture.lanes) <= MOST_LABELLED


def kinds_of(lanes: Sequence[Lane]) -> list[MarkKind]:
    """The kinds of packets in the picture, in the order of the legend."""
    present = {mark.kind for lane in lanes for mark in lane.marks}
    return [kind for kind in MarkKind if kind in present]


def layout(picture: Picture) -> Layout:
    """The layout of a picture."""
    title = _wrapped([picture.title], _TITLE_COLUMNS)
    subtitle = _wrapped(picture.subtitle, _SUBTITLE_COLUMNS)
    caption = _wrapped([" ".join(picture.caption)], _CAPTION_COLUMNS)
    lanes = _height_of_lanes(picture)
    lanes_top = MARGIN + len(title) * TITLE_ROW + len(subtitle) * SUBTITLE_ROW + 0.12
    below = lanes_top + lanes
    tops = tuple(
        below + number * (PANEL_TITLE + PANEL) + PANEL_TITLE
        for number in range(len(picture.panels))
    )
    bottom = tops[-1] + PANEL if tops else below
    longest = max((len(lane.label) for lane in picture.lanes), default=0)
    labels = 0.2 + longest * _INCHES_PER_LETTER if is_labelled(picture) else 0
    return Layout(
        title=title,
        subtitle=subtitle,
        caption=caption,
        left=min(max(_LEFT, labels), _MOST_LEFT),
        lanes_top=lanes_top,
        lanes=lanes,
        panels_tops=tops,
        height=bottom + _TIME_AXIS + len(caption) * CAPTION_ROW + MARGIN / 2,
    )


def _height_of_lanes(picture: Picture) -> float:
    number = len(picture.lanes)
    rows = len(picture.counts) + len(kinds_of(picture.lanes))
    legends = rows * LEGEND_ROW + 2 * LEGEND_TITLE + BETWEEN_LEGENDS
    dense = max(MOST_LABELLED * _LANE * 0.6, min(number * _DENSE_LANE, _HIGHEST_LANES))
    return max(legends, number * _LANE if is_labelled(picture) else dense)


def row_of(count: Count) -> str:
    """The row of a verdict in the legend."""
    row = f"{count.verdict or 'no verdict yet'}: {grouped(count.number)}"
    if count.last < count.number:
        row += f", at the end {grouped(count.last)}"
    return row if count.drawn else f"{row}, none drawn"


def shortened(text: str, columns: int = _PANEL_COLUMNS) -> str:
    """The text in one line."""
    return text if len(text) <= columns else f"{text[: columns - 4]} ..."


def _wrapped(sentences: Iterable[str], columns: int) -> tuple[str, ...]:
    lines = [line for one in sentences for line in textwrap.wrap(one, columns)]
    if len(lines) > _MOST_LINES:
        lines[_MOST_LINES - 1 :] = [shortened(" ".join(lines[_MOST_LINES - 1 :]), columns)]
    return tuple(lines)
