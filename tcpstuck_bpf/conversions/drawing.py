"""Draws a picture with matplotlib. No other module imports that library; it is optional.

Debian 12 has version 3.6. Nothing here needs a display: pyplot, which would look for one, is not
used. Neither a matplotlibrc nor the time matters, so that a picture always gives the same bytes.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from tcpstuck_bpf.conversions.layout import (
    BETWEEN_LEGENDS,
    CAPTION_ROW,
    LABEL_POINTS,
    LEGEND_ROW,
    LEGEND_TITLE,
    MARGIN,
    PANEL,
    RIGHT,
    SUBTITLE_ROW,
    TITLE_ROW,
    WIDTH,
    is_labelled,
    kinds_of,
    layout,
    row_of,
    shortened,
)
from tcpstuck_bpf.conversions.looks import BLACK, GREY, MARKS, VERDICTS, Look
from tcpstuck_bpf.conversions.picture import (
    Count,
    Lane,
    MarkKind,
    Panel,
    Picture,
    Reading,
)
from tcpstuck_bpf.conversions.symbols import chosen, side_by_side
from tcpstuck_bpf.errors import CannotTraceError

# It warns of a home without a place for its cache.
logging.getLogger("matplotlib").setLevel(logging.ERROR)
try:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.collections import LineCollection
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator
except ImportError as error:
    raise CannotTraceError(
        "--plot needs the Python module matplotlib",
        f"it cannot be imported: {error}",
        "apt install python3-matplotlib, or in a virtual environment: pip install matplotlib",
    ) from error

_METADATA: dict[str, dict[str, None]] = {
    "svg": {"Date": None},
    "pdf": {"CreationDate": None},
    "png": {},
}
"""By the form of the file: leaves the time of drawing out."""
_SETTINGS = {
    "svg.hashsalt": "tcpstuck-trace",
    "svg.fonttype": "none",
    "pdf.fonttype": 42,
}
_DOTS_PER_INCH = 120
_POINTS_PER_INCH = 72

# Lengths in points.
_TITLE, _TEXT, _SMALL = 11.0, 8.5, 7.5
_LINE, _STUCK_LINE = 1.0, 2.6
_PACKET, _VERDICT = 4.5, 7.5
_GAP = 9.0
"""Symbols of one kind that are closer together than this are drawn as dots."""
_DOT = 1.4
_BESIDE = 6.0
"""Least distance between two symbols of a line."""

_Place = tuple[float, int]
"""Time in seconds, and number of the line."""
_UNJUDGED = Look(GREY, "")


def drawn(picture: Picture, form: str) -> bytes:
    """The picture as a file of this form: svg, png or pdf."""
    with warnings.catch_warnings(), matplotlib.rc_context():
        warnings.simplefilter("ignore")  # a character that the font lacks is drawn as a box
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_SETTINGS)
        figure = _Drawing(picture).figure
        FigureCanvasAgg(figure)
        target = io.BytesIO()
        figure.savefig(target, format=form, dpi=_DOTS_PER_INCH, metadata=_METADATA[form])
    return target.getvalue()


def _plain(text: str) -> str:
    """The text as it is: matplotlib would take what is between two dollars for a formula."""
    return text.replace("$", r"\$")


def _seconds(time_ns: int) -> float:
    return time_ns / 1e9


def _look(verdict: str) -> Look:
    return VERDICTS.get(verdict, _UNJUDGED)


class _Drawing:
    """One figure."""

    def __init__(self, picture: Picture) -> None:
        self._picture = picture
        self._at = at = layout(picture)
        self.figure = Figure(figsize=(WIDTH, at.height))
        self._texts()
        lanes = self._axes(at.lanes_top, at.lanes)
        width = WIDTH - at.left - RIGHT
        _Lanes(picture, lanes, width * _POINTS_PER_INCH, at.lanes * _POINTS_PER_INCH).draw()
        self._legends()
        axes = [lanes]
        for panel, top in zip(picture.panels, at.panels_tops):
            axes.append(self._axes(top, PANEL))
            _draw_panel(panel, axes[-1], picture.end_ns)
        if picture.panels:
            rows = [
                Line2D([], [], label=name, **{**_QUEUE_LINE, **look})
                for name, look in _QUEUES.items()
            ]
            self._legend("queues: known lengths", rows, at.panels_tops[0] - LEGEND_TITLE / 2)
        for one in axes[:-1]:
            one.tick_params(labelbottom=False)
        axes[-1].set_xlabel("time since the first SYN (s)", fontsize=_TEXT)

    def _x(self, inches: float) -> float:
        return inches / WIDTH

    def _y(self, inches_from_top: float) -> float:
        return 1 - inches_from_top / self._at.height

    def _axes(self, top: float, height: float) -> Any:
        width = WIDTH - self._at.left - RIGHT
        place = (self._x(self._at.left), self._y(top + height), self._x(width))
        axes = self.figure.add_axes((*place, height / self._at.height))
        end = _seconds(self._picture.end_ns)
        axes.set_xlim(-0.012 * end, 1.03 * end)
        axes.tick_params(labelsize=_SMALL)
        axes.grid(axis="x", color="#E5E5E5", linewidth=0.6)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        return axes

    def _texts(self) -> None:
        y = MARGIN
        for line in self._at.title:
            self._text(MARGIN, y, line, va="top", fontsize=_TITLE, fontweight="bold")
            y += TITLE_ROW
        for line in self._at.subtitle:
            self._text(MARGIN, y, line, va="top", fontsize=_TEXT)
            y += SUBTITLE_ROW
        for number, line in enumerate(reversed(self._at.caption)):
            y = self._at.height - MARGIN / 2 - number * CAPTION_ROW
            self._text(MARGIN, y, line, fontsize=_SMALL, color="#333333")

    def _text(self, x: float, y: float, text: str, **look: Any) -> None:
        self.figure.text(self._x(x), self._y(y), _plain(text), **look)

    def _legends(self) -> None:
        top = self._at.lanes_top
        verdicts = [_verdict_row(count) for count in self._picture.counts]
        packets = [_packet_row(kind) for kind in kinds_of(self._picture.lanes)]
        for title, rows in (("verdicts: handshakes", verdicts), ("packets", packets)):
            if rows:
                self._legend(title, rows, top)
                top += LEGEND_TITLE + len(rows) * LEGEND_ROW + BETWEEN_LEGENDS

    def _legend(self, title: str, rows: Sequence[Any], top: float) -> None:
        left = WIDTH - RIGHT + 0.12
        self._text(left, top, title, fontsize=_TEXT, fontweight="bold", va="top")
        self.figure.legend(
            handles=rows,
            loc="upper left",
            bbox_to_anchor=(self._x(left), self._y(top + LEGEND_TITLE)),
            borderaxespad=0.0,
            borderpad=0.0,
            handlelength=2.6,
            labelspacing=(LEGEND_ROW * _POINTS_PER_INCH - _SMALL * 1.35) / _SMALL,
            frameon=False,
            fontsize=_SMALL,
        )


def _verdict_row(count: Count) -> Any:
    look = _look(count.verdict)
    return Line2D(
        [],
        [],
        color=look.colour if count.stuck else GREY,
        linewidth=_STUCK_LINE if count.stuck else _LINE,
        marker=look.shape,
        markerfacecolor=look.colour,
        markersize=_VERDICT,
        markeredgecolor=BLACK,
        markeredgewidth=0.5,
        label=row_of(count),
    )


def _packet_row(kind: MarkKind) -> Any:
    style = _of_packet(kind)
    return Line2D([], [], color=GREY, linewidth=_LINE, markersize=6.0, label=kind.value, **style)


def _of_packet(kind: MarkKind) -> dict[str, Any]:
    look = MARKS[kind]
    return {
        "marker": look.shape,
        "markerfacecolor": BLACK if look.filled else "white",
        "markeredgecolor": BLACK,
        "markeredgewidth": 0.9 if look.filled else 0.7,
    }


class _Lanes:
    """The handshakes, the first one on top."""

    def __init__(self, picture: Picture, axes: Any, width: float, height: float) -> None:
        self._picture = picture
        self._points_per_second = width / _seconds(picture.end_ns) / 1.042
        self._axes = axes
        self._labelled = is_labelled(picture)
        self._pitch = height / max(1, len(picture.lanes))
        """From one line to the next, in points."""

    def draw(self) -> None:
        """Draw them all."""
        lanes, axes = self._picture.lanes, self._axes
        room = max(0.7, _GAP / 2 / self._pitch)
        axes.set_ylim(len(lanes) + room, 1 - room)
        self._lines()
        self._all_symbols()
        if not lanes:
            axes.set_yticks([])
            axes.text(
                *(0.5, 0.5, "no handshake to draw"),
                transform=axes.transAxes,
                ha="center",
                color=GREY,
            )
        elif self._labelled:
            axes.set_yticks(range(1, len(lanes) + 1))
            axes.set_yticklabels([_plain(lane.label) for lane in lanes], fontsize=LABEL_POINTS)
            axes.tick_params(axis="y", length=0)
        else:
            axes.set_ylabel("handshakes, by their first SYN", fontsize=_TEXT)
            ticks = MaxNLocator(integer=True).tick_values(1, len(lanes))
            axes.set_yticks([tick for tick in ticks if 1 <= tick <= len(lanes)])

    def _numbered(self) -> Iterable[tuple[int, Lane]]:
        return enumerate(self._picture.lanes, 1)

    def _lines(self) -> None:
        lines: defaultdict[str, list[tuple[tuple[float, int], tuple[float, int]]]]
        lines = defaultdict(list)
        for y, lane in self._numbered():
            for begin_ns, end_ns, verdict in lane.spans:
                lines[verdict].append(((_seconds(begin_ns), y), (_seconds(end_ns), y)))
        for verdict, segments in sorted(lines.items()):
            widest = _STUCK_LINE if verdict else _LINE
            self._axes.add_collection(
                LineCollection(
                    segments,
                    colors=_look(verdict).colour,
                    linewidths=min(widest, (0.8 if verdict else 0.4) * self._pitch),
                    zorder=2 if verdict else 1.5,
                ),
                autolim=False,
            )
        if self._labelled:
            self._arrows()

    def _arrows(self) -> None:
        """Arrows at the right edge, where clients are still stuck."""
        for y, lane in self._numbered():
            if lane.goes_on and lane.spans:
                colour = _look(lane.spans[-1].verdict).colour
                x = _seconds(self._picture.end_ns)
                self._axes.plot([x], [y], ">", color=colour, markersize=4.5)

    def _symbols_of(self, y: int, lane: Lane) -> Iterator[tuple[MarkKind | str, _Place]]:
        """Each symbol of a line and its place; those that would overlap stand side by side."""
        things: list[tuple[int, int, MarkKind | str]] = [
            *((one.time_ns, 0, one.kind) for one in lane.marks),
            *((one.time_ns, 1, one.verdict) for one in lane.verdicts),
        ]
        things.sort(key=lambda thing: thing[:2])
        scale = self._points_per_second
        # The cookie goes out in answer to the SYN, at the same moment, below the line.
        widths = [0.0 if kind is MarkKind.SYN else _BESIDE for _, _, kind in things]
        places = side_by_side([_seconds(time_ns) * scale for time_ns, _, _ in things], widths)
        for (_, _, kind), place in zip(things, places):
            yield kind, (place / scale, y)

    def _all_symbols(self) -> None:
        points: defaultdict[MarkKind | str, list[_Place]] = defaultdict(list)
        for y, lane in self._numbered():
            for kind, place in self._symbols_of(y, lane):
                points[kind].append(place)
        names = sorted(kind for kind in points if isinstance(kind, str))
        for name, whole in zip(names, self._whole([points[name] for name in names])):
            look = _look(name)
            style = {"color": look.colour, "markeredgecolor": BLACK, "markeredgewidth": 0.5}
            zorder = 3 if self._labelled else 5
            self._symbols(points[name], whole, _VERDICT, {**style, "marker": look.shape}, zorder)
        for kind in kinds_of(self._picture.lanes):
            (whole,) = self._whole([points[kind]])
            style = {"color": BLACK, **_of_packet(kind)}
            self._symbols(points[kind], whole, _PACKET, style, 4)

    def _whole(self, groups: Sequence[Sequence[_Place]]) -> list[list[bool]]:
        """Whether each symbol is drawn whole, and not as a dot."""
        if self._labelled:
            return [[True] * len(group) for group in groups]
        return chosen(
            [[(x * self._points_per_second, y * self._pitch) for x, y in one] for one in groups],
            _GAP,
        )

    def _symbols(
        self,
        places: Sequence[_Place],
        whole: Sequence[bool],
        size: float,
        style: dict[str, Any],
        zorder: float,
    ) -> None:
        dot = {**style, "marker": "s", "markeredgewidth": 0}
        dot["markerfacecolor"] = style["color"]
        sizes = ((True, size, style, zorder), (False, min(_DOT, self._pitch), dot, zorder - 0.9))
        for wanted, points, how, order in sizes:
            some = [place for place, is_whole in zip(places, whole) if is_whole == wanted]
            xs, ys = [x for x, _ in some], [y for _, y in some]
            self._axes.plot(xs, ys, linestyle="", markersize=points, zorder=order, **how)


_MANY_READINGS = 120
_QUEUE_LINE = {"linewidth": 1.2}
_QUEUES: dict[str, dict[str, Any]] = {
    "accept queue": {"color": BLACK, "marker": "o", "markersize": 3.5, "zorder": 3},
    "SYN queue": {"color": GREY, "marker": "s", "markersize": 5.0, "markerfacecolor": "none"},
    "limit of both": {"color": BLACK, "linestyle": "--", "linewidth": 0.9},
}


def _draw_panel(panel: Panel, axes: Any, end_ns: int) -> None:
    """Draw the queues of a listener: dots are readings, lines only join them."""
    limit = _until(panel.limit, end_ns)
    for look, readings in zip(_QUEUES.values(), (panel.accept_queue, panel.syn_queue, limit)):
        many = {"markersize": 1.8} if len(readings) > _MANY_READINGS else {}
        xs = [_seconds(one.time_ns) for one in readings]
        ys = [one.entries for one in readings]
        steps = "steps-post" if readings is limit else "default"
        axes.plot(xs, ys, drawstyle=steps, **{**_QUEUE_LINE, **look, **many})
    every = [one.entries for one in (*panel.accept_queue, *panel.syn_queue, *panel.limit)]
    axes.set_ylim(0, max(1, 1.18 * max(every, default=1)))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
    axes.set_ylabel("entries", fontsize=_TEXT)
    axes.set_title(_plain(shortened(panel.title)), loc="left", fontsize=_TEXT)
    if not panel.accept_queue and not panel.syn_queue:
        axes.text(
            *(0.5, 0.5, "no length is known of this time"),
            transform=axes.transAxes,
            ha="center",
            va="center",
            color=GREY,
            fontsize=_TEXT,
        )


def _until(limits: Sequence[Reading], end_ns: int) -> list[Reading]:
    """The limits over the whole time."""
    if not limits:
        return []
    return [limits[0]._replace(time_ns=0), *limits[1:], Reading(end_ns, limits[-1].entries)]
